"""Algorithm 1 for one level: original ─► full fine-tune ─► measure ─► selection ─► partial fine-tune ─► adaptor in the store.

Each stage is a pure function of its inputs whose result the store keeps. A joint selection waits for the full fine-tunes of all
levels. Runs in any process, alone or as one of several under `torch.distributed`. Knows nothing of Ray.
"""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from torch import Tensor, nn

from gearnn_ray.adaptors.adaptor import put_adaptor, take_adaptor
from gearnn_ray.adaptors.bn_folding import fold, foldable
from gearnn_ray.adaptors.storage_formats import decode, encode
from gearnn_ray.config.recipe import Criterion
from gearnn_ray.core.events import Emit, Event
from gearnn_ray.levels.level import parse_level
from gearnn_ray.models.layers import alternatives_of, layers_of, network_state
from gearnn_ray.offline.held_back import NOTHING, TRIALS, Data, best_part, parted
from gearnn_ray.offline.importance import FOLDED
from gearnn_ray.offline.job_spec import JobSpec
from gearnn_ray.offline.joint_selection import BudgetTooSmallError, LevelMeasurement, joint_selection, select_layers
from gearnn_ray.offline.records import (
    FullResult,
    JointSelectionResult,
    MeasureResult,
    OriginalResult,
    PartialResult,
    SelectionResult,
)
from gearnn_ray.offline.selection import LayerSelection
from gearnn_ray.offline.sensitivity import Change, Sensitivity, StoredVariant, measure, sensitivity, share_of_weights_changed
from gearnn_ray.offline.stage_cache import NotCachedError, StageCache
from gearnn_ray.store.blobs import digest_of
from gearnn_ray.store.releases import Store
from gearnn_ray.store.states import encode_state
from gearnn_ray.tasks.base import scores
from gearnn_ray.training.gradients import Gradients, gradients
from gearnn_ray.training.predict import Predictor, collect_evidence
from gearnn_ray.training.teacher import Teacher
from gearnn_ray.training.trainer import fine_tune

T = TypeVar("T")


@dataclass(frozen=True)
class LevelResult:
    """The results of one level. Scores in percent, None where nothing was trained. others: the task's other metrics, by network
    (original, full, adaptor). storage_formats: of the adaptor's tensors that are not stored as float32. sensitivity: Eq. (1).
    compared: the rows that the selection used, in the same order. stages: the keys of the records that the results come from.
    """

    level: str
    original: float
    full: float | None = None
    adaptor: float | None = None
    digest: str | None = None
    bytes: int = 0
    floats: int = 0
    storage_formats: dict[str, str] = field(default_factory=dict)
    full_digest: str | None = None
    full_bytes: int = 0
    seconds_full: float = 0.0
    seconds_partial: float = 0.0
    sensitivity: tuple[Sensitivity, ...] = ()
    compared: tuple[Sensitivity, ...] = ()
    selection: LayerSelection | None = None
    others: dict[str, dict[str, float]] = field(default_factory=dict)
    stages: tuple[str, ...] = field(default=(), compare=False)

    @property
    def others_by_metric(self) -> dict[str, dict[str, float]]:
        """The other metrics by name and network."""
        metrics = dict.fromkeys(metric for scores in self.others.values() for metric in scores)
        return {m: {network: scores[m] for network, scores in self.others.items() if m in scores} for m in metrics}

    @property
    def layers(self) -> tuple[str, ...]:
        return () if self.selection is None else self.selection.layers

    @property
    def share_changed(self) -> tuple[float, float]:
        """`share_of_weights_changed` of the full fine-tune: by layers, by weights."""
        return share_of_weights_changed(self.sensitivity)


