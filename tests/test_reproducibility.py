"""The conditions of docs/architecture.md ("When digests are equal"): what decides the bits of a fine-tune, and what does not."""

import os
import subprocess
import sys

import pytest
import torch

from gearnn_ray.offline.records import VERSIONED, installed_versions
from tests.conftest import ROOT

FINE_TUNE = """
import hashlib
import numpy as np, torch
from gearnn_ray.config.recipe import Recipe
from gearnn_ray.models.layers import network_state
from gearnn_ray.models.registry import build_model
from gearnn_ray.store.states import encode_state
from gearnn_ray.training.precision import prepare_process
from gearnn_ray.training.trainer import fine_tune
from tests.conftest import NORMALISATION, SEGMENTATION

prepare_process(2)
torch.manual_seed(0)
model = build_model("tests.nets:small", 3)
rng = np.random.default_rng(0)
images = [rng.integers(0, 256, (64, 96, 3), dtype=np.uint8) for _ in range(8)]
labels = [rng.integers(0, 3, (64, 96), dtype=np.uint8) for _ in range(8)]
recipe = Recipe(epochs=2, batch_size=4, crop=48, learning_rate=0.05)
fine_tune(SEGMENTATION, model, images, labels, recipe, NORMALISATION, "float32", chosen=None, seed=0)
print(hashlib.sha256(encode_state(network_state(model))).hexdigest())
"""


def digest(**environment: str) -> str:
    """The digest of the weights after a fine-tune in a process of its own."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, "-c", FINE_TUNE], capture_output=True, text=True, timeout=200, cwd=ROOT, env=variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


@pytest.fixture(scope="module")
def reference() -> str:
    return digest()


def test_another_process_ends_with_the_same_bits_whatever_threads_and_hashes_its_environment_names(reference: str) -> None:
    other = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONHASHSEED": "7", "OMP_WAIT_POLICY": "ACTIVE"}
    assert digest(**other) == reference


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="this processor has no vector instructions")
def test_a_processor_without_vector_instructions_ends_with_other_bits(reference: str) -> None:
    """No key says so: processors of one kind are a condition that the user must see to."""
    assert digest(ATEN_CPU_CAPABILITY="default", ONEDNN_MAX_CPU_ISA="SSE41") != reference


def test_every_record_names_the_packages_that_decide_its_bits() -> None:
    assert set(installed_versions()) == set(VERSIONED) == {"torch", "torchvision", "numpy", "pillow", "av", "ortools"}
