#!/usr/bin/env python3
"""Serve releases of a store over HTTP with Ray Serve, every frame with the network of its own distortion level.

    uv run jobs/serve.py                                         the release that jobs/split.py makes by default
    uv run jobs/serve.py --store s3://bucket/artifacts --bundles drn22-camvid-jpeg:recommended
    ray job submit --working-dir . jobs/serve.py                 on a running cluster

Runs until Ctrl-C or SIGTERM and then exits 0; 1 when its Ray Serve ended first, 2 when what it was told is wrong.
"""

import sys
from pathlib import Path

# where only the working directory was shipped, the package is not installed but lies next door
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gearnn_ray.cli.main import run_serve

if __name__ == "__main__":
    sys.exit(run_serve(sys.argv[1:]))
