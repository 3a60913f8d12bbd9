"""Does quality per region save bandwidth: tiles with quantisation of their own against one rate factor for the whole frame.

    uv run benchmarks/regions.py
    uv run benchmarks/regions.py --every 2 --seed 1 --release centre-video:latest

Generated streets, whose labels are known. Each segment is encoded at rate factors from 18 to 48, and at some of them with tiles
that are coarser by 0, 4, 8 or 12, chosen in closed form (`gearnn_ray.knobs.regions`) from the segment before, as a camera would:
by the network's gradient there (saliency), by all pixels alike (pixels) or by chance (random), each at two prices of a byte.
Printed are bandwidth and accuracy, means over segments, and how many points more or fewer that is than one rate factor gives at
the same bandwidth, linear in the logarithm of the bandwidth between two rate factors. The interval is a bootstrap over segments.
"""

import argparse
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from gearnn_ray.knobs.encoding import Encoded, decode, encode, shown
from gearnn_ray.knobs.objective import tile_errors
from gearnn_ray.knobs.regions import Regions, choose_tiles, tile_bytes, tile_energy
from gearnn_ray.knobs.saliency import saliency
from gearnn_ray.knobs.settings import Settings
from gearnn_ray.knobs.streams import Segment, generated_stream
from gearnn_ray.levels.level import CLEAN
from gearnn_ray.serving.adaptive_model import AdaptiveModel
from gearnn_ray.store.releases import Store

CRFS = (18, 22, 26, 30, 35, 40)
BASES = (18, 26)
OFFSETS = (0, 4, 8, 12)
PRICES = (0.5, 2.0)
"""Of a byte, as multiples of what the coarsest offset loses for the bytes that it saves."""
WEIGHTS = ("saliency", "pixels", "random")
RESAMPLES = 1000

Array = NDArray[np.float64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default="artifacts")
    parser.add_argument("--release", default="centre-video:latest", help="trained on generated scenes")
    parser.add_argument("--length", type=int, default=10, help="frames of a segment")
    parser.add_argument("--seed", type=int, default=0, help="of the streets")
    parser.add_argument("--every", type=int, default=1, help="measure one of so many segments")
    options = parser.parse_args()
    model = AdaptiveModel.pull(options.store, options.release)
    segments = list(generated_stream(Store(options.store).manifest(options.release)[1], options.length, options.seed).segments())
    uniform = [Settings(crf=crf) for crf in CRFS]
    names = [f"{base} {weights} {price:g}" for base in BASES for weights in WEIGHTS for price in PRICES]
    bits, accuracy = [], []
    for number in range(1, len(segments), options.every):
        settings = [*uniform, *with_regions(model, segments[number - 1], number)]
        encoded = [encode(segments[number].frames, each) for each in settings]
        found = [accuracy_of(model, segments[number], each) for each in encoded]
        if None not in found:
            bits.append([8 * len(each) / segments[number].seconds / 1000 for each in encoded])
            accuracy.append(found)
        print(f"segment {number} of {len(segments)}", flush=True)
    report(names, np.array(bits), np.array(accuracy, np.float64))


def with_regions(model: AdaptiveModel, past: Segment, seed: int) -> Iterator[Settings]:
    """By base, weights and price, with tiles from a segment that was sent at the base."""
    pristine, energy = np.stack(past.frames), tile_energy(past.frames)
    for base in BASES:
        plain, knob = Settings(crf=base), Regions(OFFSETS)
        last = decode(encode(past.frames, plain))[-1]
        encoded = [encode(past.frames, knob.encode(offset, plain)) for offset in OFFSETS]
        errors_q = np.stack([tile_errors(pristine, shown(each, past.frames)) for each in encoded])
        bytes_q = tile_bytes([len(each) for each in encoded], energy)
        weights_by_name = {
            "saliency": saliency(model.task, model.forward_at([CLEAN.name]), last, model.device),
            "pixels": np.ones(energy.shape),
            "random": np.random.default_rng(seed).exponential(size=energy.shape),
        }
        for name in WEIGHTS:
            scores_q = weights_by_name[name] * errors_q
            lost = scores_q[-1].sum() - scores_q[0].sum()
            price = lost / max(bytes_q[0].sum() - bytes_q[-1].sum(), 1.0)
            for factor in PRICES:
                yield knob.planned(choose_tiles(scores_q, bytes_q, factor * price)).encode(OFFSETS[-1], plain)


def accuracy_of(model: AdaptiveModel, segment: Segment, encoded: Encoded) -> float | None:
    """The original network's, percent; None where the labels have nothing to be found."""
    task, images = model.task, np.stack(decode(encoded))
    answers = model(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), [CLEAN.name] * len(images))
    count, targets = model.content.model.num_classes, segment.targets or ()
    each = [task.evidence(answer, target, encoded.size, count) for answer, target in zip(answers, targets, strict=True)]
    evidence = {name: torch.stack([one[name] for one in each]) for name in each[0]}
    if not task.target_summary(evidence).any():
        return None
    return float(task.first_metric(evidence, np.ones((1, len(each))))[0])


def report(names: Sequence[str], bits_TQ: Array, accuracy_TQ: Array) -> None:
    print(f"\none rate factor, {len(bits_TQ)} segments\n{'crf':>24} {'kbit/s':>8} {'points':>8}")
    for crf, bandwidth, points in zip(CRFS, bits_TQ.mean(0), accuracy_TQ.mean(0), strict=False):
        print(f"{crf:24} {bandwidth:8.1f} {points:8.1f}")
    generator = np.random.default_rng(0)
    samples = generator.integers(0, len(bits_TQ), (RESAMPLES, len(bits_TQ)))
    print(f"\ntiles\n{'base, weights, price':>24} {'kbit/s':>8} {'points':>8} {'to one rate factor':>30}")
    for place, name in enumerate(names, len(CRFS)):
        gains = [gain(bits_TQ[rows].mean(0), accuracy_TQ[rows].mean(0), place) for rows in samples]
        low, high = np.quantile(gains, (0.025, 0.975))
        own = gain(bits_TQ.mean(0), accuracy_TQ.mean(0), place)
        interval = f"{own:+.1f} [{low:+.1f}, {high:+.1f}]"
        print(f"{name:>24} {bits_TQ[:, place].mean():8.1f} {accuracy_TQ[:, place].mean():8.1f} {interval:>30}")


def gain(bits_Q: Array, accuracy_Q: Array, place: int) -> float:
    """Points above one rate factor at the same bandwidth."""
    count = len(CRFS)
    order = np.argsort(bits_Q[:count])
    equal = np.interp(np.log(bits_Q[place]), np.log(bits_Q[:count][order]), accuracy_Q[:count][order])
    return float(accuracy_Q[place] - equal)


if __name__ == "__main__":
    main()
