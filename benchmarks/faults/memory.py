"""The most memory that this process holds while it does something, C libraries included."""

import re
from pathlib import Path


def peak_reset() -> int:
    """Forget the peak so far; the bytes that the process holds now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_since(held: int) -> int:
    """The peak since `peak_reset`, beyond what it returned, in bytes."""
    return max(0, _status("VmHWM") - held)


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, f"this system says nothing about {name}"
    return int(found[1]) * 1024
