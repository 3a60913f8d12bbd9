#!/usr/bin/env python3
"""GearNN's Algorithm 1 as a Ray job: fine-tune per level, select, fine-tune partially, publish the adaptors.

    uv run jobs/split.py                                         generated scenes, four JPEG levels
    uv run jobs/split.py --config FILE --levels jpeg-10 jpeg-30
    ray job submit --working-dir . jobs/split.py                 on a running cluster

Exits 0 when every level is published, 1 when a level failed (the others are published), 2 when what it was told is wrong.
"""

import sys
from pathlib import Path

# where only the working directory was shipped, the package is not installed but lies next door
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gearnn_ray.cli.main import run_split

if __name__ == "__main__":
    sys.exit(run_split(sys.argv[1:]))
