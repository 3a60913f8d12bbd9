"""What an evaluation makes and measures at one level, on a tiny street and in a store of its own: no Ray."""

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
from gearnn_ray.data.sampling import Subset
from gearnn_ray.evaluation import baselines, runs
from gearnn_ray.evaluation.baselines import reestimate_statistics
from gearnn_ray.evaluation.frequency import frequency_response
from gearnn_ray.evaluation.runs import Judged, Making, Weights
from gearnn_ray.models.layers import layers_of, network_state, same_bits, tensors_of
from gearnn_ray.models.registry import build_model
from gearnn_ray.offline.base import publish_given_base
from gearnn_ray.offline.job_spec import JobSpec, Network, training_data, validation_data
from gearnn_ray.offline.level_run import run_level
from gearnn_ray.store.releases import Store
from gearnn_ray.tasks import segmentation
from gearnn_ray.tasks.segmentation import Image
from gearnn_ray.training.trainer import evaluate, fine_tune
from tests import tiny
from tests.conftest import NORMALISATION

LEVEL, SMALLER = "jpeg-10", "h264-32x24"
BUDGET = 300  # of the network's 895 floats: conv1 and its normalisation fit, conv2 does not
TRAIN, VAL = 10, 5
SEED = 4

MAKINGS = {
    making.method: making
    for making in (
        Making("mixed", "all", SEED, 0.05, levels=(LEVEL, SMALLER, "brightness-0.4")),
        Making("stability", "all", SEED, 0.05, alpha=1.0, sigma=0.1),
        Making("clean-tuned", "all", SEED, 0.05),
        Making("bn-statistics", LEVEL, SEED),
        Making("bn-tuned", LEVEL, SEED, 0.05),
        Making("first-block", LEVEL, SEED, 0.05, BUDGET),
        Making("auto-rgn", LEVEL, SEED, 0.05, BUDGET),
        Making("random", LEVEL, 4, 0.05, BUDGET, draw=1),
    )
}
PARTIAL = [method for method in MAKINGS if method not in baselines.CONSTANT]


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
    """The same work in a store that holds nothing but the base."""
    spec = JobSpec(
        store="",
        cache=str(data / "cache"),
        network=Network("tests.nets:small", tiny.CLASSES, NORMALISATION),
        data=open_dataset("folder", str(data / "data"), num_classes=tiny.CLASSES),
        recipe=Recipe(epochs=2, learning_rate=0.1, batch_size=4, crop=24, precision="float32"),
        budget=BUDGET,
        seed=SEED,
        keep_full=True,
    )

    def make() -> JobSpec:
        own = replace(spec, store=str(tmp_path_factory.mktemp("store")))
        return replace(own, base=publish_given_base(own, str(data / "weights.safetensors")).digest)

    return make


@pytest.fixture(scope="module")
def spec(fresh: Callable[[], JobSpec]) -> JobSpec:
    """One store for all who only add to it."""
    return fresh()


@dataclass(frozen=True)
class Made:
    """One method's weights, what was said, at which levels it read, and the network it left behind."""

    weights: Weights
    said: list[Event]
    read: list[str]
    network: dict[str, Tensor]


@pytest.fixture(scope="module")
def made(spec: JobSpec) -> dict[str, Made]:
    """Every rival, made once."""
    result: dict[str, Made] = {}
    for method, making in MAKINGS.items():
        said: list[Event] = []
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
            return training_data(spec, level)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runs, "take_adaptor", take)  # the check it makes is made below
            patch.setattr(runs, "network_state", keep)
            patch.setattr(runs, "training_data", training)
            weights = runs.make_weights(spec, making, said.append)
        result[method] = Made(weights, said, read, left[-1])
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


def quiet(_: Event) -> None: ...


def kinds(said: Sequence[Event]) -> list[tuple[str, str]]:
    return [(event.kind, event.stage) for event in said if event.kind != "progress"]


class Counting(Sequence[Image]):
    """Images that note which of them are read."""

    def __init__(self, images: Sequence[Image], reads: list[int]) -> None:
        self._images, self._reads = images, reads
        self.shapes = images.shapes  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: Any) -> Any:
        if index < len(self):
            self._reads.append(index)
        return self._images[index]


