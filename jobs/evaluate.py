#!/usr/bin/env python3
"""Evaluate every method at every level of a release on the same images, as a Ray job: tables and a report that opens offline.

    uv run jobs/evaluate.py                                      the release that jobs/split.py makes by default
    uv run jobs/evaluate.py --release drn22-camvid-jpeg --data.path CAMVID --seeds 3
    ray job submit --working-dir . jobs/evaluate.py              on a running cluster

Run again, it continues where it stopped. Exit codes:
    0  everything was evaluated
    1  a part failed; the report has the rest
    2  invalid configuration: the job prints the reason; nothing was trained and the store is unchanged
"""

import sys
from pathlib import Path

# in a submitted job the package is not installed: it is in the working directory
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gearnn_ray.cli.main import run_evaluate

if __name__ == "__main__":
    sys.exit(run_evaluate(sys.argv[1:]))
