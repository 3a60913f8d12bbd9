"""What an evaluation makes and measures, each result a pure function of its inputs that the store keeps under a key of them.

    tuning ─► weights of every method ─► one pass over a level's images judges them all ─► counts per image

As in `gearnn_ray.offline.level_run`, whose records are used and extended: an evaluation finds what the split job made, and a
killed one what it made itself. Knows nothing of Ray.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from gearnn_ray.adaptors.adaptor import take_adaptor
from gearnn_ray.adaptors.storage_formats import decode
from gearnn_ray.core.errors import TrainingFailedError
from gearnn_ray.core.events import Emit, Event
from gearnn_ray.data.sampling import Mixture, Subset, mixed_batches
from gearnn_ray.evaluation import baselines
from gearnn_ray.evaluation.frequency import frequency_response
from gearnn_ray.levels.level import LEVELS_VERSION, codec_versions, parse_level
from gearnn_ray.models.layers import network_state
from gearnn_ray.models.registry import build_model
from gearnn_ray.offline.job_spec import (
    JobSpec,
    StoredCheckpoint,
    device,
    stage_key,
    training_data,
    validation_data,
)
from gearnn_ray.offline.level_run import LevelRun
from gearnn_ray.store.releases import Store
from gearnn_ray.tasks import segmentation
from gearnn_ray.tasks.segmentation import Image
from gearnn_ray.training.trainer import (
    BatchSource,
    Objective,
    Progress,
    autocast,
    cross_entropy,
    evaluate,
    fine_tune,
    resolve_precision,
)

EVALUATION_VERSION = 1
"""Part of every key here: bumped whenever a method would make something else from the same inputs."""

FREQUENCY_IMAGES = 24
"""Validation images, evenly spaced, that a frequency response is averaged over."""


@dataclass(frozen=True)
class Making:
    """One set of weights to be made: a method, at a level (a constant one: "all"), with what it depends on.

    `draw`: which choice of random layers. `layers`: GearNN's choice, while its learning rate is tuned.
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
        """What tells it from others of its level."""
        words = [self.method]
        if self.alpha is not None:
            words.append(f"α {self.alpha:g} σ {self.sigma:g}")
        if self.method == "random":
            words.append(f"draw {self.draw + 1}")
        return " ".join(words)


@dataclass(frozen=True)
class Weights:
    """What a method stores for a level on top of the base: the blob's digest (None: nothing, it is the base) and its floats.

    Of four bytes each: under codes there are fewer of them than restored.
    """

    digest: str | None = None
    floats: int = 0


@dataclass(frozen=True)
class Main:
    """The main methods at one level and seed: the full fine-tune, and GearNN's adaptor under each budget.

    Of a level chosen together with others there is only the release's own adaptor, if any.
    """

    switching: Weights
    gearnn: dict[int, Weights]
    layers: tuple[str, ...]
    """chosen under the release's budget"""
    sensitivity: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Judged:
    """One set of weights on one level's validation images. `counts`: digest of int32 [N, K, K], image × label × prediction."""

    score: float
    counts: str


# ── the weights ──────────────────────────────────────────────────────────────────────────────────────────────────


def make_main(
    full: JobSpec, adaptor: JobSpec, level: str, budgets: Sequence[int], emit: Emit, seed_label: str = ""
) -> Main:
    """Algorithm 1 at one level, step 1 with the recipe of `full` (which keeps its weights), step 4 with that of `adaptor`.

    budgets: M in floats, the release's own first. Every stage's key is the split job's own.
    """
    relabelled = _as_methods(emit, seed_label)
    step_1, step_4 = LevelRun(full, level, relabelled), LevelRun(adaptor, level, relabelled)
    sensed = step_1.full()
    selections = [step_1.selection(sensed, budget) for budget in budgets]
    records = [step_4.partial(selection, sensed) for selection in selections]
    # switching is always a whole fine-tune, by however short a one the layers were chosen
    whole = (
        LevelRun(replace(full, sensitivity_epochs=None), level, relabelled).full()
        if full.sensitivity_epochs is not None
        else sensed
    )
    made = {
        budget: Weights(
            record["digest"], math.ceil(record["stored"] / 4) if record.get("storage_formats") else record["floats"]
        )
        for budget, record in zip(budgets, records, strict=True)
    }
    floats = sum(row["numel"] for row in whole["sensitivity"])
    return Main(Weights(whole["digest"], floats), made, tuple(selections[0]["layers"]), tuple(whole["sensitivity"]))


