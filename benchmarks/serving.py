"""`jobs/serve.py` as a process of its own on loopback, for benchmarks that send requests."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def service(*options: str) -> Iterator[int]:
    """The port of a service with these options, for as long as the context lasts."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "jobs" / "serve.py"), "--port", str(port), "--json", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ})
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, "the service did not start"
        assert json.loads(line)["event"] == "serving"
        yield port
    finally:
        process.terminate()
        process.wait(120)
