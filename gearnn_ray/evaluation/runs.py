"""The weights of every method, each a stage whose result the store keeps under a key of its inputs.

GearNN's and switching's stages are those of `gearnn_ray.offline.level_run`, under the same keys: an evaluation reuses what the
split job made. Knows nothing of Ray.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor, nn

from gearnn_ray.adaptors.adaptor import take_adaptor
from gearnn_ray.adaptors.interpolation import interpolated
from gearnn_ray.adaptors.storage_formats import decode
from gearnn_ray.config.recipe import Recipe
from gearnn_ray.core.errors import TrainingFailedError
from gearnn_ray.core.events import Emit
from gearnn_ray.evaluation import baselines
from gearnn_ray.evaluation.records import LayersResult, MainWeights, TuningResult, Weights
from gearnn_ray.levels.level import LEVELS_VERSION, codec_versions, parse_level
from gearnn_ray.models.layers import network_state
from gearnn_ray.offline.job_spec import JobSpec
from gearnn_ray.offline.level_run import LevelRun
from gearnn_ray.offline.records import FullResult
from gearnn_ray.offline.stage_cache import StageCache
from gearnn_ray.store.manifest import LevelEntry
from gearnn_ray.store.releases import Store
from gearnn_ray.tasks.base import score
from gearnn_ray.training.batch_norm import reestimate_statistics
from gearnn_ray.training.predict import Predictor, collect_evidence
from gearnn_ray.training.sampling import Mixture, Subset, crop_size, training_batches
from gearnn_ray.training.trainer import fine_tune

EVALUATION_VERSION = 2
"""Part of every key of an evaluation's stages: raised whenever a method would compute something else from the same inputs."""


@dataclass(frozen=True)
class WeightsSpec:
    """Which weights a method is to make, with everything that they depend on beside the job spec.

    level: "all" for one network for all levels; levels: those that such a network is trained on, if several. learning_rate: 0
    for the recipe's. draw: number of the random selection. layers: GearNN's, while its learning rate is tuned.
    """

    method: str
    level: str
    seed: int = 0
    learning_rate: float = 0.0
    budget: int = 0
    alpha: float | None = None
    sigma: float | None = None
    levels: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    draw: int = 0

    @property
    def label(self) -> str:
        """Distinguishes it from the others of its level."""
        words = [self.method]
        if self.alpha is not None:
            words.append(f"α {self.alpha:g} σ {self.sigma:g}")
        if self.method == "random":
            words.append(f"draw {self.draw + 1}")
        return " ".join(words)

    @property
    def training_level(self) -> str:
        """The level of the images that the method is trained on, if it is one."""
        return "clean" if self.method in ("clean-tuned", "stability") else self.level

    def recipe(self, spec: JobSpec) -> Recipe:
        """The job's recipe at this learning rate."""
        return spec.recipe.model_copy(update={"learning_rate": self.learning_rate or spec.recipe.learning_rate})


def make_main(
    full: JobSpec, adaptor: JobSpec, level: str, budgets: Sequence[int], emit: Emit, seed_label: str = ""
) -> MainWeights:
    """Algorithm 1 at one level, step 1 with the recipe of `full`, which keeps its weights, and step 4 with that of `adaptor`.

    budgets: M in floats, the release's own first. seed_label: appended to the stages' names in events.
    """
    emit = _as_methods(emit, seed_label)
    step_1, step_4 = LevelRun(full, level, emit), LevelRun(adaptor, level, emit)
    result = step_1.full()
    selections = [step_1.selection(result, budget) for budget in budgets]
    adaptors = [step_4.partial(selection) for selection in selections]
    # switching always uses a whole fine-tune, even where layers are selected after a shorter one
    whole = result if full.sensitivity_epochs is None else _whole_fine_tune(full, level, emit)
    weights = [Weights(made.digest, math.ceil(made.stored_bytes / 4)) for made in adaptors]
    return MainWeights(_switching(whole), dict(zip(budgets, weights, strict=True)), selections[0].layers, whole.sensitivity)


