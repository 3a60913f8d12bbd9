#!/usr/bin/env python3
"""Steer a camera's knobs by the network's gradient (OneAdapt), and compare it with every rival over the same video.

    uv run jobs/adapt.py                                         generated streets, on the release of jobs/split.py --preset video
    uv run jobs/adapt.py street.mp4 --release drn22-camvid --knobs crf=18,28,38 size=1,0.5 --segments 60
    uv run jobs/adapt.py FRAMES --labels LABELS --release drn22-camvid
    ray job submit --working-dir . jobs/adapt.py                 on a running cluster

Run again, it continues where it stopped. Exit codes:
    0  every segment was computed
    1  a segment failed; table and page have the rest
    2  invalid configuration: the job prints the reason; nothing was computed and the store is unchanged
"""

import sys
from pathlib import Path

# in a submitted job the package is not installed: it is in the working directory
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gearnn_ray.cli.main import run_adapt

if __name__ == "__main__":
    sys.exit(run_adapt(sys.argv[1:]))
