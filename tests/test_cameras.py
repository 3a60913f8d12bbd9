"""Cameras that the service keeps open itself: over real RTSP, on the Ray of all tests."""

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import pytest

from gearnn_ray.config.serve import ServeConfig
from gearnn_ray.store.releases import Store
from tests import served
from tests.conftest import ROOT
from tests.nets import TRUST
from tests.streams import Camera, access_units, moving
from tests.test_service import eventually, free_port

pytest.importorskip("ray.serve", reason="the extra `serve` is not installed")
from gearnn_ray.service import deployment
from gearnn_ray.service.cameras import process_names

LEVELS = ("h264-crf18", "h264-crf40", "h264-40x32")


def test_cameras_have_a_process_each_until_every_cpu_has_one() -> None:
    assert process_names(("gate", "door"), 8) == {"gate": "cameras-0", "door": "cameras-1"}
    assert process_names(("gate", "door", "yard"), 2) == {"gate": "cameras-0", "door": "cameras-1", "yard": "cameras-0"}
    assert process_names(("gate", "door"), 0) == {"gate": "cameras-0", "door": "cameras-0"}
    assert process_names((), 4) == {}


def test_the_process_of_a_camera_does_without_torch() -> None:
    program = "import sys, gearnn_ray.service.cameras; print(*{'torch', 'torchvision', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == []


@dataclass(frozen=True)
class Watched:
    port: int
    gate: Camera
    door: Camera

    names = ("gate", "door", "yard")

    def get(self, path: str, **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        status, body = answer.status, answer.read()
        connection.close()
        return status, body

    def state(self, name: str) -> Any:
        return json.loads(self.get(f"/streams/{name}/state")[1])

    def health(self) -> Any:
        return json.loads(self.get("/health")[1])["streams"]


@pytest.fixture(scope="module")
def watched(ray_cluster: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Three cameras in two processes, because the Ray of all tests has two CPUs: `gate` and `yard` share one. `gate` sends large
    frames at a high rate factor; `door` and `yard`, small ones at a low one, come from the same address.
    """
    root = tmp_path_factory.mktemp("watched") / "store"
    for name in ("video", "other"):
        served.publish(Store(root), name, level_names=LEVELS)
    gate = Camera(access_units(moving(400, 64, 80), crf=40), seconds_per_frame=0.1)
    door = Camera(access_units(moving(400, 32, 40), crf=18), seconds_per_frame=0.1)
    with gate, door:
        config = ServeConfig(
            store=str(root), bundles=("video", "other"), port=free_port(), device="cpu", trust=TRUST,
            cache=str(root.with_name("copies")), watch=(f"gate={gate.url}", f"door={door.url}", f"yard={door.url}"),
        )  # fmt: skip
        with deployment.serving(config):
            found = Watched(config.port, gate, door)
            eventually(lambda: all(found.state(name)["frames"] >= 3 for name in found.names), 60)
            yield found


def test_each_camera_has_its_own_level_and_every_frame_a_line(watched: Watched) -> None:
    assert tuple(watched.health()) == watched.names
    for name, level, width in (("gate", "h264-crf40", 80), ("door", "h264-40x32", 40), ("yard", "h264-40x32", 40)):
        line = watched.state(name)["line"]
        assert (line["stream"], line["level"], line["width"]) == (name, level, width)
        assert line["release"].startswith("video@sha256:")
        assert sum(each["share"] for each in line["classes"]) == pytest.approx(1, abs=1e-3)


def test_its_lines_can_be_followed(watched: Watched) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", watched.port, timeout=30)
    connection.request("GET", "/streams/gate/lines")
    answer = connection.getresponse()
    lines = [json.loads(answer.readline()) for _ in range(4)]
    connection.close()
    assert [line["frame"] - lines[0]["frame"] for line in lines] == [0, 1, 2, 3]


def test_its_picture_is_drawn_when_it_is_asked_for(watched: Watched) -> None:
    eventually(lambda: watched.get("/streams/gate/picture")[1].startswith(b"\xff\xd8"))


def test_its_page_is_that_of_its_bundle_alone(watched: Watched) -> None:
    assert b"<!doctype html>" in watched.get("/streams/gate")[1]
    for path in ("/streams/gate", "/streams/gate/state", "/streams/gate/picture"):
        status, said = watched.get(path, serve_multiplexed_model_id="other:latest")
        assert status == 404
        assert "does not exist here" in json.loads(said)["detail"]
    assert watched.get("/streams/attic")[0] == 404


def test_cameras_without_power_are_offline_and_come_back_and_their_neighbour_goes_on(watched: Watched) -> None:
    lost = ("door", "yard")
    watched.door.stop()
    eventually(lambda: not any(watched.health()[name]["online"] for name in lost), 30)
    assert all(watched.health()[name]["problem"] for name in lost)
    seen = watched.state("gate")["frames"]
    eventually(lambda: watched.state("gate")["frames"] > seen + 3, 30)
    before = {name: watched.state(name)["frames"] for name in lost}
    watched.door.start()
    eventually(lambda: all(watched.health()[name]["online"] for name in lost), 30)
    eventually(lambda: all(watched.state(name)["frames"] > before[name] for name in lost), 30)


def test_cameras_whose_process_dies_are_taken_up_again(watched: Watched) -> None:
    before = watched.state("gate")
    killed = [
        process for process in psutil.process_iter(["cmdline"]) if (process.info["cmdline"] or [""])[0].startswith("ray::Camera")
    ]
    own = {each.pid for each in psutil.Process().children(recursive=True)}
    victims = [each for each in killed if each.pid in own or each.ppid() in own]
    assert len(victims) == 2, "three cameras on two CPUs"
    for victim in victims:
        os.kill(victim.pid, signal.SIGKILL)
    eventually(lambda: all(watched.state(name)["online"] for name in watched.names), 60)
    assert watched.state("gate")["frames"] < before["frames"] + 100, "it counts anew"
