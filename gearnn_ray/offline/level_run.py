"""The stages of one level, each a pure function of its inputs whose result the store keeps under a key made of them.

    original ─► full fine-tune ─► selection ─► partial fine-tune ─► adaptor in the store

Where levels are chosen together, one selection waits for the full fine-tunes of all, and is handed to each.
Running a stage again, after a crash or with another budget, finds what is there and computes what is missing: this is the
whole resume mechanism. Runs in any process, alone or as one of several under `torch.distributed` (rank 0 writes). Knows
nothing of Ray.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor, nn

from gearnn_ray.adaptors.adaptor import put_adaptor, take_adaptor
from gearnn_ray.adaptors.bn_folding import fold, foldable
from gearnn_ray.adaptors.storage_formats import decode, encode
from gearnn_ray.config.recipe import PAPERS, Criterion
from gearnn_ray.core.events import Emit, Event, StageName
from gearnn_ray.data.sampling import Mixture, mixed_batches
from gearnn_ray.levels.level import parse_level
from gearnn_ray.models.layers import alternatives_of, layers_of, network_state
from gearnn_ray.models.registry import build_model
from gearnn_ray.offline.importance import FLOAT_BYTES, FOLDED, layers_and_formats, problem
from gearnn_ray.offline.job_spec import (
    JobSpec,
    StoredCheckpoint,
    device,
    progress_to,
    stage_key,
    training_data,
    validation_data,
)
from gearnn_ray.offline.joint_selection import Measured, choose_options, in_turn, joint_selection
from gearnn_ray.offline.selection import Choice, Selection, select
from gearnn_ray.offline.sensitivity import (
    Change,
    Sensitivity,
    StoredVariant,
    measure,
    sensitivity,
    share_of_weights_changed,
    stored_variant_of,
)
from gearnn_ray.store.releases import Store, digest_of, encode_state
from gearnn_ray.tasks import segmentation
from gearnn_ray.training.gradients import Gradients, gradients
from gearnn_ray.training.trainer import BatchSource, evaluate, fine_tune, resolve_precision

T = TypeVar("T")


@dataclass(frozen=True)
class LevelResult:
    """What is known of one level when its adaptor is in the store. Scores in percent, None where nothing was trained."""

    level: str
    original: float
    full: float | None = None
    adaptor: float | None = None
    digest: str | None = None
    bytes: int = 0
    floats: int = 0
    layers: tuple[str, ...] = ()
    storage_formats: dict[str, str] = field(default_factory=dict)
    """of the adaptor's tensors that are not stored as float32"""
    full_digest: str | None = None
    full_bytes: int = 0
    seconds_full: float = 0.0
    seconds_partial: float = 0.0
    sensitivity: tuple[dict[str, Any], ...] = ()
    """of Eq. (1): against the base, in the network's own tensors"""
    judged: tuple[dict[str, Any], ...] = ()
    """what the selection went by, in the same order"""
    selection: dict[str, Any] = field(default_factory=dict)

    @property
    def share_changed(self) -> tuple[float, float]:
        """`share_of_weights_changed` of the full fine-tune: by layers, by weights."""
        return share_of_weights_changed([Sensitivity(**row) for row in self.sensitivity])


def run_level(
    spec: JobSpec, level: str, emit: Emit, selection: dict[str, Any] | None = None, only_look: bool = False
) -> LevelResult:
    """Algorithm 1 for one level: every stage that the store does not hold already, in this process.

    selection: the level's of `choose_together`, which takes the place of its own. Raises UserError, TrainingFailedError,
    ComplementChangedError; and where it may only look, NotYetError.
    """
    run = LevelRun(spec, level, emit, only_look)
    original = run.stage("original", run.key("original"), run.judge_original)
    if parse_level(level).is_clean:
        return LevelResult(level, original["score"])
    full = run.full()
    if selection is None:
        selection = run.selection(full, spec.budget)
    partial = run.partial(selection, full)
    measured = run.measured(full)
    return LevelResult(
        level=level,
        original=original["score"],
        full=full["score"],
        adaptor=run.score_of(partial),
        digest=partial["digest"],
        bytes=partial["bytes"],
        floats=partial["floats"],
        layers=tuple(selection["layers"]),
        storage_formats=partial.get("storage_formats", {}),
        full_digest=full["digest"] if spec.keep_full else None,
        full_bytes=full["bytes"],
        seconds_full=full["seconds"],
        seconds_partial=partial["seconds"],
        sensitivity=tuple(measured["sensitivity"]),
        judged=tuple(measured.get("judged", measured["sensitivity"])),
        selection=selection,
    )


