"""A release to measure with where none is at hand: DRN-D-22 with untrained weights, and adaptors of the true size and layers."""

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

from gearnn_ray import Release, Store, build_model, model_size
from gearnn_ray.models.layers import layers_of, network_state, tensors_of

CLASSES = 11
JPEG = tuple(f"jpeg-{quality}" for quality in range(10, 101, 10))
SHARE = 0.002  # of the network: the paper's budget


def made_up(levels: Sequence[str]) -> Release:
    """`clean` and these levels, each with other values for the same layers: the smallest that fit 0.2%, all BatchNorm among them.

    The costliest choice there is for a mixed batch: the first two convolutions, at the image's full size, are in it.
    """
    torch.manual_seed(0)
    model = build_model("drn_d_22", CLASSES)
    base, budget = network_state(model), int(SHARE * model_size(model))
    layers, chosen = layers_of(model), set[str]()
    for layer in sorted(layers, key=lambda layer: layer.numel):
        if sum(each.numel for each in layers if each.name in chosen) + layer.numel <= budget:
            chosen.add(layer.name)
    names = tensors_of(layers, chosen)
    adaptors = {level: {name: _moved(base[name]) for name in names} for level in levels}
    manifest = {
        "name": "made-up",
        "model": {
            "name": "drn_d_22",
            "num_classes": CLASSES,
            "normalisation": {"mean": [0.41, 0.42, 0.43], "std": [0.3, 0.31, 0.31]},
        },
        "levels": {level: {} for level in levels},
    }
    return Release(manifest, "sha256:" + "0" * 64, base, {"clean": {}, **adaptors})


def _moved(tensor: Tensor) -> Tensor:
    return tensor * (1 + 0.1 * torch.rand_like(tensor))  # a variance stays positive


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--store", help="measure with a release of this store in place of a made-up one")
    parser.add_argument("--release", help="name:tag")


def from_options(arguments: argparse.Namespace) -> Release:
    return Store(arguments.store).pull(arguments.release) if arguments.store else made_up(JPEG[:9])
