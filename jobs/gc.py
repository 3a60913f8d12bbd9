#!/usr/bin/env python3
"""Delete what no tag of a store leads to and nobody has used for a while, and images in the cache that nobody needs.

    uv run jobs/gc.py                                            lists what would go from the store `artifacts`
    uv run jobs/gc.py --delete --grace 14                        deletes what nobody has used for 14 days
    uv run jobs/gc.py --store s3://bucket/artifacts --delete --data.max-gib 10

Exit codes:
    0  everything that should go is listed, or deleted
    2  invalid configuration, or a tag that cannot be read: the job prints the reason and nothing was deleted
"""

import sys
from pathlib import Path

# in a submitted job the package is not installed: it is in the working directory
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gearnn_ray.cli.main import run_gc

if __name__ == "__main__":
    sys.exit(run_gc(sys.argv[1:]))
