#!/usr/bin/env python3
"""Several budgets M on a release's levels as a Ray Tune sweep: accuracy over memory, and the budget worth its bytes.

    uv run jobs/sweep.py                                         the release that jobs/split.py makes by default
    uv run jobs/sweep.py --release drn22-camvid --data.path CAMVID --budgets 0.1% 0.2% 127256B
    ray job submit --working-dir . jobs/sweep.py                 on a running cluster

Publishes the release under the recommended budget with the tag `recommended`. Exits 0 when every budget is judged, 1 when
something failed (the rest is reported), 2 when what it was told is wrong. Run again, it goes on where it stopped.
"""

import sys
from pathlib import Path

# where only the working directory was shipped, the package is not installed but lies next door
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gearnn_ray.cli.main import run_sweep

if __name__ == "__main__":
    sys.exit(run_sweep(sys.argv[1:]))
