"""What a comparison of methods found, as plain values: bandwidth at equal accuracy, and the rows of the table."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Final

import numpy as np

from gearnn_ray.knobs.controller import Goal
from gearnn_ray.knobs.methods import METHODS, STEERED, Table, Walk, walks
from gearnn_ray.knobs.outcome import ADAPTED, NETWORKS, ORIGINAL, Outcomes
from gearnn_ray.knobs.streams import Stretch
from gearnn_ray.levels.level import CLEAN

SUFFIX = {ORIGINAL: "", ADAPTED: "+gearnn"}


@dataclass(frozen=True, eq=False)
class Replayed:
    """One source: its outcomes and every method's runs over each of the networks. name: of the source."""

    name: str
    tables: Mapping[str, Table]
    levels: Mapping[str, Sequence[Sequence[str]]]  # by network, of each segment and configuration
    walks: Mapping[str, Sequence[Walk]]
    seconds: Mapping[str, tuple[float, float, float]]  # by network: of a segment's inference, a gradient, and an encoding
    has_labels: bool
    stretches: tuple[Stretch, ...] = ()  # between known changes of the content

    @property
    def best_accuracy(self) -> float:
        """Of the original network with the best values, percent."""
        number = next(walk for walk in self.walks[ORIGINAL] if walk.method == "fixed")
        return number.accuracy(self.tables[ORIGINAL])

    @property
    def is_adapted(self) -> bool:
        """Whether the adaptive network is another than the original one at any configuration."""
        return any(level != CLEAN.name for segment in self.levels[ADAPTED] for level in segment)

    def remarks(self) -> Iterator[str]:
        """What a reader must know of the comparison."""
        segments = self.tables[ORIGINAL].segments
        if empty := int(np.isnan(self.tables[ORIGINAL].accuracy[:, 0]).sum()):
            yield f"{empty} of {segments} segments have nothing to find, and count for the bandwidth alone"
        if not self.is_adapted:
            yield (
                "the release has no level that is nearer to any configuration than the undistorted one, so that +gearnn is the "
                "original network here"
            )

    def pairs(self) -> Iterator[tuple[str, Table, Walk]]:
        """The network's name, its table, and each run."""
        for network, table in self.tables.items():
            for walk in self.walks[network]:
                yield network, table, walk


@dataclass(frozen=True)
class Found:
    """One method on one source at equal accuracy: its cheapest run that reaches it; numbers are None where no run does.

    kilobits: a second. accuracy: percent. to_fixed, to_profiling: difference of the bandwidth in percent of that of the best
    fixed configuration, and of profiling, over the same network. of_oracle: percent of the saving that the oracle has against
    the best fixed configuration. forwards: forward passes a segment. encodes: a segment. overhead: of the gradient, in percent
    of a segment's inference; None for methods without.
    """

    source: str
    method: str
    kilobits: float | None = None
    accuracy: float | None = None
    to_fixed: float | None = None
    to_profiling: float | None = None
    of_oracle: float | None = None
    forwards: float | None = None
    encodes: float | None = None
    overhead: float | None = None


def replayed(
    name: str,
    tables: Mapping[str, Table],
    segments: Mapping[str, Sequence[Outcomes]],
    has_labels: bool,
    goal: Goal | None,
    stretches: tuple[Stretch, ...] = (),
) -> Replayed:
    """Every method over the outcomes of one source, by network."""
    return Replayed(
        name,
        tables,
        {network: [each.level for each in found] for network, found in segments.items()},
        {network: walks(table, goal, SUFFIX[network]) for network, table in tables.items()},
        {network: _seconds(found) for network, found in segments.items()},
        has_labels,
        stretches,
    )


def _seconds(segments: Sequence[Outcomes]) -> tuple[float, float, float]:
    each = [(one.seconds_forward, one.seconds_gradient, one.seconds_encode) for one in segments]
    forward, gradient, encode = np.median(each, axis=0).tolist()
    return forward, gradient, encode


def cheapest(source: Replayed, method: str, network: str, accuracy: float) -> Walk | None:
    """The run of a method with the least bandwidth among those that reach an accuracy in percent."""
    table = source.tables[network]
    own = [walk for walk in source.walks[network] if walk.method == method + SUFFIX[network] and not walk.has_goal]
    reaching = [walk for walk in own if walk.accuracy(table) >= accuracy]
    return min(reaching, key=lambda walk: walk.bandwidth(table), default=None)


@dataclass(frozen=True)
class Held:
    """What a controller made of a ceiling or a floor. kilobits: a second. accuracy: percent; None with nothing to find."""

    source: str
    method: str
    kilobits: float
    accuracy: float | None


def with_goal(source: Replayed) -> list[Held]:
    """The runs with a goal."""
    found = []
    for _, table, walk in source.pairs():
        if walk.has_goal:
            accuracy = walk.accuracy(table)
            found.append(Held(source.name, walk.method, walk.bandwidth(table) / 1000, None if math.isnan(accuracy) else accuracy))
    return found


