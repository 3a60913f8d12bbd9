"""A proxy on loopback before an S3 server: it fails as networks and servers do."""

import http.client
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Fault = Literal["none", "503", "reset", "hang", "truncate", "lose reply", "stale listing"]
"""503: the answer SlowDown. reset: the connection ends before an answer. hang: no answer until the proxy is closed. truncate:
half of the body. lose reply: the request reaches the server, and its answer nobody. stale listing: a listing is the last one that
was answered without this fault.
"""


@contextmanager
def s3_server(bucket: str) -> Iterator[str]:
    """An S3 server (moto's) with this bucket, at host:port."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket=bucket)
    yield f"{host}:{port}"
    server.stop()


@dataclass
class FaultyS3:
    """fault: which fault a request has, by its method and path. requests: all that came, as "METHOD /path?query"."""

    address: str
    fault: Callable[[str, str], Fault] = lambda method, path: "none"
    requests: list[str] = field(default_factory=list)

    def fail(self, fault: Fault, times: int, *methods: str) -> None:
        """Give the next `times` requests of these methods (by default all) the fault."""
        left = [times]

        def decide(method: str, path: str) -> Fault:
            del path
            if left[0] and (not methods or method in methods):
                left[0] -= 1
                return fault
            return "none"

        self.fault = decide


@contextmanager
def faulty_s3(server: str) -> Iterator[FaultyS3]:
    """A proxy before the server at host:port."""
    closing, listings = threading.Event(), dict[str, bytes]()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one_request(self) -> None:
            with suppress(ConnectionError):
                super().handle_one_request()

        def _forward(self) -> None:
            body = self._body()
            proxy.requests.append(f"{self.command} {self.path}")
            fault = proxy.fault(self.command, self.path)
            if fault == "hang":
                closing.wait()
            if fault in ("hang", "reset"):
                self.close_connection = True
                return
            if fault == "503":
                self._answer(503, {"Content-Type": "application/xml"}, b"<Error><Code>SlowDown</Code></Error>")
                return
            connection = http.client.HTTPConnection(server, timeout=30)
            connection.request(self.command, self.path, body, dict(self.headers))
            reply = connection.getresponse()
            data = reply.read()
            connection.close()
            if self.command == "GET" and "list-type=2" in self.path:
                if fault == "stale listing":
                    data = listings.get(self.path, data)
                else:
                    listings[self.path] = data
            if fault == "lose reply":
                self.close_connection = True
                return
            cut = len(data) // 2 if fault == "truncate" else len(data)
            self._answer(reply.status, dict(reply.headers), data, cut)

        def _body(self) -> bytes:
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                del self.headers["Transfer-Encoding"]
                parts = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                while self.rfile.readline().strip():
                    pass
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def _answer(self, status: int, headers: dict[str, str], data: bytes, cut: int | None = None) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                    self.send_header(name, value)
            length = headers.get("Content-Length", len(data)) if self.command == "HEAD" else len(data)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data[:cut])
            self.close_connection = cut is not None and cut < len(data)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _forward  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as listening:
        proxy = FaultyS3(f"127.0.0.1:{listening.server_port}")
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            closing.set()
            listening.shutdown()
            thread.join()
