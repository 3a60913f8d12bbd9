"""The doctor: what it says about machines that are not at hand, and about this one."""

import json
import socket
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from gearnn_ray.cli.diagnosis import OLDEST, TESTED, Finding, diagnose
from gearnn_ray.cli.machine import CacheFacts, Facts, Gpu, Listener, StoreFacts, Torch, gather
from gearnn_ray.config.doctor import DoctorConfig
from tests.conftest import ROOT

GIB = 2**30
FACTS = Facts(
    python="3.11.7",
    system="Linux 6.1, x86_64",
    processor="Some CPU",
    cores=2,
    memory=16 * GIB,
    available=12 * GIB,
    versions=TESTED,
    torch=Torch(("AVX512_BF16", "AVX512", "AVX2"), "bfloat16", ()),
    gpu_driver=False,
    listeners=(),
    port=8000,
    guarded=False,
    joins=None,
    store=StoreFacts("/data/artifacts", ahead=(0.1, 1.0), free=100 * GIB),
    cache=CacheFacts("/home/me/.cache/gearnn_ray", 3 * GIB, 100 * GIB),
)
"""A machine on which nothing is wrong."""


def about(what: str, facts: Facts) -> list[Finding]:
    return [finding for finding in diagnose(facts) if finding.what == what]


def only(what: str, facts: Facts) -> tuple[str, str]:
    (finding,) = about(what, facts)
    return finding.state, finding.sentence


def on(port: int, address: str, process: str | None = None, guarded: bool = False) -> Finding:
    """What is said of one process that listens."""
    facts = replace(FACTS, listeners=(Listener(port, address, process),), guarded=guarded)
    return about("ports", facts)[0]


def test_a_machine_on_which_nothing_is_wrong() -> None:
    findings = diagnose(FACTS)
    assert not [finding for finding in findings if finding.state == "wrong"]
    for finding in findings:
        assert finding.sentence.endswith(".")
        assert "\n" not in finding.sentence


def test_the_precision_follows_from_the_processor() -> None:
    assert "bfloat16" in only("CPU", FACTS)[1]
    plain = replace(FACTS, torch=Torch(("AVX2",), "float32", ()))
    assert only("CPU", plain)[1].endswith("float32 here, because it has neither AMX nor AVX512_BF16.")


def test_a_gpu_that_torch_cannot_use_is_wrong_and_none_at_all_is_not() -> None:
    assert only("GPU", FACTS)[0] == "note"
    assert only("GPU", replace(FACTS, gpu_driver=True))[0] == "wrong"
    old = replace(FACTS, gpu_driver=True, torch=replace(FACTS.torch, gpus=(Gpu("T4", 16 * GIB, (7, 5)),)))
    assert only("GPU", old) == ("fine", "T4 with 16.0 GiB. Networks train in float32 there.")


@pytest.mark.parametrize(
    ("package", "version", "state"),
    [("ray", "2.55.1", "wrong"), ("ray", "2.61.0", "note"), ("torch", None, "wrong"), ("torch", "2.15.0+cpu", None)],
)
def test_versions_are_compared_with_those_that_the_tests_ran_with(package: str, version: str | None, state: str | None) -> None:
    facts = replace(FACTS, versions={**TESTED, package: version})
    assert [finding.state for finding in about(package, facts)] == ([state] if state else [])
    if version and state:
        assert version in only(package, facts)[1]


def test_tested_and_oldest_versions_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pins = dict(pin.split("==") for pin in project["tool"]["uv"]["constraint-dependencies"])
    assert {name: pins[name] for name in TESTED} == TESTED
    floors = dict(each.split(">=") for each in project["project"]["dependencies"] if ">=" in each)
    assert {name: floors.get(name, floors.get(f"{name}[default,train,tune]")) for name in OLDEST} == OLDEST
    assert TESTED.keys() == OLDEST.keys()


def test_a_torch_that_cannot_be_imported_is_wrong() -> None:
    assert only("torch", replace(FACTS, torch=None))[0] == "wrong"


@pytest.mark.parametrize("python", ["3.10.14", "3.9.1"])
def test_an_old_python_is_wrong(python: str) -> None:
    assert only("Python", replace(FACTS, python=python))[0] == "wrong"


