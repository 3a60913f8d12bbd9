"""What a job reports: the estimate of the remaining time, lines for logs, JSON for machines, bars for terminals, a summary."""

import io
import json
import re
from dataclasses import replace

import pytest
from rich.console import Console

from gearnn_ray.core.events import Event
from gearnn_ray.reporting.progress import Estimate, _JsonLines, _LiveBars, _Plain, describe, duration, split_plan
from gearnn_ray.reporting.summary import LayerChange, SummaryRow, accuracy_figure, print_summary, weight_change_figure


def test_remaining_time_is_what_is_left_at_the_pace_so_far() -> None:
    estimate = Estimate(split_plan(("jpeg-10", "jpeg-20")))
    estimate.see(Event("started", "original", "jpeg-10"), 100.0)
    assert estimate.remaining(Event("started", "original", "jpeg-10"), 100.0) is None
    half = Event("progress", "full", "jpeg-10", 2, 4, 1, 2)
    for event in (Event("finished", "original", "jpeg-10"), half):
        estimate.see(event, 110.0)
    done = estimate.share("jpeg-10")
    assert 0.3 < done < 0.5
    assert estimate.remaining(half, 110.0) == pytest.approx(10 * (2 - done) / done)


def test_a_notice_is_a_line_of_its_own_in_every_form() -> None:
    notice = Event("notice", "full", "jpeg-10", note="a checkpoint could not be written")
    plain, lines, terminal = io.StringIO(), io.StringIO(), io.StringIO()
    _Plain(split_plan(("jpeg-10",)), plain)(notice)
    assert plain.getvalue().endswith("  jpeg-10 full fine-tune: a checkpoint could not be written\n")
    _JsonLines({}, lines)(notice)
    assert json.loads(lines.getvalue())["event"] == "notice"
    with _LiveBars(split_plan(("jpeg-10",)), Console(file=terminal, force_terminal=True, width=100)) as bars:
        bars(notice)
        bars(Event("progress", "full", "jpeg-10", 1, 4, 1, 4))
    assert "jpeg-10 full fine-tune: a checkpoint could not be written" in terminal.getvalue()


def test_what_is_reused_is_no_pace() -> None:
    estimate = Estimate(split_plan(("jpeg-10", "jpeg-20")))
    for stage in ("original", "full", "selection", "partial"):
        estimate.see(Event("reused", stage, "jpeg-10"), 0.0)
    assert estimate.share("jpeg-10") == pytest.approx(1)
    estimate.see(Event("started", "original", "jpeg-20"), 50.0)
    last = Event("progress", "full", "jpeg-20", 1, 4)
    estimate.see(Event("finished", "original", "jpeg-20"), 60.0)
    estimate.see(last, 60.0)
    done = estimate.share("jpeg-20")
    assert estimate.remaining(last, 60.0) == pytest.approx(10 * (1 - done) / done)


def test_the_undistorted_level_is_only_judged() -> None:
    estimate = Estimate(split_plan(("clean",)))
    estimate.see(Event("finished", "original", "clean"), 1.0)
    assert estimate.share("clean") == pytest.approx(1)


def test_the_control_is_a_full_fine_tune_more() -> None:
    levels = ("jpeg-10", "clean")
    full = split_plan(levels)["jpeg-10", "full"]
    assert split_plan(levels, control=True) == split_plan(levels) | {("clean", "full"): full}
    assert split_plan(("jpeg-10",), control=True).keys() - split_plan(("jpeg-10",)).keys() == {("clean", "full")}
    estimate = Estimate(split_plan(levels, control=True))
    estimate.see(Event("finished", "original", "clean"), 1.0)
    assert 0 < estimate.share("clean") < 0.5
    estimate.see(Event("finished", "full", "clean"), 5.0)
    assert estimate.share("clean") == pytest.approx(1)
    # a bar of its own, though it is no level of the release
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with _LiveBars(split_plan(("jpeg-10",), control=True), console) as emit:
        emit(Event("progress", "full", "clean", 4, 8, 2, 4, 0.25))
        emit(Event("reused", "full", "clean"))  # every level that is measured against it reports it again
    assert [line.split()[0] for line in _last_frame(console)] == ["images", "jpeg-10", "clean", "all"]


def test_the_remaining_time_grows_with_what_is_expected_later() -> None:
    estimate = Estimate({})
    first, second = Event("finished", "mixed", "all"), Event("finished", "bn-tuned", "jpeg-10")
    estimate.see(first, 0.0)
    assert estimate.remaining(first, 0.0) == pytest.approx(0)  # of its own stage: nothing is planned yet
    estimate.expect({("all", "mixed"): 3.0})
    estimate.expect({("jpeg-10", "bn-tuned"): 1.0, ("jpeg-10", "original"): 2.0})
    estimate.see(Event("started", "bn-tuned", "jpeg-10"), 10.0)
    estimate.see(second, 14.0)
    assert estimate.share("all") == 1
    assert estimate.share("jpeg-10") == pytest.approx(1 / 3)
    assert estimate.remaining(second, 14.0) == pytest.approx(4 * 2 / 4)


def test_a_log_gets_one_line_per_event_with_the_remaining_time() -> None:
    out = io.StringIO()
    times = iter([0.0, 10.0, 20.0, 30.0, 40.0])
    with _Plain(split_plan(("jpeg-10",)), out, lambda: next(times)) as emit:
        emit(Event("started", "full", "jpeg-10"))
        emit(Event("progress", "full", "jpeg-10", 1, 8, 1, 4, 0.5))  # within an epoch: no line
        emit(Event("progress", "full", "jpeg-10", 2, 8, 1, 4, 0.5))
        emit(Event("finished", "full", "jpeg-10", score=51.234, seconds=100, metric="AP"))
    lines = out.getvalue().splitlines()
    assert len(lines) == 3
    assert "jpeg-10 full fine-tune: epoch 1 of 4, loss 0.500; about " in lines[1]
    assert "left" in lines[1]
    assert "done, AP 51.23 after 2 min" in lines[2]


