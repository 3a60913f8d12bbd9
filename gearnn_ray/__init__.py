"""GearNN on Ray: one base network, a tiny adaptor per distortion level (Xie & Kim, CVPR 2020).

    model = gearnn_ray.AdaptiveModel.pull("artifacts", "drn22-scenes-jpeg:latest")
    logits = model(images)  # uint8 [B, 3, H, W], every image with the network of its own level

    release = gearnn_ray.Store("artifacts").pull("drn22-scenes-jpeg:latest")
    network = {**release.base_state(), **release.adaptor_state("jpeg-10")}

The names below are imported when they are first used: torch and CP-SAT take seconds, and not every worker or command
needs both.
"""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

# Under `uv run` Ray would upload the folder and build a second environment for its workers; the present one is enough. Ray reads
# the variable at import; where that has happened already, its constant is corrected.
if os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0") == "0" and "ray._private.ray_constants" in sys.modules:
    sys.modules["ray._private.ray_constants"].RAY_ENABLE_UV_RUN_RUNTIME_ENV = False  # type: ignore[attr-defined]

if TYPE_CHECKING:
    from gearnn_ray.core.errors import CorruptStoreError, TrainingFailedError, UserError
    from gearnn_ray.models.layers import model_size
    from gearnn_ray.models.registry import build_model
    from gearnn_ray.offline.selection import Selection, select
    from gearnn_ray.serving.adaptive_model import AdaptiveModel
    from gearnn_ray.serving.export import export_level, export_levels
    from gearnn_ray.store.releases import Release, Store
    from gearnn_ray.sweep.pipeline import sweep_budgets

_HOMES = {
    "AdaptiveModel": "serving.adaptive_model",
    "CorruptStoreError": "core.errors",
    "Release": "store.releases",
    "Selection": "offline.selection",
    "Store": "store.releases",
    "TrainingFailedError": "core.errors",
    "UserError": "core.errors",
    "build_model": "models.registry",
    "export_level": "serving.export",
    "export_levels": "serving.export",
    "model_size": "models.layers",
    "select": "offline.selection",
    "sweep_budgets": "sweep.pipeline",
}

__all__ = [
    "AdaptiveModel",
    "CorruptStoreError",
    "Release",
    "Selection",
    "Store",
    "TrainingFailedError",
    "UserError",
    "build_model",
    "export_level",
    "export_levels",
    "model_size",
    "select",
    "sweep_budgets",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
