"""The weights that an evaluation makes at one level, and what it measures of them, on a tiny street without Ray."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PillowImage
from torch import Tensor, nn

from gearnn_ray.config.recipe import Criterion, Recipe
from gearnn_ray.core.events import Event
from gearnn_ray.data.dataset import open_dataset
from gearnn_ray.evaluation import baselines, measurements, runs
from gearnn_ray.evaluation.frequency import frequency_response
from gearnn_ray.evaluation.records import Evaluated, Weights
from gearnn_ray.evaluation.runs import WeightsSpec
from gearnn_ray.models.layers import layers_of, network_state, same_bits, tensors_of
from gearnn_ray.models.registry import build_model
from gearnn_ray.offline import job_spec
from gearnn_ray.offline.job_spec import JobSpec
from gearnn_ray.offline.level_run import fine_tune_fully, run_level
from gearnn_ray.store.releases import Store
from gearnn_ray.tasks.base import Image, score
from gearnn_ray.training.batch_norm import reestimate_statistics
from gearnn_ray.training.predict import Predictor, collect_evidence
from gearnn_ray.training.sampling import Subset, training_batches
from gearnn_ray.training.trainer import fine_tune
from tests import tiny
from tests.conftest import NORMALISATION, SEGMENTATION

LEVEL, SMALLER = "jpeg-10", "h264-32x24"
BUDGET = 300  # of the network's 895 floats: conv1 and its normalisation fit, conv2 does not
TRAIN, VAL = 10, 5
SEED = 4

WANTED = {
    wanted.method: wanted
    for wanted in (
        WeightsSpec("mixed", "all", SEED, 0.05, levels=(LEVEL, SMALLER, "brightness-0.4")),
        WeightsSpec("stability", "all", SEED, 0.05, alpha=1.0, sigma=0.1),
        WeightsSpec("clean-tuned", "all", SEED, 0.05),
        WeightsSpec("bn-statistics", LEVEL, SEED),
        WeightsSpec("bn-tuned", LEVEL, SEED, 0.05),
        WeightsSpec("first-block", LEVEL, SEED, 0.05, BUDGET),
        WeightsSpec("auto-rgn", LEVEL, SEED, 0.05, BUDGET),
        WeightsSpec("random", LEVEL, 4, 0.05, BUDGET, draw=1),
    )
}
TRAINING_DATA, VALIDATION_DATA = JobSpec.training_data, JobSpec.validation_data
PARTIAL = [method for method in WANTED if method not in baselines.CONSTANT]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny street, with some pixels of every label ignored."""
    folder = tmp_path_factory.mktemp("street")
    tiny.write_folder(folder / "data", TRAIN, VAL)
    tiny.write_weights(folder / "weights.safetensors")
    for number, path in enumerate(sorted(folder.glob("data/*/labels/*.png"))):
        label = np.array(PillowImage.open(path))
        label[: 2 + number % 3] = 255
        PillowImage.fromarray(label).save(path)
    return folder


@pytest.fixture(scope="module")
def fresh(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], JobSpec]:
    """The same job in a store that holds nothing but the base."""
    dataset = open_dataset("folder", str(data / "data"), num_classes=tiny.CLASSES)

    def make() -> JobSpec:
        recipe = Recipe(epochs=2, learning_rate=0.1, batch_size=4, crop=24, precision="float32")
        store = str(tmp_path_factory.mktemp("store"))
        return tiny.job_spec(data, store=store, data=dataset, recipe=recipe, budget=BUDGET, seed=SEED, keep_full=True)

    return make


@pytest.fixture(scope="module")
def spec(fresh: Callable[[], JobSpec]) -> JobSpec:
    """One store for all tests that only add to it."""
    return fresh()


@dataclass(frozen=True)
class Made:
    """One method's weights, its events, the levels that it read, and the network that it trained."""

    weights: Weights
    events: list[Event]
    read: list[str]
    network: dict[str, Tensor]


