"""One typed configuration from a file and a command line, and one sentence for everything wrong with either."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gearnn_ray.config.budget import budget_floats
from gearnn_ray.config.command_line import from_mapping, parse_command_line
from gearnn_ray.config.recipe import BaseRecipe, Criterion, Recipe
from gearnn_ray.config.release_jobs import EvaluateConfig
from gearnn_ray.config.split import ModelConfig, SplitConfig
from gearnn_ray.core.errors import UserError
from gearnn_ray.evaluation.baselines import TITLES
from gearnn_ray.offline.base import network_of
from tests.conftest import ROOT


def parse(*arguments: str) -> SplitConfig:
    return parse_command_line(SplitConfig, arguments, "A job.")[0]


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"name": "x", "budget": "0.4%", "recipe": {"epochs": 7, "crop": 64}}))
    config, options = parse_command_line(
        SplitConfig, ["--json", "--config", str(file), "--recipe.epochs", "2", "--levels", "jpeg-5", "clean"], "A job."
    )
    assert (config.name, config.budget, config.recipe.epochs, config.recipe.crop) == ("x", "0.4%", 2, 64)
    assert config.levels == ("jpeg-5", "clean")
    assert options.json_lines


def test_what_a_job_saves_of_its_configuration_reads_back(tmp_path: Path) -> None:
    config = parse("--levels", "brightness-0.4+jpeg-30", "--model.mean", "0.4", "0.4", "0.4", "--model.std", "1", "1", "1")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert parse("--config", str(tmp_path / "c.yaml")) == config


def test_a_budget_in_a_file_may_be_a_number(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("budget: 31814\n")
    assert parse("--config", str(tmp_path / "c.yaml")).budget == "31814"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("colour: 3", r"unknown option 'colour': remove it or correct its name \(--help lists the options\)"),
        ("recipe: {speed: 3}", r"unknown option 'recipe\.speed'"),
        ("recipe: {epoch: 3}", r"unknown option 'recipe\.epoch': perhaps you meant recipe\.epochs"),
        ("recipe: {batch-sise: 3}", r"perhaps you meant recipe\.batch_size"),
        ("resipe: {epochs: 3}", "unknown option 'resipe': perhaps you meant recipe"),
        ("learning_rate: 3", r"perhaps you meant recipe\.learning_rate or base_recipe\.learning_rate \(--help"),
        ("recipe: {epochs: 0}", r"recipe\.epochs is 0"),
        ("recipe: {epochs: many}", r"recipe\.epochs is 'many'"),
        ("recipe: {learning_rate: .nan}", r"recipe\.learning_rate is nan"),
        ("levels: [jpeg-0]", "jpeg-0"),
        ("levels: []", "no level is given"),
        ("budget: 101%", "more than the whole network"),
        ("selection: {against: noise}", r"selection\.against is 'noise': input should be 'base' or 'clean'"),
        ("data: {kind: voc}", r"data\.kind is 'voc'"),
        ("model: {mean: [1, 1, 1]}", "give both or neither"),
        ("resources: {gpus: 1.5}", "1.5 GPUs cannot be reserved"),
        ("- a\n- b", "holds a list"),
        ("a: [", "not readable as YAML"),
        ("tags: ['../../x']", "is no safe name"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_sentence(tmp_path: Path, text: str, found: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=found) as caught:
        parse("--config", str(tmp_path / "c.yaml"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--speed", "3"], "Unrecognized options: --speed"),
        (
            ["--recipe.epoch", "3"],
            "Unrecognized options: --recipe.epoch, 3: perhaps you meant --base-recipe.epochs or --recipe.epochs",
        ),
        (["--levl", "jpeg-10"], "Unrecognized options: --levl, jpeg-10: perhaps you meant --levels"),
        (["--recipe.epochs", "0"], r"recipe\.epochs is 0"),
        (["--recipe.epochs", "two"], "'two'"),
        (["--levels", "jpeg-0"], "jpeg-0"),
        (["--levels", "clean"], "levels has only clean, where nothing is adapted: name at least one distorted level"),
        (["--task", "pose"], "pose"),
        (["--budget", "lots"], "the budget 'lots' is not understood"),
        (["--data.kind", "voc"], "'voc'"),
        (["--name", "../x"], "'../x' is no safe name"),
        (["--model.std", "1", "1", "1"], r"line: only one of model\.mean and model\.std is given"),
        (["--selection.against", "noise"], "invalid choice 'noise' for argument '--selection.against'. Expected one of"),
        (["--config"], "--config stands alone"),
        (["--preset"], "--preset stands alone: expected paper or fast or compact or video after it"),
        (["--preset", "slow"], "the preset 'slow' is unknown: expected paper"),
        (["--config", "nowhere.yaml"], "nowhere.yaml cannot be read"),
        (["stray"], "stray"),
    ],
)
def test_what_is_wrong_with_a_command_line_is_one_sentence(arguments: list[str], found: str) -> None:
    with pytest.raises(UserError, match=found) as caught:
        parse(*arguments)
    assert "\n" not in str(caught.value)
    assert "pydantic" not in str(caught.value)


def test_a_joint_problem_is_chosen_by_name(tmp_path: Path) -> None:
    assert not parse().selection.is_joint
    config = parse(
        "--selection.problem", "one-memory", "--selection.frequencies", "jpeg-10", "120",
        "jpeg-80", "0.5", "--selection.importance", "l2", "--levels", "clean", "jpeg-10", "jpeg-80",
    )  # fmt: skip
    selection = config.selection
    assert (selection.criterion, selection.coupling.problem) == (Criterion(importance="l2"), "one-memory")
    assert selection.coupling.frequencies == {"jpeg-10": 120, "jpeg-80": 0.5}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert parse("--config", str(tmp_path / "c.yaml")) == config


def test_stage_keys_have_every_field_of_the_recipe_but_the_precision() -> None:
    whole = Recipe(objective="both", teacher_weight=2)
    assert whole.inputs().keys() == Recipe.model_fields.keys() - {"precision"}
    assert BaseRecipe().inputs().keys() == BaseRecipe.model_fields.keys() - {"precision"}


def test_fine_tunes_on_labels_keep_the_keys_that_they_had_before_there_were_teachers() -> None:
    assert Recipe().inputs() == {
        "epochs": 4, "learning_rate": 0.01, "schedule": "linear", "warm_up": 0, "clip": None, "batch_size": 8, "crop": 208,
        "momentum": 0.9, "weight_decay": 1e-4, "averaged": 0.0,
    }  # fmt: skip
    assert json.dumps(Recipe().inputs()) == json.dumps(BaseRecipe().inputs())


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--recipe.teacher-weight", "2"], "teacher_weight is given and objective is labels: leave it out, or choose both"),
        (["--recipe.objective", "teacher", "--recipe.teacher-weight", "2"], "teacher_weight is given and objective is teacher"),
        (["--recipe.temperature", "2"], "temperature is given and objective is labels"),
        (["--recipe.objective", "teachers"], "invalid choice|objective"),
        (["--recipe.objective", "both", "--recipe.temperature", "0"], "temperature"),
        (["--base-recipe.objective", "teacher"], "base-recipe.objective"),
    ],
)
def test_options_that_the_objective_does_not_use_are_refused(arguments: list[str], found: str) -> None:
    with pytest.raises(UserError, match=found) as refused:
        parse(*arguments)
    assert "\n" not in str(refused.value)


def test_changes_may_be_measured_against_the_undistorted_fine_tune(tmp_path: Path) -> None:
    assert parse().selection.against == "base"
    config = parse("--selection.against", "clean", "--selection.granularity", "module")
    assert config.selection.criterion == Criterion(granularity="module", against="clean")
    (tmp_path / "c.yaml").write_text("selection: {against: clean}\n")
    assert parse("--config", str(tmp_path / "c.yaml")).selection.criterion == Criterion(against="clean")
    # its weights, and those of modules, are looked at again
    plain = {Criterion(): False, Criterion(importance="l2"): False, Criterion(importance="fisher"): True}
    more = {Criterion(against="clean"): True, Criterion(granularity="module"): True, Criterion(storage_formats=("int8",)): True}
    assert {criterion: criterion.needs_weights for criterion in plain | more} == plain | more


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["problem", "all"], "'all'"),
        (["problem", "few-layers"], "'few-layers'"),
        (["frequencies", "jpeg-10", "3"], "frequencies is given and selection.problem per-level"),
        (["problem", "one-memory", "frequencies", "jpeg-11", "3"], "frequencies has jpeg-11, which levels has not"),
        (["problem", "one-memory", "frequencies", "jpeg-10", "-3"], "the frequency of jpeg-10 is -3: expected 0 or more"),
        (["problem", "one-memory", "frequencies", "jpeg-10", "nan"], "nan"),
        (
            ["problem", "one-memory", "frequencies", "jpeg-10", "3"],
            "frequencies lacks jpeg-20: give one for every distorted level",
        ),
        (
            ["problem", "one-memory", "LEVELS", "jpeg-10", "frequencies", "jpeg-10", "0"],
            "one-memory and no distorted level occurs",
        ),
        (["storage_formats", "int8", "int8"], "the storage formats int8, int8 are given: expected at least one, each once"),
        (["storage_formats", "int4"], "'int4'"),
        (["WORKERS", "9"], r"resources\.workers_per_level is 9 and recipe\.batch_size 8: expected at most one worker per image"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(arguments: list[str], found: str) -> None:
    elsewhere = {"LEVELS": "--levels", "WORKERS": "--resources.workers-per-level"}
    options = ("problem", "frequencies", "storage_formats")
    line = [elsewhere.get(a, f"--selection.{a}" if a in options else a) for a in arguments]
    with pytest.raises(UserError, match=found) as caught:
        parse(*line)
    assert "\n" not in str(caught.value)
    assert "pydantic" not in str(caught.value)


def evaluation(*arguments: str) -> EvaluateConfig:
    return parse_command_line(EvaluateConfig, arguments, "A job.")[0]


def test_an_evaluation_compares_everything_and_reads_back(tmp_path: Path) -> None:
    assert {"original", "switching", "gearnn", *evaluation().methods} < set(TITLES)
    config = evaluation(
        "--release", "tiny", "--methods", "--budgets", "0.1%", "31814", "--levels", "clean", "jpeg-10", "jpeg-20",
        "--baseline-levels", "jpeg-10", "--tuning-level", "jpeg-10", "--stability.alphas", "1", "--resources.gpus", "0.25",
    )  # fmt: skip
    assert (config.release, config.methods, config.stability.alphas) == ("tiny:latest", (), (1.0,))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert evaluation("--config", str(tmp_path / "c.yaml")) == config
    (tmp_path / "c.yaml").write_text("{baseline_levels: [jpeg-10], budgets: [31814, 1%]}")  # the release has the levels
    assert evaluation("--config", str(tmp_path / "c.yaml")).budgets == ("31814", "1%")


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--release", "../x"], "'../x' is no bundle"),
        (["--levels", "jpeg-0"], "jpeg-0"),
        (["--levels", "clean"], "levels has only clean, where nothing is adapted"),
        (["--tuning-level", "clean"], "tuning_level has clean, where nothing is adapted: name a distorted level"),
        (["--budget-levels", "jpeg-10", "clean"], "budget_levels has clean"),
        (["--baseline-levels", "jpeg-0"], "jpeg-0"),
        (["--tuning-level", "jpeg-010"], "write 'jpeg-10'"),
        (["--untrained", "jpeg-10", "jpeg-10"], "the level jpeg-10 is given twice: give each level once"),
        (["--levels", "jpeg-10", "--baseline-levels", "jpeg-20"], "line: baseline_levels has jpeg-20, which levels has not"),
        (["--methods", "magic"], "'magic'"),
        (["--methods", "mixed", "mixed"], "the method mixed is given twice"),
        (["--stability.alphas"], "no alpha is given"),
        (["--learning-rates", "0.1", "0"], "the learning rate 0 is given: expected above 0"),
        (["--learning-rates", "0.1", "0.10"], r"the learning rate 0\.1 is given twice"),
        (["--stability.alphas", "-1"], "the alpha -1 is given: expected above 0"),
        (["--stability.sigmas", "0"], "the sigma 0 is given: expected above 0"),
        (["--budgets", "0.2%", "lots"], "the budget 'lots' is not understood"),
        (["--budgets", "1%", "1%"], "the budget 1% is given twice"),
        (["--seeds", "21"], "seeds is 21"),
        (["--draws", "0"], "draws is 0"),
        (["--resources.gpus", "1.5"], r"1\.5 GPUs cannot be reserved"),
        (["--resources.workers-per-level", "2"], "--resources.workers-per-level"),
    ],
)
def test_what_is_wrong_with_an_evaluation_is_one_sentence(arguments: list[str], found: str) -> None:
    with pytest.raises(UserError, match=found) as caught:
        evaluation(*arguments)
    assert "\n" not in str(caught.value)
    assert "pydantic" not in str(caught.value)


def test_the_budget_is_the_papers() -> None:
    assert budget_floats("0.2%", 15_907_139) == 31_814
    assert budget_floats("0.2%", 26_022_723) == 52_045
    assert budget_floats("31814", 15_907_139) == 31_814
    assert budget_floats("100%", 7) == 7


@given(st.integers(0, 10**9), st.integers(0, 10_000))
def test_the_share_is_floored_exactly(floats: int, basis_points: int) -> None:
    text = f"{basis_points // 100}.{basis_points % 100:02d}%"
    assert budget_floats(text, floats) == floats * basis_points // 10_000


@given(st.text(max_size=12))
def test_any_text_is_a_budget_or_a_plain_refusal(text: str) -> None:
    try:
        floats = budget_floats(text, 1000)
    except ValueError as error:
        message = str(error)
    else:
        message = "budget"
        assert floats >= 0
    assert "budget" in message


def test_normalisation_comes_from_the_configuration_the_file_or_imagenet(tmp_path: Path) -> None:
    def mean_of(**model: Any) -> tuple[float, float, float]:
        return network_of(ModelConfig(**model), 3, "segmentation").normalisation.mean

    stated, invalid = str(tmp_path / "stated.safetensors"), str(tmp_path / "invalid.safetensors")
    about = {"mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 1.0]}
    safetensors.numpy.save_file({}, stated, {"about": json.dumps(about)})
    safetensors.numpy.save_file({}, invalid, {"about": json.dumps({"mean": "?"})})
    assert mean_of(weights=stated, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2)) == (0.5, 0.5, 0.5)
    assert mean_of(weights=stated) == (0.1, 0.2, 0.3)
    assert mean_of(weights=invalid) == mean_of() == (0.485, 0.456, 0.406)


def test_help_is_made_from_the_same_types_and_needs_no_ray() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "jobs/split.py"), "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    for option in ("--levels", "--budget", "--recipe.learning-rate", "--resources.workers-per-level", "--config", "--json"):
        assert option in done.stdout
    assert "ray._raylet" not in done.stderr


def test_a_preset_fills_in_what_nothing_else_says(tmp_path: Path) -> None:
    fast = parse("--preset", "fast")
    assert (fast.sensitivity.epochs, fast.recipe.epochs) == (0.125, 3)
    assert fast.recipe == SplitConfig().recipe.model_copy(update={"epochs": 3})
    (tmp_path / "my.yaml").write_text("preset: fast\nrecipe: {epochs: 2}\n")
    for arguments in (["--config", str(tmp_path / "my.yaml")], ["--preset=fast", "--recipe.epochs", "2"]):
        config = parse(*arguments)
        assert (config.sensitivity.epochs, config.recipe.epochs) == (0.125, 2)
    assert from_mapping(SplitConfig, config.model_dump(), "a manifest") == config  # a preset is not recorded
    with pytest.raises(UserError, match="preset \\['fast'\\] is unknown"):
        from_mapping(SplitConfig, {"preset": ["fast"]}, "my.yaml")
    with pytest.raises(UserError, match="recipe is 3"):
        from_mapping(SplitConfig, {"preset": "fast", "recipe": 3}, "my.yaml")


def test_the_operator_names_the_modules_that_a_release_may_import() -> None:
    assert evaluation().trust == ()
    assert evaluation("--trust", "my_package.nets", "other").trust == ("my_package.nets", "other")
    with pytest.raises(UserError, match=r"'os:abort' is no import path of a module: expected one such as my_package\.nets"):
        evaluation("--trust", "os:abort")
