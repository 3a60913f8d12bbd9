"""Which estimate of an encoding's harm ranks encodings as the network's accuracy does: gradients of utilities, or plain pixels.

    uv run benchmarks/accgrad.py --network camvid --weights drn_d_22_camvid.safetensors --frames camvid/val
    uv run benchmarks/accgrad.py --network fastestdet --weights fastestdet_coco.pth --video one-by-one-person-detection.mp4
    uv run benchmarks/accgrad.py --network release --store artifacts --release centre-video:latest

Each segment is encoded with libx264 along two axes, from the best value to the cheapest: rate factors 18 to 48, sizes 1 to 1/4.
Its last frame is judged. The true loss is 100 less the task's first metric of the network's answer to the received frame, against
its own answer to the pristine frame; or, with `--labels`, against labels, less what the pristine frame loses itself. Estimates
see the pristine and the received frame; gradients are taken once per segment, on the frame as received at `--deployed`.

    |S·e|     sum over tiles of the gradient's magnitude times the error's (OneAdapt)
    |g·e|     the same without tiles
    S²·e²     the same with squares
    ⟨g, e⟩    the chain rule, with signs

of the gradient of: the soft count, the largest probability, the entropy, the loss against the network's own answer to the same
frame (own) and to the pristine frame one segment earlier (previous), the logarithm of the probability of classes drawn at random
(Fisher). `answer KL` and `answer` compare the network's answers to the received and to the best frame: a forward pass per value.

Printed are Spearman's rank correlations with the true loss: over all segments and values (all); over the values within a segment,
mean of segments (within); over segments at one value, mean of values (across); of the increases from one value to the next, over
all segments and steps (steps); over the values of both axes within a segment, mean of segments (axes); and the time in forward
passes.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as Pictures
from torch import Tensor

from gearnn_ray.data.camvid import UNLABELLED
from gearnn_ray.data.dataset import IGNORED
from gearnn_ray.data.scenes import ScenesSplit
from gearnn_ray.knobs.encoding import decode, encode
from gearnn_ray.knobs.objective import pixel_loss, psnr_loss, signed_loss, ssim_loss
from gearnn_ray.knobs.settings import Settings
from gearnn_ray.knobs.tiles import tile_means, tile_sums
from gearnn_ray.levels.level import CLEAN
from gearnn_ray.models.detector import collected_candidates
from gearnn_ray.models.registry import build_model
from gearnn_ray.models.weights import load_weights, read_weights
from gearnn_ray.serving.adaptive_model import AdaptiveModel
from gearnn_ray.tasks import task_by_name
from gearnn_ray.tasks.base import Forward, Image, Task, score
from gearnn_ray.training.predict import Normalisation, Predictor, for_inference
from gearnn_ray.video.decoding import decoded
from gearnn_ray.video.sources import open_source

CRFS = (18, 23, 28, 33, 38, 43, 48)
SCALES = (1, 0.75, 0.5, 0.375, 0.25)
LENGTH = 5  # frames of a segment
IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass
class Network:
    task: Task
    forward: Forward
    num_classes: int
    classes: tuple[int, ...] = ()  # those that count; empty for all


@dataclass
class Segment:
    frames: list[Image]  # LENGTH + 1: the first one is the last of the segment before
    target: Any = None  # labels of the last frame


@dataclass
class Scores:
    """By axis, a row per segment with a number for each value."""

    truth: dict[str, list[list[float]]] = field(default_factory=dict)
    estimates: dict[str, dict[str, list[list[float]]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=("camvid", "fastestdet", "release"), required=True)
    parser.add_argument("--weights", help="of camvid and fastestdet")
    parser.add_argument("--store", default="artifacts")
    parser.add_argument("--release", default="centre-video:latest", help="judged on generated scenes unless a video is given")
    parser.add_argument("--trust", nargs="*", default=[])
    parser.add_argument("--frames", help="folder of a clip's frames, in order of their names")
    parser.add_argument("--labels", help="folder of their label images, of the same names: CamVid's classes")
    parser.add_argument("--video", help="a video file instead of both")
    parser.add_argument("--segments", type=int, default=8)
    parser.add_argument("--shrink", type=int, default=1, help="use frames of sides so many times smaller")
    parser.add_argument("--deployed", type=int, default=28, help="rate factor of the frame whose gradient is taken")
    parser.add_argument("--scale-back", action="store_true", help="the network sees received frames scaled to their first size")
    options = parser.parse_args()
    network = opened(options)
    scores = Scores()
    for number, segment in enumerate(segments(options)):
        used = measure(network, segment, scores, options)
        print(f"segment {number + 1} of {options.segments}{'' if used else ': nothing is found in it'}", flush=True)
    report(scores)


def opened(options: argparse.Namespace) -> Network:
    if options.network == "release":
        adaptive = AdaptiveModel.pull(options.store, options.release, trust=options.trust)
        return Network(adaptive.task, adaptive.forward_at([CLEAN.name]), len(adaptive.content.model.class_names))
    name, classes, normalisation = {
        "camvid": ("drn_d_22", 11, IMAGENET),
        "fastestdet": ("examples.fastestdet:fastestdet", 80, Normalisation((0, 0, 0), (1, 1, 1))),
    }[options.network]
    model = build_model(name, classes)
    load_weights(model, read_weights(options.weights), options.weights)
    task = task_by_name("segmentation" if options.network == "camvid" else "detection")
    return Network(task, Predictor(for_inference(model), normalisation), classes, (0,) if options.network == "fastestdet" else ())


def segments(options: argparse.Namespace) -> Iterator[Segment]:
    """Segments evenly spread over the clip."""
    if options.video:
        source = open_source(options.video)
        try:
            frames = [frame.pixels for frame in decoded(source.container)]
        finally:
            source.close()
        labels: list[Any] = []
    elif options.frames:
        paths = sorted(Path(options.frames).iterdir())
        frames = [np.asarray(Pictures.open(path).convert("RGB")) for path in paths]
        labels = [np.asarray(Pictures.open(Path(options.labels, path.name))) for path in paths] if options.labels else []
        labels = [np.where(label == UNLABELLED, IGNORED, label).astype(np.uint8) for label in labels]
    else:
        scenes = ScenesSplit("val", 50 * options.segments, 96, 128, 0, "detection", 50)
        frames = [scenes.image(number) for number in range(len(scenes))]
        labels = []
    for last in np.linspace(LENGTH, len(frames) - 1, options.segments).round().astype(int):
        own = [scaled(frame, 1 / options.shrink) for frame in frames[last - LENGTH : last + 1]]
        yield Segment(own, labels[last] if labels else None)


def scaled(frame: Image, scale: float) -> Image:
    if scale == 1:
        return frame
    return resized(frame, *(2 * round(side * scale / 2) for side in frame.shape[:2]))


def resized(frame: Image, height: int, width: int) -> Image:
    if frame.shape[:2] == (height, width):
        return frame
    return np.asarray(Pictures.fromarray(frame).resize((width, height), Pictures.Resampling.BICUBIC))


def received(frames: Sequence[Image], crf: int, scale: float) -> list[Image]:
    """The frames after encoding as a segment of its own, in the size that was sent."""
    return decode(encode(frames, Settings(crf=crf, size=scale)))


def measure(network: Network, segment: Segment, scores: Scores, options: argparse.Namespace) -> bool:
    """One more row of everything; False if nothing is found in the pristine frame, so that there is nothing to lose."""
    pristine, size = segment.frames[-1], segment.frames[-1].shape[:2]
    start = time.perf_counter()
    own = answer(network, pristine)
    scores.seconds["forward"] = scores.seconds.get("forward", 0.0) + time.perf_counter() - start
    target = network.task.target_of(own.prediction, size) if segment.target is None else segment.target
    least = true_loss(network, own.prediction, target, size)
    if segment.target is None and least == 100:
        return False
    grid = {"CRF": [(crf, 1.0) for crf in CRFS], "size": [(CRFS[0], float(scale)) for scale in SCALES]}
    places = dict.fromkeys([*itertools.chain(*grid.values()), (options.deployed, 1.0)])
    frames = {place: received(segment.frames[1:], *place)[-1] for place in places}
    fed = {place: resized(frame, *size) if options.scale_back else frame for place, frame in frames.items()}
    found = {place: answer(network, frame) for place, frame in fed.items()}
    best = found[CRFS[0], 1.0]
    g = gradients(network, frames[options.deployed, 1.0], answer(network, segment.frames[0]), scores.seconds)
    own_best = network.task.target_of(best.prediction, size)
    for axis, values in grid.items():
        losses = [true_loss(network, found[place].prediction, target, fed[place].shape[:2]) - least for place in values]
        scores.truth.setdefault(axis, []).append(losses)
        rows = []
        for place in values:
            p = found[place].distribution
            if p.shape != best.distribution.shape:  # a detector whose candidates are as many as the pixels
                p = answer(network, resized(fed[place], *size)).distribution
            rows.append({
                **pixel_estimates(pristine, resized(frames[place], *size), g),
                "answer KL": float(divergence(best.distribution, p)),
                "answer": true_loss(network, found[place].prediction, own_best, fed[place].shape[:2]),
            })  # fmt: skip
        for name in rows[0]:
            scores.estimates.setdefault(name, {}).setdefault(axis, []).append([row[name] for row in rows])
    return True


@dataclass
class Answer:
    prediction: Any
    distribution: Tensor  # [M, C]: of every pixel over the classes, or of every candidate, whether there is an object


def answer(network: Network, frame: Image) -> Answer:
    x = torch.from_numpy(frame.copy()).permute(2, 0, 1)[None]
    with torch.no_grad():
        raw, p = distribution(network, x)
    prediction = network.task.outputs(raw)[0]
    if isinstance(prediction, dict):
        wanted = torch.isin(prediction["labels"], torch.tensor(network.classes or range(network.num_classes)))
        return Answer({name: part[wanted] for name, part in prediction.items()}, p)
    return Answer(prediction, p)


def distribution(network: Network, x_1CHW: Tensor) -> tuple[Any, Tensor]:
    """What the network returns, and [M, C] as in `Answer`."""
    with collected_candidates() as candidates:
        raw = network.forward(x_1CHW)
    if network.task.name == "segmentation":
        logits: Tensor = network.task.at_frame_size(network.task.outputs(raw), *x_1CHW.shape[-2:])[0]
        return raw, logits.softmax(0).flatten(1).T.clamp(1e-6, 1)
    (scores,) = candidates
    p = (scores[..., list(network.classes)] if network.classes else scores).flatten()
    return raw, torch.stack([1 - p, p], -1).clamp(1e-6, 1)


def gradients(network: Network, deployed: Image, earlier: Answer, seconds: dict[str, float]) -> dict[str, NDArray[np.float32]]:
    """By utility, of the pixels of one frame: [H, W, 3]."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, NDArray[np.float32]] = {}
    start = time.perf_counter()
    x = torch.from_numpy(deployed.copy()).permute(2, 0, 1)[None].float().requires_grad_()
    _, p = distribution(network, x)
    for name, utility in {
        "soft count": torch.sigmoid(20 * (top(p) - 0.5)).sum(),
        "largest": top(p).sum(),
        "entropy": -torch.special.entr(p).sum(),
        "own": p.amax(-1).log().sum(),
        "previous": -divergence(earlier.distribution, p),
        "Fisher": p.gather(-1, torch.multinomial(p.detach(), 1, generator=generator)).log().sum(),
    }.items():
        (each,) = torch.autograd.grad(utility, x, retain_graph=True)
        if not found:
            seconds["gradient"] = seconds.get("gradient", 0.0) + time.perf_counter() - start
        found[name] = each[0].permute(1, 2, 0).numpy()
    return found


