"""All the checks behind one command, the quick ones first: `uv run tests/check.py [arguments for pytest]`.

It knows nothing about the project but that its tests come in kinds: each tool reads its own settings from
`pyproject.toml`.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
# where it is set, each of the hundreds of processes compiles torch and Ray again, which doubles the time of the suite
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def start(*check: str, out: IO[str] | None = None) -> "subprocess.Popen[str]":
    print("$", *check, flush=True)
    command = [sys.executable, "-m", *check]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=out, stderr=out and subprocess.STDOUT)


def ended(check: "subprocess.Popen[str]") -> int:
    # A negative code is the signal that ended the tool; exit codes stop at 255.
    code = check.wait()
    return code if code >= 0 else 1


for check in (("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",)):
    if code := ended(start(*check)):
        sys.exit(code)
if arguments := sys.argv[1:]:
    sys.exit(ended(start("pytest", *arguments)))
# Tests on a Ray wait for processes much of the time, which the others fill, also those with a Ray of their own.
with tempfile.TemporaryFile("w+") as said:
    others = start("pytest", "-m", "not ray and not slow", out=said)
    codes = [ended(start("pytest", "-m", "ray and not slow")), ended(others)]
    said.seek(0)
    print("$ pytest -m not ray and not slow (beside it)", said.read(), sep="\n", end="", flush=True)
sys.exit(max(codes))
