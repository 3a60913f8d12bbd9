"""How much of a full fine-tune's change is due to the distortion, and how much any further training causes.

    uv run benchmarks/control.py drn22-camvid --levels jpeg-10 h264-120x90 --data CAMVID --store artifacts

Fine-tunes the whole network on each level and, with the same order and crops, on undistorted images; results in the store are
reused. Folds normalisations, and prints for each layer: mean |Δ| against the base (Eq. 1), mean |Δ| against the undistorted
fine-tune, and the cosine between the changes of both fine-tunes. A cosine of 1 means that the level had no influence.
"""

import argparse
from dataclasses import replace

from torch import Tensor

from gearnn_ray.adaptors.bn_folding import fold, foldable
from gearnn_ray.config.release_jobs import ReleaseDataConfig, SweepConfig
from gearnn_ray.config.resources import ResourcesConfig
from gearnn_ray.models.layers import layers_of
from gearnn_ray.models.registry import build_model
from gearnn_ray.offline.level_run import fine_tune_fully
from gearnn_ray.offline.pipeline import prepare_images
from gearnn_ray.offline.release_context import open_release_context
from gearnn_ray.ray_jobs.board import discard
from gearnn_ray.ray_jobs.run_tasks import job_tasks
from gearnn_ray.store.releases import Store

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("release")
parser.add_argument("--levels", nargs="+", required=True)
parser.add_argument("--learning-rate", type=float, help="default: the release's")
parser.add_argument("--layers", nargs="*", help="print only these layers; default: all")
parser.add_argument("--data", help="folder of the data set")
parser.add_argument("--cache", default="~/.cache/gearnn_ray")
parser.add_argument("--store", default="artifacts")
options = parser.parse_args()

store, names = Store(options.store), ["clean", *options.levels]
data = ReleaseDataConfig(path=options.data, cache=options.cache)
with job_tasks(ResourcesConfig(), discard) as tasks:
    release = open_release_context(store, SweepConfig(store=options.store, release=options.release, data=data), tasks)
    spec = replace(release.spec, keep_full=True)
    if options.learning_rate is not None:
        spec = replace(spec, recipe=spec.recipe.model_copy(update={"learning_rate": options.learning_rate}))
    prepare_images(spec.data, spec.network.task, names, spec.cache, tasks, discard)
    fulls = tasks.all(fine_tune_fully, {name: (spec, name) for name in names})
if tasks.failed:
    raise SystemExit("\n".join(f"{name} failed: {reason}" for name, reason in tasks.failed.items()))

model = build_model(spec.network.name, spec.network.num_classes)
base = store.get_state(spec.base)
after = {name: fold(foldable(model).values(), base, store.get_state(full.digest)) for name, full in fulls.items()}


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