def test_a_machine_that_is_short_of_memory_or_disk() -> None:
    assert only("memory", replace(FACTS, available=GIB))[0] == "wrong"
    assert only("cache", replace(FACTS, cache=replace(FACTS.cache, free=GIB // 2)))[0] == "wrong"
    assert only("store", replace(FACTS, store=replace(FACTS.store, free=GIB // 2)))[0] == "wrong"


def test_the_services_port() -> None:
    taken = on(8000, "0.0.0.0", "nginx")
    assert (taken.state, taken.sentence.partition(",")[0]) == ("wrong", "nginx listens on 0.0.0.0 port 8000")
    assert on(8000, "127.0.0.1").sentence.startswith("A process of another user listens on")
    assert on(8000, "127.0.0.1", "ray::ProxyActor").state == "note"


@pytest.mark.parametrize(
    ("address", "process", "guarded", "state"),
    [
        ("127.0.0.1", "gcs_server", False, "fine"), ("::1", "gcs_server", False, "fine"),
        ("0.0.0.0", "gcs_server", False, "wrong"), ("::", "gcs_server", False, "wrong"),
        ("10.0.0.5", "gcs_server", False, "wrong"), ("fe80::1%eth0", "gcs_server", False, "wrong"),
        ("0.0.0.0", "gcs_server", True, "note"), ("0.0.0.0", "redis-server", False, "note"),
    ],
)  # fmt: skip
def test_a_ray_that_others_reach_without_a_token_is_wrong(address: str, process: str, guarded: bool, state: str) -> None:
    assert on(6379, address, process, guarded).state == state


def test_who_may_not_see_listeners_is_told_so() -> None:
    assert only("ports", replace(FACTS, listeners=None))[0] == "note"


def test_a_store_that_cannot_be_used_and_one_that_is_not_there_yet() -> None:
    store = StoreFacts("s3://bucket/x", problem="The store s3://bucket/x cannot be written: no such bucket.")
    assert only("store", replace(FACTS, store=store))[0] == "wrong"
    assert not about("clock", replace(FACTS, store=store))
    assert only("store", replace(FACTS, store=replace(FACTS.store, exists=False)))[0] == "fine"


@pytest.mark.parametrize(("ahead", "state"), [(3.0, "fine"), (-5.5, "fine"), (8.0, "wrong"), (-86400.0, "wrong")])
def test_clocks_that_disagree_by_more_than_the_measurement_may_be_wrong(ahead: float, state: str) -> None:
    found, sentence = only("clock", replace(FACTS, store=replace(FACTS.store, ahead=(ahead, 1.0))))
    assert found == state
    if state == "wrong":
        assert ("behind" in sentence) == (ahead < 0)


def test_a_cluster_that_a_job_would_join_is_named() -> None:
    assert only("cluster", FACTS)[0] == "fine"
    assert "10.0.0.5:6379" in only("cluster", replace(FACTS, joins="10.0.0.5:6379"))[1]


def test_facts_of_this_machine_leave_the_store_as_it_is(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        facts = gather(DoctorConfig(store=str(tmp_path / "store"), cache=str(tmp_path / "cache"), port=port), TESTED)
        assert [(each.port, each.address) for each in facts.listeners or () if each.port == port] == [(port, "127.0.0.1")]
    assert facts.store.problem is None
    assert not facts.store.exists
    ahead, error = facts.store.ahead or (99.0, 0.0)
    assert abs(ahead) <= error + 1
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("gearnn_ray.cli.machine._store", lambda address: time.sleep(600))
    monkeypatch.setattr("gearnn_ray.cli.machine._STORE_SECONDS", 0.1)
    facts = gather(DoctorConfig(store="s3://silent/x", cache=str(tmp_path)), TESTED)
    assert "did not answer within" in (facts.store.problem or "")


def test_as_a_command_it_says_what_is_wrong_and_ends_with_1(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    command = [sys.executable, str(ROOT / "jobs/doctor.py"), "--json", "--store", str(tmp_path / "file")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    wrong = [each for each in found["findings"] if each["state"] == "wrong"]
    assert len(wrong) == found["wrong"] >= 1
    assert "store" in {each["what"] for each in wrong}

    wrong_option = subprocess.run([sys.executable, str(ROOT / "jobs/doctor.py"), "--port", "0"], capture_output=True, text=True)
    assert (wrong_option.returncode, wrong_option.stdout) == (2, "")
    assert wrong_option.stderr.startswith("error: ")
