"""Reads a job's configuration from a YAML file and a command line; an invalid one is refused in one plain sentence.

The options are generated from the configuration's type. Knows nothing of Ray or of what the options mean.
"""

import contextlib
import io
import itertools
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar

import tyro
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from gearnn_ray.config.release_jobs import EvaluateConfig, SweepConfig
from gearnn_ray.config.split import PRESETS, SplitConfig
from gearnn_ray.core.errors import UserError

ConfigT = TypeVar("ConfigT", bound=BaseModel)

_TRACKED = (SplitConfig, EvaluateConfig, SweepConfig)
"""Jobs with curves and scores that a tracker can show."""


def from_mapping(kind: type[ConfigT], values: object, source: str) -> ConfigT:
    """Validate plain values, for example of a YAML file, as `kind`. Raises UserError for the first invalid one."""
    if not isinstance(values, Mapping):
        raise UserError(f"{source} holds a {type(values).__name__}: expected a mapping of options to values")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError(_sentence(error, source, kind)) from error


def _sentence(error: ValidationError, source: str, kind: type[BaseModel]) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        hint = _perhaps(_near(where, kind)) or "remove it or correct its name"
        return f"{source} has an unknown option {where!r}: {hint} (--help lists the options)"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{source}: {where + ': ' if where else ''}{message}"
    return f"{source}: {where} is {first['input']!r}: {message[0].lower()}{message[1:]}"


def _near(name: str, kind: type[BaseModel]) -> list[str]:
    """The options that may be meant: the same name in another section, or a similar one."""
    known = list(_names(kind))
    last = name.rpartition(".")[2]
    elsewhere = [option for option in known if option.rpartition(".")[2] == last]
    return elsewhere or get_close_matches(name.replace("-", "_"), known, 3, 0.75)