def pixel_estimates(pristine: Image, shown: Image, gradients: dict[str, NDArray[np.float32]]) -> dict[str, float]:
    error = shown.astype(np.float32) - pristine
    magnitude = np.abs(error)
    none, pair = np.zeros(0, np.float32), (pristine[None], shown[None])
    estimates = {"|e|": pixel_loss(none, *pair), "PSNR": psnr_loss(none, *pair), "SSIM": ssim_loss(none, *pair)}
    for name, g in gradients.items():
        estimates |= {
            f"|S·e| {name}": float((tile_means(np.abs(g).sum(-1)) * tile_sums(magnitude.mean(-1))).sum()),
            f"|g·e| {name}": float(np.abs(g * error).sum()),
            f"S²·e² {name}": float((tile_means(np.square(g).sum(-1)) * tile_sums(np.square(error).mean(-1))).sum()),
            f"⟨g,e⟩ {name}": signed_loss(g, *pair),
        }
    return estimates


def true_loss(network: Network, prediction: Any, target: Any, size: tuple[int, int]) -> float:
    evidence = network.task.evidence(prediction, target, size, network.num_classes)
    return 100 - score(network.task, {name: each[None] for name, each in evidence.items()})


def top(p_MC: Tensor) -> Tensor:
    """The largest probability of a pixel, or the score of a candidate."""
    return p_MC[:, 1] if p_MC.shape[1] == 2 else p_MC.amax(-1)