def released_main(full: JobSpec, level: str, entry: LevelEntry | None, emit: Emit, seed_label: str = "") -> MainWeights:
    """The main methods at a level that was selected jointly with others: a full fine-tune, and GearNN's adaptor as released.

    entry: the level's in the manifest; None for another seed than the release's, which has no adaptor.
    """
    whole = _whole_fine_tune(full, level, _as_methods(emit, seed_label))
    if entry is None or entry.digest is None:
        return MainWeights(_switching(whole), {}, (), whole.sensitivity)
    stored = sum(t.numel() * t.element_size() for t in Store(full.store).get_state(entry.digest).values())
    released = {full.budget: Weights(entry.digest, math.ceil(stored / 4))}
    return MainWeights(_switching(whole), released, entry.layers, whole.sensitivity)


def _whole_fine_tune(full: JobSpec, level: str, emit: Emit) -> FullResult:
    return LevelRun(replace(full, sensitivity_epochs=None), level, emit).full()


def _switching(whole: FullResult) -> Weights:
    return Weights(whole.digest, sum(row.numel for row in whole.sensitivity))


def choose_layers(spec: JobSpec, level: str, emit: Emit) -> tuple[str, ...]:
    """Steps 1 to 3 of Algorithm 1: the layers that GearNN adapts at this level."""
    # the weights are kept, because full fine-tunes may be given this learning rate
    run = LevelRun(replace(spec, keep_full=True), level, renamed(emit, lambda stage: f"tuning: {stage}"))
    return run.selection(run.full(), spec.budget).layers


def _as_methods(emit: Emit, seed_label: str) -> Emit:
    names = {"full": "switching", "partial": "gearnn"}
    return renamed(emit, lambda stage: names.get(stage, stage) + seed_label)


def renamed(emit: Emit, name: Callable[[str], str]) -> Emit:
    """An `Emit` that gives every event's stage another name."""
    return lambda event: emit(replace(event, stage=name(event.stage)))


def make_weights(spec: JobSpec, wanted: WeightsSpec, emit: Emit) -> Weights:
    """A baseline's weights, from the store or trained now. Raises TrainingFailedError."""
    cache, key = StageCache(Store(spec.store), wanted.level, emit), _key(spec, "weights", wanted)

    def train() -> Weights:
        model, base = base_network(spec)
        chosen = _train(spec, wanted, model, len(spec.data.train), cache, key, wanted.label)
        state = network_state(model) if chosen is None else take_adaptor(model, base, chosen)
        floats = sum(tensor.numel() for tensor in state.values())
        return Weights(cache.store.put_state(state).digest if state else None, floats)

    def intact(weights: Weights) -> bool:
        return weights.digest is None or cache.store.is_intact(weights.digest)

    return cache.result(Weights, key, train, intact, wanted.label)


def tune(spec: JobSpec, wanted: WeightsSpec, level: str, emit: Emit) -> float:
    """The score in percent at `level`, on the last fifth of the training images, of a method that is trained on the others.

    -inf where the training diverges: such a learning rate is not chosen.
    """
    key = _key(spec, "tuning", wanted, evaluated_at=level, evaluated_pixels=pixels_version(level))
    cache, label = (StageCache(Store(spec.store), wanted.level, emit), f"tuning: {wanted.label} at {wanted.learning_rate:g}")
    count = len(spec.data.train)
    kept = count - baselines.tuning_images(count)

    def train() -> TuningResult:
        model, _ = base_network(spec)
        try:
            _train(spec, wanted, model, kept, cache, key, label)
            images, targets = (Subset(part, range(kept, count)) for part in spec.training_data(level))
            predictor = Predictor(model, spec.network.normalisation, spec.execution.precision)
            (evidence,) = collect_evidence(spec.task, model, [predictor], images, targets, spec.network.num_classes)
        except TrainingFailedError:
            return TuningResult(None)
        return TuningResult(score(spec.task, evidence))

    found = cache.result(TuningResult, key, train, label=label, metric=spec.task.metrics[0]).score
    return float("-inf") if found is None else found