def test_json_lines_hold_every_field() -> None:
    out = io.StringIO()
    with _JsonLines(split_plan(("jpeg-10",)), out) as emit:
        emit(Event("progress", "partial", "jpeg-10", 4, 8, 2, 4, 0.25))
    (row,) = map(json.loads, out.getvalue().splitlines())
    assert row["event"] == "progress"
    assert (row["stage"], row["level"], row["step"], row["steps"], row["loss"]) == ("partial", "jpeg-10", 4, 8, 0.25)
    assert row["remaining_seconds"] is not None


def test_a_terminal_gets_a_bar_per_level_with_its_stage() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with _LiveBars(split_plan(("jpeg-10", "clean")), console) as emit:
        emit(Event("progress", "images", "all", 1, 4))
        emit(Event("progress", "full", "jpeg-10", 4, 8, 2, 4, 0.25))
        emit(Event("finished", "original", "clean", score=56.3, metric="mIoU"))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "full fine-tune, epoch 2 of 4, loss 0.250" in text
    assert "done, mIoU 56.3" in text
    assert "jpeg-10" in text


def test_bars_are_added_with_the_plan_and_the_whole_stays_last() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with _LiveBars({}, console) as emit:
        emit(Event("progress", "images", "all", 1, 4))
        emit.expect({("all", "mixed"): 1.0, ("jpeg-10", "bn-tuned"): 1.0, ("jpeg-10", "original"): 1.0})
        emit(Event("finished", "mixed", "all", seconds=7))
        emit(Event("finished", "bn-tuned", "jpeg-10", score=43.2))
    rows = {line.split()[0] + line.partition("%")[2].strip() for line in _last_frame(console)}
    assert rows == {"images1 of 4", "allmixed, done after 7 s", "jpeg-10bn-tuned, done, score 43.20", "all"}
    assert [line.split()[0] for line in _last_frame(console)] == ["images", "all", "jpeg-10", "all"]
    assert "75%" in _last_frame(console)[-1]


def _last_frame(console: Console) -> list[str]:
    """The bars as they were left, without colours."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())  # type: ignore[attr-defined]
    lines = [line.split("\r")[-1].strip() for line in text.splitlines()]
    return [line for line in lines if line][-4:]


def test_a_stage_of_no_single_level_stands_alone_in_a_log() -> None:
    out = io.StringIO()
    with _Plain({("all", "stability, alpha 1"): 1.0}, out) as emit:
        emit(Event("started", "stability, alpha 1", "all"))
        emit(Event("started", "bn-tuned", "jpeg-10"))
    places = [line.split("  ")[1] for line in out.getvalue().splitlines()]
    assert places == ["stability, alpha 1: started", "jpeg-10 bn-tuned: started"]


def test_words() -> None:
    assert [duration(s) for s in (5, 100, 3600, 7300)] == ["5 s", "2 min", "60 min", "2 h 2 min"]
    reused = Event("reused", "full", "jpeg-10", score=50.0, metric="mIoU", note="made with torch 2.9.0")
    assert describe(reused) == "already in the store, mIoU 50.00 (made with torch 2.9.0)"
    assert describe(Event("finished", "full", "jpeg-10", seconds=7, note="a remark")) == "done after 7 s (a remark)"


ROW = SummaryRow("jpeg-10", "mIoU", 40.0, 50.0, 48.0, 31_000, 31_800, 15_500_000, 9.0, 3.0)


def test_a_share_of_a_gap_below_one_point_is_not_shown() -> None:
    assert ROW.gap_closed == pytest.approx(80)
    assert replace(ROW, adaptor=52.0).gap_closed == pytest.approx(120)
    assert replace(ROW, original=50.0, full=50.9).gap_closed is None
    assert replace(ROW, full=None).gap_closed is None


def test_the_table_is_readable_on_eighty_columns() -> None:
    console = Console(file=io.StringIO(), width=80)
    print_summary([ROW, replace(ROW, level="brightness-0.4+jpeg-30", full=40.5)], console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "80%" in text
    assert "31,000" in text
    assert "0.200%" in text
    assert "brightness-0.4+jpeg-30" in text
    assert "…" not in text


def test_the_picture_is_a_png_and_the_same_twice() -> None:
    rows = [
        LayerChange(f"l{i}", kind, i, 10.0**-i, selected=i == 1)
        for i, kind in enumerate(["conv_weight", "norm_weight", "norm_statistics", "bias"])
    ]
    figure = weight_change_figure({"jpeg-10": rows, "jpeg-20": rows}, "t")
    assert figure.startswith(b"\x89PNG")
    assert figure == weight_change_figure({"jpeg-10": rows, "jpeg-20": rows}, "t")
    unselected = [replace(row, selected=False) for row in rows]
    assert figure != weight_change_figure({"jpeg-10": unselected, "jpeg-20": rows}, "t")


def test_accuracy_is_drawn_over_every_kind_of_level() -> None:
    names = ("clean", "jpeg-10", "jpeg-20", "brightness-0.2", "h264-512x256", "h264-crf24", "brightness-0.4+jpeg-30")
    rows = [replace(ROW, level=name, full=None if name == "clean" else 50.0) for name in names]
    figure = accuracy_figure(rows, "t")
    assert figure.startswith(b"\x89PNG")
    assert figure == accuracy_figure(rows, "t")
    assert figure != accuracy_figure([replace(row, adaptor=10.0) for row in rows], "t")