def sense_level(
    spec: JobSpec, level: str, criteria: Sequence[Criterion], emit: Emit, only_look: bool = False
) -> tuple[dict[str, Any], ...]:
    """What selections under all budgets share: the original judged, the full fine-tune and what it says of the layers.

    The last by criterion, as `LevelRun.measured` has it; nothing of the undistorted level.
    """
    # weights that any of them looks at again are kept from the start
    spec = replace(spec, keep_full=spec.keep_full or any(criterion.needs_weights for criterion in criteria))
    run = LevelRun(spec, level, emit, only_look)
    run.stage("original", run.key("original"), run.judge_original)
    if parse_level(level).is_clean:
        return ()
    full = run.full()
    measured = []
    for criterion in criteria:
        run.spec = replace(spec, criterion=criterion)
        measured.append(run.measured(full))
    return tuple(measured)


def sense_own(spec: JobSpec, level: str, emit: Emit, only_look: bool = False) -> tuple[dict[str, Any], ...]:
    """`sense_level` by the work's own criterion."""
    return sense_level(spec, level, (spec.criterion,), emit, only_look)


def fine_tune_fully(spec: JobSpec, level: str, emit: Emit, only_look: bool = False) -> dict[str, Any]:
    """Step 1 alone, of the undistorted level too: the record of the full fine-tune."""
    return LevelRun(spec, level, emit, only_look).full()


def select_jointly(
    spec: JobSpec, measured: Mapping[str, dict[str, Any]], emit: Emit, only_look: bool = False
) -> dict[str, dict[str, Any]]:
    """Step 3 for all levels at once: level to its selection, for `run_level`. measured: of each, as `sense_own` gives it.

    In whatever order they come, levels are the same problem. Raises UserError, and NotYetError as `run_level` does.
    """
    levels, coupling = sorted(measured), spec.coupling
    asked = coupling.model_dump() | {"frequencies": [coupling.frequencies.get(level, 1.0) for level in levels]}
    key = stage_key(
        "together",
        network=asdict(spec.network),
        levels=[[level, measured[level]] for level in levels],
        criterion=spec.criterion.inputs(),
        coupling=asked,
        budget=spec.budget,
    )

    def solve(_: str) -> dict[str, Any]:
        network = build_model(spec.network.name, spec.network.num_classes)
        alternatives = alternatives_of(network, spec.criterion.granularity)
        rows = {level: _measured_of(measured[level]) for level in levels}
        return {"levels": joint_selection(rows, alternatives, spec.criterion, coupling, spec.budget)}

    record = LevelRun(spec, "all", emit, only_look).stage("selection", key, solve)
    selections: dict[str, dict[str, Any]] = record["levels"]
    return selections


def _measured_of(record: Mapping[str, Any]) -> Measured:
    rows = record.get("judged", record["sensitivity"])
    return Measured([Sensitivity(**row) for row in rows], [stored_variant_of(each) for each in record["coded"]])


def adapt_together(
    spec: JobSpec, chosen: tuple[Sequence[str], dict[str, Any]], emit: Emit, only_look: bool = False
) -> tuple[LevelResult, ...]:
    """Step 4 for the levels that one selection of `choose_together` is for; of what came before it, nothing is said again."""
    levels, selection = chosen

    def tell(event: Event) -> None:
        if event.stage == "partial":
            emit(event)

    return tuple(run_level(spec, level, tell, selection, only_look) for level in levels)


def known(step: Callable[..., T], spec: JobSpec, what: Any, emit: Emit, *more: Any) -> T | None:
    """What `step(work, what, say, *more)` would return where the store holds all of it, else None; computes nothing."""
    said: list[Event] = []
    try:
        result = step(spec, what, said.append, *more, only_look=True)
    except NotYetError:
        return None
    for event in said:
        emit(event)
    return result


def known_level(spec: JobSpec, level: str, emit: Emit) -> LevelResult | None:
    """`run_level`'s result where the store holds all of it already, else None; computes nothing."""
    return known(run_level, spec, level, emit)


class NotYetError(Exception):
    """A stage is not in the store, and only looking was asked for."""


