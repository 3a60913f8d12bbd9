"""A sample of the campaign's lines about the service (`benchmarks/faults`), and that they see what they are there for."""

import asyncio
import io
import itertools
import random
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from PIL import Image

from benchmarks.faults import long_service
from benchmarks.faults import service as faults
from benchmarks.faults.campaign import Outcome
from benchmarks.faults.clients import LOGITS, SMALL, Answer, Asked, Seen, Service, expected
from benchmarks.faults.long_service import Size, judged_soak, slope, slopes
from gearnn_ray.config.serve import LimitsConfig, ServeConfig
from gearnn_ray.service.connections import proxies
from gearnn_ray.store.releases import Store
from tests import served
from tests.nets import TRUST

pytest.importorskip("ray.serve", reason="the extra `serve` is not installed")
import ray

from gearnn_ray.service import deployment


@pytest.fixture(scope="module")
def service(ray_cluster: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """On the Ray of all tests, and quicker to give up than a user's."""
    root = tmp_path_factory.mktemp("chaos") / "store"
    digest = served.publish(Store(root))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = ServeConfig(
        store=str(root), bundles=("tiny",), port=port, device="cpu", trust=TRUST, poll_seconds=0.3,
        limits=LimitsConfig(body_seconds=2), cache=str(root.with_name("copies")),
    )  # fmt: skip

    def processes() -> list[psutil.Process]:
        return psutil.Process().children(recursive=True)

    with deployment.serving(config):
        for proxy in proxies():
            ray.get(proxy.__ray_call__.remote(impatient))
        yield Service(port, root, processes, {digest})


def impatient(_: object) -> None:
    """Runs in the proxy: unread answers are cut off after a second."""
    from gearnn_ray.service import connections

    connections._LOOK_SECONDS, connections._GRACE_SECONDS = 0.2, 1.0


def sound(outcome: Outcome) -> None:
    assert (outcome.silent, outcome.note) == (0, "")


SLOW = {"head": (faults.HALF_HEAD, b"x"), "body": (faults.HALF_BODY, b"x"), "reader": (faults.UNREAD, b"")}


@pytest.mark.parametrize(("begin", "trickle"), SLOW.values(), ids=SLOW)
def test_slow_clients(begin: bytes, trickle: bytes, service: Service) -> None:
    count = 8 if begin is faults.UNREAD else 40  # a second of CPU for each
    sound(faults.slow(service, begin, trickle, count, before=0.5))


def test_overload(service: Service) -> None:
    sound(faults.overload(service, "small frames", 10, random.Random(0), seconds=0.7, measuring=0.5))


def test_a_replica_that_stops_for_a_while_or_is_killed(service: Service) -> None:
    sound(faults.stop_replica(service, random.Random(0), longest=2.0))
    sound(faults.kill_replica(service, random.Random(0)))


def test_the_hour_in_seconds(service: Service) -> None:
    outcome = long_service.serving_hour(service, random.Random(3), seconds=7.0)
    sound(outcome)
    assert outcome.figures["times kill"] == 1
    assert outcome.figures["times publish"] + outcome.figures["times corrupt"] >= 2
    assert outcome.figures["requests that failed"] < outcome.figures["requests"] / 2


@pytest.mark.slow  # a Ray of two nodes, and a service of its own
@pytest.mark.ray
def test_a_camera_whose_node_is_lost(tmp_path: Path) -> None:
    assert long_service.lost_camera_node(random.Random(0), tmp_path).hit


# ── that they would see it ─────────────────────────────────────────────────────────────────────────────────────────────


def written(logits: NDArray[np.float32], accept: str) -> bytes:
    file = io.BytesIO()
    if accept == LOGITS:
        np.save(file, logits)
    else:
        Image.fromarray(logits.argmax(0).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("accept", ["image/png", LOGITS])
def test_wrong_answers_are_seen(accept: str, tmp_path: Path) -> None:
    digest = served.publish(Store(tmp_path))
    never = served.publish(Store(tmp_path), seed=1)
    watched, asked = Service(0, tmp_path, list, {digest}), Asked(SMALL[0].frame, "jpeg-10", accept)

    def said(body: bytes, level: str = "jpeg-10", release: str = digest) -> str:
        return watched.wrong(asked, Answer(200, {"x-gearnn-level": level, "x-gearnn-release": f"tiny@{release}"}, body))

    right = written(expected(tmp_path, f"tiny@{digest}", asked), accept)
    for _ in range(2):
        assert said(right) == ""
        assert "never published" in said(right, release=never)
        assert "answered at clean" in said(right, level="clean")
        other = written(expected(tmp_path, f"tiny@{digest}", Asked(asked.frame, "clean")), accept)
        assert "another answer" in said(other)
        assert "another answer" in said(written(expected(tmp_path, f"tiny@{digest}", asked)[:, :-1], accept))
        assert "cannot be read" in said(right[:20])


def test_slow_clients_that_are_not_disconnected_are_seen() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        clients = [faults.connected(listener.getsockname()[1], b"GET") for _ in range(2)]
        accepted = [listener.accept()[0] for _ in clients]
        accepted[0].close()
        with pytest.raises(AssertionError, match="1 slow clients are still connected"):
            faults.until_gone(clients, b"x", 0.5)
        accepted[1].close()
        assert faults.until_gone(clients, b"x", 0.5) < 0.5
        for client in clients:
            client.close()


def test_wrong_and_refused_answers_of_an_overload_are_seen(tmp_path: Path) -> None:
    digest = served.publish(Store(tmp_path))
    body = written(expected(tmp_path, f"tiny@{digest}", SMALL[1]), "image/png")
    head = f"HTTP/1.1 200 OK\r\nx-gearnn-level: clean\r\nx-gearnn-release: tiny@{digest}\r\ncontent-length: {len(body)}\r\n\r\n"
    answers = itertools.cycle([head.encode() + body, b"HTTP/1.1 503 Busy\r\nconnection: close\r\ncontent-length: 0\r\n\r\n", b""])

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(next(answers))
        writer.close()

    async def loads() -> list[faults.Load]:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            fake = Service(server.sockets[0].getsockname()[1], tmp_path, list, {digest})
            requests = (Asked(SMALL[0].frame, "clean"),)
            closed = await faults.closed_loop(fake, requests, 2, 0.2)
            return [closed, await faults.open_loop(fake, requests, 200, 0.2, random.Random(0))]

    for load in asyncio.run(loads()):
        assert load.wrong
        assert "another answer" in load.wrong[0]
        assert {status for status, _ in load.asked} == {200, 503, 0}
        assert load.share(200, 503) < 1


def test_an_answer_counts_as_good_only_when_it_was_asked_for_after_the_fault() -> None:
    seen = Seen([(1.0, 9.0, 200), (2.0, 5.0, 0), (4.0, 1.0, 503), (5.0, 2.0, 200), (6.0, 3.0, 200)])
    assert seen.first_good(2.0) == 7.0
    assert seen.first_good(6.5) is None
    assert seen.since(2.0, 5.0).statuses() == [0, 503]


def life(start: int, pid: int, growth: float) -> list[Size]:
    """Ten minutes of a replica that grows by so many MiB an hour after it was started with 100."""
    return [Size(start + s, pid, 100 + growth * s / 3600, 500.0, 90.0, s / 3600) for s in range(0, 600, 20)]


def test_growth_is_seen_though_replicas_are_replaced() -> None:
    flat = [size for pid in range(6) for size in life(600 * pid, pid, 0.0)]
    growing = [size for pid in range(6) for size in life(600 * pid, pid, 300.0)]
    name = "memory of the replica, MiB an hour"
    assert slopes(flat, 120)[name] == 0
    assert slopes(growing, 120)[name] == pytest.approx(300)
    assert slopes(flat, 120)["memory of the other processes, MiB an hour"] == 0
    assert slope([(60.0 * minute, 7.0 * minute) for minute in range(10)]) == pytest.approx(420)


def test_a_soak_with_late_streams_or_growing_memory_is_no_success() -> None:
    def soak(*kills: tuple[str, float, int]) -> str:
        lines = [f"{victim:8} killed, all back after {seconds:5.1f} s; {size} MB" for victim, seconds, size in kills]
        return "\n".join([*lines, "memory 1000 MB at first, 1001 MB at the end"])

    good = judged_soak(soak(("camera", 3.1, 1000), ("replica", 7.5, 1010), ("actor", 4.0, 1005), ("camera", 3.0, 1001)))
    assert (good.recovery, good.figures["kills of camera"]) == (7.5, 2)
    with pytest.raises(AssertionError, match=r"1 of 2 times not all streams were back within 10 s: replica 12\.0 s"):
        judged_soak(soak(("camera", 3.1, 1000), ("replica", 12.0, 1000)))
    with pytest.raises(AssertionError, match="memory grew from 1000 MB to 1300 MB"):
        judged_soak(soak(("camera", 3.1, 1000), ("actor", 3.0, 1300)))
    with pytest.raises(AssertionError, match="nothing was killed"):
        judged_soak("")