def run_level(
    spec: JobSpec, level: str, emit: Emit, selection: LayerSelection | None = None, only_cached: bool = False
) -> LevelResult:
    """Algorithm 1 for one level: computes the stages that the store does not hold. selection: the level's part of a joint
    selection. Raises UserError, TrainingFailedError, ComplementChangedError; with `only_cached`, NotCachedError.
    """
    run = LevelRun(spec, level, emit, only_cached)
    original = run.original()
    if parse_level(level).is_clean:
        return LevelResult(level, original.score, others={"original": original.others}, stages=tuple(sorted(run.cache.used)))
    full = run.full()
    selection = selection or run.selection(full, spec.budget)
    partial = run.partial(selection)
    measured = run.measured(full)
    return LevelResult(
        level=level,
        original=original.score,
        full=full.score,
        adaptor=partial.score,
        digest=partial.digest,
        bytes=partial.bytes,
        floats=partial.floats,
        storage_formats=partial.storage_formats,
        full_digest=full.digest if spec.keep_full else None,
        full_bytes=full.bytes,
        seconds_full=full.seconds,
        seconds_partial=partial.seconds,
        sensitivity=measured.sensitivity,
        compared=measured.compared,
        selection=selection,
        others={"original": original.others, "full": full.others, "adaptor": partial.others},
        stages=tuple(sorted(run.cache.used)),
    )


def measure_level(
    spec: JobSpec, level: str, emit: Emit, criteria: Sequence[Criterion] = (), only_cached: bool = False
) -> tuple[LevelMeasurement, ...]:
    """Steps 1 and 2 at one level: one measurement per criterion (by default the job's own), none at the undistorted level."""
    criteria = criteria or (spec.criterion,)
    # weights that any criterion needs again are kept from the start
    spec = replace(spec, keep_full=spec.keep_full or any(criterion.needs_weights for criterion in criteria))
    run = LevelRun(spec, level, emit, only_cached)
    run.original()
    if parse_level(level).is_clean:
        return ()
    full = run.full()
    measured = []
    for criterion in criteria:
        run.spec = replace(spec, criterion=criterion)
        found = run.measured(full)
        measured.append(LevelMeasurement(found.compared, found.stored_variants))
    return tuple(measured)


def fine_tune_fully(spec: JobSpec, level: str, emit: Emit, only_cached: bool = False) -> FullResult:
    """Step 1 alone, of the undistorted level too."""
    return LevelRun(spec, level, emit, only_cached).full()


def select_jointly(
    spec: JobSpec, measured: Mapping[str, LevelMeasurement], emit: Emit, only_cached: bool = False
) -> dict[str, LayerSelection]:
    """Step 3 for all levels at once, in any order: level to selection. Raises UserError or NotCachedError as `run_level` does."""
    levels, coupling = sorted(measured), spec.coupling
    key = spec.key(
        "joint selection",
        levels=[[level, asdict(measured[level])] for level in levels],
        criterion=spec.criterion.model_dump(),
        problem=coupling.problem,
        frequencies=[coupling.frequencies.get(level, 1.0) for level in levels],
        budget=spec.budget,
    )

    def solve() -> JointSelectionResult:
        network = spec.network.build()
        alternatives = alternatives_of(network, spec.criterion.granularity)
        rows = {level: measured[level] for level in levels}
        return JointSelectionResult(joint_selection(rows, alternatives, spec.criterion, coupling, spec.budget))

    cache = StageCache(Store(spec.store), "all", emit, only_cached)
    return cache.result(JointSelectionResult, key, solve).selections


def cached(step: Callable[..., T], *arguments: Any, emit: Emit = lambda _: None) -> T | None:
    """What `step(*arguments, emit)` would return where the store holds all of it, else None; computes nothing."""
    events: list[Event] = []
    try:
        result = step(*arguments, events.append, only_cached=True)
    except NotCachedError:
        return None
    for event in events:
        emit(event)
    return result


