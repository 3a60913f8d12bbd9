"""Accuracy over time on a stream whose size, rate factor and light change: a clip as an adaptive-bitrate ladder.

    uv run benchmarks/stream_accuracy.py --release drn22-camvid-video:latest --frames camvid/val --labels camvid/valannot \\
        --rate 15 --ladder 480x360:18 320x240:30 480x360:36 240x180:18 --full
    uv run benchmarks/stream_accuracy.py --release fastestdet-video:latest --trust examples.fastestdet \\
        --video one-by-one-person-detection.mp4 --every 10 --rate 10 --ladder 768x432:18 384x216:30 768x432:40 768x432:18*0.2

The clip is cut into pieces of a second, and each piece is encoded with libx264 at the next size and rate factor of the ladder,
all in one MPEG transport stream, which `gearnn_ray.video` decodes and whose levels it finds by itself. Each frame is answered by
the original network; with adaptors of the nearest level, of a linear mixture of two, and of a mixture weighed by entropy (DaWin);
and by the fully fine-tuned network of the nearest level, if the release was made with `keep_full`. The targets are labels, whole,
of their own size; or, of a video without labels, what the original network finds on its pristine frames with a score of 0.5 and
more. Printed: the score of all frames and of each step of the ladder, and 95% intervals of the difference to the original from
1,000 resamples of the seconds.
"""

import argparse
import io
import itertools
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import torch
from av.container import InputContainer
from numpy.typing import NDArray
from PIL import Image

from gearnn_ray.data.dataset import IGNORED
from gearnn_ray.data.objects import Objects
from gearnn_ray.levels.h264_codec import x264_encoder
from gearnn_ray.levels.level import CLEAN
from gearnn_ray.serving.adaptive_model import AdaptiveModel
from gearnn_ray.serving.assembly import predictor, released_network
from gearnn_ray.store.releases import Store
from gearnn_ray.training.predict import predict_image
from gearnn_ray.video.decoding import VideoFrame, decoded
from gearnn_ray.video.sources import open_source
from gearnn_ray.video.stream_levels import StreamLevels