def released_main(full: JobSpec, level: str, entry: Mapping[str, Any] | None, emit: Emit, seed_label: str = "") -> Main:
    """The main methods at a level chosen together with others: the full fine-tune made, GearNN's adaptor as released.

    entry: the level's in the manifest, None for another seed than the release's.
    """
    whole = LevelRun(replace(full, sensitivity_epochs=None), level, _as_methods(emit, seed_label)).full()
    switching = Weights(whole["digest"], sum(row["numel"] for row in whole["sensitivity"]))
    if entry is None:
        return Main(switching, {}, (), tuple(whole["sensitivity"]))
    stored = sum(t.numel() * t.element_size() for t in Store(full.store).get_state(entry["digest"]).values())
    released = {full.budget: Weights(entry["digest"], math.ceil(stored / 4))}
    return Main(switching, released, tuple(entry["layers"]), tuple(whole["sensitivity"]))


def make_control(spec: JobSpec, emit: Emit) -> None:
    """The full fine-tune on undistorted images, which GearNN's changes may be measured against."""
    LevelRun(spec, "clean", emit).full()


def choose_layers(spec: JobSpec, level: str, emit: Emit) -> tuple[str, ...]:
    """Steps 1 to 3 of Algorithm 1: the layers that GearNN adapts at this level."""
    # the weights are kept, for this may be the learning rate that full fine-tunes are given
    run = LevelRun(replace(spec, keep_full=True), level, _relabelled(emit, lambda event: f"tuning: {event.stage}"))
    return tuple(run.selection(run.full(), spec.budget)["layers"])


def make_weights(spec: JobSpec, making: Making, emit: Emit) -> Weights:
    """A rival's weights, from the store or made now. Raises TrainingFailedError."""
    store, key = Store(spec.store), _key(spec, "weights", making)
    label = making.label
    record = store.get_record(key)
    if record is not None and (record["digest"] is None or store.has_blob(record["digest"])):
        emit(Event("reused", label, making.level))
        return Weights(**{name: record[name] for name in ("digest", "floats")})
    emit(Event("started", label, making.level))
    started = time.perf_counter()
    base = store.get_state(spec.base)
    model = _network(spec, base)
    chosen = _train(
        spec, making, model, len(spec.data.train), StoredCheckpoint(store, key), _relay(emit, label, making)
    )
    state = network_state(model) if chosen is None else take_adaptor(model, base, chosen)
    floats = sum(tensor.numel() for tensor in state.values())
    digest = store.put_state(state).digest if state else None
    store.put_record(key, {"digest": digest, "floats": floats, "layers": None if chosen is None else list(chosen)})
    store.drop_checkpoint(key)
    emit(Event("finished", label, making.level, seconds=time.perf_counter() - started))
    return Weights(digest, floats)


def tune(spec: JobSpec, making: Making, level: str, emit: Emit) -> float:
    """mIoU in percent at `level` of what a method makes without the last fifth of the training images, on that fifth.

    -inf where the training diverges: such a learning rate is not chosen.
    """
    store, key = Store(spec.store), _key(spec, "tuning", making, judged_at=level, judged_pixels=_pixels(level))
    label = f"tuning: {making.label} at {making.learning_rate:g}"
    if (record := store.get_record(key)) is not None:
        emit(Event("reused", label, making.level, score=record["score"]))
        return float("-inf") if record["score"] is None else float(record["score"])
    emit(Event("started", label, making.level))
    started = time.perf_counter()
    model = _network(spec, store.get_state(spec.base))
    count = len(spec.data.train)
    kept = count - baselines.held_back(count)
    score: float | None
    try:
        _train(spec, making, model, kept, StoredCheckpoint(store, key), _relay(emit, label, making))
        images, labels = (Subset(part, range(kept, count)) for part in training_data(spec, level))
        score = evaluate(model, images, labels, spec.network.normalisation, spec.recipe.precision)
    except TrainingFailedError:
        score = None
    store.put_record(key, {"score": score})
    store.drop_checkpoint(key)
    emit(Event("finished", label, making.level, score=score, seconds=time.perf_counter() - started))
    return float("-inf") if score is None else score


