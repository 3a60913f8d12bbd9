"""What jobs print at their end."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from gearnn_ray.cli import output
from gearnn_ray.config.split import SplitConfig
from gearnn_ray.offline.level_run import LevelResult
from gearnn_ray.offline.pipeline import PARTIAL_TAG, Outcome
from tests.test_progress import ROW

DIGEST = "sha256:" + "5" * 64


def test_a_release_that_lacks_levels_is_printed_with_its_tag_and_how_to_finish_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = SplitConfig(name="tiny", store=str(tmp_path), levels=("jpeg-10", "jpeg-20"))
    result = LevelResult("jpeg-10", original=40.0, adaptor=48.0, digest=DIGEST, bytes=9, floats=2)
    partial = Outcome(DIGEST, (result,), {"jpeg-20": "the loss became nan"}, (ROW,), PARTIAL_TAG)
    output.show_split(config, partial, json_lines=False)
    text = capsys.readouterr().out
    assert "jpeg-20 failed: the loss became nan\n" in text
    assert "the release has the tag partial and tiny:latest stays as it was" in text
    assert "run the same command again: it computes only what is missing" in text
    assert f"bundle:   tiny:partial (sha256:555555555555…) in {tmp_path}" in text
    assert "pull('tiny:partial')" in text

    output.show_split(config, replace(partial, failed={}, tag="latest"), json_lines=False)
    text = capsys.readouterr().out
    assert "bundle:   tiny:latest" in text
    assert "partial" not in text

    output.show_split(config, Outcome(None, (), {"jpeg-20": "the loss became nan"}), json_lines=False)
    assert "No level succeeded, so nothing was published." in capsys.readouterr().out

    output.show_split(config, partial, json_lines=True)
    printed = json.loads(capsys.readouterr().out)
    assert (printed["release"], printed["tag"], printed["name"]) == (DIGEST, "partial", "tiny")
    assert printed["summary"][0]["gap_closed"] == pytest.approx(80)
