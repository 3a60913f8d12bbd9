"""The network of one level, or of all levels, as a file for other runtimes: a plain state dict, `torch.export`, or ONNX.

    release = gearnn_ray.Store("artifacts").pull("drn22-scenes-jpeg:latest")
    export_level(release, "jpeg-10", "jpeg-10.onnx")
    export_levels(release, "street.onnx")  # images and the position of each image's level

The files run without gearnn_ray. Knows nothing about estimating levels.
"""

import importlib.util
import io
import json
import os
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as symbolic_shapes

from gearnn_ray.core.errors import UserError
from gearnn_ray.levels.level import CLEAN
from gearnn_ray.serving.all_levels import AllLevels
from gearnn_ray.serving.assembly import predictor, released_network
from gearnn_ray.serving.level_estimation import Reference
from gearnn_ray.store.releases import Release
from gearnn_ray.store.states import encode_state
from gearnn_ray.tasks import task_by_name

__all__ = ["export_level", "export_levels"]

_SUFFIXES = (".safetensors", ".pt2", ".onnx")
_IMAGES = 2  # while a graph is made


def export_level(
    release: Release,
    level: str,
    path: str | os.PathLike[str],
    image_size: tuple[int, int] | None = None,
    trust: Collection[str] = (),
) -> Path:
    """Write the network of a level, in the format that the suffix of `path` names, and return the path.

    `.safetensors`: all weights under the names of the network's state dict. `.pt2`: `torch.export.load(path).module()`.
    `.onnx` (needs the extra onnx): input `images`, outputs by name. The last two map normalised float32 images [B, 3, H, W], for
    any B, to the task's tensors: for segmentation `logits` float32 [B, K, h, w]; for detection a dict of `boxes` float32
    [B, D, 4], `scores` float32 [B, D], where 0 is an empty place, and `labels` int64 [B, D]. H and W are `image_size`, by default
    the size of the training images; or any size, if the network's operations do not depend on it. Of a release with
    `model.input` training-size they are this size alone: scale frames to it before (bilinearly, antialiased where they shrink),
    and boxes or logits back. Every file has the normalisation of its input, this size as `input_size` (height and width, null
    where there is none), the class names and its origin as JSON under `gearnn_ray`.

    trust: modules, such as "my_package.nets", whose networks the release may name; `.safetensors` needs none.
    Raises UserError for an unknown level or suffix, a network that is not trusted or cannot be exported (such as a detector that
    returns a list with the detections of each image), an `image_size` that the release excludes, a missing extra, and a path that
    cannot be written.
    """
    path = _with_suffix(path, _SUFFIXES)
    state = {**release.base_state(), **({} if level == CLEAN.name else release.adaptor_state(level))}
    about = _about(release, level)
    if path.suffix == ".safetensors":
        data = encode_state(state, about)
    else:
        size = _size(release, image_size)
        data = _graph(release, released_network(release, state, trust), path.suffix, about, size)
    return _written(path, data)


def export_levels(
    release: Release, path: str | os.PathLike[str], image_size: tuple[int, int] | None = None, trust: Collection[str] = ()
) -> Path:
    """Write the network with the adaptors of all levels as one `.pt2` or `.onnx` file, and return the path.

    Inputs are `images` as of `export_level`, and `level` int64 [B]: for each image the position of its level in `levels` of the
    JSON under `gearnn_ray`, where `clean`, the base, is the first. Images of one batch may have different levels. Outputs are as
    of `export_level`. The file holds the base, and of each adaptor the tensors that it changes. A convolution that levels change
    runs once for each of its variants, whatever the batch holds. Arguments and errors as of `export_level`; a network that sees
    regions of its images is refused.
    """
    path = _with_suffix(path, _SUFFIXES[1:])
    levels = (CLEAN.name, *(level for level in release.levels if level != CLEAN.name))
    about = _about(release, levels=levels)
    with torch.random.fork_rng(devices=[]):  # building and checking a network draws random numbers
        network = AllLevels(release, levels, trust)
    positions = torch.arange(_IMAGES).remainder(len(levels))
    return _written(path, _graph(release, network, path.suffix, about, _size(release, image_size), positions))


def _with_suffix(path: str | os.PathLike[str], expected: Sequence[str]) -> Path:
    path = Path(path)
    if path.suffix not in expected:
        raise UserError(f"{path} ends in {path.suffix or 'nothing'!r}: expected one of {', '.join(expected)}")
    return path


def _written(path: Path, data: bytes) -> Path:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): give a file in an existing folder") from error
    return path


