#!/usr/bin/env python3
"""Read everything that a tag of a store leads to, and every stage record, and say what is wrong.

    uv run jobs/verify.py                                        the store `artifacts`
    uv run jobs/verify.py --store s3://bucket/artifacts

Changes nothing. Exit codes:
    0  everything is as it was published
    1  something is wrong: a sentence for each
    2  invalid configuration, or a store that cannot be read: the job prints the reason
"""

import sys
from pathlib import Path

# in a submitted job the package is not installed: it is in the working directory
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gearnn_ray.cli.main import run_verify

if __name__ == "__main__":
    sys.exit(run_verify(sys.argv[1:]))
