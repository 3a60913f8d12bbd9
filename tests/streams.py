"""Real video for tests: clips encoded in memory, and servers on loopback that send them as cameras and web sites do."""

import base64
import contextlib
import functools
import http.server
import io
import itertools
import os
import socket
import socketserver
import threading
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]


def moving(frames: int = 12, height: int = 48, width: int = 64, seed: int = 0) -> list[Pixels]:
    """Blocks of colour that move two pixels a frame; the top left block shows the frame's number as its grey."""
    wide = np.random.default_rng(seed).integers(40, 216, (height // 8 + 1, (width + 2 * frames) // 8 + 1, 3), np.uint8)
    wide = wide.repeat(8, 0).repeat(8, 1)
    shown = [wide[:height, 2 * number : 2 * number + width].copy() for number in range(frames)]
    for number, frame in enumerate(shown):
        frame[:16, :16] = number_grey(number)
    return shown


def number_grey(number: int) -> int:
    """The grey of a frame's number, which survives compression."""
    return 16 + 8 * (number % 28)


def number_of(pixels: Pixels) -> int:
    """The number (0 to 27) that a decoded frame of `moving` shows."""
    height, width = pixels.shape[0] // 6, pixels.shape[1] // 8
    return round((float(pixels[: max(height, 4), : max(width, 4)].mean()) - 16) / 8)


def encoded(
    frames: Sequence[Pixels],
    codec: str = "libx264",
    container: str = "mp4",
    rate: int = 10,
    start: int = 0,
    times: Sequence[int] | None = None,
    muxing: dict[str, str] | None = None,
    **options: object,
) -> bytes:
    """Frames as a file. times: of each frame, in units of 1 / rate. options: of the encoder; `g=5` becomes "g": "5"."""
    file = io.BytesIO()
    with own_priority(), av.open(file, "w", format=container, options=muxing or {}) as output:
        add(output, frames, codec, rate, start, times, **options)
    return file.getvalue()


@contextlib.contextmanager
def own_priority() -> Iterator[None]:
    """Undoes what SVT-AV1 does to a superuser: a thread that encodes gets real-time priority for ever, which all that it starts
    later inherits, so that one test in an endless loop would stop the machine.
    """
    policy, priority = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, priority)


def add(
    output: Any,
    frames: Sequence[Pixels],
    codec: str,
    rate: int,
    start: int = 0,
    times: Sequence[int] | None = None,
    **options: object,
) -> None:
    """Add frames to an open file as a video stream of its own."""
    usual = {"libx264": {"preset": "ultrafast"}, "libx265": {"preset": "ultrafast", "x265-params": "log-level=none"}}
    usual |= {"libsvtav1": {"preset": "8", "crf": "10"}, "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"}}
    video = output.add_stream(codec, rate=rate, options={**usual.get(codec, {}), **{k: str(v) for k, v in options.items()}})
    video.height, video.width, _ = frames[0].shape
    video.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    video.codec_context.thread_count = 1
    for number, pixels in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frame.pts, frame.time_base = start + (times[number] if times else number), Fraction(1, rate)
        for packet in video.encode(frame):
            output.mux(packet)
    for packet in video.encode(None):
        output.mux(packet)


def transport_stream(shots: Sequence[Sequence[Pixels]], rate: int = 10, **options: object) -> bytes:
    """Several shots, each encoded on its own and possibly of another size, one after the other in one MPEG transport stream."""
    starts = itertools.accumulate((len(shot) for shot in shots), initial=0)
    return b"".join(
        encoded(shot, container="mpegts", rate=rate, start=start, **options) for shot, start in zip(shots, starts, strict=False)
    )


