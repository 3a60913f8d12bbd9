"""The service over real HTTP to a real Ray Serve; every answer is compared with a plain network.

One deployment serves all tests. Each test leaves it serving the first release.
"""

import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from PIL import Image

from gearnn_ray.config.serve import LimitsConfig, ServeConfig
from gearnn_ray.core.errors import UserError
from gearnn_ray.knobs.wire import CONTENT_TYPE
from gearnn_ray.store.releases import Store
from gearnn_ray.video.decoding import DEFAULT_LIMITS
from gearnn_ray.video.upload import segment_frames
from tests import served
from tests.conftest import eventually
from tests.nets import TRUST
from tests.streams import encoded, moving
from tests.test_camera_job import parts
from tests.test_segment_requests import Client, lines_of
from tests.test_segments import bombs, claiming

# read when the session's Ray starts; ten seconds, Ray's default, is long for a test
os.environ.setdefault("RAY_metrics_report_interval_ms", "1000")

pytest.importorskip("ray.serve", reason="the extra `serve` is not installed")
from gearnn_ray.service import deployment as service


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def classes(self) -> NDArray[np.uint8]:
        image = Image.open(io.BytesIO(self.body))
        assert image.mode == "P"
        return np.asarray(image)


@dataclass(frozen=True)
class Server:
    """The running service and the store behind it."""

    root: Path
    port: int
    serving: service.Serving

    @property
    def store(self) -> Store:
        return Store(self.root)

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): text for name, text in headers.items()})
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def predict(self, frame: bytes, **headers: str) -> Answer:
        return self.ask("POST", "/predict", frame, **headers)

    def health(self) -> Any:
        return json.loads(self.ask("GET", "/health").body)

    def check(self, frame: bytes, level: str, answer: Answer) -> None:
        """The answer is that of the release and level in its headers, pixel by pixel."""
        assert answer.status == 200, answer.body
        assert answer.headers["x-gearnn-level"] == level
        expected = self.expected(answer.headers["x-gearnn-release"], level, frame)
        assert np.mean(answer.classes == expected) > 0.999  # in other pixels the logits of two classes are almost equal

    def expected(self, release: str, level: str, frame: bytes) -> NDArray[Any]:
        return served.expected_logits(self.root, release, level, frame).argmax(0)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def server(ray_cluster: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("served") / "store"
    served.publish(Store(root), "tiny", tags=("first",))
    served.publish(Store(root), "other", seed=7, shared=True, network_name="tests.nets:stuck")
    served.publish(Store(root), "video", seed=8, level_names=VIDEO_LEVELS)
    config = ServeConfig(
        store=str(root), bundles=("tiny", "other", "video"), port=free_port(), device="cpu", max_batch=8, poll_seconds=0.3,
        trust=TRUST, limits=LimitsConfig(body_mib=0.1, megapixels=0.05, body_seconds=4), cache=str(root.with_name("copies")),
    )  # fmt: skip
    with service.serving(config) as serving:
        yield Server(root, config.port, serving)


VIDEO_LEVELS = ("h264-crf18", "h264-crf40")
FRAMES = {
    "jpeg-10": served.jpeg(served.picture(1), 10),
    "jpeg-50": served.jpeg(served.picture(2, 48, 96), 50),
    "clean": served.png(served.picture(3)),
}
WHITE = served.png(np.full((64, 80, 3), 255, np.uint8))  # with which the network of the bundle `other` never ends


def test_every_frame_is_answered_by_the_network_of_its_level(server: Server) -> None:
    for level, frame in FRAMES.items():
        answer = server.predict(frame)
        server.check(frame, level, answer)
        assert answer.headers["x-gearnn-found"] == level
        assert float(answer.headers["x-gearnn-distance"]) == 0
        assert answer.headers["x-gearnn-release"].startswith("tiny@sha256:")
        assert re.search(r"queue;dur=.*network;dur=", answer.headers["server-timing"])


def test_a_level_given_wins_over_the_one_found(server: Server) -> None:
    frame = FRAMES["jpeg-10"]
    for level in ("clean", "jpeg-50"):
        answer = server.predict(frame, x_gearnn_level=level)
        server.check(frame, level, answer)
        assert answer.headers["x-gearnn-found"] == "jpeg-10"
    near = server.predict(frame, x_gearnn_level="jpeg-33")
    server.check(frame, "jpeg-50", near)
    assert float(near.headers["x-gearnn-distance"]) > 0


def test_logits_are_those_of_the_level(server: Server) -> None:
    frame = FRAMES["jpeg-50"]
    answer = server.predict(frame, accept="application/x-npy")
    logits = np.load(io.BytesIO(answer.body), allow_pickle=False)
    expected = served.expected_logits(server.root, answer.headers["x-gearnn-release"], "jpeg-50", frame)
    assert (logits.dtype, logits.shape) == (np.float32, (3, 48, 96))
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_bundle_is_chosen_by_its_header_and_only_configured_ones_are(server: Server) -> None:
    frame = FRAMES["jpeg-10"]
    for bundle in ("other", "other:latest", "tiny:latest"):
        answer = server.predict(frame, serve_multiplexed_model_id=bundle)
        server.check(frame, "jpeg-10", answer)
        assert answer.headers["x-gearnn-release"].split("@")[0] == bundle.split(":")[0]
    for bundle in ("tiny:first", "nowhere", "tiny@sha256:0"):
        refused = server.predict(frame, serve_multiplexed_model_id=bundle)
        assert refused.status == 404
        assert f"the bundle {bundle} is not served here: choose one of tiny:latest, other:latest" in refused.body.decode()


def test_levels_that_share_an_adaptor_are_levels_of_their_own(server: Server) -> None:
    levels = server.health()["bundles"]["other:latest"]["levels"]
    assert levels == ["clean", *served.LEVELS]
    given: dict[str, str] = {"serve_multiplexed_model_id": "other", "accept": "application/x-npy"}
    for level in served.LEVELS:
        found = server.predict(FRAMES[level], serve_multiplexed_model_id="other")
        server.check(FRAMES[level], level, found)
    logits = {}
    for level in levels:
        answer = server.predict(FRAMES["jpeg-10"], x_gearnn_level=level, **given)
        assert (answer.headers["x-gearnn-level"], answer.headers["x-gearnn-found"]) == (level, "jpeg-10")
        logits[level] = np.load(io.BytesIO(answer.body), allow_pickle=False)
    np.testing.assert_array_equal(logits["jpeg-10"], logits["jpeg-50"])
    assert not np.allclose(logits["jpeg-10"], logits["clean"])


def test_errors_are_one_sentence_and_the_service_still_works(server: Server) -> None:
    good, noise = FRAMES["jpeg-10"], np.random.default_rng(0).integers(0, 256, (300, 300, 3)).astype(np.uint8)
    wrong: list[tuple[bytes, dict[str, str], int, str]] = [
        (good, {"x_gearnn_level": "brightness-0.4"}, 422, "brightness-0.4"),
        (good[: len(good) // 2], {}, 400, "ends before"),
        (served.png(noise), {}, 413, "larger than"),
        (served.jpeg(noise, 5), {}, 413, "pixels"),
        (b"hello", {}, 415, "image/jpeg"),
    ]
    for body, headers, status, sentence in wrong:
        answer = server.predict(body, **headers)
        assert (answer.status, answer.headers["content-type"]) == (status, "application/problem+json")
        assert sentence in answer.body.decode()
    server.check(good, "jpeg-10", server.predict(good))


def test_levels_sizes_and_bundles_mixed_by_many_clients_are_each_answered_right(server: Server) -> None:
    levels = list(FRAMES)

    def client(number: int) -> None:
        for turn in range(6):
            level = levels[(number + turn) % 3]
            bundle = ("tiny", "other")[number % 2]
            answer = server.predict(FRAMES[level], serve_multiplexed_model_id=bundle, x_gearnn_stream=f"camera-{number}")
            server.check(FRAMES[level], level, answer)
            assert answer.headers["x-gearnn-release"].startswith(bundle)

    with ThreadPoolExecutor(12) as clients:
        list(clients.map(client, range(12)))


def test_two_streams_at_the_same_time_are_each_answered_at_their_levels(server: Server) -> None:
    shots = {crf: encoded(moving(30, 64, 80, seed=crf), container="mpegts", crf=crf) for crf in (18, 40)}

    def client(crf: int) -> Answer:
        return server.ask("POST", f"/streams/camera-{crf}/segments", shots[crf], serve_multiplexed_model_id="video")

    with ThreadPoolExecutor(2) as clients:
        answers = dict(zip(shots, clients.map(client, shots), strict=True))
    for crf, answer in answers.items():
        lines = lines_of(answer)
        assert [line["frame"] for line in lines] == list(range(30))
        assert {line["level"] for line in lines} == {f"h264-crf{crf}"}
        for frame, line in zip(segment_frames(shots[crf], DEFAULT_LIMITS, 30), lines, strict=True):
            classes = server.expected(line["release"], line["level"], served.png(frame.pixels))
            shares = {each["category_id"]: each["share"] for each in line["classes"]}
            for label in range(3):
                assert abs(shares.get(label, 0) - float(np.mean(classes == label))) < 0.01


def test_lines_of_an_upload_come_through_serves_proxy_while_it_is_sent(server: Server) -> None:
    data = encoded(moving(40, 64, 80), container="mpegts", g=5, crf=18)
    with Client(server.port, head="transfer-encoding: chunked\r\nserve_multiplexed_model_id: video") as client:
        client.send(data[: len(data) // 2])
        assert [client.line()["frame"] for _ in range(10)] == list(range(10))
        client.send(data[len(data) // 2 :])
        client.send(b"")
        assert [line["frame"] for line in client.rest()] == list(range(10, 40))


def test_hostile_segments_are_refused_and_the_replica_lives(server: Server) -> None:
    (replica,) = replica_pids()
    bodies = [b"#EXTM3U\nfile:///etc/passwd\n", claiming(100_000, 100_000), claiming(16_000, 16_000), bombs(50_000_000)["trun"]]
    for body in (*bodies, bytes(5000), encoded(moving(3, 240, 320))):
        for chunked in (False, True):
            sent: Any = iter([body]) if chunked else body
            answer = server.ask("POST", "/streams/x/segments", sent, serve_multiplexed_model_id="video")
            assert (answer.status // 100, answer.headers["content-type"]) == (4, "application/problem+json"), answer
    assert replica_pids() == [replica]


class Load:
    """Clients that send requests without pause; every answer is checked, and failures are counted."""

    def __init__(self, server: Server, clients: int = 4) -> None:
        self.server, self.failed, self.releases = server, 0, list[str]()
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(clients)
        self._clients = [self._pool.submit(self._ask, number) for number in range(clients)]

    def _ask(self, number: int) -> None:
        levels = list(FRAMES)
        while not self._stop.is_set():
            number += 1
            level = levels[number % 3]
            try:
                answer = self.server.predict(FRAMES[level])
            except (OSError, http.client.HTTPException):  # the connection broke
                answer = Answer(0, {}, b"")
            if answer.status != 200:
                self.failed += 1
                time.sleep(0.2)
                continue
            self.server.check(FRAMES[level], level, answer)
            self.releases.append(answer.headers["x-gearnn-release"])

    def __enter__(self) -> "Load":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown()
        for client in self._clients:
            client.result()  # raises the error of a failed check


def test_a_moved_tag_is_followed_without_dropping_a_request(server: Server) -> None:
    first = server.store.tags("tiny")["first"]
    (server.root / "refs/tiny/latest.bak").write_bytes(b"a stray file, no digest")
    with Load(server) as load:
        eventually(lambda: len(load.releases) > 5)
        second = served.publish(server.store, "tiny", seed=1)
        eventually(lambda: f"tiny@{second}" in load.releases[-4:])
        assert server.health()["bundles"]["tiny:latest"]["digest"] == second
        server.store.tag("tiny", "latest", first)  # a rollback
        eventually(lambda: load.releases[-4:] == [f"tiny@{first}"] * 4)
    assert load.failed == 0
    assert set(load.releases) == {f"tiny@{first}", f"tiny@{second}"}


def degraded(server: Server, words: str) -> bool:
    health = server.health()
    return health["status"] == "degraded" and words in (health["bundles"]["tiny:latest"]["problem"] or "")


def test_with_a_corrupt_release_or_a_lost_store_the_old_one_serves_and_health_gives_the_reason(server: Server) -> None:
    first = server.store.tags("tiny")["first"]
    before = set((server.root / "blobs/sha256").iterdir())
    third = served.publish(server.store, "tiny", seed=2, tags=("third",))
    server.store.tag("tiny", "latest", first)
    time.sleep(1)  # the replica may have loaded the third one, and must see that it is not the latest any more
    eventually(lambda: server.health()["bundles"]["tiny:latest"]["digest"] == first)
    broken = next(iter(set((server.root / "blobs/sha256").iterdir()) - before))
    broken.write_bytes(broken.read_bytes()[:-1] + b"x")
    server.store.tag("tiny", "latest", third)
    eventually(lambda: degraded(server, broken.name))
    answer = server.predict(FRAMES["jpeg-10"])
    assert answer.headers["x-gearnn-release"] == f"tiny@{first}"
    server.store.tag("tiny", "latest", first)
    eventually(lambda: server.health()["status"] == "ok")

    server.root.rename(server.root.with_name("away"))
    eventually(lambda: degraded(server, "tiny:latest is not in"))
    frame = FRAMES["clean"]
    away = server.predict(frame)
    server.root.with_name("away").rename(server.root)
    server.check(frame, "clean", away)
    eventually(lambda: server.health()["status"] == "ok")


def metric(text: str, name: str, **tags: str) -> float:
    """The sum of all series of a metric that have these tags."""
    lines = [line for line in text.splitlines() if line.startswith(f"ray_gearnn_{name}{{")]
    wanted = [line for line in lines if all(f'{tag}="{value}"' in line for tag, value in tags.items())]
    return sum(float(line.rpartition(" ")[2]) for line in wanted)


def test_prometheus_sees_levels_batches_distances_and_the_release(server: Server) -> None:
    server.predict(served.jpeg(served.picture(), 30))
    server.predict(b"hello")

    def scraped() -> str:
        with urllib.request.urlopen(server.serving.metrics[0], timeout=10) as response:
            return str(response.read().decode())

    # jpeg-30 lies 20 steps of quality, 4 units, from both levels; every other frame lies on one
    eventually(lambda: metric(scraped(), "level_distance_sum", bundle="tiny:latest") >= 3, 30)
    text = scraped()
    for level in FRAMES:
        assert metric(text, "requests_total", bundle="tiny:latest", level=level, status="200") >= 1
    assert metric(text, "request_seconds_count") == metric(text, "requests_total")
    assert metric(text, "batch_size_sum") > metric(text, "batch_size_count") > 0
    assert metric(text, "batch_levels_sum") > metric(text, "batch_levels_count")
    assert metric(text, "requests_total", bundle="none", level="none", status="415") >= 1
    for level in VIDEO_LEVELS:
        assert metric(text, "lines_total", bundle="video:latest", level=level, status="200") >= 30
    assert metric(text, "lines_total", bundle="video:latest", level="none", status="413") >= 1
    digest = server.store.tags("tiny")["latest"]
    eventually(lambda: metric(scraped(), "release", bundle="tiny:latest", digest=digest) >= 1)


def replica_pids() -> list[int]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # some come and go
            if any("ServeReplica:gearnn" in word for word in process.cmdline()):
                found.append(process.pid)
    return found


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """SIGSTOP to a process, which is ended afterwards if somebody else has not."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_a_replica_that_does_not_answer_is_replaced_and_starts_without_the_newest_release(server: Server) -> None:
    """Alive, but stopped; and the newest release is corrupt when the next replica starts."""
    first = server.store.tags("tiny")["first"]
    eventually(lambda: server.health()["bundles"]["tiny:latest"]["digest"] == first)
    (wedged,) = replica_pids()
    corrupt = server.root / "manifests" / f"{server.store.tags('other')['latest'].removeprefix('sha256:')}.json"
    content = corrupt.read_bytes()
    start = time.monotonic()
    with stopped(wedged):
        corrupt.write_bytes(content.replace(b"other", b"wrong"))
        eventually(lambda: replica_pids() not in ([], [wedged]), 60)
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if (answer := server.predict(FRAMES["jpeg-10"], serve_multiplexed_model_id="other")).status == 200:
                    break
            assert time.monotonic() < start + 90
            time.sleep(0.2)
    assert time.monotonic() - start < 45
    health = server.health()["bundles"]
    assert health["other:latest"]["is_copy"]
    assert "is altered" in health["other:latest"]["problem"]
    assert (health["tiny:latest"]["is_copy"], health["tiny:latest"]["digest"]) == (False, first)
    corrupt.write_bytes(content)
    eventually(lambda: server.health()["status"] == "ok")
    server.check(FRAMES["jpeg-10"], "jpeg-10", answer)
    assert not psutil.pid_exists(wedged)


@pytest.mark.slow  # a minute
def test_a_replica_whose_network_hangs_is_replaced(server: Server) -> None:
    (wedged,) = replica_pids()
    start = time.monotonic()
    with Client(server.port, "/predict", f"serve_multiplexed_model_id: other\r\ncontent-length: {len(WHITE)}") as client:
        client.socket.sendall(WHITE)
        eventually(lambda: replica_pids() not in ([], [wedged]), 60)
    assert time.monotonic() - start > 15  # it had time
    eventually(lambda: server.predict(FRAMES["jpeg-10"]).status == 200, 30)


def test_the_controller_of_a_camera_survives_a_replica(server: Server) -> None:
    head, data, report = parts(("crf=18,28,38",), price=0.0)

    def answer() -> Any:
        return server.ask("POST", "/streams/gate/segments", head.line() + data + report.line(), content_type=CONTENT_TYPE)

    *frames, last = lines_of(answer())
    assert (len(frames), last["steps"], last["ignored"]) == (8, 1, 0)
    (killed,) = replica_pids()
    os.kill(killed, signal.SIGKILL)
    eventually(lambda: replica_pids() not in ([], [killed]) and answer().status == 200, 40)
    assert lines_of(answer())[-1]["steps"] > 2


def test_a_missing_bundle_is_refused_before_ray_starts(tmp_path: Path) -> None:
    served.publish(Store(tmp_path), "tiny")
    for bundle, sentence in (("nowhere", "No release nowhere:latest"), ("tiny:v2", "No release tiny:v2")):
        config = ServeConfig(store=str(tmp_path), bundles=("tiny", bundle), trust=TRUST)
        with pytest.raises(UserError, match=sentence), service.serving(config):
            pass
