"""The frame of the campaign of faults: each run is noted, what was cut off is run again, and nothing wrong is passed over."""

import random
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import faults
from benchmarks.faults.campaign import Line, Outcome, Run, campaign, finished, run_once, sound, table
from tests.conftest import ROOT


def line(run: Callable[[random.Random, Path], Outcome], name: str = "a-fault", runs: int = 3) -> Line:
    return Line(name, f"what {name} does", runs, run)


def fine(draw: random.Random, folder: Path) -> Outcome:
    del folder
    return Outcome(equal=True, recovery=draw.random())


def test_a_run_draws_the_same_moments_again_and_has_a_folder_of_its_own() -> None:
    folders = []

    def draws(draw: random.Random, folder: Path) -> Outcome:
        assert list(folder.iterdir()) == []
        (folder / "left over").touch()
        folders.append(folder)
        return Outcome(figures={"drawn": draw.random()})

    def drawn(name: str, seed: int, index: int) -> float:
        outcome = run_once(line(draws, name), seed, index).outcome
        assert outcome is not None
        return outcome.figures["drawn"]

    assert drawn("a", 0, 1) == drawn("a", 0, 1)
    assert len({drawn("a", 0, 1), drawn("a", 0, 2), drawn("a", 1, 1), drawn("b", 0, 1)}) == 4
    assert not any(folder.exists() for folder in folders)


def test_an_exception_is_a_failed_run_and_the_campaign_goes_on(tmp_path: Path) -> None:
    def sometimes(draw: random.Random, folder: Path) -> Outcome:
        made.append(1)
        if len(made) == 2:
            raise LookupError("the digest is gone")
        return fine(draw, folder)

    made: list[int] = []
    runs = [run for _, run in campaign([line(sometimes)], 0, None, tmp_path)]
    assert [run.error for run in runs] == ["", "LookupError: the digest is gone", ""]
    assert runs[1].outcome is None
    assert finished(tmp_path / "a-fault.jsonl") == runs
    assert not sound(runs)


def test_what_is_noted_is_not_run_again_and_what_was_cut_off_is(tmp_path: Path) -> None:
    made: list[int] = []

    def count(draw: random.Random, folder: Path) -> Outcome:
        made.append(1)
        return fine(draw, folder)

    lines = [line(count, "one", 5), line(count, "two", 1)]
    assert [run.index for _, run in campaign(lines, 0, 2, tmp_path)] == [0, 1, 0]
    file = tmp_path / "one.jsonl"
    whole = finished(file)
    file.write_text(file.read_text()[:-10])  # killed while it wrote the second run
    assert finished(file) == whole[:1]
    made.clear()
    made_again = [(which.name, run.index) for which, run in campaign(lines, 0, None, tmp_path)]
    assert made_again == [("one", 1), ("one", 2), ("one", 3), ("one", 4)]
    assert len(made) == 4
    again = finished(file)
    assert sorted(run.index for run in again) == [0, 1, 2, 3, 4]
    assert next(run for run in again if run.index == 1).outcome == whole[1].outcome  # it drew the same
    assert list(campaign(lines, 0, None, tmp_path)) == []


def test_the_table_has_a_row_for_each_line_that_ran(tmp_path: Path) -> None:
    outcomes = iter(
        [
            Outcome(equal=True, repeated=1.0, recovery=2.0, figures={"requests": 4}),
            Outcome(equal=False, torn=1, lost=2, repeated=1.0, recovery=5.0, silent=1, figures={"requests": 6}),
            Outcome(hit=False),
        ]
    )
    ran = line(lambda *_: next(outcomes), runs=4)
    list(campaign([ran], 0, None, tmp_path))  # the fourth finds no outcome
    head, _, row, rest = table([line(fine, "never-ran"), ran], tmp_path).split("\n", 3)
    assert head.startswith("| fault | runs | hit | equal digests | torn or lost |")
    cells = "4 of 4 | 2 | 1 of 2 | 3 | 1 | 3.5, at most 5 | 1 | 1"
    assert row == f"| what a-fault does | {cells} |"
    assert rest.strip() == "- what a-fault does: requests 5, at most 6"


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (Outcome(), True),
        (Outcome(hit=False), True),
        (Outcome(equal=True, repeated=3, recovery=9), True),
        (Outcome(equal=False), False),
        (Outcome(torn=1), False),
        (Outcome(lost=1), False),
        (Outcome(silent=1), False),
        (None, False),
    ],
)
def test_one_thing_that_is_wrong_is_enough(outcome: Outcome | None, expected: bool) -> None:
    assert sound([Run(0, 0.1, Outcome()), Run(1, 0.1, outcome)]) == expected


@pytest.mark.parametrize(("outcome", "code"), [(Outcome(equal=True), 0), (Outcome(silent=1, note="zeros were trained on"), 1)])
def test_the_command_shows_every_run_and_the_table_and_its_code_says_whether_all_is_well(
    outcome: Outcome, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (line(lambda *_: outcome, "wanted"), line(lambda *_: pytest.fail("not asked for"), "other"))
    monkeypatch.setattr(faults, "LINES", lines)

    def run(*arguments: str) -> int | str | None:
        monkeypatch.setattr(sys, "argv", ["chaos.py", *arguments, "--state", str(tmp_path)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "benchmarks/chaos.py"), run_name="__main__")
        return ended.value.code

    assert run("wanted", "--runs", "2") == code
    shown = capsys.readouterr().out.splitlines()
    assert [text.split(": ")[0] for text in shown[:2]] == ["wanted 0", "wanted 1"]
    assert shown[0].endswith(outcome.note or "ok")
    assert "| what wanted does | 2 of 3 |" in "\n".join(shown)
    assert run("--list") == 0
    assert [text.split()[0] for text in capsys.readouterr().out.splitlines()] == ["wanted", "other"]
    assert run("wnated") == 2
    assert "there is no line wnated" in capsys.readouterr().err


def test_several_ways_of_a_line_take_turns(tmp_path: Path) -> None:
    ways = [lambda _, __, way=way: Outcome(figures={"way": way}) for way in range(2)]
    runs = [run for _, run in campaign([Line("a-fault", "two ways", 3, ways)], 0, None, tmp_path)]
    assert [run.outcome and run.outcome.figures["way"] for run in runs] == [0, 1, 0]
