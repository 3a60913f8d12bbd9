"""The built-in networks and the kinds of data sets, and which tasks each is for. Imports neither torch nor a loader."""

from collections.abc import Mapping

from gearnn_ray.core.errors import UserError

TORCHVISION_DETECTORS = (
    "maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2", "fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2",
    "fasterrcnn_mobilenet_v3_large_fpn", "fasterrcnn_mobilenet_v3_large_320_fpn", "retinanet_resnet50_fpn",
    "retinanet_resnet50_fpn_v2", "fcos_resnet50_fpn", "ssdlite320_mobilenet_v3_large", "ssd300_vgg16",
)  # fmt: skip
BUILT_IN = {
    "drn_d_22": "drn", "drn_d_22_narrow": "drn", "drn_d_38": "drn",
    "centre_detector": "centre_detector", "light_maskrcnn": "light_maskrcnn",
    **dict.fromkeys(TORCHVISION_DETECTORS, "torchvision_detectors"),
}  # fmt: skip
"""Every built-in network, and the module of `gearnn_ray.models` that it is in."""

NEEDS_WEIGHTS = (*(name for name in TORCHVISION_DETECTORS if name != "ssd300_vgg16"), "light_maskrcnn")
"""Networks whose batch normalisations are never in training mode: without weights they do not normalise anything."""

KINDS = {
    "scenes": ("segmentation", "detection"), "camvid": ("segmentation",), "cityscapes": ("segmentation",),
    "folder": ("segmentation",), "coco": ("detection",), "penn-fudan": ("detection",), "yolo": ("detection",),
    "footage": ("segmentation", "detection"),
}  # fmt: skip
"""Every kind of data set, and the tasks that it has targets for."""

LIBRARIES = {"torchvision": "torchvision", "timm": "timm", "smp": "segmentation_models_pytorch", "hf": "transformers"}
"""The installed libraries whose segmentation networks have names, by the prefix of these: `timm:resnet18`."""

_SEGMENTATION = ("drn_d_22", "drn_d_22_narrow", "drn_d_38")
_SIZES = ("min_size", "max_size")  # arguments of built-in detectors that scale images themselves


def library_of(name: str) -> str | None:
    """The prefix of a network of an installed library; None for a built-in network and an import path."""
    prefix, colon, _ = name.partition(":")
    return prefix if colon and prefix in LIBRARIES else None


def missing_library(name: str) -> UserError:
    """What to say where the library of the network `name` is not installed."""
    prefix = name.partition(":")[0]
    return UserError(
        f"the network {name!r} needs {LIBRARIES[prefix]}, which is not installed: install gearnn-ray[{prefix}], on every node"
    )


def task_of_network(name: str) -> str | None:
    """The task of a built-in network, or of one of an installed library; None for a network by import path."""
    if library_of(name):
        return "segmentation"
    if name not in BUILT_IN:
        return None
    return "segmentation" if name in _SEGMENTATION else "detection"


def task_of_options(kind: object, network: object) -> str:
    """The task of a job that names none: the one that its data or its built-in network is for."""
    tasks = KINDS.get(kind, ()) if isinstance(kind, str) else ()
    own = task_of_network(network) if isinstance(network, str) else None
    return tasks[0] if len(tasks) == 1 else own or "segmentation"


def check_arguments(name: str, arguments: Mapping[str, object]) -> None:
    """Raise UserError for an argument that a built-in network does not take. Those of all others are their own, except that
    torchvision's, which would fetch weights, are not taken.
    """
    if name.startswith("torchvision:"):
        for argument, value in arguments.items():
            if argument != "aux_loss" or type(value) is not bool:
                raise UserError(f"{name} has no argument {argument!r} of {value!r}: expected only aux_loss, true or false")
    if name not in BUILT_IN:
        return
    taken = _SIZES if name in TORCHVISION_DETECTORS or name == "light_maskrcnn" else ()
    for argument, value in arguments.items():
        if argument not in taken:
            expected = f"expected {' or '.join(taken)}" if taken else "leave it out"
            raise UserError(f"{name} has no argument {argument!r}: {expected}")
        if type(value) is not int or not 32 <= value <= 8192:
            raise UserError(f"{argument} of {name} is {value!r}: expected a whole number of pixels from 32 to 8192")
