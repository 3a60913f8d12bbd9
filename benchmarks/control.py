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

from gearnn_ray.cluster import Board, Relay, cluster, mute
from gearnn_ray.config import ReleaseDataConfig
from gearnn_ray.folding import fold, foldable
from gearnn_ray.layers import layers_of
from gearnn_ray.models import build_model
from gearnn_ray.offline import stages
from gearnn_ray.offline.finetune import prepare_process
from gearnn_ray.offline.reopen import make_images, reopen
from gearnn_ray.offline.work import Work
from gearnn_ray.store import Store


@ray.remote(num_cpus=1)
def whole(work: Work, level: str) -> str:
    prepare_process(1)
    return cast(str, stages.fine_tune_fully(work, level, mute)["digest"])


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
    relay = Relay(cast(Any, Board).remote(), mute)
    store = Store(options.store)
    release = reopen(store, options.release, ReleaseDataConfig(path=options.data, cache=options.cache), relay)
    make_images(release.work, options.levels, relay)
    work = replace(release.work, keep_full=True)
    if options.learning_rate is not None:
        work = replace(work, recipe=work.recipe.model_copy(update={"learning_rate": options.learning_rate}))
    names = ["clean", *options.levels]
    digests = dict(zip(names, ray.get([whole.remote(work, name) for name in names]), strict=True))

model = build_model(work.network.name, work.network.num_classes)
base = store.get_state(work.base)
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
