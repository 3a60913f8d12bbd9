#!/usr/bin/env python3
"""Every method at every level of a release, judged on the same images as a Ray job: tables and a report that opens offline.

    uv run jobs/evaluate.py                                      the release that jobs/split.py makes by default
    uv run jobs/evaluate.py --release drn22-camvid-jpeg --data.path CAMVID --seeds 3
    ray job submit --working-dir . jobs/evaluate.py              on a running cluster

Exits 0 when everything is judged, 1 when something failed (the rest is reported), 2 when what it was told is wrong. Run
again, it goes on where it stopped.
"""

import sys
from pathlib import Path

# where only the working directory was shipped, the package is not installed but lies next door
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gearnn_ray.cli.main import run_evaluate

if __name__ == "__main__":
    sys.exit(run_evaluate(sys.argv[1:]))