@contextlib.contextmanager
def web_site(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """A folder over HTTP with range requests: its address, and the paths that were asked for."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            path = Path(self.translate_path(self.path))
            if not path.is_file():
                self.send_error(404)
                return
            data, wanted = path.read_bytes(), self.headers.get("range")
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
            if start and start >= len(data):
                self.send_error(416)
                return
            self.send_response(206 if wanted else 200)
            self.send_header("accept-ranges", "bytes")
            self.send_header("content-length", str(len(data) - start))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(data[start:])

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


class Camera:
    """An RTSP camera on loopback that sends H.264 or H.265 over TCP (RFC 2326, 6184, 7798), as often as it is asked.

    `stop` ends its connections and its door, as a camera does whose power fails; `start` opens it again at the same address.
    """

    def __init__(self, packets: Sequence[bytes], seconds_per_frame: float = 0.0, codec: str = "H264") -> None:
        """packets: access units in Annex B, the first with its parameter sets. codec: H264 or H265."""
        self.packets, self.pause, self.codec = packets, seconds_per_frame, codec
        self.port = 0
        self._server: socketserver.ThreadingTCPServer | None = None
        self._connections: list[socket.socket] = []

    @property
    def url(self) -> str:
        return f"rtsp://127.0.0.1:{self.port}/camera"

    def start(self) -> "Camera":
        camera = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                camera._connections.append(self.connection)
                with contextlib.suppress(OSError, ValueError):
                    _session(self.rfile, self.wfile, camera)

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = daemon_threads = True

            def handle_error(self, *_: object) -> None: ...

        self._server = Server(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def stop(self) -> None:
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._connections.clear()

    def __enter__(self) -> "Camera":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def access_units(frames: Sequence[Pixels], codec: str = "libx264", **options: object) -> list[bytes]:
    """Frames as access units without reordering; every keyframe has its parameter sets."""
    encoder: Any = av.CodecContext.create(codec, "w")
    encoder.height, encoder.width, _ = frames[0].shape
    encoder.pix_fmt, encoder.framerate, encoder.time_base = "yuv420p", Fraction(10), Fraction(1, 10)
    encoder.thread_count = 1
    quiet = {"x265-params": "log-level=none:repeat-headers=1"} if codec == "libx265" else {}
    encoder.options = {"preset": "ultrafast", "tune": "zerolatency", "g": "5", **quiet, **{k: str(v) for k, v in options.items()}}
    units = []
    for number, pixels in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frame.pts = number
        units += [bytes(packet) for packet in encoder.encode(frame)]
    return units + [bytes(packet) for packet in encoder.encode(None)]


def _units(packet: bytes) -> list[bytes]:
    """The NAL units of an access unit in Annex B."""
    parts = packet.replace(b"\0\0\0\1", b"\0\0\1").split(b"\0\0\1")
    return [part for part in parts if part]


def _session(requests: Any, answers: Any, camera: Camera) -> None:
    """One RTSP connection: describe, set up, and send everything once it is played."""
    first = _units(camera.packets[0])
    sets = ",".join(base64.b64encode(unit).decode() for unit in first if unit[0] & 31 in (7, 8) and camera.codec == "H264")
    sdp = "\r\n".join(
        ["v=0", "o=- 0 0 IN IP4 127.0.0.1", "s=test", "t=0 0", "m=video 0 RTP/AVP 96", "c=IN IP4 127.0.0.1",
         f"a=rtpmap:96 {camera.codec}/90000", *([f"a=fmtp:96 packetization-mode=1;sprop-parameter-sets={sets}"] if sets else []),
         "a=control:track", ""]
    )  # fmt: skip
    while line := requests.readline().decode():
        if not line.strip():
            continue
        method, headers = line.split()[0], {}
        while (header := requests.readline().decode()).strip():
            name, _, value = header.partition(":")
            headers[name.lower()] = value.strip()
        said = {"OPTIONS": "Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN", "PLAY": "Session: 1\r\nRange: npt=0-"}
        said |= {"SETUP": f"Session: 1\r\nTransport: {headers.get('transport', '')}", "TEARDOWN": "Session: 1"}
        body = sdp if method == "DESCRIBE" else ""
        about = (
            f"Content-Type: application/sdp\r\nContent-Base: {camera.url}/\r\nContent-Length: {len(body)}"
            if body
            else said[method]
        )
        answers.write(f"RTSP/1.0 200 OK\r\nCSeq: {headers['cseq']}\r\n{about}\r\n\r\n{body}".encode())
        answers.flush()
        if method == "PLAY":
            _play(answers, camera)
            return
        if method == "TEARDOWN":
            return


def _play(answers: Any, camera: Camera) -> None:
    sequence = 0
    for number, packet in enumerate(camera.packets):
        units = _units(packet)
        for position, unit in enumerate(units):
            for payload, ends in _payloads(unit, camera.codec):
                marker = 0x80 if ends and position == len(units) - 1 else 0
                stamp = (number * 9000) & 0xFFFFFFFF
                rtp = bytes([0x80, 96 | marker]) + (sequence & 0xFFFF).to_bytes(2) + stamp.to_bytes(4) + b"\0\0\0\1" + payload
                answers.write(b"$\0" + len(rtp).to_bytes(2) + rtp)
                sequence += 1
        answers.flush()
        threading.Event().wait(camera.pause)


def _payloads(unit: bytes, codec: str, most: int = 1200) -> Iterator[tuple[bytes, bool]]:
    """A NAL unit as RTP payloads: itself, or fragments (FU-A; FU)."""
    if len(unit) <= most:
        yield unit, True
        return
    if codec == "H264":
        header, kind, rest = bytes([(unit[0] & 0xE0) | 28]), unit[0] & 31, unit[1:]
    else:
        header, kind, rest = bytes([(unit[0] & 0x81) | 49 << 1, unit[1]]), unit[0] >> 1 & 63, unit[2:]
    for start in range(0, len(rest), most):
        last = start + most >= len(rest)
        flags = (0x80 if start == 0 else 0) | (0x40 if last else 0)
        yield header + bytes([flags | kind]) + rest[start : start + most], last