def at_equal_accuracy(source: Replayed, within: float) -> list[Found]:
    """Every method, at the accuracy of the original network with the best values less `within` points."""
    found = []
    for network in NETWORKS:
        runs = {method: cheapest(source, method, network, source.best_accuracy - within) for method in METHODS}
        table = source.tables[network]
        bits = {method: run.bandwidth(table) for method, run in runs.items() if run is not None}
        for method, run in runs.items():
            if run is None:
                found.append(Found(source.name, method + SUFFIX[network], overhead=_overhead(source, network, method)))
                continue
            saving = [bits["fixed"] - bits[each] for each in (method, "oracle")] if {"fixed", "oracle"} <= bits.keys() else []
            found.append(
                Found(
                    source.name,
                    run.method,
                    bits[method] / 1000,
                    run.accuracy(table),
                    _difference(bits[method], bits.get("fixed")),
                    _difference(bits[method], bits.get("profiling")),
                    100 * saving[0] / saving[1] if saving and saving[1] > 0 else None,
                    float(run.forwards.mean()),
                    float(run.encodes.mean()),
                    _overhead(source, network, method),
                )
            )
    return found


@dataclass(frozen=True)
class Average:
    """One method over several sources. sources: how many there are. reached: over how many of them it has a run at equal
    accuracy. Over these are the means, and the standard deviations (`_sd`) where there are two or more; None without.
    """

    method: str
    sources: int
    reached: int
    kilobits: float | None
    kilobits_sd: float | None
    to_fixed: float | None
    to_fixed_sd: float | None
    accuracy: float | None


def averages_of(found: Sequence[Found]) -> list[Average]:
    """Of every method, in the order in which they were found."""
    by_method: dict[str, list[Found]] = {}
    for each in found:
        by_method.setdefault(each.method, []).append(each)

    def average(method: str, own: Sequence[Found]) -> Average:
        kilobits, to_fixed, accuracy = (
            [value for each in own if (value := getattr(each, name)) is not None] for name in ("kilobits", "to_fixed", "accuracy")
        )
        return Average(method, len(own), len(kilobits), *_spread(kilobits), *_spread(to_fixed), _spread(accuracy)[0])

    return [average(method, own) for method, own in by_method.items()]


AVERAGE_HEADS: Final = ("kbit/s", "to best fixed", "accuracy", "clips")


def average_rows(averages: Sequence[Average], nothing: str) -> list[list[str]]:
    """A row for each method, with its name and a cell for each of `AVERAGE_HEADS`; `nothing` without."""

    def cell(mean: float | None, deviation: float | None, form: str, unit: str = "") -> str:
        if mean is None:
            return nothing
        return f"{mean:{form}}{unit}" + ("" if deviation is None else f" ± {deviation:{form.removeprefix('+')}}")

    return [
        [
            each.method,
            cell(each.kilobits, each.kilobits_sd, ",.1f"),
            cell(each.to_fixed, each.to_fixed_sd, "+.0f", "%"),
            cell(each.accuracy, None, ".1f"),
            f"{each.reached} of {each.sources}",
        ]
        for each in averages
    ]


def _spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and standard deviation."""
    return (fmean(values) if values else None, stdev(values) if len(values) > 1 else None)


def _overhead(source: Replayed, network: str, method: str) -> float | None:
    if STEERED.get(method) not in ("saliency", "signed"):
        return None
    return 100 * source.tables[network].gradient / source.tables[network].frames


def _difference(bits: float, other: float | None) -> float | None:
    return None if other is None else 100 * (bits / other - 1)


def rows_of(sources: Sequence[Replayed], goal: str | None) -> list[Mapping[str, object]]:
    """The rows of `tables.adapt_schema`. goal: of the runs that have one, ceiling or floor."""
    rows: list[Mapping[str, object]] = []
    for source in sources:
        runs: dict[str, int] = {}
        for network, table, walk in source.pairs():
            run = runs[walk.method] = runs.get(walk.method, -1) + 1
            steers = walk.method.partition("+")[0] in STEERED
            for t, number in enumerate(walk.chosen.tolist()):
                accuracy = float(table.accuracy[t, number])
                rows.append(
                    {
                        "source": source.name,
                        "method": walk.method,
                        "run": run,
                        "segment": t,
                        "bytes": int(table.bytes[t, number]),
                        "seconds": table.seconds,
                        "accuracy": None if math.isnan(accuracy) else accuracy,
                        "forward_equivalents": float(walk.forwards[t]),
                        "encodes": int(walk.encodes[t]),
                        "level": source.levels[network][t][number],
                        "price": walk.price,
                        "goal": goal if walk.has_goal else "trade" if steers else None,
                        **table.configurations[number],
                    }
                )
    return rows