def mix_adaptors(spec: JobSpec, lower: Weights, upper: Weights, share: float) -> Weights:
    """Two levels' adaptors mixed linearly, `share` of the upper."""
    store = Store(spec.store)
    base = store.get_state(spec.base)
    state = baselines.interpolated(base, _change(store, base, lower.digest), _change(store, base, upper.digest), share)
    return Weights(store.put_state(state).digest, sum(tensor.numel() for tensor in state.values()))


def _change(store: Store, base: Mapping[str, Tensor], digest: str | None) -> dict[str, Tensor]:
    """The tensors that a blob changes, as everyone restores them."""
    return {} if digest is None else decode(base, store.get_state(digest))


def _key(spec: JobSpec, stage: str, making: Making, **more: Any) -> str:
    if making.method == "bn-statistics":
        more["images"] = "crops"  # once they were whole
    return stage_key(
        f"evaluation-{stage}",
        evaluation=EVALUATION_VERSION,
        base=spec.base,
        network=asdict(spec.network),
        train=spec.data.train.digest,
        recipe=_recipe(spec, making).inputs(),
        making=asdict(making),
        pixels=_pixels(*(making.levels or [_trained_at(making)])),
        **more,
    )


def _trained_at(making: Making) -> str:
    """The level of the images that a method sees (`levels` where they are several)."""
    return "clean" if making.method in ("clean-tuned", "stability") else making.level


def _pixels(*levels: str) -> dict[str, Any]:
    """What decides the pixels of levels, beside the data."""
    codecs = {name: version for level in levels for name, version in codec_versions(parse_level(level)).items()}
    return {"levels": LEVELS_VERSION, "codecs": codecs}


