"""The tables of releases and of evaluations, with the unit or meaning of every column in the file itself."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

SCHEMA_VERSION = 1


def _schema(title: str, columns: Sequence[tuple[str, pa.DataType, str]]) -> pa.Schema:
    fields = [pa.field(name, kind, metadata={"description": text}) for name, kind, text in columns]
    return pa.schema(fields, metadata={"gearnn_ray.schema": str(SCHEMA_VERSION), "title": title})


_CHANGE = [
    ("level", pa.string(), "distortion level q"),
    (
        "layer",
        pa.string(),
        "state-dict name; <module>.running_stats is running mean and variance together",
    ),
    ("kind", pa.string(), "kind of layer"),
    ("index", pa.int64(), "position in state-dict order"),
    ("numel", pa.int64(), "N_i, floats in the layer"),
    ("mean_abs_change", pa.float64(), "v_i^q, mean |p - f_q(p)|, in units of the weight"),
    ("max_abs_change", pa.float64(), "max |p - f_q(p)|, in units of the weight"),
    ("l2_change", pa.float64(), "L2 norm of p - f_q(p)"),
    ("l2_weight", pa.float64(), "L2 norm of p, the base's weights"),
    ("share_above_2e_4", pa.float64(), "share of the layer's floats with |p - f_q(p)| > 2e-4, 0 to 1"),
]

_VALUES = [
    ("sum_abs_change", pa.float64(), "sum |p - f_q(p)|, in units of the weight"),
    ("relative_change", pa.float64(), "l2_change / l2_weight; 0 where the base's weights are all zero"),
    (
        "first_order_change",
        pa.float64(),
        "sum g·(f_q(p) - p), g the loss's mean gradient at the base: its predicted change; null where g was not taken",
    ),
    (
        "fisher_change",
        pa.float64(),
        "sum F·(f_q(p) - p)², F the mean squared gradient of an image's loss at the base; null where F was not taken",
    ),
]

SENSITIVITY = _schema("per-layer weight change of a full fine-tune, Eq. (1)", [*_CHANGE, *_VALUES])

SELECTION = _schema(
    "layers chosen under the budget, Eq. (2)",
    [
        ("level", pa.string(), "distortion level q"),
        ("layer", pa.string(), "state-dict name"),
        ("numel", pa.int64(), "N_i, floats in the layer; folded into others, an adaptor holds none of them"),
        (
            "value",
            pa.float64(),
            "v_i^q: Eq. (1), or the value function that the release was made with, of the change that it measures",
        ),
        ("selected", pa.bool_(), "whether the layer is in S^q"),
        (
            "budget",
            pa.int64(),
            "M in floats, of this adaptor; with selection.problem one-memory of all levels' together",
        ),
        (
            "objective",
            pa.float64(),
            "sum of v_i^q over S^q, less what codes lose, in float64; of levels chosen together that of all, by frequency",
        ),
        ("bound", pa.float64(), "proven upper bound on the objective"),
        ("status", pa.string(), "OPTIMAL, or FEASIBLE with the gap between objective and bound"),
        (
            "storage_format",
            pa.string(),
            "how the layer is stored: float32, bfloat16 or int8, or folded into its normalisation; null where it is not selected",
        ),
    ],
)

SUMMARY = _schema(
    "accuracy and size per level",
    [
        ("level", pa.string(), "distortion level q"),
        ("metric", pa.string(), "what the three scores are, in percent on the validation images"),
        ("original", pa.float64(), "score of the base, percent"),
        ("full", pa.float64(), "score of the fully fine-tuned network, percent; null where none was made"),
        ("adaptor", pa.float64(), "score of base + adaptor, percent"),
        ("adaptor_floats", pa.int64(), "floats in the adaptor"),
        (
            "budget_floats",
            pa.int64(),
            "M in floats, of this adaptor; with selection.problem one-memory of all together",
        ),
        ("model_floats", pa.int64(), "floats in the network, running statistics included"),
        ("seconds_full", pa.float64(), "seconds of the full fine-tune, judging not counted"),
        (
            "seconds_partial",
            pa.float64(),
            "seconds of the partial fine-tune, judging not counted; of a shared adaptor the same one at each of its levels",
        ),
    ],
)

SWEEP = _schema(
    "accuracy over the budget M, a row per budget, value function and level",
    [
        ("budget", pa.string(), "M as asked for"),
        (
            "budget_floats",
            pa.int64(),
            "M in floats, of each adaptor; with selection.problem one-memory of all together",
        ),
        ("model_floats", pa.int64(), "floats in the network, running statistics included"),
        ("value", pa.string(), "what a layer is worth: name of the value function"),
        ("level", pa.string(), "distortion level q"),
        ("metric", pa.string(), "what the scores are, in percent on the validation images"),
        ("original", pa.float64(), "score of the base, percent"),
        ("full", pa.float64(), "score of the fully fine-tuned network, percent"),
        ("adaptor", pa.float64(), "score of base + adaptor, percent"),
        ("floats", pa.int64(), "floats in the adaptor"),
        ("bytes", pa.int64(), "bytes of the adaptor in the store"),
        ("layers", pa.int64(), "layers in the adaptor"),
        ("seconds_partial", pa.float64(), "seconds of the partial fine-tune, judging not counted"),
        ("complete", pa.bool_(), "whether every level was judged under this budget and value"),
        ("mean", pa.float64(), "mean of `adaptor` over this budget's and value's levels"),
        ("pareto", pa.bool_(), "whether no other budget or value has less memory or a better mean"),
        ("recommended", pa.bool_(), "the smallest memory within the tolerance of the best mean"),
    ],
)

ACCURACY = _schema(
    "accuracy of every method at every level, of each seed",
    [
        ("method", pa.string(), "id of the method"),
        ("level", pa.string(), "distortion level q"),
        ("metric", pa.string(), "what the value is, in percent on the validation images"),
        ("value", pa.float64(), "score, percent"),
        ("seed", pa.int64(), "seed of the fine-tune; of random layers: the draw"),
        (
            "floats",
            pa.int64(),
            "floats the method stores for this level beside the base; one network for all levels: the whole of it; original: 0",
        ),
        ("release", pa.string(), "manifest digest of the release under evaluation"),
    ],
)

DIFFERENCES = _schema(
    "each method minus GearNN at every level, paired over the validation images",
    [
        ("method", pa.string(), "id of the method"),
        ("level", pa.string(), "distortion level q"),
        ("value", pa.float64(), "the method's mean over its seeds minus GearNN's, percentage points"),
        ("low", pa.float64(), "lower end of the 95% interval of a paired bootstrap over images, percentage points"),
        ("high", pa.float64(), "upper end of it, percentage points"),
        ("seeds", pa.int64(), "how many seeds of the method were judged"),
    ],
)

AVERAGES = _schema(
    "GearNN minus each method per axis, levels with equal weight",
    [
        ("axis", pa.string(), "family of levels"),
        ("method", pa.string(), "id of the method"),
        ("levels", pa.int64(), "how many levels of the axis both have; the averages are over these"),
        ("average", pa.float64(), "the method's average score, percent"),
        ("gearnn", pa.float64(), "GearNN's average score over the same levels, percent"),
        ("difference", pa.float64(), "GearNN minus the method, percentage points"),
        ("low", pa.float64(), "lower end of the 95% interval of a paired bootstrap over images, percentage points"),
        ("high", pa.float64(), "upper end of it, percentage points"),
        (
            "published",
            pa.float64(),
            "the paper's figure for GearNN minus the method, mIoU points over all its distortions on Cityscapes; or null",
        ),
    ],
)

MEMORY = _schema(
    "numbers in memory per method and count of levels (Table 1)",
    [
        ("network", pa.string(), "name of the network"),
        ("method", pa.string(), "id of the method"),
        ("levels", pa.int64(), "|Q|, the undistorted level included"),
        ("floats", pa.int64(), "floats in memory"),
        ("of_network", pa.float64(), "floats as a multiple of the network's"),
        ("kind", pa.string(), "budget (by the formula N + (|Q| - 1)·M) or actual (what is really held)"),
    ],
)

TUNING = _schema(
    "settings tried: learning rates, and the grid of stability training",
    [
        ("method", pa.string(), "id of the method"),
        ("level", pa.string(), "distortion level q"),
        ("learning_rate", pa.float64(), "learning rate at the start"),
        ("alpha", pa.float64(), "weight of stability training's second term; null for learning rates"),
        ("sigma", pa.float64(), "its noise's standard deviation, pixels in [0, 1]; null for learning rates"),
        (
            "value",
            pa.float64(),
            "percent, on held-back training images (null: diverged); stability's grid on validation images",
        ),
        ("chosen", pa.bool_(), "whether the method was then fine-tuned with this setting"),
    ],
)

BYTES = _schema(
    "accuracy over what is stored per level",
    [
        ("method", pa.string(), "id of the method"),
        ("level", pa.string(), "distortion level q"),
        ("budget", pa.int64(), "M in floats; null for methods without a budget"),
        ("floats", pa.int64(), "floats stored for this level"),
        ("value", pa.float64(), "score, mean over seeds, percent"),
    ],
)

CHANGES = _schema(
    "per-layer weight change of full fine-tunes and what the adaptors hold of it (Fig. 5)",
    [*_CHANGE, ("selected", pa.bool_(), "whether the layer is in the adaptor")],
)

SHARES = _schema(
    "share of a network that a full fine-tune changed by more than 2e-4",
    [
        ("level", pa.string(), "distortion level q"),
        ("by_layer", pa.float64(), "share of weights in layers whose mean change is above 2e-4, 0 to 1"),
        ("by_weight", pa.float64(), "share of weights whose own change is above 2e-4, 0 to 1"),
    ],
)

FREQUENCY = _schema(
    "gradient of the loss by the DCT coefficients of the image (§3.1.2, Figs. 3, 4, 6, 7)",
    [
        ("network", pa.string(), "original, switching (the full fine-tune) or gearnn (the partial one)"),
        ("level", pa.string(), "distortion level q"),
        ("vertical", pa.int64(), "vertical frequency of the 8×8 block, 0 to 7"),
        ("horizontal", pa.int64(), "horizontal frequency of the 8×8 block, 0 to 7"),
        ("magnitude", pa.float64(), "mean |d loss / d coefficient|, per unit of the coefficient of pixels in 0 to 255"),
    ],
)


def table(schema: pa.Schema, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows as a table of exactly this schema. Raises KeyError for a row that lacks a column."""
    return pa.table({field.name: [row[field.name] for row in rows] for field in schema}, schema=schema)
