"""The schemas of the Parquet tables, as text: a title, then a line `name type meaning` per column, whose meaning is metadata."""

from collections.abc import Mapping, Sequence

import pyarrow as pa

SCHEMA_VERSION = 1

_TYPES = {"text": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}


def _schema(text: str) -> pa.Schema:
    title, *columns = (line for line in text.splitlines() if line)
    split = (column.split(maxsplit=2) for column in columns)
    fields = [pa.field(name, _TYPES[kind], metadata={"description": meaning}) for name, kind, meaning in split]
    return pa.schema(fields, metadata={"gearnn_ray.schema": str(SCHEMA_VERSION), "title": title})


_LEVEL = "level text distortion level q"
_METHOD = "method text identifier of the method"
_METRIC = "metric text name of the metric of the scores, which are percentages on the validation images"
_BUDGET = "int M in floats: of this adaptor, or with selection.problem one-memory of all adaptors together"
_MODEL = "model_floats int floats in the network, running statistics included"
_PARTIAL = "seconds_partial float seconds of the partial fine-tune without evaluation; repeated for a shared adaptor"
_INTERVAL = """
low float lower end of the 95% interval of a paired bootstrap over images, percentage points
high float upper end of the 95% interval, percentage points
"""
_CHANGE = f"""
{_LEVEL}
layer text state-dict name; <module>.running_stats stands for running mean and variance together
kind text kind of layer
index int position in the order of the state dict
numel int N_i, number of floats in the layer
mean_abs_change float v_i^q = mean |p - f_q(p)|, in units of the weight
max_abs_change float max |p - f_q(p)|, in units of the weight
l2_change float L2 norm of p - f_q(p), in units of the weight
l2_weight float L2 norm of p, the weights of the base
share_above_2e_4 float share of the layer's floats with |p - f_q(p)| > 2e-4, 0 to 1
"""

SENSITIVITY = _schema(f"""
per-layer weight change of a full fine-tune, Eq. (1)
{_CHANGE}
sum_abs_change float sum |p - f_q(p)|, in units of the weight
relative_change float l2_change / l2_weight; 0 if all weights of the base are zero
first_order_change float sum g·(f_q(p) - p), g the mean gradient of the loss at the base; null if g was not computed
fisher_change float sum F·(f_q(p) - p)², F the mean squared gradient of one image's loss at the base; null if not computed
""")

SELECTION = _schema(f"""
layers selected under the budget, Eq. (2)
{_LEVEL}
layer text state-dict name
numel int N_i, number of floats in the layer; the adaptor stores none of them if the layer is folded
value float v_i^q of Eq. (1), or the importance that selection.importance names, of the change that was measured
selected bool whether the layer is in S^q
budget {_BUDGET}
objective float sum of v_i^q over S^q less the loss of storage formats; over all levels, by frequency, if selected jointly
bound float proven upper bound on the objective
status text OPTIMAL, or FEASIBLE if a gap remains between objective and bound
storage_format text float32, bfloat16, int8, or folded into the layer's normalisation; null if it is not selected
""")

SUMMARY = _schema(f"""
accuracy and size per level
{_LEVEL}
{_METRIC}
original float score of the base, percent
full float score of the fully fine-tuned network, percent; null if there is none
adaptor float score of base + adaptor, percent
adaptor_floats int floats in the adaptor
budget_floats {_BUDGET}
{_MODEL}
seconds_full float seconds of the full fine-tune without evaluation
{_PARTIAL}
""")

SCORES = _schema(f"""
further metrics of a task with several, per level and network
{_LEVEL}
network text original (the base), full (the base fully fine-tuned) or adaptor (base + adaptor)
metric text name of the metric
value float percent, on the validation images
""")

SWEEP = _schema(f"""
accuracy over the budget M, a row per budget, importance and level
budget text M as it was asked for
budget_floats {_BUDGET}
{_MODEL}
value text name of the importance by which layers were selected
{_LEVEL}
{_METRIC}
original float score of the base, percent
full float score of the fully fine-tuned network, percent
adaptor float score of base + adaptor, percent
floats int floats in the adaptor
bytes int bytes of the adaptor in the store
layers int layers in the adaptor
{_PARTIAL}
complete bool whether every level was evaluated under this budget and importance
mean float mean of `adaptor` over the levels of this budget and importance
pareto bool whether no other budget or importance has less memory or a better mean
recommended bool whether this is the smallest memory within the tolerance of the best mean
""")

