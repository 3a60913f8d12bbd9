"""What experiment trackers get at a job's end (`reporting.tracking`): scores by curve, and texts such as the release."""

from collections import defaultdict
from collections.abc import Mapping
from statistics import fmean
from typing import TYPE_CHECKING

from gearnn_ray.config.release_jobs import EvaluateConfig, SweepConfig
from gearnn_ray.config.split import SplitConfig
from gearnn_ray.reporting.summary import NETWORKS

if TYPE_CHECKING:
    from gearnn_ray.evaluation.findings import Outcome as Evaluated
    from gearnn_ray.offline.pipeline import Outcome
    from gearnn_ray.sweep.pipeline import Outcome as Swept

Results = tuple[dict[str, float | None], dict[str, str | None]]
"""Scores in percent by curve, and texts by name; what is None is left out."""


def split_results(config: SplitConfig, outcome: "Outcome") -> Results:
    """Every level's scores, and the release."""
    scores = {f"{row.level}/{network}": getattr(row, network) for row in outcome.summary for network in NETWORKS}
    release = outcome.release and f"{config.name}@{outcome.release}"
    return scores, {"release": release, "tag": release and outcome.tag, **_failures(outcome.failed)}


def evaluation_results(config: EvaluateConfig, outcome: "Evaluated") -> Results:
    """Every method's score at every level, mean over seeds, and where the report is."""
    values = defaultdict[str, list[float]](list)
    for row in outcome.accuracy:
        values[f"{row['level']}/{row['method']}"].append(row["value"])
    facts = {"release": config.release, "report": outcome.report, **_failures(outcome.failed)}
    return {name: fmean(each) for name, each in values.items()}, facts


def sweep_results(config: SweepConfig, outcome: "Swept") -> Results:
    """Every budget's score at every level, and which one is recommended."""
    scores: dict[str, float | None] = {
        f"{point.budget} {point.importance}/{result.level}": result.adaptor
        for point in outcome.points
        for result in point.results
    }
    name = config.release.partition("@")[0].partition(":")[0]
    release = outcome.release and f"{name}@{outcome.release}"
    return scores, {"recommendation": outcome.sentence, "release": release, **_failures(outcome.failed)}


def _failures(failed: Mapping[str, str]) -> dict[str, str | None]:
    return {f"failed/{label}": reason for label, reason in failed.items()}