Pixels = NDArray[np.uint8]
UNLABELLED = 11  # CamVid's class of pixels without a label
SURE, UNSURE = 0.5, 0.2  # scores of the original's own answers: from the one on they are labels, between both they do not count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default="artifacts")
    parser.add_argument("--release", default="drn22-camvid-video:latest")
    parser.add_argument("--trust", nargs="*", default=[])
    parser.add_argument("--frames", help="folder of the clip's frames, in order of their names")
    parser.add_argument("--labels", help="folder of their label images, of the same names")
    parser.add_argument("--video", help="a video without labels, instead of both")
    parser.add_argument("--every", type=int, default=1, help="of the video, use one frame of so many")
    parser.add_argument("--rate", type=int, default=15, help="frames a second")
    parser.add_argument(
        "--ladder", nargs="+", required=True, help="WIDTHxHEIGHT:CRF of each second in turn; *B behind it: darkened"
    )
    parser.add_argument("--full", action="store_true", help="also the fully fine-tuned networks, which the release must hold")
    parser.add_argument("--csv", help="file for a row per frame")
    options = parser.parse_args()

    if options.video:
        frames = pristine(options.video, options.every)
        targets = own_answers(frames, options)
    else:
        names = sorted(os.listdir(options.frames))
        frames = [np.asarray(Image.open(Path(options.frames, name)).convert("RGB")) for name in names]
        labels = [np.asarray(Image.open(Path(options.labels, name))) for name in names]
        targets = [np.where(label == UNLABELLED, IGNORED, label).astype(np.uint8) for label in labels]
    steps = [options.ladder[(number // options.rate) % len(options.ladder)] for number in range(len(frames))]
    stream = list(encoded_ladder(frames, steps, options.rate))
    assert len(stream) == len(frames), (len(stream), len(frames))
    evidence = {name: judged(name, stream, targets, options) for name in methods(options)}
    task = AdaptiveModel.pull(options.store, options.release, trust=options.trust).task
    report(evidence, steps, options.rate, task, options.csv)


def pristine(path: str, every: int) -> list[Pixels]:
    source = open_source(path)
    try:
        return [frame.pixels for frame in itertools.islice(decoded(source.container), 0, None, every)]
    finally:
        source.close()


@torch.inference_mode()
def own_answers(frames: Sequence[Pixels], options: argparse.Namespace) -> list[Any]:
    """What the original detector finds with a score of 0.5 and more, as labels; what it finds with less does not count."""
    model = AdaptiveModel.pull(options.store, options.release, trust=options.trust)
    targets = []
    for pixels in frames:
        found = model(torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous(), [CLEAN.name])[0]
        likely = found["scores"] >= UNSURE
        boxes = found["boxes"][likely].numpy()
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        unsure = found["scores"][likely].numpy() < SURE
        targets.append(Objects(boxes, found["labels"][likely].numpy(), areas, unsure, pixels.shape[:2]))
    print(f"{sum(int((~each.crowd).sum()) for each in targets)} objects in {len(frames)} pristine frames", flush=True)
    return targets


def methods(options: argparse.Namespace) -> list[str]:
    return ["original", "nearest", "interpolate", "entropy", *(["network per level"] if options.full else [])]


def encoded_ladder(frames: Sequence[Pixels], steps: Sequence[str], rate: int) -> Iterator[VideoFrame]:
    """The frames after encoding each run of equal steps on its own, decoded as a stream."""
    file, first = io.BytesIO(), 0
    with av.open(file, "w", format="mpegts") as output:
        video: Any = output.add_stream("libx264", rate=rate)
        video.height, video.width, _ = frames[0].shape
        video.pix_fmt = "yuv420p"
        for _, group in itertools.groupby(range(len(frames)), lambda index: index // rate):
            run = list(group)
            for packet in encoded([frames[index] for index in run], steps[run[0]], rate):
                packet.pts, packet.dts, packet.stream = packet.pts + first, packet.dts + first, video
                output.mux(packet)
            first += len(run)
    with av.open(io.BytesIO(file.getvalue()), format="mpegts") as container:
        yield from decoded(cast(InputContainer, container))


def encoded(frames: Sequence[Pixels], step: str, rate: int) -> Iterator[Any]:
    size, _, rest = step.partition(":")
    crf, _, light = rest.partition("*")
    width, height = map(int, size.split("x"))
    encoder = x264_encoder((height, width), Fraction(rate), {"preset": "medium", "crf": crf})
    for number, pixels in enumerate(frames):
        darker = (pixels * float(light or 1) + 0.5).clip(0, 255).astype(np.uint8)
        scaled = np.asarray(Image.fromarray(darker).resize((width, height), Image.Resampling.BICUBIC))
        frame = av.VideoFrame.from_ndarray(scaled, format="rgb24")
        frame.pts = number
        yield from encoder.encode(frame)
    yield from encoder.encode(None)


@torch.inference_mode()
def judged(method: str, stream: Sequence[VideoFrame], targets: Sequence[Pixels], options: argparse.Namespace) -> dict[str, Any]:
    """The evidence of every frame, and the level used for it."""
    untrained = method if method in ("interpolate", "entropy") else "nearest"
    store = Store(options.store)
    release = store.pull(options.release)
    model = AdaptiveModel(release, untrained=untrained, trust=options.trust)
    levels = StreamLevels(model.level_estimator, method)
    classes = len(release.content.model.class_names)
    full = {}
    found, used = [], []
    for frame, target in zip(stream, targets, strict=True):
        estimate = levels.estimate(frame.evidence)
        size = frame.pixels.shape[:2]
        if method == "network per level":
            if estimate.level not in full:
                entry = release.content.levels[estimate.level].full
                state = release.base_state() if entry is None else store.get_state(entry.digest)
                full[estimate.level] = predictor(release.content, released_network(release, state, options.trust))
            prediction = predict_image(model.task, full[estimate.level], frame.pixels, torch.device("cpu"))
        else:
            images = torch.from_numpy(frame.pixels).permute(2, 0, 1)[None].contiguous()
            prediction = model(images, [CLEAN.name if method == "original" else estimate])[0]
        found.append(model.task.evidence(prediction, target, size, classes))
        used.append("clean" if method == "original" else estimate.spelled)
    stacked = {name: torch.stack([each[name] for each in found]) for name in found[0]}
    print(f"{method}: judged", flush=True)
    return {"evidence": stacked, "used": used}


def report(evidence: dict[str, dict[str, Any]], steps: Sequence[str], rate: int, task: Any, csv: str | None) -> None:
    N = len(steps)
    seconds = np.arange(N) // rate
    draws = np.random.default_rng(0).integers(0, seconds.max() + 1, (1000, seconds.max() + 1))
    weights_RN = np.stack([np.bincount(draw, minlength=seconds.max() + 1)[seconds] for draw in draws]).astype(float)
    parts = {"all": np.ones(N, bool)} | {step: np.array([each == step for each in steps]) for step in dict.fromkeys(steps)}
    scores = {}
    for method, judgement in evidence.items():
        scores[method] = [float(task.first_metric(judgement["evidence"], part[None].astype(float))[0]) for part in parts.values()]
    print(f"{'':20}" + "".join(f"{part:>18}" for part in parts))
    for method, row in scores.items():
        print(f"{method:20}" + "".join(f"{score:18.1f}" for score in row))
    base = task.first_metric(evidence["original"]["evidence"], weights_RN)
    for method, judgement in evidence.items():
        low, high = np.percentile(task.first_metric(judgement["evidence"], weights_RN) - base, [2.5, 97.5])
        print(
            f"{method:20} minus original, all frames: {scores[method][0] - scores['original'][0]:+.1f} [{low:+.1f}, {high:+.1f}]"
        )
    for method, judgement in evidence.items():
        spans = [f"{level} × {len(list(group))}" for level, group in itertools.groupby(judgement["used"])]
        print(f"{method:20} {'; '.join(spans)[:600]}")
    if csv:
        rows = ["frame,step,method,level,score"]
        for method, judgement in evidence.items():
            each = task.first_metric(judgement["evidence"], np.eye(N))
            rows += [f"{n},{steps[n]},{method},{judgement['used'][n]},{each[n]:.2f}" for n in range(N)]
        Path(csv).write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
