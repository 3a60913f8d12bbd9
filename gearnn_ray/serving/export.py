"""The network of one level for those who serve elsewhere: a plain state dict, `torch.export`, or ONNX.

    release = gearnn_ray.Store("artifacts").pull("drn22-scenes-jpeg:latest")
    export_level(release, "jpeg-10", "jpeg-10.onnx")

What is written needs no gearnn_ray to run. Knows nothing about detecting levels or switching between them.
"""

import importlib.util
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as symbolic_shapes

from gearnn_ray.core.errors import UserError
from gearnn_ray.levels.level import CLEAN
from gearnn_ray.models.registry import build_model
from gearnn_ray.serving.level_estimation import Reference
from gearnn_ray.store.releases import Release, encode_state
from gearnn_ray.tasks.segmentation import logits_of

__all__ = ["export_level"]

_SUFFIXES = (".safetensors", ".pt2", ".onnx")


def export_level(
    release: Release, level: str, path: str | os.PathLike[str], image_size: tuple[int, int] | None = None
) -> Path:
    """Write the network of a level in the format that the suffix of `path` names, and return the path.

    `.safetensors`: all weights under the names of the network's state dict. `.pt2`: `torch.export.load(path).module()`.
    `.onnx`: input `images`, output `logits` (needs the extra onnx). Both map float32 [B, 3, H, W] to float32
    [B, K, h, w] for any B; H and W are `image_size` (by default the size the release was trained on), or any where
    the network does not depend on them. Every file carries how its input is normalised, the class names and where it is from,
    as JSON under `gearnn_ray`.

    Raises UserError for a level that the release has not, another suffix, a network that is no graph, a missing extra.
    """
    path = Path(path)
    if path.suffix not in _SUFFIXES:
        raise UserError(f"{path} ends in {path.suffix or 'nothing'!r}: expected one of {', '.join(_SUFFIXES)}")
    state = {**release.base_state(), **({} if level == CLEAN.name else release.adaptor_state(level))}
    about = _about(release, level)
    if path.suffix == ".safetensors":
        data = encode_state(state, about)
    else:
        data = _graph(release, state, path.suffix, about, image_size or _training_size(release))
    try:
        path.write_bytes(data)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): name a file in a folder that is there"
        ) from error
    return path


def _about(release: Release, level: str) -> dict[str, Any]:
    model = release.manifest["model"]
    return {
        "release": f"{release.name}@{release.digest}",
        "level": level,
        "network": model["name"],
        "class_names": model.get("class_names"),
        **model["normalisation"],  # mean and std of RGB in units of [0, 1]
    }


def _training_size(release: Release) -> tuple[int, int]:
    reference = Reference.of_manifest(release.manifest)
    if reference is None:
        raise UserError(f"{release.name} does not say on which size it was trained: give image_size=(height, width)")
    return reference.height, reference.width


class _Logits(nn.Module):
    """A network without the dict that some put their logits in."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self.network, images)


def _graph(
    release: Release, state: Mapping[str, Tensor], suffix: str, about: Mapping[str, Any], size: tuple[int, int]
) -> bytes:
    if suffix == ".onnx" and not all(map(importlib.util.find_spec, ("onnx", "onnxscript"))):
        raise UserError("writing ONNX needs the extra onnx: install gearnn-ray[onnx]")
    model = release.manifest["model"]
    network = build_model(model["name"], model["num_classes"])
    images = torch.zeros(2, 3, *size)
    shape = {0: Dim.DYNAMIC, 2: Dim.AUTO, 3: Dim.AUTO}  # auto: fixed where the network wants it so
    try:
        network.load_state_dict(state)
        # oblivious: whether a tensor happens to be contiguous at the size of the example is no condition on the size.
        # (DRN's logits are cropped to the image: they are where its sides are multiples of 8.)
        with symbolic_shapes.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
            program = torch.export.export(_Logits(network.eval()), (images,), dynamic_shapes={"images": shape})
            return _onnx(program, about) if suffix == ".onnx" else _pt2(program, about)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        what = f"the network {model['name']!r} cannot be written as {suffix} for {size[1]}x{size[0]} images"
        raise UserError(f"{what} ({type(error).__name__}: {reason}): take .safetensors, or another size") from error


def _pt2(program: ExportedProgram, about: Mapping[str, Any]) -> bytes:
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"gearnn_ray": json.dumps(about)})
    return file.getvalue()


def _onnx(program: ExportedProgram, about: Mapping[str, Any]) -> bytes:
    converted = torch.onnx.export(
        program, dynamo=True, input_names=["images"], output_names=["logits"], external_data=False, verbose=False
    )
    assert converted is not None
    converted.model.metadata_props["gearnn_ray"] = json.dumps(about)
    data: bytes = converted.model_proto.SerializeToString()
    return data