def _names(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every option and section, as recipe.epochs."""
    for name, field in kind.model_fields.items():
        yield f"{prefix}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _names(field.annotation, f"{prefix}{name}.")


def _perhaps(options: Sequence[str]) -> str:
    return f"perhaps you meant {' or '.join(options)}" if options else ""


def read_yaml(path: str | Path) -> object:
    """Contents of a YAML file. Raises UserError if it cannot be read."""
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UserError(f"the configuration file {path} cannot be read ({error.strerror}): check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not readable as YAML ({reason}): correct it") from error


class JobOptions(BaseModel):
    """Options of every job that do not change what it computes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: str | None = None
    """YAML file with any of the other options; the command line takes precedence"""
    preset: str | None = None
    """name of a set of options of jobs/split.py; all other options take precedence"""
    json_lines: bool = False
    """print one JSON object per line instead of text"""
    track: tuple[str, ...] = ()
    """experiment trackers (`reporting.tracking`), such as tensorboard or mlflow:http://host:5000; may be given several times"""


def parse_command_line(kind: type[ConfigT], arguments: Sequence[str], description: str) -> tuple[ConfigT, JobOptions]:
    """A job's configuration from `--config FILE` and the command line, which takes precedence.

    Raises UserError for the first invalid option; `--help` prints all options and exits 0.
    """
    options, rest = _own_options(arguments)
    if options.track and kind not in _TRACKED:
        raise UserError("--track is given, and only split, evaluate and sweep have something to track: leave it out")
    given = read_yaml(options.config) if options.config else {}
    if isinstance(given, dict):
        if options.preset is not None:
            given = {**given, "preset": options.preset}
        if kind is SplitConfig:
            given = _with_what_decides_the_task(given, rest)
    rest = _with_values_of_flags(kind, rest)
    base = from_mapping(kind, given, options.config or "the command line")
    shown = io.StringIO()
    try:
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
            config = tyro.cli(
                kind,
                default=base,
                args=rest,
                prog=Path(sys.argv[0]).name,
                description=f"{description}\n\n--config FILE: a YAML file with any of these options; the command line takes "
                "precedence. --json: print one JSON object per line instead of text."
                + (
                    f" --preset {', '.join(PRESETS)}: Algorithm 1 as published, fewer epochs, more accuracy for each byte, or "
                    "levels of video; all other options take precedence." * (kind is SplitConfig)
                )
                + (
                    " --track tensorboard, mlflow or wandb, with a place such as mlflow:http://host:5000: also send losses, "
                    "scores and the release there (docs/tracking.md)." * (kind in _TRACKED)
                ),
                config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
            )
    except SystemExit as stop:
        if stop.code == 0:
            sys.stdout.write(shown.getvalue())
            raise
        raise UserError(f"the command line: {_plain(shown.getvalue())}") from None
    except ValidationError as error:
        raise UserError(_sentence(error, "the command line", kind)) from error
    # tyro fills in defaults without pydantic's validation
    return from_mapping(kind, config.model_dump(), "the command line"), options


def _with_what_decides_the_task(given: Mapping[str, object], arguments: Sequence[str]) -> dict[str, object]:
    """The file's options with those of the command line that decide the task, because each task has defaults of its own."""
    found = dict(given)
    for option in ("task", "data.kind", "model.name"):
        section, _, name = option.rpartition(".")
        for argument, following in itertools.pairwise([*arguments, ""]):
            named, equals, value = argument.partition("=")
            if named == f"--{option}":
                own = found.get(section) if section else found
                if isinstance(own, Mapping) or own is None:
                    changed = {**(own or {}), name: value if equals else following}
                    found = {**found, section: changed} if section else changed
    return found


def _with_values_of_flags(kind: type[BaseModel], arguments: Sequence[str]) -> list[str]:
    """The arguments, with True after each yes-or-no option that stands alone."""
    flags = {f"--{name.replace('_', '-')}" for name, field in kind.model_fields.items() if field.annotation is bool}
    found = []
    for argument, following in itertools.pairwise([*arguments, ""]):
        found.append(argument)
        if argument.replace("_", "-") in flags and following not in ("True", "False"):
            found.append("True")
    return found


def _own_options(arguments: Sequence[str]) -> tuple[JobOptions, list[str]]:
    expected = {
        "config": "the path of a YAML file", "preset": " or ".join(PRESETS), "track": "tensorboard, mlflow or wandb"
    }  # fmt: skip
    found: dict[str, str] = {}
    json_lines, track = False, list[str]()
    rest: list[str] = []
    pending = iter(arguments)
    for argument in pending:
        option, equals, value = argument.removeprefix("--").partition("=")
        if argument == "--json":
            json_lines = True
        elif argument.startswith("--") and option in expected:
            given = value if equals else next(pending, None)
            if given is None:
                raise UserError(f"--{option} stands alone: expected {expected[option]} after it")
            if option == "track":
                track.append(given)
            else:
                found[option] = given
        else:
            rest.append(argument)
    return JobOptions(**found, json_lines=json_lines, track=tuple(track)), rest


def _plain(box: str) -> str:
    """tyro's message, which stands in a frame, as one sentence."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [re.sub(r"[─│╭╮╰╯]+|-{4,}", " ", line).strip() for line in text.splitlines()]
    words = re.sub(r"\s+", " ", " ".join(lines[1:])).strip()
    words, _, after = words.partition("Perhaps you meant")
    meant = _perhaps(re.findall(r"(?<!\S)--[a-z][\w.-]*(?= [A-Z{\[])", after)[:3])
    words = re.split(r" ?(?:Argument helptext|For full helptext)", words)[0].strip()
    invalid = re.match(
        r"Error parsing (\S+): \d+ validation errors? for \w+ (.*?) \[type=(\w+), input_value=(.*?), input_type=", words
    )
    if invalid is None:
        return words.rstrip(".") + (f": {meant}" if meant else "") + " (--help lists the options)"
    section, found, kind, value = invalid.groups()
    if kind == "value_error":  # raised by a validator of ours, with a whole sentence
        return found.partition("Value error, ")[2]
    option, _, message = found.partition(" ")
    where = option if section[0].isupper() else f"{section}.{option}"
    return f"{where} is {value}: {message[0].lower()}{message[1:]}"
