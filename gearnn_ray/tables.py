"""The three tables a release carries, with the unit or meaning of every column in the file itself."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

SCHEMA_VERSION = 1


def _schema(title: str, columns: Sequence[tuple[str, pa.DataType, str]]) -> pa.Schema:
    fields = [pa.field(name, kind, metadata={"description": text}) for name, kind, text in columns]
    return pa.schema(fields, metadata={"gearnn_ray.schema": str(SCHEMA_VERSION), "title": title})


SENSITIVITY = _schema(
    "per-layer weight change of a full fine-tune, Eq. (1)",
    [
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
    ],
)

SELECTION = _schema(
    "layers chosen under the budget, Eq. (2)",
    [
        ("level", pa.string(), "distortion level q"),
        ("layer", pa.string(), "state-dict name"),
        ("numel", pa.int64(), "N_i, floats in the layer"),
        ("value", pa.float64(), "v_i^q of Eq. (1)"),
        ("selected", pa.bool_(), "whether the layer is in S^q"),
        ("budget", pa.int64(), "M in floats"),
        ("objective", pa.float64(), "sum of v_i^q over S^q, recomputed in float64"),
        ("bound", pa.float64(), "proven upper bound on the objective"),
        ("status", pa.string(), "OPTIMAL, or FEASIBLE with the gap between objective and bound"),
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
        ("budget_floats", pa.int64(), "M in floats"),
        ("model_floats", pa.int64(), "floats in the network, running statistics included"),
        ("seconds_full", pa.float64(), "seconds of the full fine-tune, judging not counted"),
        ("seconds_partial", pa.float64(), "seconds of the partial fine-tune, judging not counted"),
    ],
)


def table(schema: pa.Schema, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows as a table of exactly this schema. Raises KeyError for a row that lacks a column."""
    return pa.table({field.name: [row[field.name] for row in rows] for field in schema}, schema=schema)