@pytest.fixture(scope="module")
def made(spec: JobSpec) -> dict[str, Made]:
    """Every baseline, made once."""
    result: dict[str, Made] = {}
    for method, wanted in WANTED.items():
        events: list[Event] = []
        read: list[str] = []
        left: list[dict[str, Tensor]] = []

        def take(model: nn.Module, base: Mapping[str, Tensor], chosen: Collection[str]) -> dict[str, Tensor]:
            left.append(network_state(model))  # noqa: B023
            return {n: left[-1][n] for n in tensors_of(layers_of(model), chosen)}  # noqa: B023

        def keep(model: nn.Module) -> dict[str, Tensor]:
            left.append(network_state(model))  # noqa: B023
            return left[-1]  # noqa: B023

        def training(spec: JobSpec, level: str) -> Any:
            read.append(level)  # noqa: B023
            return TRAINING_DATA(spec, level)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runs, "take_adaptor", take)  # the check it makes is made below
            patch.setattr(runs, "network_state", keep)
            patch.setattr(JobSpec, "training_data", training)
            weights = runs.make_weights(spec, wanted, events.append)
        result[method] = Made(weights, events, read, left[-1])
    return result


@pytest.fixture(scope="module")
def base(spec: JobSpec) -> dict[str, Tensor]:
    return Store(spec.store).get_state(spec.base)


def network(state: Mapping[str, Tensor]) -> nn.Module:
    model = build_model("tests.nets:small", tiny.CLASSES)
    model.load_state_dict(state)
    return model


def state_of(spec: JobSpec, digest: str | None) -> dict[str, Tensor]:
    store = Store(spec.store)
    return {**store.get_state(spec.base), **({} if digest is None else store.get_state(digest))}


def evaluate(model: nn.Module, images: Sequence[Image], labels: Sequence[Image]) -> float:
    """mIoU in percent."""
    (evidence,) = collect_evidence(SEGMENTATION, model, [Predictor(model, NORMALISATION)], images, labels, tiny.CLASSES)
    return score(SEGMENTATION, evidence)


def quiet(_: Event) -> None: ...


def kinds(events: Sequence[Event]) -> list[tuple[str, str]]:
    return [(event.kind, event.stage) for event in events if event.kind != "progress"]


class Counting(Sequence[Image]):
    """Images that note which of them are read."""

    def __init__(self, images: Sequence[Image], reads: list[int]) -> None:
        self._images, self._reads = images, reads
        self.shapes = getattr(images, "shapes", None)  # targets have none

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: Any) -> Any:
        if index < len(self):
            self._reads.append(index)
        return self._images[index]


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network may be built, and no images opened."""

    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError("computed again")

    monkeypatch.setattr(job_spec, "build_model", fail)
    monkeypatch.setattr(JobSpec, "training_data", fail)
    monkeypatch.setattr(JobSpec, "validation_data", fail)


# ── evaluation ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("level", [LEVEL, SMALLER, "clean"])
def test_evaluation_is_the_evaluation_of_a_fine_tune(spec: JobSpec, made: dict[str, Made], level: str) -> None:
    digests = [None, *(made[method].weights.digest for method in ("mixed", "bn-statistics", "first-block"))]
    evaluated = measurements.evaluate_weights(spec, level, digests, quiet)
    images, labels = spec.validation_data(level)
    assert list(evaluated) == digests
    for digest, each in evaluated.items():
        assert each.score == evaluate(network(state_of(spec, digest)), images, labels)
        evidence = measurements.evidence_of(spec, each)
        counts = evidence["counts"]
        assert counts.dtype == torch.int32
        assert counts.shape == (VAL, 3, 3)
        for image_counts, label in zip(counts, labels, strict=True):
            occurring = [int((label == k).sum()) for k in range(3)]
            assert image_counts.sum(1).tolist() == occurring  # rows are labels
        assert score(SEGMENTATION, evidence) == each.score
    assert len({each.evidence for each in evaluated.values()}) == 4


def test_one_pass_over_the_images_serves_all(
    fresh: Callable[[], JobSpec], spec: JobSpec, made: dict[str, Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = fresh()
    given: list[str | None] = [None]
    for method in ("clean-tuned", "bn-statistics", "random"):
        digest = made[method].weights.digest
        assert digest is not None
        given.append(Store(own.store).put_state(Store(spec.store).get_state(digest)).digest)
    image_reads, label_reads, events = list[int](), list[int](), list[Event]()

    def counted(spec: JobSpec, level: str) -> Any:
        images, labels = VALIDATION_DATA(spec, level)
        return Counting(images, image_reads), Counting(labels, label_reads)

    monkeypatch.setattr(JobSpec, "validation_data", counted)
    first = measurements.evaluate_weights(own, LEVEL, given[:3], events.append)
    assert image_reads == label_reads == list(range(VAL))
    assert kinds(events) == [("started", "evaluation"), ("finished", "evaluation")]

    # a second time nothing is evaluated, and with more weights only the new ones
    events.clear()
    assert measurements.evaluate_weights(own, LEVEL, given[:3], events.append) == first
    assert kinds(events) == [("reused", "evaluation")]
    assert len(image_reads) == VAL
    passes = count_networks(monkeypatch)
    more = measurements.evaluate_weights(own, LEVEL, given, events.append)
    assert passes == [1]
    assert {digest: more[digest] for digest in given[:3]} == first
    # another level has results of its own
    measurements.evaluate_weights(own, "clean", given[:2], quiet)
    assert passes == [1, 2]
    # lost evidence is collected again, and so is altered evidence
    blob = Path(own.store) / "blobs" / "sha256" / first[None].evidence.removeprefix("sha256:")
    blob.unlink()
    assert measurements.evaluate_weights(own, LEVEL, given, quiet) == more
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    assert measurements.evaluate_weights(own, LEVEL, given, quiet) == more
    assert passes == [1, 2, 1, 1]
    assert measurements.evidence_of(own, first[None])["counts"].sum() > 0


def count_networks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of networks of every pass over images."""
    passes: list[int] = []

    def collect(task: Any, model: nn.Module, predictors: Sequence[Predictor], *rest: Any) -> Any:
        passes.append(len(predictors))
        return collect_evidence(task, model, predictors, *rest)

    monkeypatch.setattr(measurements, "collect_evidence", collect)
    return passes


