#!/usr/bin/env python3
"""Take a video through the adaptive network: every frame with the network of its own distortion level.

    uv run jobs/watch.py                                         a minute of generated streets, on the release of jobs/split.py
    uv run jobs/watch.py street.mp4 --ndjson street.ndjson --mp4 seen.mp4 --compare
    uv run jobs/watch.py rtsp://camera/stream --release drn22-camvid:latest --port 8001

Exit codes:
    0  the video has ended, or Ctrl-C or SIGTERM ended it
    1  the source failed after its first frame
    2  invalid configuration, or no video: the job prints the reason
"""

import sys
from pathlib import Path

# in a submitted job the package is not installed: it is in the working directory
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gearnn_ray.cli.main import run_watch

if __name__ == "__main__":
    sys.exit(run_watch(sys.argv[1:]))
