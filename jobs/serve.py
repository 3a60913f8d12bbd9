#!/usr/bin/env python3
"""Serve releases over HTTP with Ray Serve; each frame is answered by the network of its own distortion level.

    uv run jobs/serve.py                                         the release that jobs/split.py makes by default
    uv run jobs/serve.py --store s3://bucket/artifacts --bundles drn22-camvid-jpeg:recommended
    ray job submit --working-dir . jobs/serve.py                 on a running cluster

Exit codes:
    0  ended by Ctrl-C or SIGTERM
    1  another program ended Ray Serve
    2  invalid configuration: the job prints the reason
"""

import sys
from pathlib import Path

# in a submitted job the package is not installed: it is in the working directory
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gearnn_ray.cli.main import run_serve

if __name__ == "__main__":
    sys.exit(run_serve(sys.argv[1:]))