def _about(release: Release, level: str | None = None, levels: Sequence[str] = ()) -> dict[str, object]:
    model = release.content.model
    return {
        "release": f"{release.name}@{release.digest}",
        **({"levels": list(levels)} if level is None else {"level": level}),
        "network": model.name,
        "class_names": model.class_names or None,
        **model.normalisation.model_dump(),  # mean and std of RGB in units of [0, 1]
        "input_size": model.input_size,
    }


def _size(release: Release, image_size: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width of the images while a graph is made."""
    only = release.content.model.input_size
    if only is not None and image_size is not None and tuple(image_size) != tuple(only):
        raise UserError(
            f"image_size is {image_size}, and {release.name} was made with model.input training-size, whose network takes frames "
            f"at {only} alone: leave image_size out"
        )
    if size := image_size or only:
        return size
    reference = Reference.of_manifest(release.content)
    if reference is None:
        raise UserError(f"{release.name} does not name the size of its training images: give image_size=(height, width)")
    return reference.height, reference.width


class _Outputs(nn.Module):
    """Normalised images, and perhaps their levels, to the task's tensors: the only one, or all by name."""

    def __init__(self, release: Release, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._manifest, self.task = release.content, task_by_name(release.content.model.task)

    def forward(self, images: Tensor, level: Tensor | None = None) -> Any:
        network = self.network if level is None else partial(self.network, level=level)
        tensors = self.task.tensors(predictor(self._manifest, network).normalised(images))
        return tensors[0] if len(tensors) == 1 else dict(zip(self.task.exported, tensors, strict=True))


def _graph(
    release: Release,
    network: nn.Module,
    suffix: str,
    about: Mapping[str, object],
    size: tuple[int, int],
    levels: Tensor | None = None,
) -> bytes:
    """The bytes of a file. levels: of a network that takes them, one for each of `_IMAGES` images."""
    if suffix == ".onnx" and not all(map(importlib.util.find_spec, ("onnx", "onnxscript"))):
        raise UserError("ONNX files need the extra onnx: install gearnn-ray[onnx]")
    given: tuple[Tensor, ...] = (torch.zeros(_IMAGES, 3, *size), *([] if levels is None else [levels]))
    outputs = _Outputs(release, network)
    try:
        with torch.no_grad():
            # because an error that an export meets on its way says less than the task's own
            outputs(*(each[:1] for each in given))
        # Without `backed_size_oblivious`, a tensor that happens to be contiguous at this size becomes a condition on the
        # size: the logits of DRN, cropped to the image, are contiguous where its sides are multiples of 8.
        with symbolic_shapes.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
            program = _program(outputs, given, any_size=release.content.model.input_size is None)
            return _onnx(program, outputs.task.exported, about) if suffix == ".onnx" else _pt2(program, about)
    except UserError as error:
        raise UserError(f"the network {release.content.model.name!r} cannot be written as {suffix}: {error}") from error
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        what = f"the network {release.content.model.name!r} cannot be written as {suffix} for {size[1]}x{size[0]} images"
        raise UserError(f"{what} ({type(error).__name__}: {reason}): use .safetensors, or another image_size") from error


def _program(outputs: nn.Module, given: tuple[Tensor, ...], any_size: bool) -> ExportedProgram:
    """The graph for any number of images. It may take any sides too, unless the network's operations depend on them."""
    any_number = {0: Dim.DYNAMIC}
    sides = {2: Dim.AUTO, 3: Dim.AUTO} if any_size else {}
    try:
        shapes = ({**any_number, **sides}, any_number)[: len(given)]
        return torch.export.export(outputs, given, dynamic_shapes=shapes)
    except torch._dynamo.exc.UserError:
        # Tracing takes `len(images)` in a network for the number that it is now. Dynamo does not, but would leave the sides in
        # expressions that ONNX has no operations for.
        return torch.export.export(outputs, given, dynamic_shapes=(any_number,) * len(given), strict=True)


def _pt2(program: ExportedProgram, about: Mapping[str, object]) -> bytes:
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"gearnn_ray": json.dumps(about)})
    return file.getvalue()


def _onnx(program: ExportedProgram, names: Sequence[str], about: Mapping[str, object]) -> bytes:
    converted = torch.onnx.export(
        program,
        dynamo=True,
        input_names=["images", "level"][: len(program.graph_signature.user_inputs)],
        output_names=names,
        external_data=False,
        verbose=False,
    )
    assert converted is not None
    converted.model.metadata_props["gearnn_ray"] = json.dumps(about)
    data: bytes = converted.model_proto.SerializeToString()
    return data