def _kept(store: Store, key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The record under a key: the one in the store, else a new one."""
    record = store.get_record(key)
    if record is None:
        record = compute()
        store.put_record(key, record)
    return record


def _recipe(spec: JobSpec, making: Making) -> Any:
    return spec.recipe.model_copy(update={"learning_rate": making.learning_rate or spec.recipe.learning_rate})


def _network(spec: JobSpec, base: Mapping[str, Tensor]) -> nn.Module:
    model = build_model(spec.network.name, spec.network.num_classes).to(device())
    model.load_state_dict(base)
    return model


def _train(
    spec: JobSpec,
    making: Making,
    model: nn.Module,
    count: int,
    checkpoint: StoredCheckpoint,
    progress: Callable[[Progress], None],
) -> tuple[str, ...] | None:
    """Do to `model`, which is the base, what the method does, on the first `count` training images.

    Returns the layers it may have changed, None for all.
    """
    method, recipe, normalisation = making.method, _recipe(spec, making), spec.network.normalisation
    chosen: tuple[str, ...] | None = None
    objective: Objective = cross_entropy
    batches: BatchSource = segmentation.training_batches
    rates: dict[str, float] | None = None
    images: Sequence[Image]
    if method == "mixed":
        parts = [training_data(spec, name) for name in making.levels]
        labels: Sequence[Image] = Subset(parts[0][1], range(count))
        images = Mixture([Subset(part, range(count)) for part, _ in parts], recipe.crop)
        batches = mixed_batches
    else:
        images, labels = (Subset(part, range(count)) for part in training_data(spec, _trained_at(making)))
    if method == "bn-statistics":
        sides = segmentation.crop_size(images, recipe.crop)
        drawn = segmentation.training_batches(images, labels, recipe.batch_size, sides, (making.seed, 0))
        baselines.reestimate_statistics(model, (x for x, _ in drawn), normalisation, recipe.precision)
        return baselines.statistics_layers(model)
    if method == "stability":
        assert making.alpha is not None
        assert making.sigma is not None
        objective = baselines.stability_objective(making.alpha, making.sigma)
    elif method == "bn-tuned":
        chosen = baselines.norm_layers(model)
    elif method == "first-block":
        chosen = baselines.first_layers(model, making.budget)
    elif method == "random":
        chosen = baselines.random_layers(model, making.budget, making.draw)
    elif method == "auto-rgn":

        def choose() -> dict[str, Any]:
            crop, precision = recipe.crop, recipe.precision
            rgn = baselines.relative_gradients(
                model, images, labels, normalisation, recipe.batch_size, crop, making.seed, precision
            )
            layers, factors = baselines.auto_rgn(model, making.budget, rgn)
            return {"layers": list(layers), "rates": factors}

        # kept, because a gradient's last bit may choose otherwise where the fine-tune is resumed
        choice = _kept(
            Store(spec.store), _key(spec, "layers", replace(making, learning_rate=0.0), images=count), choose
        )
        chosen, rates = tuple(choice["layers"]), choice["rates"]
    elif method == "gearnn":
        chosen = making.layers
    if chosen != ():
        fine_tune(
            model, images, labels, recipe, normalisation, chosen=chosen, seed=making.seed, checkpoint=checkpoint,
            progress=progress, batches=batches, objective=objective, rates=rates,
        )  # fmt: skip
    return chosen


# ── judging ──────────────────────────────────────────────────────────────────────────────────────────────────────


def judge(spec: JobSpec, level: str, digests: Sequence[str | None], emit: Emit) -> dict[str | None, Judged]:
    """All these weights (None: the base itself) on a level's validation images, in one pass over them.

    What the store has judged before is not judged again.
    """
    store = Store(spec.store)
    keys = {digest: _judged_key(spec, level, digest) for digest in digests}
    found = {digest: record for digest, key in keys.items() if (record := store.get_record(key)) is not None}
    missing = [digest for digest in keys if digest not in found or not store.has_blob(found[digest]["counts"])]
    if not missing:
        emit(Event("reused", "judging", level))
    else:
        emit(Event("started", "judging", level))
        started = time.perf_counter()
        base = store.get_state(spec.base)
        changes = [_change(store, base, digest) for digest in missing]
        model = _network(spec, base)
        images, labels = validation_data(spec, level)

        def report(done: int) -> None:
            emit(Event("progress", "judging", level, done, len(images)))

        counts = confusions(model, changes, images, labels, spec, report)
        for digest, each in zip(missing, counts, strict=True):
            blob = store.put_state({"counts": each})
            found[digest] = {"score": segmentation.mean_iou(each.sum(0)), "counts": blob.digest}
            store.put_record(keys[digest], found[digest])
        emit(Event("finished", "judging", level, seconds=time.perf_counter() - started))
    return {digest: Judged(found[digest]["score"], found[digest]["counts"]) for digest in keys}


def _judged_key(spec: JobSpec, level: str, digest: str | None) -> str:
    return stage_key(
        "evaluation-judged",
        base=spec.base,
        network=asdict(spec.network),
        level=level,
        val=spec.data.val.digest,
        pixels=_pixels(level),
        # whatever machine judges: bfloat16 and float32 are not mixed within a comparison unnoticed
        precision=resolve_precision(spec.recipe.precision, device()),
        weights=digest,
    )


def confusions(
    model: nn.Module,
    changes: Sequence[Mapping[str, Tensor]],
    images: Sequence[Image],
    labels: Sequence[Image],
    spec: JobSpec,
    report: Callable[[int], None] = lambda _: None,
) -> list[Tensor]:
    """Counts int32 [N, K, K] of `model` with each of these changes to its weights ({}: as it is).

    Each image is read and normalised once; the arithmetic is that of `gearnn_ray.training.trainer.evaluate`, image by image.
    """
    where = next(model.parameters()).device
    precision = resolve_precision(spec.recipe.precision, where)
    model.to(memory_format=torch.channels_last)
    model.eval()
    networks = [_with(model, {name: _channels_last(t.to(where)) for name, t in change.items()}) for change in changes]
    counts: list[list[Tensor]] = [[] for _ in changes]
    reported = time.perf_counter()
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        x = torch.from_numpy(image[None].copy()).to(where).permute(0, 3, 1, 2)
        x = spec.network.normalisation(x).contiguous(memory_format=torch.channels_last)
        for network, own in zip(networks, counts, strict=True):
            with torch.inference_mode(), autocast(precision, where):
                logits = segmentation.logits_of(network, x)
            own.append(segmentation.confusion(logits, label).to("cpu", torch.int32))
        if time.perf_counter() - reported > 1:
            report(index + 1)
            reported = time.perf_counter()
    return [torch.stack(own) for own in counts]


def _with(model: nn.Module, change: Mapping[str, Tensor]) -> Callable[[Tensor], Any]:
    """`model` with some weights in place of its own; nothing else is held twice."""
    return lambda x: functional_call(model, dict(change), (x,), tie_weights=False)


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def counts_of(spec: JobSpec, judged: Judged) -> NDArray[np.int64]:
    """[N, K, K] = image × label × prediction."""
    return Store(spec.store).get_state(judged.counts)["counts"].numpy().astype(np.int64)


# ── a closer look ────────────────────────────────────────────────────────────────────────────────────────────────


def frequency(spec: JobSpec, level: str, weights: Weights, network: str, emit: Emit) -> list[list[float]]:
    """The frequency response (§3.1.2) of a network at a level, [8][8], over at most 24 validation images."""
    store, label = Store(spec.store), f"frequency response: {network}"
    key = stage_key(
        "evaluation-frequency",
        evaluation=EVALUATION_VERSION,
        base=spec.base,
        network=asdict(spec.network),
        level=level,
        val=spec.data.val.digest,
        pixels=_pixels(level),
        weights=weights.digest,
        images=FREQUENCY_IMAGES,
    )
    record = store.get_record(key)
    if record is not None:
        emit(Event("reused", label, level))
    else:
        emit(Event("started", label, level))
        started = time.perf_counter()
        base = store.get_state(spec.base)
        model = _network(spec, {**base, **_change(store, base, weights.digest)})
        images, labels = validation_data(spec, level)
        taken = range(min(len(images), FREQUENCY_IMAGES))
        positions = [index * len(images) // len(taken) for index in taken]
        response = frequency_response(
            model, Subset(images, positions), Subset(labels, positions), spec.network.normalisation
        )
        record = {"response": np.asarray(response).tolist()}
        store.put_record(key, record)
        emit(Event("finished", label, level, seconds=time.perf_counter() - started))
    response_: list[list[float]] = record["response"]
    return response_


@dataclass(frozen=True)
class Picture:
    """One image at one level, as both networks see it.

    image: uint8 [H, W, 3]; label, original, adaptor: uint8 [h, w] class ids, 255 = not labelled; scores: percent mIoU of this
    image (original, adaptor).
    """

    level: str
    sample: str
    image: Image
    label: Image
    original: Image
    adaptor: Image
    class_names: tuple[str, ...]
    scores: tuple[float, float]


def see(spec: JobSpec, level: str, weights: Weights, original: Judged, adaptor: Judged) -> Picture:
    """The image whose gain from the adaptor is the median one of all: neither the best nor the worst example."""
    before, after = (
        [segmentation.mean_iou(torch.from_numpy(c)) for c in counts_of(spec, j)] for j in (original, adaptor)
    )
    gains = np.subtract(after, before)
    index = int(np.argsort(gains, kind="stable")[len(gains) // 2])
    store = Store(spec.store)
    base = store.get_state(spec.base)
    images, labels = validation_data(spec, level)
    image, label = images[index], labels[index]
    model = _network(spec, base)
    where = next(model.parameters()).device
    precision = resolve_precision(spec.recipe.precision, where)
    model.eval()
    predictions: list[NDArray[np.uint8]] = []
    for state in (base, {**base, **_change(store, base, weights.digest)}):
        x = torch.from_numpy(image[None].copy()).to(where).permute(0, 3, 1, 2)
        x = spec.network.normalisation(x).contiguous(memory_format=torch.channels_last)
        model.load_state_dict(state)
        with torch.inference_mode(), autocast(precision, where):
            logits = segmentation.logits_of(model, x)
        predictions.append(logits[0].argmax(0).to("cpu", torch.uint8).numpy())
    sample = spec.data.val.ids[index]
    first, second = predictions
    scores = (before[index], after[index])
    names = spec.data.class_names
    return Picture(level, sample, np.array(image), np.array(label), first, second, names, scores)


def _relay(emit: Emit, label: str, making: Making) -> Callable[[Progress], None]:
    def report(p: Progress) -> None:
        emit(Event("progress", label, making.level, p.step, p.steps, p.epoch + 1, p.epochs, p.loss))

    return report


def _as_methods(emit: Emit, seed_label: str) -> Emit:
    names = {"full": "switching", "partial": "gearnn"}
    return _relabelled(emit, lambda event: names.get(event.stage, event.stage) + seed_label)


def _relabelled(emit: Emit, name: Callable[[Event], str]) -> Emit:
    return lambda event: emit(replace(event, stage=name(event)))
