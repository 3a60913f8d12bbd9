#!/usr/bin/env python3
"""GearNN's Algorithm 1 as a Ray job: fine-tune per level, select, fine-tune partially, publish the adaptors.

    uv run jobs/split.py                                         generated scenes, four JPEG levels
    uv run jobs/split.py --config FILE --levels jpeg-10 jpeg-30
    ray job submit --working-dir . jobs/split.py                 on a running cluster

Exit codes:
    0  every level was published
    1  a level failed; the others were published with the tag `partial`
    2  invalid configuration: the job prints the reason; nothing was trained and the store is unchanged
"""

import sys
from pathlib import Path

# in a submitted job the package is not installed: it is in the working directory
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gearnn_ray.cli.main import run_split

if __name__ == "__main__":
    sys.exit(run_split(sys.argv[1:]))
