"""All the checks behind one command, the quick ones first: `uv run tests/check.py [arguments for pytest]`.

It knows nothing about the project: each tool reads its own settings from `pyproject.toml`.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

CHECKS = (
    ("ruff", "check", "."),
    ("ruff", "format", "--check", "."),
    ("mypy",),
    ("pytest", *sys.argv[1:]),
)

for check in CHECKS:
    print("$", *check, flush=True)
    if code := subprocess.run([sys.executable, "-m", *check], cwd=ROOT).returncode:
        # A negative code is the signal that ended the tool; exit codes stop at 255.
        sys.exit(code if code > 0 else 1)