ACCURACY = _schema(f"""
accuracy of every method at every level, per seed
{_METHOD}
{_LEVEL}
{_METRIC}
value float score, percent
seed int seed of the fine-tune, or the number of the draw of random layers
floats int floats stored for this level beside the base; the whole network if all levels share one; 0 for the original
release text manifest digest of the evaluated release
""")

DIFFERENCES = _schema(f"""
each method minus GearNN at every level, paired over the validation images
{_METHOD}
{_LEVEL}
value float mean over the method's seeds minus that of GearNN, percentage points
{_INTERVAL}
seeds int number of seeds of the method that were evaluated
""")

AVERAGES = _schema(f"""
GearNN minus each method per axis, levels with equal weight
axis text family of levels
{_METHOD}
levels int number of levels of the axis that both have, over which the averages are taken
average float average score of the method, percent
gearnn float average score of GearNN over the same levels, percent
difference float GearNN minus the method, percentage points
{_INTERVAL}
published float GearNN minus the method in the paper: mIoU points on Cityscapes over all its distortions; null if not given
""")

MEMORY = _schema(f"""
floats in memory per method and number of levels (Table 1)
network text name of the network
{_METHOD}
levels int |Q|, the undistorted level included
floats int floats in memory
of_network float floats as a multiple of the network's
kind text budget (the formula N + (|Q| - 1)·M) or actual (what the release holds)
""")

TUNING = _schema(f"""
settings that were tried: learning rates, and the grid of stability training
{_METHOD}
{_LEVEL}
learning_rate float initial learning rate
alpha float weight of the stability loss; null for learning rates
sigma float standard deviation of the noise of stability training, pixels in [0, 1]; null for learning rates
value float score in percent on held-back training images (stability: on validation images); null if training diverged
chosen bool whether the method was then fine-tuned with this setting
""")

BYTES = _schema(f"""
accuracy over the memory per level
{_METHOD}
{_LEVEL}
budget int M in floats; null for methods without a budget
floats int floats stored for this level
value float mean score over seeds, percent
""")

CHANGES = _schema(f"""
per-layer weight change of full fine-tunes, and the layers of the adaptors (Fig. 5)
{_CHANGE}
selected bool whether the layer is in the adaptor
""")

SHARES = _schema(f"""
share of a network that a full fine-tune changed by more than 2e-4
{_LEVEL}
by_layer float share of weights in layers whose mean change exceeds 2e-4, 0 to 1
by_weight float share of weights whose own change exceeds 2e-4, 0 to 1
""")

FREQUENCY = _schema(f"""
gradient of the loss with respect to the DCT coefficients of the image (§3.1.2, Figs. 3, 4, 6, 7)
network text original, switching (the full fine-tune) or gearnn (the partial fine-tune)
{_LEVEL}
vertical int vertical frequency of the 8×8 block, 0 to 7
horizontal int horizontal frequency of the 8×8 block, 0 to 7
magnitude float mean |d loss / d coefficient|, per unit of a coefficient of pixels in 0 to 255
""")


_ADAPT = """
what each method sent and found in each segment of a video, a row per source, run of a method and segment
source text name of the video
method text identifier of the method; +gearnn: over the adaptive network
run int number of the run among those of the method: controllers have one for each price
segment int number of the segment, from 0
bytes int bytes of the encoded segment
seconds float duration of the segment, seconds
accuracy float the task's first metric over the segment's frames, percent; null if there is nothing to find in it
forward_equivalents float forward passes of one frame that the server computed, a gradient as its time in such passes
encodes int encodings of the segment by the camera, probes included
level text distortion level whose network answered
price float λ of a controller, price of the oracle in points per byte, or agreement in percent that profiling asks for; or null
goal text of a controller: trade (at the price λ), ceiling (bits a second) or floor (accuracy in percent); null for other methods
"""


def adapt_schema(knobs: Mapping[str, Sequence[int | float | str]]) -> pa.Schema:
    """Of `adapt.parquet`, with a column for each knob. knobs: their values by name."""
    kinds = {name: "text" if any(isinstance(value, str) for value in values) else "float" for name, values in knobs.items()}
    return _schema(_ADAPT + "".join(f"{name} {kind} deployed value of the knob\n" for name, kind in kinds.items()))


def table(schema: pa.Schema, rows: Sequence[Mapping[str, object]]) -> pa.Table:
    """Rows as a table of exactly this schema. Raises KeyError for a row that lacks a column."""
    return pa.table({field.name: [row[field.name] for row in rows] for field in schema}, schema=schema)
