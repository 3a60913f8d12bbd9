"""How much of what a full fine-tune changes is the distortion's, and how much comes of training anyway.

    uv run benchmarks/control.py drn22-camvid --levels jpeg-10 h264-120x90 --data CAMVID --store artifacts

Fine-tunes the whole network on each level and, with the same order and crops, on undistorted images (where the store has not
got them), folds normalisations, and prints per layer: mean |Δ| against the base (Eq. 1), that against the undistorted
fine-tune, and the cosine between the two fine-tunes' changes. 1 says that the level had no part in it.
"""

import argparse
from dataclasses import replace
from typing import Any, cast

import ray
from torch import Tensor

from gearnn_ray.adaptors.bn_folding import fold, foldable
from gearnn_ray.config.schema import ReleaseDataConfig
from gearnn_ray.models.layers import layers_of
from gearnn_ray.models.registry import build_model
from gearnn_ray.offline import level_run
from gearnn_ray.offline.job_spec import JobSpec
from gearnn_ray.offline.release_context import make_images, open_release_context
from gearnn_ray.ray_jobs.cluster import EventBoard, EventRelay, cluster, discard
from gearnn_ray.store.releases import Store
from gearnn_ray.training.trainer import prepare_process


@ray.remote(num_cpus=1)
def whole(spec: JobSpec, level: str) -> str:
    prepare_process(1)
    return cast(str, level_run.fine_tune_fully(spec, level, discard)["digest"])


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("release")
parser.add_argument("--levels", nargs="+", required=True)
parser.add_argument("--learning-rate", type=float, help="default: the release's")
parser.add_argument("--layers", nargs="*", help="print these alone; default: all")
parser.add_argument("--data", help="folder of the data set")
parser.add_argument("--cache", default="~/.cache/gearnn_ray")
parser.add_argument("--store", default="artifacts")
options = parser.parse_args()

with cluster():
    relay = EventRelay(cast(Any, EventBoard).remote(), discard)
    store = Store(options.store)
    release = open_release_context(
        store, options.release, ReleaseDataConfig(path=options.data, cache=options.cache), relay
    )
    make_images(release.spec, options.levels, relay)
    spec = replace(release.spec, keep_full=True)
    if options.learning_rate is not None:
        spec = replace(spec, recipe=spec.recipe.model_copy(update={"learning_rate": options.learning_rate}))
    names = ["clean", *options.levels]
    digests = dict(zip(names, ray.get([whole.remote(spec, name) for name in names]), strict=True))

model = build_model(spec.network.name, spec.network.num_classes)
base = store.get_state(spec.base)
after = {name: fold(foldable(model).values(), base, store.get_state(digest)) for name, digest in digests.items()}


def change(name: str, tensor: str) -> Tensor:
    return (after[name][tensor].double() - base[tensor].double()).flatten()


print(" ".join([f"{'layer':<36}{'floats':>9}", *(f"{level:>30}" for level in options.levels)]))
print(" ".join([f"{'':<45}", *(f"{'base':>11}{'clean':>11}{'cosine':>8}" for _ in options.levels)]))
for layer in layers_of(model):
    (tensor, *more) = layer.tensors
    if more or (options.layers and layer.name not in options.layers):
        continue
    texts = []
    for level in options.levels:
        own, without = change(level, tensor), change("clean", tensor)
        norms = float(own.norm() * without.norm())
        cosine = f"{float(own @ without) / norms:8.3f}" if norms else f"{'-':>8}"
        texts.append(f"{float(own.abs().mean()):>11.2e}{float((own - without).abs().mean()):>11.2e}{cosine}")
    print(" ".join([f"{layer.name:<36}{layer.numel:>9,}", *(f"{text:>30}" for text in texts)]))