def forbid(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """These of the stages' functions must not be called."""

    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError("computed again")

    for name in names:
        monkeypatch.setattr(runs, name, fail)


# ── judging ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("level", [LEVEL, SMALLER, "clean"])
def test_judging_is_the_evaluation_of_a_fine_tune(spec: JobSpec, made: dict[str, Made], level: str) -> None:
    digests = [None, *(made[method].weights.digest for method in ("mixed", "bn-statistics", "first-block"))]
    judged = runs.judge(spec, level, digests, quiet)
    images, labels = validation_data(spec, level)
    assert list(judged) == digests
    for digest, each in judged.items():
        expected = evaluate(network(state_of(spec, digest)), images, labels, NORMALISATION, "float32")
        assert each.score == expected
        counts = runs.counts_of(spec, each)
        assert counts.dtype == np.int64
        assert counts.shape == (VAL, 3, 3)
        for image_counts, label in zip(counts, labels, strict=True):
            occurring = [int((label == k).sum()) for k in range(3)]
            assert image_counts.sum(1).tolist() == occurring  # rows are labels
        assert segmentation.mean_iou(torch.from_numpy(counts.sum(0))) == each.score
    assert len({each.counts for each in judged.values()}) == 4


def test_one_pass_over_the_images_serves_all(
    fresh: Callable[[], JobSpec], spec: JobSpec, made: dict[str, Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = fresh()
    given: list[str | None] = [None]
    for method in ("clean-tuned", "bn-statistics", "random"):
        digest = made[method].weights.digest
        assert digest is not None
        given.append(Store(own.store).put_state(Store(spec.store).get_state(digest)).digest)
    image_reads, label_reads, said = list[int](), list[int](), list[Event]()

    def counted(spec: JobSpec, level: str) -> Any:
        images, labels = validation_data(spec, level)
        return Counting(images, image_reads), Counting(labels, label_reads)

    monkeypatch.setattr(runs, "validation_data", counted)
    first = runs.judge(own, LEVEL, given[:3], said.append)
    assert image_reads == label_reads == list(range(VAL))
    assert kinds(said) == [("started", "judging"), ("finished", "judging")]

    # a second time nothing is judged, and of more only what is new
    said.clear()
    assert runs.judge(own, LEVEL, given[:3], said.append) == first
    assert kinds(said) == [("reused", "judging")]
    assert len(image_reads) == VAL
    states: list[int] = []
    real = runs.confusions

    def spy(model: nn.Module, own: Sequence[Any], *rest: Any) -> Any:
        states.append(len(own))
        return real(model, own, *rest)

    monkeypatch.setattr(runs, "confusions", spy)
    more = runs.judge(own, LEVEL, given, said.append)
    assert states == [1]
    assert {digest: more[digest] for digest in given[:3]} == first
    # of no other level or images is anything known
    runs.judge(own, "clean", given[:2], quiet)
    assert states == [1, 2]
    # counts that were lost are counted again
    (Path(own.store) / "blobs" / "sha256" / first[None].counts.removeprefix("sha256:")).unlink()
    assert runs.judge(own, LEVEL, given, quiet) == more
    assert states == [1, 2, 1]
    assert runs.counts_of(own, first[None]).sum() > 0


def test_equal_weights_are_judged_once(fresh: Callable[[], JobSpec], monkeypatch: pytest.MonkeyPatch) -> None:
    own = fresh()
    states: list[int] = []
    real = runs.confusions

    def spy(model: nn.Module, given: Sequence[Any], *rest: Any) -> Any:
        states.append(len(given))
        return real(model, given, *rest)

    monkeypatch.setattr(runs, "confusions", spy)
    assert len(runs.judge(own, LEVEL, [None, None], quiet)) == 1
    assert states == [1]


# ── rivals' weights ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", PARTIAL)
def test_a_partial_rival_is_the_base_outside_its_layers(
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


def test_each_partial_rival_adapts_its_own_layers(
    spec: JobSpec, made: dict[str, Made], base: dict[str, Tensor]
) -> None:
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
def test_a_constant_rival_is_a_whole_network(
    spec: JobSpec, made: dict[str, Made], base: dict[str, Tensor], method: str
) -> None:
    weights = made[method].weights
    assert weights.digest is not None
    state = Store(spec.store).get_state(weights.digest)
    assert state.keys() == base.keys()
    assert weights.floats == sum(tensor.numel() for tensor in base.values())
    assert not same_bits(state["conv2.weight"], base["conv2.weight"])
    assert same_bits(state["up.weight"], base["up.weight"])


def test_rivals_see_their_own_levels(made: dict[str, Made]) -> None:
    for method, each in made.items():
        expected = {"mixed": list(MAKINGS["mixed"].levels), "stability": ["clean"], "clean-tuned": ["clean"]}
        assert each.read == expected.get(method, [LEVEL])


def test_no_two_rivals_are_the_same(made: dict[str, Made]) -> None:
    assert len({each.weights.digest for each in made.values()}) == len(MAKINGS)


def test_what_they_say(made: dict[str, Made]) -> None:
    labels = {method: method for method in made} | {"stability": "stability α 1 σ 0.1", "random": "random draw 2"}
    for method, each in made.items():
        assert {event.stage for event in each.said} == {labels[method]}
        assert {event.level for event in each.said} == {MAKINGS[method].level}
        assert [event.kind for event in each.said][:: len(each.said) - 1] == ["started", "finished"]
        if method != "bn-statistics":
            last = each.said[-2]
            assert (last.kind, last.step, last.steps, last.epoch, last.epochs) == ("progress", 4, 4, 2, 2)


@pytest.mark.parametrize("method", MAKINGS)
def test_what_is_made_is_not_made_again(
    spec: JobSpec, made: dict[str, Made], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid(monkeypatch, "fine_tune", "training_data", "build_model")
    said: list[Event] = []
    assert runs.make_weights(spec, MAKINGS[method], said.append) == made[method].weights
    assert kinds(said) == [("reused", made[method].said[0].stage)]


def test_the_control_is_a_plain_fine_tune_at_its_learning_rate(
    spec: JobSpec, made: dict[str, Made], base: dict[str, Tensor]
) -> None:
    model = network(base)
    recipe = spec.recipe.model_copy(update={"learning_rate": 0.05})
    fine_tune(model, *training_data(spec, "clean"), recipe, NORMALISATION, chosen=None, seed=SEED)
    by_hand = network_state(model)
    assert all(same_bits(by_hand[name], tensor) for name, tensor in made["clean-tuned"].network.items())


def test_statistics_are_those_of_the_levels_training_images(
    spec: JobSpec, made: dict[str, Made], base: dict[str, Tensor]
) -> None:
    model = network(base)
    batches = segmentation.training_batches(*training_data(spec, LEVEL), 4, (24, 24), (SEED, 0))
    reestimate_statistics(model, (x for x, _ in batches), NORMALISATION, "float32")
    by_hand = network_state(model)
    assert all(same_bits(by_hand[name], tensor) for name, tensor in made["bn-statistics"].network.items())


def test_auto_rgn_trains_with_its_rates(spec: JobSpec, made: dict[str, Made], base: dict[str, Tensor]) -> None:
    images, labels = training_data(spec, LEVEL)
    model = network(base)
    rgn = baselines.relative_gradients(model, images, labels, NORMALISATION, 4, 24, SEED, "float32")
    chosen, rates = baselines.auto_rgn(model, BUDGET, rgn)
    recipe = spec.recipe.model_copy(update={"learning_rate": 0.05})
    fine_tune(model, images, labels, recipe, NORMALISATION, chosen=chosen, seed=SEED, rates=rates)
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
def test_other_inputs_make_other_weights(
    spec: JobSpec, made: dict[str, Made], method: str, change: dict[str, Any]
) -> None:
    said: list[Event] = []
    other = runs.make_weights(spec, replace(MAKINGS[method], **change), said.append)
    assert kinds(said)[0][0] == "started"
    assert other.digest != made[method].weights.digest


def test_another_recipe_or_base_makes_them_anew(spec: JobSpec, made: dict[str, Made], base: dict[str, Tensor]) -> None:
    other_base = Store(spec.store).put_state({name: tensor + 0.01 for name, tensor in base.items()}).digest
    for other in (
        replace(spec, recipe=spec.recipe.model_copy(update={"epochs": 1})),
        replace(spec, base=other_base),
    ):
        said: list[Event] = []
        runs.make_weights(other, MAKINGS["bn-statistics"], said.append)
        assert kinds(said)[0][0] == "started"


def test_a_lost_blob_is_made_again(fresh: Callable[[], JobSpec], made: dict[str, Made]) -> None:
    own, making = fresh(), MAKINGS["bn-tuned"]
    weights = runs.make_weights(own, making, quiet)
    assert weights == made["bn-tuned"].weights
    assert weights.digest is not None
    (Path(own.store) / "blobs" / "sha256" / weights.digest.removeprefix("sha256:")).unlink()
    said: list[Event] = []
    assert runs.make_weights(own, making, said.append) == weights
    assert kinds(said)[0][0] == "started"
    assert Store(own.store).has_blob(weights.digest)


def test_where_nothing_fits_it_is_the_base(spec: JobSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    for method in ("first-block", "random", "auto-rgn"):
        making = replace(MAKINGS[method], budget=1)
        assert runs.make_weights(spec, making, quiet) == Weights(None, 0)
        said: list[Event] = []
        assert runs.make_weights(spec, making, said.append) == Weights(None, 0)
        assert kinds(said)[0][0] == "reused"


class _KilledError(BaseException):
    """As a process dies: nothing in the code under test catches it."""


def killed_in_epoch_2(said: list[Event]) -> Callable[[Event], None]:
    def emit(event: Event) -> None:
        said.append(event)
        if event.kind == "progress" and event.epoch == 2:
            raise _KilledError

    return emit


def checkpoints(spec: JobSpec) -> list[Path]:
    return [p for p in Path(spec.store).rglob("*") if p.is_file() and "checkpoint" in str(p.relative_to(spec.store))]


@pytest.mark.parametrize("method", ["mixed", "stability", "bn-tuned", "auto-rgn"])
def test_a_killed_fine_tune_goes_on_from_its_checkpoint(
    fresh: Callable[[], JobSpec], made: dict[str, Made], method: str
) -> None:
    own, making = fresh(), MAKINGS[method]
    with pytest.raises(_KilledError):
        runs.make_weights(own, making, killed_in_epoch_2([]))
    assert len(checkpoints(own)) == 1
    said: list[Event] = []
    weights = runs.make_weights(own, making, said.append)
    assert {event.epoch for event in said if event.kind == "progress"} == {2}
    assert weights == made[method].weights
    assert checkpoints(own) == []


# ── tuning ───────────────────────────────────────────────────────────────────────────────────────────────────────


KEPT = TRAIN - TRAIN // 5
TUNED = {
    "switching": Making("switching", LEVEL, SEED, 0.05),
    "gearnn": Making("gearnn", LEVEL, SEED, 0.05, layers=("bn1.weight", "head.weight", "head.bias")),
    **{method: making for method, making in MAKINGS.items() if method != "bn-statistics"},
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
        images, labels = training_data(spec, level)
        return Counting(images, phase[0].positions), Counting(labels, phase[0].positions)

    def train(*arguments: Any) -> Any:
        phase[0] = training
        try:
            return real_train(*arguments)
        finally:
            phase[0] = after

    monkeypatch.setattr(runs, "training_data", data)
    monkeypatch.setattr(runs, "_train", train)
    return training, after


@pytest.mark.parametrize("method", TUNED)
def test_held_back_images_are_judged_on_and_not_trained_on(
    fresh: Callable[[], JobSpec], reads: tuple[Reads, Reads], method: str
) -> None:
    own = fresh()
    score = runs.tune(own, TUNED[method], LEVEL, quiet)
    assert 0 < score <= 100
    training, after = reads
    assert set(training.positions) == set(range(KEPT))
    assert Counter(after.positions) == dict.fromkeys(range(KEPT, TRAIN), 2)  # image and label
    constant = {"mixed": list(MAKINGS["mixed"].levels), "stability": ["clean"], "clean-tuned": ["clean"]}
    assert training.levels == constant.get(method, [LEVEL])
    assert after.levels == [LEVEL]


def test_the_score_is_of_the_network_trained_on_the_rest(spec: JobSpec, base: dict[str, Tensor]) -> None:
    model = network(base)
    images, labels = training_data(spec, LEVEL)
    kept, held = range(KEPT), range(KEPT, TRAIN)
    recipe = spec.recipe.model_copy(update={"learning_rate": 0.05})
    layers = TUNED["gearnn"].layers
    fine_tune(
        model, Subset(images, kept), Subset(labels, kept), recipe, NORMALISATION, chosen=layers, seed=SEED
    )  # fmt: skip
    expected = evaluate(model, Subset(images, held), Subset(labels, held), NORMALISATION, "float32")
    assert runs.tune(spec, TUNED["gearnn"], LEVEL, quiet) == expected


def test_a_score_is_stored(spec: JobSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    making, said = replace(TUNED["switching"], learning_rate=0.03), list[Event]()
    score = runs.tune(spec, making, LEVEL, said.append)
    label = "tuning: switching at 0.03"
    assert kinds(said) == [("started", label), ("finished", label)]
    assert said[-1].score == score
    assert runs.tune(spec, making, "clean", quiet) != score  # trained alike, judged elsewhere
    forbid(monkeypatch, "fine_tune", "training_data", "evaluate", "build_model")
    said.clear()
    assert runs.tune(spec, making, LEVEL, said.append) == score
    assert kinds(said) == [("reused", label)]
    # what was tuned without a fifth of the images is not the method's weights
    with pytest.raises(AssertionError, match="computed again"):
        runs.make_weights(spec, making, quiet)


def test_a_learning_rate_that_diverges_is_worth_nothing_and_remembered(
    fresh: Callable[[], JobSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    own, making = fresh(), replace(TUNED["switching"], learning_rate=1e20)
    assert runs.tune(own, making, LEVEL, quiet) == float("-inf")
    assert checkpoints(own) == []
    forbid(monkeypatch, "fine_tune", "training_data")
    said: list[Event] = []
    assert runs.tune(own, making, LEVEL, said.append) == float("-inf")
    assert [event.kind for event in said] == ["reused"]


def test_a_killed_tuning_goes_on(fresh: Callable[[], JobSpec]) -> None:
    own, making = fresh(), TUNED["mixed"]
    undisturbed = runs.tune(fresh(), making, LEVEL, quiet)
    with pytest.raises(_KilledError):
        runs.tune(own, making, LEVEL, killed_in_epoch_2([]))
    said: list[Event] = []
    assert runs.tune(own, making, LEVEL, said.append) == undisturbed
    assert {event.epoch for event in said if event.kind == "progress"} == {2}
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
    said: list[Event] = []
    adaptor = replace(own, recipe=own.recipe.model_copy(update={"learning_rate": 0.02}))
    other = runs.make_main(own, adaptor, LEVEL, [BUDGET], said.append)
    assert kinds(said) == [
        ("reused", "switching"), ("reused", "selection"), ("started", "gearnn"), ("finished", "gearnn"),
    ]  # fmt: skip
    assert other.switching == main.switching
    assert other.layers == main.layers
    assert other.gearnn[BUDGET].digest != split.digest
    assert other.gearnn[BUDGET].floats == split.floats

    # a further budget: one more selection and fine-tune, the release's own first
    said.clear()
    both = runs.make_main(own, own, LEVEL, [BUDGET, 40], said.append, " 2")
    assert [stage for kind, stage in kinds(said) if kind == "reused"] == ["switching 2", "selection 2", "gearnn 2"]
    assert [stage for kind, stage in kinds(said) if kind == "finished"] == ["selection 2", "gearnn 2"]
    assert list(both.gearnn) == [BUDGET, 40]
    assert both.layers == main.layers
    assert 0 < both.gearnn[40].floats <= 40
    assert all(
        set(Store(own.store).get_state(w.digest)) < set(state_of(own, None)) for w in both.gearnn.values() if w.digest
    )

    # another learning rate for the full fine-tune: all is made anew
    said.clear()
    full = replace(own, recipe=own.recipe.model_copy(update={"learning_rate": 0.02}))
    assert runs.make_main(full, own, LEVEL, [BUDGET], said.append).switching != main.switching
    assert ("started", "switching") in kinds(said)
    assert ("started", "selection") in kinds(said)


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
        said: list[Event] = []
        runs.make_control(own, said.append)
        assert [(e.level, e.stage) for e in said if e.kind == "finished"] == [("clean", "full")]
        said.clear()
        main = runs.make_main(own, own, LEVEL, [BUDGET], said.append)
        assert {e.level for e in said if e.kind in ("started", "progress", "finished")} == {LEVEL}
        assert main.layers == runs.choose_layers(own, LEVEL, quiet)
        said.clear()
        split = run_level(own, LEVEL, said.append)
        assert {kind for kind, stage in kinds(said) if stage != "original"} == {"reused"}
        assert main.gearnn == {BUDGET: Weights(split.digest, split.floats)}
        assert main.sensitivity != split.judged


def test_a_split_finds_what_an_evaluation_made(fresh: Callable[[], JobSpec]) -> None:
    own = fresh()
    main = runs.make_main(own, own, LEVEL, [BUDGET], quiet)
    said: list[Event] = []
    split = run_level(own, LEVEL, said.append)
    assert [stage for kind, stage in kinds(said) if kind == "reused"] == ["full", "selection", "partial"]
    assert (split.full_digest, split.digest) == (main.switching.digest, main.gearnn[BUDGET].digest)


def test_full_weights_that_were_not_kept_are_made_again(fresh: Callable[[], JobSpec]) -> None:
    own = fresh()
    split = run_level(replace(own, keep_full=False), LEVEL, quiet)
    said: list[Event] = []
    main = runs.make_main(own, own, LEVEL, [BUDGET], said.append)
    assert [stage for kind, stage in kinds(said) if kind == "started"] == ["switching"]
    assert main.switching.digest is not None
    assert Store(own.store).has_blob(main.switching.digest)
    assert main.gearnn == {BUDGET: Weights(split.digest, split.floats)}


def test_the_layers_to_tune_are_the_splits(fresh: Callable[[], JobSpec]) -> None:
    own = fresh()
    said: list[Event] = []
    layers = runs.choose_layers(own, LEVEL, said.append)
    assert [stage for kind, stage in kinds(said) if kind == "finished"] == ["tuning: full", "tuning: selection"]
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


def test_a_frequency_response_is_measured_once(
    spec: JobSpec, made: dict[str, Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = made["first-block"].weights
    images, labels = validation_data(spec, LEVEL)
    monkeypatch.setattr(runs, "FREQUENCY_IMAGES", 2)
    said: list[Event] = []
    found = runs.frequency(spec, LEVEL, weights, "gearnn", said.append)
    spaced = [0, 2]  # of five
    expected = frequency_response(
        network(state_of(spec, weights.digest)), Subset(images, spaced), Subset(labels, spaced), NORMALISATION
    )
    np.testing.assert_array_equal(found, expected)
    label = "frequency response: gearnn"
    assert kinds(said) == [("started", label), ("finished", label)]
    original = runs.frequency(spec, LEVEL, Weights(), "original", quiet)
    assert not np.array_equal(original, found)
    assert not np.array_equal(runs.frequency(spec, "clean", Weights(), "original", quiet), original)
    monkeypatch.setattr(runs, "FREQUENCY_IMAGES", 24)
    whole = runs.frequency(spec, LEVEL, weights, "gearnn", quiet)
    np.testing.assert_array_equal(
        whole, frequency_response(network(state_of(spec, weights.digest)), images, labels, NORMALISATION)
    )
    forbid(monkeypatch, "frequency_response", "build_model", "validation_data")
    said.clear()
    assert runs.frequency(spec, LEVEL, weights, "gearnn", said.append) == whole
    assert kinds(said) == [("reused", label)]
    monkeypatch.setattr(runs, "FREQUENCY_IMAGES", 2)
    assert runs.frequency(spec, LEVEL, weights, "gearnn", quiet) == found


def test_the_picture_shown_is_the_one_of_median_gain(spec: JobSpec, made: dict[str, Made]) -> None:
    weights = made["mixed"].weights
    judged = runs.judge(spec, SMALLER, [None, weights.digest], quiet)
    seen = runs.see(spec, SMALLER, weights, judged[None], judged[weights.digest])
    images, labels = validation_data(spec, SMALLER)
    before, after = (network(state_of(spec, digest)) for digest in (None, weights.digest))

    def score(model: nn.Module, index: int) -> float:
        return evaluate(model, [images[index]], [labels[index]], NORMALISATION, "float32")

    gains = [score(after, index) - score(before, index) for index in range(VAL)]
    assert len(set(gains)) == VAL
    index = gains.index(sorted(gains)[VAL // 2])
    assert seen.sample == spec.data.val.ids[index]
    assert seen.scores == (score(before, index), score(after, index))
    assert np.array_equal(seen.image, images[index])
    assert np.array_equal(seen.label, labels[index])
    x = NORMALISATION(torch.from_numpy(images[index].copy()).permute(2, 0, 1)[None])
    for model, prediction in ((before, seen.original), (after, seen.adaptor)):
        with torch.inference_mode():
            assert np.array_equal(model.eval()(x)[0].argmax(0), prediction)
        assert prediction.dtype == np.uint8


def test_the_median_is_that_of_gains(spec: JobSpec) -> None:
    """Counts of one's own: neither the median score before or after nor the median distance is meant."""
    store = Store(spec.store)

    def judged(right: Sequence[int]) -> Judged:
        counts = [[[10, 0, 0], [10 - r, r, 0], [0, 0, 0]] for r in right]
        return Judged(0.0, store.put_state({"counts": torch.tensor(counts, dtype=torch.int32)}).digest)

    before, after = judged([0, 9, 6, 2, 1]), judged([4, 7, 8, 9, 2])
    seen = runs.see(spec, LEVEL, Weights(), before, after)
    assert seen.sample == spec.data.val.ids[2]
    assert np.array_equal(seen.original, seen.adaptor)
