#!/usr/bin/env python3
"""Say what this machine is good for, and what is wrong: processor, precision, memory, GPU, versions, ports, store, cache, clock.

    uv run jobs/doctor.py                                        the store `artifacts`
    uv run jobs/doctor.py --store s3://bucket/artifacts
    ray job submit --working-dir . jobs/doctor.py                the head of a running cluster

Starts no Ray, and leaves the store unchanged. Exit codes:
    0  nothing is wrong
    1  something is wrong: a sentence says what
    2  invalid configuration: the job prints the reason
"""

import sys
from pathlib import Path

# in a submitted job the package is not installed: it is in the working directory
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gearnn_ray.cli.main import run_doctor

if __name__ == "__main__":
    sys.exit(run_doctor(sys.argv[1:]))
