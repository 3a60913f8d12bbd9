"""GearNN on Ray: one base network, a tiny adaptor per distortion level (Xie & Kim, CVPR 2020).

release = gearnn_ray.Store("artifacts").pull("drn22-scenes-jpeg:latest")
model = gearnn_ray.build_model("drn_d_22", num_classes=9)
model.load_state_dict({**release.base_state(), **release.adaptor_state("jpeg-10")})
"""

from gearnn_ray.errors import CorruptStoreError, TrainingFailedError, UserError
from gearnn_ray.layers import model_size
from gearnn_ray.models import build_model
from gearnn_ray.offline.selection import Selection, select
from gearnn_ray.store import Release, Store

__all__ = [
    "CorruptStoreError",
    "Release",
    "Selection",
    "Store",
    "TrainingFailedError",
    "UserError",
    "build_model",
    "model_size",
    "select",
]