def divergence(p_MC: Tensor, q_MC: Tensor) -> Tensor:
    """KL(p || q), a sum."""
    return (p_MC * (p_MC.log() - q_MC.log())).sum()


Matrix = NDArray[np.float64]


def ranks(values: Matrix) -> Matrix:
    """From 0; equal values have the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse].astype(np.float64)


def spearman(a: Matrix, b: Matrix) -> float:
    """NaN if all values of one side are equal."""
    x, y = (each - each.mean() for each in (ranks(a), ranks(b)))
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale else float("nan")


def mean_of(pairs: Iterator[tuple[Matrix, Matrix]]) -> float:
    found = [value for a, b in pairs if not np.isnan(value := spearman(a, b))]
    return float(np.mean(found)) if found else float("nan")


COLUMNS: dict[str, Callable[[Matrix, Matrix], float]] = {
    "all": lambda truth, estimate: spearman(truth.ravel(), estimate.ravel()),
    "within": lambda truth, estimate: mean_of(zip(truth, estimate, strict=True)),
    "across": lambda truth, estimate: mean_of(zip(truth.T, estimate.T, strict=True)),
    "steps": lambda truth, estimate: spearman(np.diff(truth).ravel(), np.diff(estimate).ravel()),
}


def report(scores: Scores) -> None:
    axes = list(scores.truth)
    for axis, rows in scores.truth.items():
        print(f"true loss over {axis}:", " ".join(f"{value:.1f}" for value in np.mean(rows, 0)))
    print(f"{'':20}" + "".join(f"{axis:>32}" for axis in axes))
    print(f"{'':20}" + "".join(f"{column:>8}" for _ in axes for column in COLUMNS) + f"{'axes':>8}{'passes':>8}")
    for name, estimates in scores.estimates.items():
        cells = [column(np.array(scores.truth[a]), np.array(estimates[a])) for a in axes for column in COLUMNS.values()]
        both = [np.hstack([np.array(side[a]) for a in axes]) for side in (scores.truth, estimates)]
        cells.append(COLUMNS["within"](*both))
        gradient = "" if name in ("|e|", "PSNR", "SSIM") else f"{scores.seconds['gradient'] / scores.seconds['forward']:.1f}"
        text = "1/value" if name.startswith("answer") else gradient
        print(f"{name:20}" + "".join(f"{cell:8.2f}" for cell in cells) + f"{text:>8}")


if __name__ == "__main__":
    main()
