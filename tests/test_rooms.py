"""The rooms of the package: every module imports alone, lower rooms import no higher ones, and what stands in one place only."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

ROOMS = (
    "core", "levels", "config", "models", "adaptors", "store", "data", "tasks", "training", "reporting", "ray_jobs", "offline",
    "serving", "evaluation", "sweep", "video", "knobs", "service", "cli",
)  # fmt: skip
"""From the lowest to the highest, as in docs/architecture.md."""

PACKAGE = ROOT / "gearnn_ray"
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports anywhere: at its top, in functions, and for type checkers."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, f"{path} imports relatively"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(module: str) -> int | None:
    """Its place in `ROOMS`; None for the package's root and for other packages."""
    package, _, rest = module.partition(".")
    room = rest.partition(".")[0]
    return ROOMS.index(room) if package == "gearnn_ray" and room in ROOMS else None


# what others import is there already: a fork then takes milliseconds, and imports the module as a fresh process would
_IMPORT_EACH_ALONE = """
import json, os, sys
from contextlib import suppress
from importlib import import_module
for library in json.loads(sys.argv[2]):
    with suppress(ImportError):  # a name inside a module, or an optional library
        import_module(library)
for module in json.loads(sys.argv[1]):
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            import_module(module)
            found = sorted(name for name in sys.modules if name.startswith("gearnn_ray"))
        except BaseException as error:
            found = f"{type(error).__name__}: {error}"
        os.write(writer, json.dumps(found).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as said:
        print(json.dumps([module, json.loads(said.read())]))
    os.waitpid(child, 0)
"""


@pytest.mark.timeout(900)  # 15 s; minutes beside other work, because the libraries are imported in a fresh process
def test_every_module_imports_alone_and_no_lower_room_imports_a_higher_one() -> None:
    names = [name_of(path) for path in MODULES]
    assert {name.split(".")[1] for name in names if "." in name} == set(ROOMS), "a room without a place in ROOMS"
    libraries = {name for path in MODULES for name in imported(path) if not name.startswith("gearnn_ray")}
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT_EACH_ALONE, json.dumps(names), json.dumps(sorted(libraries))],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    found = dict(map(json.loads, done.stdout.splitlines()))
    assert found.keys() == set(names), done.stderr
    for module, loaded in found.items():
        assert isinstance(loaded, list), f"{module} does not import alone: {loaded}"
        own = room_of(module)
        higher = [name for name in loaded if own is not None and (room := room_of(name)) is not None and room > own]
        assert not higher, f"{module} imports {higher[0]}, which is in a higher room"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_import_statement_leads_to_a_higher_room(path: Path) -> None:
    own = room_of(name_of(path))
    for module in imported(path):
        room = room_of(module)
        assert own is None or room is None or room <= own, f"{name_of(path)} imports {module} from a higher room"


def test_only_tasks_know_segmentation() -> None:
    outside = [path for path in MODULES if path.parent.name != "tasks"]
    assert [name_of(p) for p in outside if "gearnn_ray.tasks.segmentation" in set(imported(p))] == []


def test_ray_is_known_at_one_edge() -> None:
    knowing = {name_of(path) for path in MODULES if any(m.split(".")[0] == "ray" for m in imported(path))}
    of_the_service = ("app", "deployment", "cameras", "steering", "connections", "metrics")
    edge = ("gearnn_ray.ray_jobs.", *(f"gearnn_ray.service.{name}" for name in of_the_service))
    assert {name for name in knowing if not name.startswith(edge)} == set()


def test_the_forward_pass_stands_once() -> None:
    """Normalisation, autocast and the network's call: `training/predict.py`."""
    calling = [name_of(path) for path in MODULES if "torch.autocast" in path.read_text()]
    assert calling == ["gearnn_ray.training.precision"]
    using = [name_of(p) for p in MODULES if "gearnn_ray.training.precision.autocast" in set(imported(p))]
    assert using == ["gearnn_ray.training.predict"]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_is_short_enough_to_be_read_at_once(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 450


def test_records_are_typed() -> None:
    """Stages hand each other dataclasses and models; plain mappings are left where JSON or options of libraries are meant."""
    assert sum(path.read_text().count("dict[str, Any]") for path in MODULES) < 15