def test_equal_weights_are_evaluated_once(fresh: Callable[[], JobSpec], monkeypatch: pytest.MonkeyPatch) -> None:
    passes = count_networks(monkeypatch)
    assert len(measurements.evaluate_weights(fresh(), LEVEL, [None, None], quiet)) == 1
    assert passes == [1]


# ── baselines' weights ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", PARTIAL)
def test_a_partial_baseline_is_the_base_outside_its_layers(
    spec: JobSpec, made: dict[str, Made], base: dict[str, Tensor], method: str
) -> None:
    weights, left = made[method].weights, made[method].network
    assert weights.digest is not None
    state = Store(spec.store).get_state(weights.digest)
    assert weights.floats == sum(tensor.numel() for tensor in state.values())
    assert left.keys() == base.keys()
    assert all(same_bits(left[name], base[name]) for name in base if name not in state)
    assert all(same_bits(left[name], tensor) for name, tensor in state.items())
    assert any(not same_bits(base[name], tensor) for name, tensor in state.items())
    if method in ("first-block", "auto-rgn", "random"):
        assert 0 < weights.floats <= BUDGET


def test_each_partial_baseline_adapts_its_own_layers(spec: JobSpec, made: dict[str, Made], base: dict[str, Tensor]) -> None:
    model = network(base)
    layers = layers_of(model)
    expected = {
        "bn-statistics": baselines.statistics_layers(model),
        "bn-tuned": baselines.norm_layers(model),
        "first-block": ("conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_stats"),
        "random": baselines.random_layers(model, BUDGET, 1),
    }
    for method, chosen in expected.items():
        digest = made[method].weights.digest
        assert digest is not None
        assert set(Store(spec.store).get_state(digest)) == set(tensors_of(layers, chosen))


@pytest.mark.parametrize("method", ["mixed", "stability", "clean-tuned"])
def test_a_constant_baseline_is_a_whole_network(
    spec: JobSpec, made: dict[str, Made], base: dict[str, Tensor], method: str
) -> None:
    weights = made[method].weights
    assert weights.digest is not None
    state = Store(spec.store).get_state(weights.digest)
    assert state.keys() == base.keys()
    assert weights.floats == sum(tensor.numel() for tensor in base.values())
    assert not same_bits(state["conv2.weight"], base["conv2.weight"])
    assert same_bits(state["up.weight"], base["up.weight"])


def test_baselines_see_their_own_levels(made: dict[str, Made]) -> None:
    for method, each in made.items():
        expected = {"mixed": list(WANTED["mixed"].levels), "stability": ["clean"], "clean-tuned": ["clean"]}
        assert each.read == expected.get(method, [LEVEL])


def test_no_two_baselines_are_the_same(made: dict[str, Made]) -> None:
    assert len({each.weights.digest for each in made.values()}) == len(WANTED)


