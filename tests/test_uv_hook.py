"""Under `uv run` Ray's workers use the present environment, whichever of Ray and this package is imported first."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

ASK = "import ray._private.ray_constants as c; print(c.RAY_ENABLE_UV_RUN_RUNTIME_ENV)"


@pytest.mark.parametrize("first", ["import gearnn_ray; import ray", "import ray; import gearnn_ray"])
@pytest.mark.parametrize(("given", "on"), [(None, "False"), ("1", "True")])
def test_ray_builds_no_second_environment_unless_the_variable_is_1(first: str, given: str | None, on: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ENABLE_UV_RUN_RUNTIME_ENV"}
    environment |= {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": given} if given else {}
    done = subprocess.run([sys.executable, "-c", f"{first}; {ASK}"], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"{on}\n", done.stderr