class LevelRun:
    """The stages of one level over one network in memory."""

    def __init__(self, spec: JobSpec, level: str, emit: Emit, only_cached: bool = False) -> None:
        self.spec, self.level = spec, level
        self.cache = StageCache(Store(spec.store), level, emit, only_cached)
        self._base: dict[str, Tensor] = {}
        self._model: nn.Module | None = None
        self._gradients_at_base: Gradients | None = None
        self._teaches: Teacher | None = None
        self._states: dict[str, dict[str, Tensor]] = {}
        self._controls: dict[str, FullResult] = {}

    def original(self) -> OriginalResult:
        key = self.spec.key("original", level=self.level, val=self.spec.data.val.digest)
        return self.cache.result(
            OriginalResult, key, lambda: OriginalResult(*self._scores(self.network())) if self.cache.leads else None,
            metric=self._metric,
        )  # fmt: skip

    def full(self) -> FullResult:
        """Step 1: the full fine-tune. With `sensitivity_epochs` it ends early and is not evaluated; with 0 epochs it is one step
        of the recipe's learning rate against the level's mean gradient at the base.
        """
        key = self._key("full", stop_after=self.spec.sensitivity_epochs)
        return self.cache.result(
            FullResult,
            key,
            lambda: self._fine_tune_all(key),
            lambda result: not self.spec.keeps_full or self.cache.store.is_intact(result.digest),
            metric=self._metric,
        )

    def measured(self, full: FullResult) -> MeasureResult:
        """Step 2: how far each layer moved, and what each storage format would lose of it."""
        criterion = self.spec.criterion
        if not criterion.needs_weights:
            return MeasureResult(full.sensitivity, full.sensitivity, ())
        control = self._control() if criterion.against == "clean" else None
        key = self._key(
            "measure",
            full=full.digest,
            control=control and control.digest,
            storage_formats=criterion.storage_formats,
            gradients=criterion.needs_gradients,
            granularity=criterion.granularity,
        )
        return self.cache.result(MeasureResult, key, lambda: self._measure(full, control) if self.cache.leads else None)

    def selection(self, full: FullResult, budget: int) -> LayerSelection:
        """Step 3: the layers chosen under M, in floats; with `held_back`, under the part of M that does best on these."""
        held_back = self.spec.held_back
        if not held_back:
            return self._selected(full, budget)
        parts = {name: self._selected(full, budget // divisor, divisor > 1) for name, divisor in TRIALS.items()}
        return best_part(parts, lambda selection, name: self.partial(selection, held_back, name).score)

    def _selected(self, full: FullResult, budget: int, or_nothing: bool = False) -> LayerSelection:
        """or_nothing: where nothing fits, that is the selection, and no error."""
        criterion = self.spec.criterion
        control = self._control().digest if criterion.against == "clean" else None
        more = {"or_nothing": True} if or_nothing else {}
        key = self._key("selection", full=full.digest, criterion=criterion.model_dump(), control=control, budget=budget, **more)

        def solve() -> SelectionResult:
            measured = self.measured(full)
            alternatives = alternatives_of(self.network(), criterion.granularity)
            rows, variants = measured.compared, measured.stored_variants
            try:
                return SelectionResult(select_layers(rows, variants, alternatives, criterion, budget, self.level))
            except BudgetTooSmallError:
                if not or_nothing:
                    raise
                return SelectionResult(NOTHING)

        return self.cache.result(SelectionResult, key, solve).selection

    def partial(self, selection: LayerSelection, held_back: float = 0.0, label: str = "partial") -> PartialResult:
        """Step 4: the partial fine-tune, and its adaptor in the store. held_back: share of the training images, counted from the
        last one, that it is judged on instead of trained on. label: the stage's name in events.
        """
        apart = {"held_back": held_back} if held_back else {}
        key = self._key("partial", chosen=selection.layers, storage_formats=selection.storage_formats, **apart)
        return self.cache.result(
            PartialResult,
            key,
            lambda: self._fine_tune_chosen(key, selection, held_back, label),
            lambda result: self.cache.store.is_intact(result.digest),
            label,
            self._metric,
        )

    @property
    def _metric(self) -> str:
        return self.spec.task.metrics[0]

    def _key(self, stage: str, **more: Any) -> str:
        """The key of a stage that rests on a fine-tune at this level."""
        spec = self.spec
        return spec.key(
            stage,
            level=self.level,
            train=spec.data.train.digest,
            val=spec.data.val.digest,
            recipe=spec.recipe.inputs(),
            seed=spec.seed,
            world_size=spec.world_size,
            **more,
        )

    def network(self) -> nn.Module:
        """The base network as it was: a fine-tune before this one leaves no trace. It is built and read once."""
        if self._model is None:
            self._base = self.cache.store.get_state(self.spec.base)
            self._model = self.spec.network.build().to(self.spec.device)
            self._frozen = {n for n, p in self._model.named_parameters() if not p.requires_grad}
            # a base state has no num_batches_tracked: the untouched model's zeros come back with it
            self._start = {n: t.detach().clone() for n, t in self._model.state_dict().items()}
        self._model.load_state_dict({**self._start, **self._base})
        for name, parameter in self._model.named_parameters():
            parameter.requires_grad_(name not in self._frozen)
            parameter.grad = None
        return self._model

    def _fine_tune_all(self, key: str) -> FullResult | None:
        model, started = self.network(), time.perf_counter()
        if self.spec.sensitivity_epochs == 0:
            self._step_along_gradient(model)
            seconds = time.perf_counter() - started
        else:
            seconds = self._fine_tune(model, None, key, "full")
        if not self.cache.leads:
            return None
        state = network_state(model)
        rows = sensitivity(layers_of(model), self._base, state)
        data = encode_state(state)
        digest = self.cache.store.put_blob(data) if self.spec.keeps_full else digest_of(data)
        self._states[digest] = state  # measuring finds it here
        score, others = self._scores(model) if self.spec.sensitivity_epochs is None else (None, {})
        return FullResult(digest, len(data), score, seconds, tuple(rows), others)

    def _step_along_gradient(self, model: nn.Module) -> None:
        if not self.cache.leads:
            return
        mean, rate = self._gradients(model).mean, self.spec.recipe.learning_rate
        # by hand: running statistics, which no optimizer moves, have a gradient here too
        step = {name: self._base[name] - rate * mean[name] for name in mean}
        model.load_state_dict({**self._start, **self._base, **step})

    def _control(self) -> FullResult:
        """The full fine-tune on undistorted images, with the same order and crops: what training does without distortion."""
        key = self._key("full", stop_after=self.spec.sensitivity_epochs)
        if key not in self._controls:

            def emit(event: Event) -> None:
                if event.kind != "reused":  # every level reuses it
                    self.cache.emit(event)

            control = LevelRun(self.spec, "clean", emit, self.cache.only_cached)
            self._controls[key] = control.full()
            self.cache.used |= control.cache.used
        return self._controls[key]

    def _state(self, digest: str) -> dict[str, Tensor]:
        if digest not in self._states:
            self._states[digest] = self.cache.store.get_state(digest)
        return self._states[digest]

    def _measure(self, full: FullResult, control: FullResult | None) -> MeasureResult:
        model, criterion = self.network(), self.spec.criterion
        at_base = self._gradients(model) if criterion.needs_gradients else None
        layers, after = layers_of(model), self._state(full.digest)
        rows, variants = measure(layers, self._base, after, at_base, criterion.storage_formats)
        compared, statistics = rows, foldable(model) if criterion.granularity == "module" else {}
        if statistics or control is not None:
            states = [after, *([] if control is None else [self._state(control.digest)])]
            after, *against = (fold(statistics.values(), self._base, state) for state in states)
            compared, variants = measure(layers, self._base, after, at_base, criterion.storage_formats, *against)
            # folded into weight and bias, statistics take no floats
            compared = [replace(r, numel=0, l2_weight=0.0) if r.layer in statistics else r for r in compared]
        zero = None if at_base is None else 0.0
        variants += [StoredVariant(name, FOLDED, 0, Change(0, 0.0, 0.0, 0.0, zero, zero)) for name in statistics]
        return MeasureResult(tuple(rows), tuple(compared), tuple(variants))

    def _fine_tune_chosen(self, key: str, selection: LayerSelection, held_back: float, label: str) -> PartialResult | None:
        train, val = parted(self.spec.training_data(self.level), held_back) if held_back else (None, None)
        model, chosen, formats = self.network(), selection.layers, selection.storage_formats
        folded = {layer for layer, storage_format in formats.items() if storage_format == FOLDED}
        by_tensor = {
            name: formats[layer.name]
            for layer in layers_of(model)
            for name in layer.tensors
            if layer.name in formats.keys() - folded
        }
        # where nothing moved in the full fine-tune, the adaptor is empty
        seconds = self._fine_tune(model, chosen, key, label, train) if chosen else 0.0
        if not self.cache.leads:
            return None
        if folded:
            normalisations = foldable(model)
            whole = fold([normalisations[layer] for layer in folded], self._base, network_state(model))
            model.load_state_dict({**model.state_dict(), **whole})
        # refuses to continue when a single bit outside the chosen layers has changed
        stored = adaptor = take_adaptor(model, self._base, set(chosen) - folded)
        if by_tensor:
            # evaluate what the store restores, not what was trained
            stored = encode(self._base, adaptor, by_tensor)
            put_adaptor(model, self._base, decode(self._base, stored))
        blob = self.cache.store.put_state(stored)
        score, others = self._scores(model, val)
        return PartialResult(
            digest=blob.digest,
            bytes=blob.bytes,
            floats=sum(t.numel() for t in adaptor.values()),
            storage_formats=by_tensor,
            stored_bytes=sum(t.numel() * t.element_size() for t in stored.values()),
            score=score,
            seconds=seconds,
            others=others,
        )

    def _gradients(self, model: nn.Module) -> Gradients:
        if self._gradients_at_base is None:
            spec, (images, targets) = self.spec, self.spec.training_data(self.level)
            self._gradients_at_base = gradients(
                spec.task, model, images, targets, spec.network.normalisation, spec.execution.precision,
                spec.recipe.crop, spec.seed, self._teacher(),
            )  # fmt: skip
        return self._gradients_at_base

    def _teacher(self) -> Teacher | None:
        if self._teaches is None:
            self._teaches = self.spec.teacher(lambda: copy.deepcopy(self.network()))
        return self._teaches

    def _fine_tune(
        self, model: nn.Module, chosen: tuple[str, ...] | None, key: str, label: str, data: Data | None = None
    ) -> float:
        """Seconds that it took. data: by default the training images."""
        spec = self.spec
        recipe, stop_after = spec.recipe, spec.sensitivity_epochs if chosen is None else None
        if stop_after is not None:
            recipe = recipe.model_copy(update={"averaged": 0.0})  # averaging is for networks that are used
        images, targets = data or spec.training_data(self.level)
        outcome = fine_tune(
            spec.task, model, images, targets, recipe, spec.network.normalisation, spec.execution.precision,
            chosen=chosen, seed=spec.seed, checkpoint=self.cache.checkpoint(key, label), progress=self.cache.progress(label),
            teacher=self._teacher(), stop_after=stop_after,
        )  # fmt: skip
        return outcome.seconds

    def _scores(self, model: nn.Module, data: Data | None = None) -> tuple[float, dict[str, float]]:
        """The task's first metric, and its others by name. data: by default the validation images."""
        spec, (images, targets) = self.spec, data or self.spec.validation_data(self.level)
        predictor = Predictor(model, spec.network.normalisation, spec.execution.precision)
        (evidence,) = collect_evidence(spec.task, model, [predictor], images, targets, spec.network.num_classes)
        found = scores(spec.task, evidence)
        return found.pop(self._metric), found