def test_what_they_say(made: dict[str, Made]) -> None:
    labels = {method: method for method in made} | {"stability": "stability α 1 σ 0.1", "random": "random draw 2"}
    for method, each in made.items():
        assert {event.stage for event in each.events} == {labels[method]}
        assert {event.level for event in each.events} == {WANTED[method].level}
        assert [event.kind for event in each.events][:: len(each.events) - 1] == ["started", "finished"]
        if method != "bn-statistics":
            last = each.events[-2]
            assert (last.kind, last.step, last.steps, last.epoch, last.epochs) == ("progress", 4, 4, 2, 2)


@pytest.mark.parametrize("method", WANTED)
def test_what_is_made_is_not_made_again(
    spec: JobSpec, made: dict[str, Made], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid(monkeypatch)
    events: list[Event] = []
    assert runs.make_weights(spec, WANTED[method], events.append) == made[method].weights
    assert kinds(events) == [("reused", made[method].events[0].stage)]


def test_the_control_is_a_plain_fine_tune_at_its_learning_rate(
    spec: JobSpec, made: dict[str, Made], base: dict[str, Tensor]
) -> None:
    model = network(base)
    recipe = spec.recipe.model_copy(update={"learning_rate": 0.05})
    fine_tune(SEGMENTATION, model, *spec.training_data("clean"), recipe, NORMALISATION, "float32", chosen=None, seed=SEED)
    by_hand = network_state(model)
    assert all(same_bits(by_hand[name], tensor) for name, tensor in made["clean-tuned"].network.items())


def test_statistics_are_those_of_the_levels_training_images(
    spec: JobSpec, made: dict[str, Made], base: dict[str, Tensor]
) -> None:
    model = network(base)
    batches = training_batches(SEGMENTATION, *spec.training_data(LEVEL), 4, (24, 24), (SEED, 0))
    reestimate_statistics(model, batches, NORMALISATION, "float32")
    by_hand = network_state(model)
    assert all(same_bits(by_hand[name], tensor) for name, tensor in made["bn-statistics"].network.items())


def test_auto_rgn_trains_with_its_rates(spec: JobSpec, made: dict[str, Made], base: dict[str, Tensor]) -> None:
    images, labels = spec.training_data(LEVEL)
    model = network(base)
    rgn = baselines.relative_gradients(SEGMENTATION, model, images, labels, NORMALISATION, 4, 24, SEED, "float32")
    chosen, rates = baselines.auto_rgn(model, BUDGET, rgn)
    recipe = spec.recipe.model_copy(update={"learning_rate": 0.05})
    fine_tune(SEGMENTATION, model, images, labels, recipe, NORMALISATION, "float32", chosen=chosen, seed=SEED, rates=rates)
    by_hand = network_state(model)
    assert min(rates.values()) < 0.9
    assert all(same_bits(by_hand[name], tensor) for name, tensor in made["auto-rgn"].network.items())


@pytest.mark.parametrize(
    ("method", "change"),
    [
        ("stability", {"alpha": 2.0}),
        ("stability", {"sigma": 0.04}),
        ("mixed", {"levels": (LEVEL, SMALLER)}),
        ("bn-tuned", {"learning_rate": 0.02}),
        ("bn-tuned", {"seed": SEED + 1}),
        ("bn-tuned", {"level": "brightness-0.4"}),
        ("random", {"seed": 3}),
        ("random", {"draw": 0}),
        ("random", {"budget": 60}),
    ],
)
def test_other_inputs_make_other_weights(spec: JobSpec, made: dict[str, Made], method: str, change: dict[str, Any]) -> None:
    events: list[Event] = []
    other = runs.make_weights(spec, replace(WANTED[method], **change), events.append)
    assert kinds(events)[0][0] == "started"
    assert other.digest != made[method].weights.digest


def test_another_recipe_or_base_makes_them_anew(spec: JobSpec, made: dict[str, Made], base: dict[str, Tensor]) -> None:
    other_base = Store(spec.store).put_state({name: tensor + 0.01 for name, tensor in base.items()}).digest
    for other in (replace(spec, recipe=spec.recipe.model_copy(update={"epochs": 1})), replace(spec, base=other_base)):
        events: list[Event] = []
        runs.make_weights(other, WANTED["bn-statistics"], events.append)
        assert kinds(events)[0][0] == "started"


def test_a_lost_blob_is_made_again(fresh: Callable[[], JobSpec], made: dict[str, Made]) -> None:
    own, wanted = fresh(), WANTED["bn-tuned"]
    weights = runs.make_weights(own, wanted, quiet)
    assert weights == made["bn-tuned"].weights
    assert weights.digest is not None
    (Path(own.store) / "blobs" / "sha256" / weights.digest.removeprefix("sha256:")).unlink()
    events: list[Event] = []
    assert runs.make_weights(own, wanted, events.append) == weights
    assert kinds(events)[0][0] == "started"
    assert Store(own.store).is_intact(weights.digest)


def test_where_nothing_fits_it_is_the_base(spec: JobSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    for method in ("first-block", "random", "auto-rgn"):
        wanted = replace(WANTED[method], budget=1)
        assert runs.make_weights(spec, wanted, quiet) == Weights(None, 0)
        events: list[Event] = []
        assert runs.make_weights(spec, wanted, events.append) == Weights(None, 0)
        assert kinds(events)[0][0] == "reused"


class _KilledError(BaseException):
    """As a process dies: nothing in the code under test catches it."""


def killed_in_epoch_2(events: list[Event]) -> Callable[[Event], None]:
    def emit(event: Event) -> None:
        events.append(event)
        if event.kind == "progress" and event.epoch == 2:
            raise _KilledError

    return emit


def checkpoints(spec: JobSpec) -> list[Path]:
    return [p for p in Path(spec.store).rglob("*") if p.is_file() and "checkpoint" in str(p.relative_to(spec.store))]


@pytest.mark.parametrize("method", ["mixed", "stability", "bn-tuned", "auto-rgn"])
def test_a_killed_fine_tune_goes_on_from_its_checkpoint(fresh: Callable[[], JobSpec], made: dict[str, Made], method: str) -> None:
    own, wanted = fresh(), WANTED[method]
    with pytest.raises(_KilledError):
        runs.make_weights(own, wanted, killed_in_epoch_2([]))
    assert len(checkpoints(own)) == 1
    events: list[Event] = []
    weights = runs.make_weights(own, wanted, events.append)
    assert {event.epoch for event in events if event.kind == "progress"} == {2}
    assert weights == made[method].weights
    assert checkpoints(own) == []


# ── tuning ───────────────────────────────────────────────────────────────────────────────────────────────────────


KEPT = TRAIN - TRAIN // 5
TUNED = {
    "switching": WeightsSpec("switching", LEVEL, SEED, 0.05),
    "gearnn": WeightsSpec("gearnn", LEVEL, SEED, 0.05, layers=("bn1.weight", "head.weight", "head.bias")),
    **{method: wanted for method, wanted in WANTED.items() if method != "bn-statistics"},
}


@dataclass
class Reads:
    """The levels opened and the positions read, images and labels alike."""

    levels: list[str] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> tuple[Reads, Reads]:
    """What of the training part is read to train, and what after that."""
    training, after = Reads(), Reads()
    real_train, phase = runs._train, [after]

    def data(spec: JobSpec, level: str) -> tuple[Sequence[Image], Sequence[Image]]:
        phase[0].levels.append(level)
        images, labels = TRAINING_DATA(spec, level)
        return Counting(images, phase[0].positions), Counting(labels, phase[0].positions)

    def train(*arguments: Any) -> Any:
        phase[0] = training
        try:
            return real_train(*arguments)
        finally:
            phase[0] = after

    monkeypatch.setattr(JobSpec, "training_data", data)
    monkeypatch.setattr(runs, "_train", train)
    return training, after


@pytest.mark.parametrize("method", TUNED)
def test_held_back_images_are_evaluated_on_and_not_trained_on(
    fresh: Callable[[], JobSpec], reads: tuple[Reads, Reads], method: str
) -> None:
    own = fresh()
    score = runs.tune(own, TUNED[method], LEVEL, quiet)
    assert 0 < score <= 100
    training, after = reads
    assert set(training.positions) == set(range(KEPT))
    assert Counter(after.positions) == dict.fromkeys(range(KEPT, TRAIN), 2)  # image and label
    constant = {"mixed": list(WANTED["mixed"].levels), "stability": ["clean"], "clean-tuned": ["clean"]}
    assert training.levels == constant.get(method, [LEVEL])
    assert after.levels == [LEVEL]


def test_the_score_is_of_the_network_trained_on_the_rest(spec: JobSpec, base: dict[str, Tensor]) -> None:
    model = network(base)
    images, labels = spec.training_data(LEVEL)
    kept, held = range(KEPT), range(KEPT, TRAIN)
    recipe = spec.recipe.model_copy(update={"learning_rate": 0.05})
    layers = TUNED["gearnn"].layers
    fine_tune(
        SEGMENTATION, model, Subset(images, kept), Subset(labels, kept), recipe, NORMALISATION, "float32", chosen=layers,
        seed=SEED,
    )  # fmt: skip
    expected = evaluate(model, Subset(images, held), Subset(labels, held))
    assert runs.tune(spec, TUNED["gearnn"], LEVEL, quiet) == expected


def test_a_score_is_stored(spec: JobSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, events = replace(TUNED["switching"], learning_rate=0.03), list[Event]()
    score = runs.tune(spec, wanted, LEVEL, events.append)
    label = "tuning: switching at 0.03"
    assert kinds(events) == [("started", label), ("finished", label)]
    assert events[-1].score == score
    assert runs.tune(spec, wanted, "clean", quiet) != score  # trained alike, evaluated elsewhere
    forbid(monkeypatch)
    events.clear()
    assert runs.tune(spec, wanted, LEVEL, events.append) == score
    assert kinds(events) == [("reused", label)]
    # what was tuned without a fifth of the images is not the method's weights
    with pytest.raises(AssertionError, match="computed again"):
        runs.make_weights(spec, wanted, quiet)


def test_a_learning_rate_that_diverges_is_worth_nothing_and_remembered(
    fresh: Callable[[], JobSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    own, wanted = fresh(), replace(TUNED["switching"], learning_rate=1e20)
    assert runs.tune(own, wanted, LEVEL, quiet) == float("-inf")
    assert checkpoints(own) == []
    forbid(monkeypatch)
    events: list[Event] = []
    assert runs.tune(own, wanted, LEVEL, events.append) == float("-inf")
    assert [event.kind for event in events] == ["reused"]


def test_a_killed_tuning_goes_on(fresh: Callable[[], JobSpec]) -> None:
    own, wanted = fresh(), TUNED["mixed"]
    undisturbed = runs.tune(fresh(), wanted, LEVEL, quiet)
    with pytest.raises(_KilledError):
        runs.tune(own, wanted, LEVEL, killed_in_epoch_2([]))
    events: list[Event] = []
    assert runs.tune(own, wanted, LEVEL, events.append) == undisturbed
    assert {event.epoch for event in events if event.kind == "progress"} == {2}
    assert checkpoints(own) == []


# ── the main methods ─────────────────────────────────────────────────────────────────────────────────────────────


MAIN = ["switching", "selection", "gearnn"]


def test_what_the_split_job_made_is_found(fresh: Callable[[], JobSpec]) -> None:
    own = fresh()
    split = run_level(own, LEVEL, quiet)
    known: list[Event] = []
    main = runs.make_main(own, own, LEVEL, [BUDGET], known.append)
    assert kinds(known) == [("reused", stage) for stage in MAIN]
    assert {event.level for event in known} == {LEVEL}
    assert main.switching == Weights(split.full_digest, 895)
    assert main.gearnn == {BUDGET: Weights(split.digest, split.floats)}
    assert main.layers == split.layers
    assert main.sensitivity == split.sensitivity

    # another learning rate for the adaptor: the full fine-tune and its selection stay
    events: list[Event] = []
    adaptor = replace(own, recipe=own.recipe.model_copy(update={"learning_rate": 0.02}))
    other = runs.make_main(own, adaptor, LEVEL, [BUDGET], events.append)
    assert kinds(events) == [
        ("reused", "switching"), ("reused", "selection"), ("started", "gearnn"), ("finished", "gearnn"),
    ]  # fmt: skip
    assert other.switching == main.switching
    assert other.layers == main.layers
    assert other.gearnn[BUDGET].digest != split.digest
    assert other.gearnn[BUDGET].floats == split.floats

    # a further budget: one more selection and fine-tune, the release's own first
    events.clear()
    both = runs.make_main(own, own, LEVEL, [BUDGET, 40], events.append, " 2")
    assert [stage for kind, stage in kinds(events) if kind == "reused"] == ["switching 2", "selection 2", "gearnn 2"]
    assert [stage for kind, stage in kinds(events) if kind == "finished"] == ["selection 2", "gearnn 2"]
    assert list(both.gearnn) == [BUDGET, 40]
    assert both.layers == main.layers
    assert 0 < both.gearnn[40].floats <= 40
    assert all(set(Store(own.store).get_state(w.digest)) < set(state_of(own, None)) for w in both.gearnn.values() if w.digest)

    # another learning rate for the full fine-tune: all is made anew
    events.clear()
    full = replace(own, recipe=own.recipe.model_copy(update={"learning_rate": 0.02}))
    assert runs.make_main(full, own, LEVEL, [BUDGET], events.append).switching != main.switching
    assert ("started", "switching") in kinds(events)
    assert ("started", "selection") in kinds(events)


def test_the_full_fine_tune_is_whole_however_short_a_one_chose_the_layers(fresh: Callable[[], JobSpec]) -> None:
    """Switching and the share of changed weights are of it; GearNN's layers and adaptor are the split's."""
    own = fresh()
    whole = run_level(own, LEVEL, quiet)
    short = replace(own, sensitivity_epochs=0.5)
    split = run_level(replace(short, keep_full=False), LEVEL, quiet)
    assert split.sensitivity != whole.sensitivity
    main = runs.make_main(short, short, LEVEL, [BUDGET], quiet)
    assert main.gearnn == {BUDGET: Weights(split.digest, split.floats)}
    assert main.layers == split.layers
    for each in (main, runs.released_main(short, LEVEL, None, quiet)):
        assert each.switching.digest == whole.full_digest
        assert each.sensitivity == whole.sensitivity


def test_with_a_control_gearnn_is_the_splits_too(fresh: Callable[[], JobSpec]) -> None:
    """It is made before the tasks of levels, each of which would make it; also where a shorter look chose the layers."""
    for changes in ({}, {"sensitivity_epochs": 0.5}):
        own = replace(fresh(), criterion=Criterion(against="clean", granularity="module"), **changes)  # type: ignore[arg-type]
        events: list[Event] = []
        fine_tune_fully(own, "clean", events.append)
        assert [(e.level, e.stage) for e in events if e.kind == "finished"] == [("clean", "full")]
        events.clear()
        main = runs.make_main(own, own, LEVEL, [BUDGET], events.append)
        assert {e.level for e in events if e.kind in ("started", "progress", "finished")} == {LEVEL}
        assert main.layers == runs.choose_layers(own, LEVEL, quiet)
        events.clear()
        split = run_level(own, LEVEL, events.append)
        assert {kind for kind, stage in kinds(events) if stage != "original"} == {"reused"}
        assert main.gearnn == {BUDGET: Weights(split.digest, split.floats)}
        assert main.sensitivity != split.compared


def test_a_split_finds_what_an_evaluation_made(fresh: Callable[[], JobSpec]) -> None:
    own = fresh()
    main = runs.make_main(own, own, LEVEL, [BUDGET], quiet)
    events: list[Event] = []
    split = run_level(own, LEVEL, events.append)
    assert [stage for kind, stage in kinds(events) if kind == "reused"] == ["full", "selection", "partial"]
    assert (split.full_digest, split.digest) == (main.switching.digest, main.gearnn[BUDGET].digest)


def test_full_weights_that_were_not_kept_are_made_again(fresh: Callable[[], JobSpec]) -> None:
    own = fresh()
    split = run_level(replace(own, keep_full=False), LEVEL, quiet)
    events: list[Event] = []
    main = runs.make_main(own, own, LEVEL, [BUDGET], events.append)
    assert [stage for kind, stage in kinds(events) if kind == "started"] == ["switching"]
    assert main.switching.digest is not None
    assert Store(own.store).is_intact(main.switching.digest)
    assert main.gearnn == {BUDGET: Weights(split.digest, split.floats)}


def test_the_layers_to_tune_are_the_splits(fresh: Callable[[], JobSpec]) -> None:
    own = fresh()
    events: list[Event] = []
    layers = runs.choose_layers(own, LEVEL, events.append)
    assert [stage for kind, stage in kinds(events) if kind == "finished"] == ["tuning: full", "tuning: selection"]
    assert runs.make_main(own, own, LEVEL, [BUDGET], quiet).layers == layers
    assert layers


def test_adaptors_are_mixed_in_the_store(spec: JobSpec, made: dict[str, Made], base: dict[str, Tensor]) -> None:
    lower, upper = made["first-block"].weights, made["random"].weights
    mixed = runs.mix_adaptors(spec, lower, upper, 0.25)
    assert lower.digest is not None
    assert upper.digest is not None
    assert mixed.digest is not None
    one, other, state = (Store(spec.store).get_state(w) for w in (lower.digest, upper.digest, mixed.digest))
    assert set(state) == set(one) | set(other)
    for name, tensor in state.items():
        expected = 0.75 * one.get(name, base[name]) + 0.25 * other.get(name, base[name])
        torch.testing.assert_close(tensor, expected)
    assert mixed.floats == sum(tensor.numel() for tensor in state.values())
    # the base itself is an adaptor of nothing
    alone = runs.mix_adaptors(spec, Weights(), upper, 1.0)
    assert alone.floats == upper.floats
    assert alone.digest == upper.digest


# ── a closer look ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_frequency_response_is_measured_once(spec: JobSpec, made: dict[str, Made], monkeypatch: pytest.MonkeyPatch) -> None:
    weights = made["first-block"].weights
    images, labels = spec.validation_data(LEVEL)
    monkeypatch.setattr(measurements, "FREQUENCY_IMAGES", 2)
    events: list[Event] = []
    found = measurements.frequency(spec, LEVEL, weights, "gearnn", events.append)
    spaced = [0, 2]  # of five
    expected = frequency_response(
        SEGMENTATION, network(state_of(spec, weights.digest)), Subset(images, spaced), Subset(labels, spaced), NORMALISATION
    )
    np.testing.assert_array_equal(found.response, expected)
    label = "frequency response: gearnn"
    assert kinds(events) == [("started", label), ("finished", label)]
    original = measurements.frequency(spec, LEVEL, Weights(), "original", quiet)
    assert original != found
    assert measurements.frequency(spec, "clean", Weights(), "original", quiet) != original
    monkeypatch.setattr(measurements, "FREQUENCY_IMAGES", 24)
    whole = measurements.frequency(spec, LEVEL, weights, "gearnn", quiet)
    np.testing.assert_array_equal(
        whole.response, frequency_response(SEGMENTATION, network(state_of(spec, weights.digest)), images, labels, NORMALISATION)
    )
    forbid(monkeypatch)
    events.clear()
    assert measurements.frequency(spec, LEVEL, weights, "gearnn", events.append) == whole
    assert kinds(events) == [("reused", label)]
    monkeypatch.setattr(measurements, "FREQUENCY_IMAGES", 2)
    assert measurements.frequency(spec, LEVEL, weights, "gearnn", quiet) == found


def test_the_picture_shown_is_the_one_of_median_gain(spec: JobSpec, made: dict[str, Made]) -> None:
    weights = made["mixed"].weights
    evaluated = measurements.evaluate_weights(spec, SMALLER, [None, weights.digest], quiet)
    seen = measurements.picture_of(spec, SMALLER, weights, evaluated[None], evaluated[weights.digest])
    images, labels = spec.validation_data(SMALLER)
    before, after = (network(state_of(spec, digest)) for digest in (None, weights.digest))

    def score_of(model: nn.Module, index: int) -> float:
        return evaluate(model, [images[index]], [labels[index]])

    gains = [score_of(after, index) - score_of(before, index) for index in range(VAL)]
    assert len(set(gains)) == VAL
    index = gains.index(sorted(gains)[VAL // 2])
    assert seen.sample == spec.data.val.ids[index]
    assert seen.scores == (score_of(before, index), score_of(after, index))
    assert np.array_equal(seen.image, images[index])
    assert np.array_equal(seen.target, labels[index])
    x = NORMALISATION(torch.from_numpy(images[index].copy()).permute(2, 0, 1)[None])
    for model, prediction in ((before, seen.original), (after, seen.adaptor)):
        with torch.inference_mode():
            assert np.array_equal(model.eval()(x)[0].argmax(0), prediction)
        assert prediction.dtype == np.uint8


def test_the_median_is_that_of_gains(spec: JobSpec) -> None:
    """Counts of one's own: neither the median score before or after nor the median distance is meant."""
    store = Store(spec.store)

    def evaluated(right: Sequence[int]) -> Evaluated:
        counts = [[[10, 0, 0], [10 - r, r, 0], [0, 0, 0]] for r in right]
        return Evaluated(0.0, store.put_state({"counts": torch.tensor(counts, dtype=torch.int32)}).digest)

    before, after = evaluated([0, 9, 6, 2, 1]), evaluated([4, 7, 8, 9, 2])
    seen = measurements.picture_of(spec, LEVEL, Weights(), before, after)
    assert seen.sample == spec.data.val.ids[2]
    assert np.array_equal(seen.original, seen.adaptor)
