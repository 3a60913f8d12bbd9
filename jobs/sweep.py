#!/usr/bin/env python3
"""Try several budgets M on a release's levels, as a Ray Tune sweep: accuracy over memory, and the budget to recommend.

    uv run jobs/sweep.py                                         the release that jobs/split.py makes by default
    uv run jobs/sweep.py --release drn22-camvid --data.path CAMVID --budgets 0.1% 0.2% 127256B
    ray job submit --working-dir . jobs/sweep.py                 on a running cluster

Publishes the release under the recommended budget with the tag `recommended`. Run again, it continues where it stopped.
Exit codes:
    0  every budget was evaluated
    1  a part failed; the table has the rest
    2  invalid configuration: the job prints the reason; nothing was trained and the store is unchanged
"""

import sys
from pathlib import Path

# in a submitted job the package is not installed: it is in the working directory
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gearnn_ray.cli.main import run_sweep

if __name__ == "__main__":
    sys.exit(run_sweep(sys.argv[1:]))