def mix_adaptors(spec: JobSpec, lower: Weights, upper: Weights, share: float) -> Weights:
    """Two levels' adaptors mixed linearly, `share` of the upper."""
    store = Store(spec.store)
    base = store.get_state(spec.base)
    state = interpolated(base, change_of(store, base, lower.digest), change_of(store, base, upper.digest), share)
    return Weights(store.put_state(state).digest, sum(tensor.numel() for tensor in state.values()))


def change_of(store: Store, base: Mapping[str, Tensor], digest: str | None) -> dict[str, Tensor]:
    """The tensors that a blob changes, as every reader restores them; none for the base itself."""
    return {} if digest is None else decode(base, store.get_state(digest))


def base_network(spec: JobSpec) -> tuple[nn.Module, dict[str, Tensor]]:
    """The base on the job's device, and its state."""
    base = Store(spec.store).get_state(spec.base)
    model = spec.network.build().to(spec.device)
    model.load_state_dict(base)
    return model, base


def pixels_version(*levels: str) -> dict[str, object]:
    """What determines the pixels of levels, beside the data."""
    codecs = {name: version for level in levels for name, version in codec_versions(parse_level(level)).items()}
    return {"levels": LEVELS_VERSION, "codecs": codecs}


def _key(spec: JobSpec, stage: str, wanted: WeightsSpec, **more: Any) -> str:
    return spec.key(
        f"evaluation-{stage}",
        evaluation=EVALUATION_VERSION,
        train=spec.data.train.digest,
        recipe=wanted.recipe(spec).inputs(),
        weights=asdict(wanted),
        pixels=pixels_version(*(wanted.levels or [wanted.training_level])),
        **more,
    )


def _train(
    spec: JobSpec, wanted: WeightsSpec, model: nn.Module, count: int, cache: StageCache, key: str, label: str
) -> tuple[str, ...] | None:
    """Train `model`, which is the base, as the method does, on the first `count` training images.

    Returns the layers that it may have changed, None for all.
    """
    task, method, recipe = spec.task, wanted.method, wanted.recipe(spec)
    normalisation, precision = spec.network.normalisation, spec.execution.precision
    chosen: tuple[str, ...] | None = None
    loss, rates = None, None
    parts = [spec.training_data(name) for name in wanted.levels or [wanted.training_level]]
    levels, targets = [Subset(part, range(count)) for part, _ in parts], Subset(parts[0][1], range(count))
    images = Mixture(levels, recipe.crop) if method == "mixed" else levels[0]
    if method == "bn-statistics":
        sides = crop_size(task, images, recipe.crop)
        batches = training_batches(task, images, targets, recipe.batch_size, sides, (wanted.seed, 0))
        reestimate_statistics(model, batches, normalisation, precision)
        return baselines.statistics_layers(model)
    teacher = spec.teacher(lambda: base_network(spec)[0])
    if method == "stability":
        assert wanted.alpha is not None
        assert wanted.sigma is not None
        loss = baselines.stability_loss(task, wanted.alpha, wanted.sigma)
    elif method == "bn-tuned":
        chosen = baselines.norm_layers(model)
    elif method == "first-block":
        chosen = baselines.first_layers(model, wanted.budget)
    elif method == "random":
        chosen = baselines.random_layers(model, wanted.budget, wanted.draw)
    elif method == "auto-rgn":

        def choose() -> LayersResult:
            rgn = baselines.relative_gradients(
                task, model, images, targets, normalisation, recipe.batch_size, recipe.crop, wanted.seed, precision, teacher
            )
            return LayersResult(*baselines.auto_rgn(model, wanted.budget, rgn))

        # kept, because another last bit of a gradient may choose other layers when the fine-tune is resumed
        quiet = StageCache(cache.store, cache.level, lambda _: None)
        layers_key = _key(spec, "layers", replace(wanted, learning_rate=0.0), images=count)
        choice = quiet.result(LayersResult, layers_key, choose)
        chosen, rates = choice.layers, choice.rates
    elif method == "gearnn":
        chosen = wanted.layers
    if chosen != ():
        fine_tune(
            task, model, images, targets, recipe, normalisation, precision, chosen=chosen, seed=wanted.seed,
            checkpoint=cache.checkpoint(key, label), progress=cache.progress(label), loss=loss, teacher=teacher, rates=rates,
        )  # fmt: skip
    return chosen