class LevelRun:
    """The stages of one level over one network in memory."""

    def __init__(self, spec: JobSpec, level: str, emit: Emit, only_look: bool = False) -> None:
        self.spec, self.level, self.emit, self.only_look = spec, level, emit, only_look
        self.store = Store(spec.store)
        self.distributed = dist.is_initialized() and dist.get_world_size() > 1
        self.leads = not self.distributed or dist.get_rank() == 0
        self._base: dict[str, Tensor] = {}
        self._model: nn.Module | None = None
        self._taken: Gradients | None = None

    def key(self, stage: str, **more: Any) -> str:
        """A stage's key; fine-tunes depend on recipe and seed, judging the base does not."""
        spec = self.spec
        inputs: dict[str, Any] = {
            "base": spec.base,
            "network": asdict(spec.network),
            "level": self.level,
            "val": spec.data.val.digest,
            "precision": spec.recipe.precision,
        }
        if stage != "original":
            inputs |= {
                "train": spec.data.train.digest,
                "recipe": spec.recipe.inputs(),
                "seed": spec.seed,
                "world_size": spec.world_size,
            }
        if stage in ("full", "measure", "selection") and spec.sensitivity_epochs is not None:
            inputs["stop_after"] = spec.sensitivity_epochs
        return stage_key(stage, **inputs | more)

    def stage(
        self,
        name: StageName,
        key: str,
        compute: Callable[[str], dict[str, Any]],
        intact: Callable[[dict[str, Any]], bool] = lambda _: True,
    ) -> dict[str, Any]:
        """The stage's record: the one in the store where it is there and intact, else a new one."""
        record = self.store.get_record(key) if self.leads else None
        record = self._agree(record if record is not None and intact(record) else None)
        if record is not None:
            self.emit(
                Event("reused", name, self.level, score=self.score_of(record), seconds=record.get("seconds", 0.0))
            )
            return record
        if self.only_look:
            raise NotYetError
        self.emit(Event("started", name, self.level))
        started = time.perf_counter()
        record = compute(key)
        if self.leads:
            self.store.put_record(key, record)
            self.store.drop_checkpoint(key)
        record = self._agree(record)
        assert record is not None
        seconds = time.perf_counter() - started
        self.emit(Event("finished", name, self.level, score=self.score_of(record), seconds=seconds))
        return record

    def score_of(self, record: Mapping[str, Any]) -> float | None:
        """At this level, of a stage that was judged."""
        score: float | None = record["scores"][self.level] if "scores" in record else record.get("score")
        return score

    def _agree(self, record: dict[str, Any] | None) -> dict[str, Any] | None:
        """Rank 0's record (or whatever else by name), on every rank."""
        if not self.distributed:
            return record
        box = [record]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def network(self) -> nn.Module:
        """The base network, fresh: a fine-tune before this one leaves no trace."""
        if self._model is None:
            self._base = self.store.get_state(self.spec.base)
            self._model = build_model(self.spec.network.name, self.spec.network.num_classes).to(device())
            self._frozen = {n for n, p in self._model.named_parameters() if not p.requires_grad}
            # a base state has no num_batches_tracked: the untouched model's zeros come back with it
            self._start = {n: t.detach().clone() for n, t in self._model.state_dict().items()}
        self._model.load_state_dict({**self._start, **self._base})
        for name, parameter in self._model.named_parameters():
            parameter.requires_grad_(name not in self._frozen)
            parameter.grad = None
        return self._model

    def judge_original(self, _: str) -> dict[str, Any]:
        return {"score": self._judge(self.network())} if self.leads else {}

    def _fine_tune_all(self, key: str) -> dict[str, Any]:
        model, recipe = self.network(), self.spec.recipe
        if self.spec.sensitivity_epochs == 0:
            started = time.perf_counter()
            if self.leads:
                g = self._gradients(model).mean
                # by hand: running statistics, which no optimizer moves, have a gradient here too
                step = {name: self._base[name] - recipe.learning_rate * g[name] for name in g}
                model.load_state_dict({**self._start, **self._base, **step})
            outcome = time.perf_counter() - started, resolve_precision(recipe.precision, device())
        else:
            outcome = self._fine_tune(model, None, key, "full")
        seconds, precision = outcome
        if not self.leads:
            return {}
        state = network_state(model)
        rows = sensitivity(layers_of(model), self._base, state)
        data = encode_state(state)
        digest = self.store.put_blob(data) if self.spec.keeps_full else digest_of(data)
        return {
            "digest": digest,
            "bytes": len(data),
            "score": self._judge(model) if self.spec.sensitivity_epochs is None else None,
            "seconds": seconds,
            "precision": precision,
            "sensitivity": [asdict(row) for row in rows],
        }

    def full(self) -> dict[str, Any]:
        """Step 1: the record of the full fine-tune, from the store or made now.

        Where fewer epochs are enough to choose layers by, it ends there and is not judged ("score" None); where none are, it
        is one step of the recipe's learning rate against the level's mean gradient at the base.
        """
        return self.stage("full", self.key("full"), self._fine_tune_all, self._is_complete)

    def _is_complete(self, record: dict[str, Any]) -> bool:
        """A full fine-tune's weights are there if this job wants them kept."""
        return not self.spec.keeps_full or self.store.has_blob(record["digest"])

    def measured(self, full: dict[str, Any]) -> dict[str, Any]:
        """Step 2: "sensitivity" (rows of `Sensitivity`) and "coded" (of `Coded`).

        "judged", where it is there, are the rows that the criterion goes by: of changes against the control, and of
        normalisations that are chosen whole, whose statistics are then folded into weight and bias and take no floats.
        """
        criterion = self.spec.criterion
        if not criterion.needs_weights:
            return {"sensitivity": full["sensitivity"], "coded": []}
        about: dict[str, Any] = {
            "full": full["digest"],
            "storage_formats": criterion.storage_formats,
            "gradients": criterion.needs_gradients,
        }
        if criterion.granularity == "module":
            about["folded"] = True
        control = self.control() if criterion.against == "clean" else None
        if control is not None:
            about["control"] = control["digest"]
        return self.stage("measure", self.key("measure", **about), lambda _: self._measure(full, control))

    def control(self) -> dict[str, Any]:
        """The full fine-tune on undistorted images, with the same order and crops: what training does without distortion."""

        def tell(event: Event) -> None:
            if event.kind != "reused":  # by every level
                self.emit(event)

        return LevelRun(self.spec, "clean", tell, self.only_look).full()

    def _measure(self, full: dict[str, Any], control: dict[str, Any] | None) -> dict[str, Any]:
        if not self.leads:
            return {}
        model, criterion = self.network(), self.spec.criterion
        taken = self._gradients(model) if criterion.needs_gradients else None
        after = self.store.get_state(full["digest"])
        layers = layers_of(model)
        rows, stored_variants = measure(layers, self._base, after, taken, criterion.storage_formats)
        judged, statistics = rows, foldable(model) if criterion.granularity == "module" else {}
        if statistics or control is not None:
            states = [after, *([] if control is None else [self.store.get_state(control["digest"])])]
            after, *against = (fold(statistics.values(), self._base, state) for state in states)
            judged, stored_variants = measure(layers, self._base, after, taken, criterion.storage_formats, *against)
            judged = [replace(row, numel=0, l2_weight=0.0) if row.layer in statistics else row for row in judged]
        zero = None if taken is None else 0.0
        stored_variants += [StoredVariant(name, FOLDED, 0, Change(0, 0.0, 0.0, 0.0, zero, zero)) for name in statistics]
        own = {} if judged is rows else {"judged": [asdict(row) for row in judged]}
        return {
            "sensitivity": [asdict(row) for row in rows],
            "coded": [asdict(each) for each in stored_variants],
            **own,
        }

    def selection(self, full: dict[str, Any], budget: int) -> dict[str, Any]:
        """Step 3: the layers chosen under M, in floats; and under "codes" those that are not stored as float32."""
        criterion = self.spec.criterion
        about = {} if criterion == PAPERS else {"full": full["digest"], "criterion": criterion.inputs()}
        if criterion.granularity == "module":
            about["folded"] = True
        if criterion.against == "clean":
            about["control"] = self.control()["digest"]
        return self.stage(
            "selection", self.key("selection", budget=budget, **about), lambda _: self._select(full, budget)
        )

    def _select(self, full: dict[str, Any], budget: int) -> dict[str, Any]:
        criterion, measured = self.spec.criterion, _measured_of(self.measured(full))
        rows = measured.rows
        if criterion == PAPERS:
            papers = select([r.mean_abs_change for r in rows], [r.numel for r in rows], budget)
            return {"layers": [rows[i].layer for i in papers.chosen], **_solved(papers, papers.used)}
        groups = problem(
            rows,
            measured.stored_variants,
            alternatives_of(self.network(), criterion.granularity),
            criterion.importance,
            criterion.storage_formats,
        )
        choice = choose_options(groups, f"{self.level}'s", criterion, budget)
        chosen = layers_and_formats(groups, choice.picked)
        storage_formats = {
            layer: storage_format for layer, storage_format in chosen.items() if storage_format != "float32"
        }
        ordered = [row.layer for row in rows if row.layer in chosen]
        return {
            "layers": ordered,
            "storage_formats": storage_formats,
            **_solved(choice, math.ceil(choice.used / FLOAT_BYTES)),
        }

    def partial(self, selection: dict[str, Any], full: dict[str, Any]) -> dict[str, Any]:
        """Step 4: the adaptor's record, "codes" by tensor where any is not float32.

        One that several levels share is the same stage for all of them, and has "scores" by level.
        """
        chosen, storage_formats = tuple(selection["layers"]), selection.get("storage_formats", {})
        shares: dict[str, int] = selection.get("shared_by", {})
        about: dict[str, Any] = {"chosen": chosen}
        if shares:
            about["level"] = shares
        if storage_formats:
            about["storage_formats"] = storage_formats
        return self.stage(
            "partial",
            self.key("partial", **about),
            lambda key: self._fine_tune_chosen(key, chosen, storage_formats, shares),
            lambda record: self.store.has_blob(record["digest"]),
        )

    def _fine_tune_chosen(
        self, key: str, chosen: tuple[str, ...], storage_formats: Mapping[str, str], shares: Mapping[str, int]
    ) -> dict[str, Any]:
        model = self.network()
        folded = {layer for layer, storage_format in storage_formats.items() if storage_format == FOLDED}
        by_tensor = {
            name: storage_formats[layer.name]
            for layer in layers_of(model)
            for name in layer.tensors
            if layer.name in storage_formats.keys() - folded
        }
        seconds, precision = self._fine_tune(model, chosen, key, "partial", shares)
        if not self.leads:
            return {}
        if folded:
            known = foldable(model)
            whole = fold([known[layer] for layer in folded], self._base, network_state(model))
            model.load_state_dict({**model.state_dict(), **whole})
        # refuses to go on when a single bit outside the chosen layers has changed
        stored = adaptor = take_adaptor(model, self._base, set(chosen) - folded)
        if by_tensor:
            # judged is what everyone will restore, not what was trained
            stored = encode(self._base, adaptor, by_tensor)
            put_adaptor(model, self._base, decode(self._base, stored))
        blob = self.store.put_state(stored)
        return {
            "digest": blob.digest,
            "bytes": blob.bytes,
            "floats": sum(t.numel() for t in adaptor.values()),
            "storage_formats": by_tensor,
            "stored": sum(t.numel() * t.element_size() for t in stored.values()),
            **(
                {"scores": {name: self._judge(model, name) for name in shares}}
                if shares
                else {"score": self._judge(model)}
            ),
            "seconds": seconds,
            "precision": precision,
        }

    def _gradients(self, model: nn.Module) -> Gradients:
        """Of the level's loss at the base, in one pass for all who ask."""
        if self._taken is None:
            images, labels = training_data(self.spec, self.level)
            recipe, normalisation = self.spec.recipe, self.spec.network.normalisation
            self._taken = gradients(model, images, labels, normalisation, recipe.crop, self.spec.seed, recipe.precision)
        return self._taken

    def _fine_tune(
        self,
        model: nn.Module,
        chosen: tuple[str, ...] | None,
        key: str,
        stage: StageName,
        shares: Mapping[str, int] | None = None,
    ) -> tuple[float, str]:
        if chosen == ():
            return (
                0.0,
                self.spec.recipe.precision,
            )  # nothing moved in the full fine-tune: the adaptor is empty
        recipe, stop_after = self.spec.recipe, self.spec.sensitivity_epochs if chosen is None else None
        images: Sequence[segmentation.Image]
        images, labels = training_data(self.spec, self.level)
        batches: BatchSource = segmentation.training_batches
        if shares:
            # every image at a level drawn anew in each epoch, as often as the level's share says
            opened = {name: training_data(self.spec, name)[0] for name in shares}
            images = Mixture([opened[name] for name in in_turn(shares)], recipe.crop)
            batches = mixed_batches
        if stop_after is not None:
            # what a recipe does at its end is for networks that are used
            recipe = recipe.model_copy(update={"averaged": 0.0})
        outcome = fine_tune(
            model, images, labels, recipe, self.spec.network.normalisation, stop_after=stop_after,
            chosen=chosen, seed=self.spec.seed, checkpoint=StoredCheckpoint(self.store, key),
            progress=progress_to(self.emit, stage, self.level), batches=batches,
        )  # fmt: skip
        return outcome.seconds, outcome.precision

    def _judge(self, model: nn.Module, level: str | None = None) -> float:
        images, labels = validation_data(self.spec, level or self.level)
        return evaluate(model, images, labels, self.spec.network.normalisation, self.spec.recipe.precision)


def _solved(found: Selection | Choice, used: int) -> dict[str, Any]:
    """What a record says of a solution; `used` in floats."""
    return {"objective": found.objective, "bound": found.bound, "status": found.status, "used": used}
