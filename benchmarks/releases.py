"""Synthetic releases for measurements: DRN-D-22 with untrained weights and adaptors like real ones, or of any tensors."""

import argparse
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gearnn_ray import Release, Store, build_model, model_size
from gearnn_ray.models.layers import layers_of, network_state, tensors_of
from gearnn_ray.store.manifest import Manifest

CLASSES = 11
JPEG = tuple(f"jpeg-{quality}" for quality in range(10, 101, 10))
SHARE = 0.002  # of the network: the paper's budget


def made_up(levels: Sequence[str]) -> Release:
    """`clean` and these levels, each with its own values for the same layers: the smallest that fit 0.2%, with all BatchNorm.

    This is the costliest choice for a mixed batch: it has the first two convolutions, which run at the image's full size.
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
    return in_memory("drn_d_22", CLASSES, "segmentation", base, adaptors)


def in_memory(
    network: str, classes: int, task: str, base: Mapping[str, Tensor], adaptors: Mapping[str, Mapping[str, Tensor]]
) -> Release:
    """A release of these tensors that is in no store. adaptors: by level, `clean` apart."""
    digests = {level: f"sha256:{number:064x}" for number, level in enumerate(adaptors, 1)}
    nothing = {"digest": None, "bytes": 0, "floats": 0, "layers": [], "scores": {}}
    floats = {level: sum(tensor.numel() for tensor in adaptor.values()) for level, adaptor in adaptors.items()}
    entries = {
        level: {"digest": digests[level], "bytes": 1, "floats": floats[level], "layers": sorted(adaptor), "scores": {}}
        for level, adaptor in adaptors.items()
    }
    content = {
        "name": "made-up",
        "model": {
            "name": network, "num_classes": classes, "floats": sum(tensor.numel() for tensor in base.values()), "task": task,
            "normalisation": {"mean": [0.41, 0.42, 0.43], "std": [0.3, 0.31, 0.31]},
        },
        "base": {"digest": "sha256:" + "0" * 64, "bytes": 1},
        "levels": {"clean": nothing, **entries}, "budget": {}, "recipe": {}, "versions": {},
    }  # fmt: skip
    return Release(Manifest.model_validate(content), "sha256:" + "0" * 64, dict(base), {"clean": {}, **adaptors})


def _moved(tensor: Tensor) -> Tensor:
    return tensor * (1 + 0.1 * torch.rand_like(tensor))  # a variance stays positive


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--store", help="measure with a release of this store, not with a synthetic one")
    parser.add_argument("--release", help="name:tag")


def from_options(arguments: argparse.Namespace) -> Release:
    return Store(arguments.store).pull(arguments.release) if arguments.store else made_up(JPEG[:9])
