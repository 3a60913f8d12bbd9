"""What a camera and the service tell each other: exact enough for steering, and bounded whatever a stranger sends."""

import base64
import json
import subprocess
import sys
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearnn_ray.knobs.controllers import Controllers
from gearnn_ray.knobs.wire import Advice, Costs, Head, Probe, Report, Tiles, WireError, parsed
from tests.conftest import ROOT

HEAD: dict[str, Any] = {
    "codec": "h264", "bytes": 10, "size": [48, 64], "frame": [96, 128], "frames": 10, "sent": [0, 5], "start": 0,
    "seconds": 1, "crf": 18, "knobs": {"crf": [18, 28, 38], "rate": [1, 5]}, "values": {"crf": 18, "rate": 5},
}  # fmt: skip
ONES = np.ones((6, 8), np.float32)


def head(**changed: Any) -> Head:
    return parsed(Head, json.dumps({**HEAD, **changed}).encode(), "the head")


def costs(values: dict[str, Any], loss: float, cheaper: float, **changed: Any) -> Costs:
    """A segment with these values whose loss rises to another one where the rate factor is a notch larger."""
    told = head(values=values, knobs={"crf": [18, 28, 38]}, **changed)
    after = {18: 28, 28: 38, 38: 28}[values["crf"]]
    probe = Probe(value=after, bytes=5, errors=Tiles.of(ONES * cheaper / 48))
    return Costs.of(told, Report(errors=Tiles.of(ONES * loss / 48), probes={"crf": probe}), ONES)


@given(st.lists(st.floats(0, 65_280, width=32), min_size=48, max_size=48))
def test_errors_of_tiles_arrive_as_they_were_up_to_a_step(errors: list[float]) -> None:
    sent = np.array(errors, np.float32).reshape(6, 8)
    received = Tiles.of(sent).errors((96, 128))
    assert np.abs(np.sqrt(received) - np.sqrt(sent)).max() <= np.sqrt(sent.max()) * 0.5001 / 255 + 1e-3
    assert Tiles.of(received).errors((96, 128)) == pytest.approx(received)


@pytest.mark.parametrize(
    "data",
    [
        "not base64 ☃", base64.b64encode(b"no zlib").decode(), base64.b64encode(zlib.compress(bytes(47))).decode(),
        base64.b64encode(zlib.compress(bytes(49))).decode(), base64.b64encode(zlib.compress(bytes(48))[:-5]).decode(),
        base64.b64encode(zlib.compress(bytes(50_000_000))).decode(),
    ],
    ids=["characters", "zlib", "fewer", "more", "cut short", "bomb"],
)  # fmt: skip
def test_errors_that_are_not_of_the_tiles_are_refused_unpacked_only_so_far(data: str) -> None:
    with pytest.raises(WireError, match="correct the camera"):
        Tiles(largest=1, data=data).errors((96, 128))


@pytest.mark.parametrize(
    "changed",
    [
        {"version": 2}, {"codec": "gif"}, {"bytes": 0}, {"size": [0, 64]}, {"frame": [96, 10**9]}, {"sent": []}, {"sent": [5, 0]},
        {"sent": [0, 10]}, {"sent": [-1]}, {"seconds": 0}, {"seconds": float("nan")}, {"start": float("inf")}, {"crf": 52},
        {"knobs": {}}, {"knobs": {"crf": [18], "rate": [1, 5]}}, {"knobs": {"crf": [18, 18], "rate": [1, 5]}},
        {"knobs": {"crf": [18, True], "rate": [1, 5]}}, {"knobs": {"crf": [18, float("nan")], "rate": [1, 5]}},
        {"knobs": {"crf": [18, "x" * 65], "rate": [1, 5]}}, {"knobs": {"crf": list(range(65)), "rate": [1, 5]}},
        {"knobs": {"a b": [1, 2]}, "values": {"a b": 1}}, {"knobs": {f"k{n}": [1, 2] for n in range(9)}},
        {"values": {"crf": 18}}, {"values": {"crf": 19, "rate": 5}}, {"price": -1}, {"price": 1e300}, {"ceiling": 0}, {"more": 1},
        {"codec": "jpeg"}, {"codec": "jpeg", "packets": [5, 6]}, {"codec": "jpeg", "packets": [11, -1]},
    ],
    ids=str,
)  # fmt: skip
def test_a_head_that_does_not_fit_together_is_refused_in_one_sentence(changed: dict[str, Any]) -> None:
    with pytest.raises(WireError) as refused:
        head(**changed)
    assert refused.value.status == 400
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400


@given(
    st.binary(max_size=200)
    | st.recursive(st.none() | st.floats() | st.text(), st.lists).map(lambda each: json.dumps(each).encode())
)
def test_any_bytes_are_a_message_or_are_refused(line: bytes) -> None:
    for kind in (Head, Report, Advice):
        try:
            parsed(kind, line, "the message")
        except WireError:
            continue


def test_probes_of_other_values_are_refused() -> None:
    probe = Probe(value=19, bytes=5)
    for name in ("crf", "other"):
        with pytest.raises(WireError, match="not among its values"):
            Costs.of(head(), Report(errors=Tiles.of(ONES), probes={name: probe}), ONES)


def test_a_stream_is_steered_from_segment_to_segment_and_others_are_not() -> None:
    controllers = Controllers()
    first = controllers.step("a", costs({"crf": 18}, 1.0, 1.01, price=10))
    assert first.steps == 1
    assert first.knobs != {"crf": 18}, "half of the bits for a hundredth of the loss"
    assert controllers.step("b", costs({"crf": 18}, 1.0, 90.0, price=10)).knobs == {"crf": 18}, "they are worth it"


def test_a_segment_with_knobs_of_before_and_one_without_probes_change_nothing() -> None:
    controllers = Controllers()
    steered = controllers.step("a", costs({"crf": 18}, 1.0, 1.01, price=10))
    late = controllers.step("a", costs({"crf": 18}, 1.0, 1.01, price=10))
    assert late == steered
    without = Costs.of(head(values=steered.knobs, knobs={"crf": [18, 28, 38]}, price=10), Report(), None)
    assert controllers.step("a", without) == steered


def test_losses_that_are_no_numbers_leave_the_knobs_and_count() -> None:
    told = head(price=10)
    report = Report(errors=Tiles.of(ONES), probes={"crf": Probe(value=28, bytes=5, errors=Tiles.of(ONES))})
    controllers = Controllers()
    before = controllers.step("a", Costs.of(told, Report(), None))
    values = {**told.values, "rate": 1}
    after = controllers.step("a", Costs.of(head(price=10, values=values), report, ONES * np.nan))
    assert (after.knobs, after.ignored) == (before.knobs, 2)


def test_other_knobs_or_another_goal_begin_anew_and_old_streams_are_forgotten() -> None:
    controllers = Controllers(most=2)
    best = {"crf": 18}
    for change in ({"price": 10}, {"price": 20}, {"ceiling": 1000}):
        assert controllers.step("a", costs(best, 1.0, 1.01, **change)).steps == 1
    for name in ("b", "c"):
        controllers.step(name, costs(best, 1.0, 1.01, price=10))
    assert controllers.step("a", costs(best, 1.0, 1.01, ceiling=1000)).steps == 1


def test_a_camera_needs_neither_torch_nor_ray() -> None:
    lines = "import sys, gearnn_ray.cli.main, gearnn_ray.knobs.camera, gearnn_ray.knobs.controllers"
    lines += "; print({'torch', 'ray', 'torchvision'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "set()"
