#!/usr/bin/env python3
"""Which segmentation networks work: each is tried, fine-tuned for two steps, selected from, served in a mixed batch, exported.

uv run --extra timm --extra smp --extra hf benchmarks/zoo.py [--only PART_OF_NAME]

Prints the table of docs/networks.md. Weights and images are random: it shows what runs and is exact, not what is accurate.
"""

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from releases import in_memory
from torch import Tensor, nn

from gearnn_ray import AdaptiveModel, build_model, model_size, select
from gearnn_ray.config.recipe import Recipe
from gearnn_ray.core.errors import UserError
from gearnn_ray.models.layers import layers_of, network_state, tensors_of
from gearnn_ray.models.weights import load_weights, read_weights
from gearnn_ray.offline.network_check import try_segmenter
from gearnn_ray.serving.export import export_level
from gearnn_ray.serving.modules import Adaptive, PerLevel
from gearnn_ray.store.manifest import DataEntry, ReferenceEntry
from gearnn_ray.store.releases import Release
from gearnn_ray.tasks import task_by_name
from gearnn_ray.tasks.base import Image
from gearnn_ray.training.precision import prepare_process
from gearnn_ray.training.predict import Normalisation, Predictor
from gearnn_ray.training.trainer import fine_tune

CLASSES = 5
TRUST = ("timm", "smp", "hf")
BUDGET = 0.2  # of the network: enough for layers of most kinds
LEVELS = {"jpeg-10": lambda image: image // 64 * 64 + 32, "brightness-0.2": lambda image: image // 5}  # about as these levels
NORMALISATION = Normalisation((0.41, 0.42, 0.43), (0.3, 0.31, 0.31))  # that of `releases.in_memory`
RECIPE = Recipe(epochs=1, batch_size=2, crop=96, learning_rate=0.01, precision="float32")


@dataclass(frozen=True)
class Entry:
    """A network, the arguments it is built with, and the size (height, width) of its images."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    pad_to: int | None = None
    size: tuple[int, int] = (64, 96)


def _hf(kind: str, size: tuple[int, int] = (64, 96), **config: Any) -> Entry:
    return Entry(f"hf:{kind}", {"config": json.dumps({"model_type": kind, **config})}, None, size)


_SQUARE = (64, 64)
_VIT = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 64}
_STAGES = {"depths": [1, 1, 1, 1], "out_features": ["stage1", "stage2", "stage3", "stage4"]}
_CONVNEXT = {"model_type": "convnext", "hidden_sizes": [16, 32, 48, 64], **_STAGES}
_SWIN = {"model_type": "swin", "embed_dim": 16, "num_heads": [1, 2, 2, 4], "window_size": 4, **_STAGES}
_SEGFORMER = {
    "hidden_sizes": [16, 32, 48, 64],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 1, 2, 2],
    "decoder_hidden_size": 32,
}
_UPERNET = {"hidden_size": 32}
ENTRIES = (
    Entry("drn_d_22_narrow"),
    *(Entry(f"torchvision:{name}") for name in (
        "fcn_resnet50", "deeplabv3_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large",
    )),
    Entry("torchvision:fcn_resnet50", {"aux_loss": True}),
    *(Entry(f"timm:{name}") for name in (
        "resnet18", "resnet10t", "mobilenetv3_small_100", "tf_mobilenetv3_small_minimal_100", "efficientnet_b0",
        "tf_efficientnet_b0", "regnety_002", "convnext_atto", "convnextv2_atto", "resnetv2_50", "mobilevit_xxs",
        "hrnet_w18_small", "repvgg_a0", "ghostnet_100",
    )),
    Entry("timm:vit_tiny_patch16_224", {"img_size": 64}, None, _SQUARE),
    Entry("timm:swin_tiny_patch4_window7_224", {"img_size": 64}, None, _SQUARE),
    *(Entry(f"smp:{name}", {"encoder_name": "resnet18"}, 32, (60, 90)) for name in (
        "unet", "unetplusplus", "manet", "linknet", "fpn", "pspnet", "deeplabv3", "deeplabv3plus", "pan", "upernet", "segformer",
    )),
    Entry("smp:unet", {"encoder_name": "timm-efficientnet-b0"}, 32, (60, 90)),
    Entry("smp:unet", {"encoder_name": "tu-convnext_atto"}, 32, (60, 90)),
    Entry("smp:dpt", {"encoder_name": "tu-vit_tiny_patch16_224", "dynamic_img_size": True}, 16, (60, 90)),
    _hf("segformer", **_SEGFORMER),
    _hf("upernet", backbone_config=_CONVNEXT, auxiliary_in_channels=48, **_UPERNET),
    _hf("upernet", backbone_config=_SWIN, auxiliary_in_channels=64, **_UPERNET),
    _hf("mobilevit", hidden_sizes=[32, 48, 64], neck_hidden_sizes=[8, 16, 24, 32, 48, 64, 128], image_size=64),
    _hf("mobilenet_v2", depth_multiplier=0.35),
    _hf("beit", _SQUARE, **_VIT, patch_size=16, out_indices=[1, 2, 3, 4]),
    _hf("data2vec-vision", _SQUARE, **_VIT, patch_size=16, out_indices=[1, 2, 3, 4]),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only networks whose name has this in it")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    prepare_process(arguments.threads)
    warnings.simplefilter("ignore")
    print("| network | floats | splits | mixed batch | modules of their own | exports | s |\n|---|---|---|---|---|---|---|")
    for entry in ENTRIES:
        if arguments.only in entry.name:
            started = time.perf_counter()
            cells = list(_cells(entry))
            given = {name: value for name, value in entry.arguments.items() if name != "config"} | {"pad_to": entry.pad_to}
            told = "".join(f", {name} {value}" for name, value in given.items() if value is not None)
            cells += ["-"] * (5 - len(cells))
            print(f"| `{entry.name}`{told} | {' | '.join(cells)} | {time.perf_counter() - started:.0f} |", flush=True)


def _cells(entry: Entry) -> Iterator[str]:
    """The columns behind the name, up to the first that fails, which says why."""
    try:
        torch.manual_seed(0)
        model = build_model(entry.name, CLASSES, entry.arguments, entry.pad_to)
        images = np.random.default_rng(0).integers(0, 256, (4, *entry.size, 3), dtype=np.uint8)
        _through_a_file(model)
        try_segmenter(entry.name, model, CLASSES, NORMALISATION, task_by_name("segmentation"), images[0], RECIPE)
        yield f"{model_size(model):,}"
        release, chosen = _split(entry, model, images)
        yield f"{chosen} of {len(layers_of(model))} layers"
        adaptive = AdaptiveModel(release, trust=TRUST)
        yield "exact" if _is_exact(adaptive, release, entry, images) else "**differs**"
        yield _own_modules(adaptive)
        yield _exported(release, entry, images)
    except Exception as error:
        first = str(error).splitlines()[0][:160] if str(error) else ""
        yield first if isinstance(error, UserError) else f"{type(error).__name__}: {first}"


def _through_a_file(model: nn.Module) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "w.safetensors"
        safetensors.torch.save_file({name: t.clone() for name, t in network_state(model).items()}, path)
        load_weights(model, read_weights(path), "w.safetensors")


def _split(entry: Entry, model: nn.Module, images: Any) -> tuple[Release, int]:
    """Two levels, each with the layers that two steps of a full fine-tune move most within the budget (Eq. 1, 2)."""
    base, layers = network_state(model), layers_of(model)
    adaptors, chosen = {}, set[str]()
    for level, distort in LEVELS.items():
        full = _tuned(model, base, distort(images), None)
        change = [max(float((full[t] - base[t]).float().abs().mean()) for t in layer.tensors) for layer in layers]
        selection = select(change, [layer.numel for layer in layers], int(BUDGET * model_size(model)))
        names = {layers[index].name for index in selection.chosen}
        partial = _tuned(model, base, distort(images), names)
        adaptors[level] = {name: partial[name] for name in tensors_of(layers, names)}
        still = [name for name in base if name not in adaptors[level] and not torch.equal(base[name], partial[name])]
        if still:
            raise RuntimeError(f"{still[0]} moved although it was frozen")
        chosen |= names
    release = in_memory(entry.name, CLASSES, "segmentation", base, adaptors)
    about = {"arguments": entry.arguments, "pad_to": entry.pad_to}
    height, width = entry.size
    data = DataEntry(reference=ReferenceEntry(height=height, width=width, luma=128.0))
    content = release.content.model_copy(update={"model": release.content.model.model_copy(update=about), "data": data})
    return Release(content, release.digest, base, {"clean": {}, **adaptors}), len(chosen)


def _tuned(model: nn.Module, base: Mapping[str, Tensor], images: list[Image], chosen: set[str] | None) -> Mapping[str, Tensor]:
    model.load_state_dict(base, strict=False)
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    labels = [(image[..., 0] % CLASSES).astype(np.uint8) for image in images]
    task = task_by_name("segmentation")
    fine_tune(task, model, list(images), labels, RECIPE, NORMALISATION, "float32", chosen=chosen, seed=0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable[name])
    state = network_state(model)
    model.load_state_dict(base, strict=False)
    return state


def _is_exact(adaptive: AdaptiveModel, release: Release, entry: Entry, images: Any) -> bool:
    """Whether a batch of all levels is what each level's plain network answers to its image."""
    levels = ["clean", *LEVELS]
    x_BCHW = torch.from_numpy(images[: len(levels)]).permute(0, 3, 1, 2)
    task = task_by_name("segmentation")
    for level, x, found in zip(levels, x_BCHW, adaptive(x_BCHW, levels=levels), strict=True):
        plain = build_model(entry.name, CLASSES, entry.arguments, entry.pad_to).eval()
        plain.load_state_dict(
            {**release.base_state(), **release.adaptor_state(level)} if level != "clean" else release.base_state()
        )
        with torch.no_grad():
            logits = task.at_frame_size(task.outputs(Predictor(plain, NORMALISATION, memory_format=None)(x[None])), *entry.size)
        if not task.close(found[None], logits):
            return False
    return True


def _own_modules(adaptive: AdaptiveModel) -> str:
    """How many of the adapted modules compute with a weight per sample; the others run once per level."""
    if isinstance(adaptive._network, PerLevel):
        return "whole network per level"
    found = [module for module in adaptive._network.modules() if isinstance(module, Adaptive)]
    whole = [type(module.module).__name__ for module in found if isinstance(module, PerLevel)]
    return f"{len(found) - len(whole)} of {len(found)}" + f" (per level: {', '.join(sorted(set(whole)))})" * bool(whole)


def _exported(release: Release, entry: Entry, images: Any) -> str:
    level = next(iter(LEVELS))
    with tempfile.TemporaryDirectory() as folder:
        path = export_level(release, level, Path(folder) / "level.pt2", entry.size, TRUST)
        program = torch.export.load(path).module()
    x_BCHW = NORMALISATION(torch.from_numpy(images[:3]).permute(0, 3, 1, 2))
    expected = AdaptiveModel(release, trust=TRUST)(x_BCHW, levels=[level] * 3)
    task = task_by_name("segmentation")
    with torch.no_grad():
        same = task.close(task.at_frame_size(program(x_BCHW), *entry.size), expected)
    return ".pt2" if same else "**.pt2 differs**"


if __name__ == "__main__":
    main()
