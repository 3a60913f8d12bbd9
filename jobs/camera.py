#!/usr/bin/env python3
"""Be a camera whose encoder the service steers (OneAdapt): post segments, and encode the next ones with the knobs in the answers.

    uv run jobs/serve.py --bundles centre-video:latest           the service
    uv run jobs/camera.py                                        a minute of generated streets
    uv run jobs/camera.py street.mp4 --server http://10.0.0.7:8000 --link 500k
    uv run jobs/camera.py /dev/video0 --server http://10.0.0.7:8000 --knobs crf=18,28,38 size=1,0.5 --ceiling 300k

Exit codes:
    0  the video has ended, or Ctrl-C or SIGTERM ended it, and segments were answered
    1  no segment was answered, or the source failed after its first segment
    2  invalid configuration, or no video: the job prints the reason
"""

import sys
from pathlib import Path

# in a submitted job the package is not installed: it is in the working directory
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gearnn_ray.cli.main import run_camera

if __name__ == "__main__":
    sys.exit(run_camera(sys.argv[1:]))
