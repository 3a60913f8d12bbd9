"""Video over HTTP, with uvicorn alone and no Ray: lines while frames are decoded, and limits against clients."""

import asyncio
import contextlib
import http.client
import itertools
import json
import random
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gearnn_ray.video
from gearnn_ray.config.serve import FRAMES_AHEAD, LimitsConfig, ServeConfig
from gearnn_ray.core.errors import CorruptStoreError
from gearnn_ray.data.scenes import CLASS_NAMES
from gearnn_ray.service.admission import Admission
from gearnn_ray.service.backend import Prediction
from gearnn_ray.serving.frames import Frame
from gearnn_ray.store.releases import Store
from gearnn_ray.video.decoding import VideoFrame
from gearnn_ray.video.lines import written
from tests.conftest import eventually
from tests.nets import TRUST
from tests.served import publish
from tests.streams import encoded, moving
from tests.test_http import Answer, Luma, admission, ask, picture, problem, serve
from tests.test_http import encoded as still

SEGMENT = encoded(moving(8, 64, 80), container="mpegts", crf=18)
LONG = encoded(moving(60, 64, 80), container="mpegts", g=5)
PATH = "/streams/camera-1/segments"


@dataclass
class Slow(Luma):
    """Answers frames after random times; knows how many it had at once, and fails at one of them."""

    at_once: list[int] = field(default_factory=lambda: [0, 0])  # now, and the most so far
    fails_at: int = -1
    frames: int = 0
    predicted: int = 0

    async def predict(
        self, frame: Frame, level: str | None, stream: str | None, bundle: str | None, media_type: str
    ) -> Prediction:
        self.predicted += 1
        return await super().predict(frame, level, stream, bundle, media_type)

    async def predict_next(self, frame: VideoFrame, stream: str, bundle: str | None) -> Prediction:
        number, self.frames = self.frames, self.frames + 1
        self.at_once = [self.at_once[0] + 1, max(self.at_once[1], self.at_once[0] + 1)]
        try:
            prediction = await super().predict_next(frame, stream, bundle)
            await asyncio.sleep(random.Random(number).uniform(0, 0.03))
            if number == self.fails_at:
                raise RuntimeError("secret inner state")
            return prediction
        finally:
            self.at_once[0] -= 1


@contextlib.contextmanager
def served(backend: Luma | None = None, **limits: Any) -> Iterator[tuple[int, Luma, Admission]]:
    backend, admitted = backend or Luma(), admission(**limits)
    with serve(backend, admitted) as port:
        yield port, backend, admitted


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with served() as (port, _, _):
        yield port


def lines_of(answer: Answer) -> list[dict[str, Any]]:
    """The lines of an answer, each of which must fit the documented schema."""
    assert (answer.status, answer.headers["content-type"]) == (200, "application/x-ndjson")
    return [fitting(line) for line in answer.body.splitlines()]


def fitting(line: bytes) -> dict[str, Any]:
    schema = json.loads(resources.files("gearnn_ray.video").joinpath("frames.schema.json").read_bytes())
    said: dict[str, Any] = json.loads(line)
    pytest.importorskip("jsonschema").Draft202012Validator(schema).validate(said)
    return said


class Client:
    """A request whose body is sent piece by piece, while its answer is read."""

    def __init__(self, port: int, path: str = PATH, head: str = "transfer-encoding: chunked") -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=20)
        self.socket.sendall(f"POST {path} HTTP/1.1\r\nhost: localhost\r\n{head}\r\n\r\n".encode())
        self._response: http.client.HTTPResponse | None = None

    def send(self, data: bytes) -> None:
        self.socket.sendall(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    @property
    def response(self) -> http.client.HTTPResponse:
        if self._response is None:
            self._response = http.client.HTTPResponse(self.socket, method="POST")
            self._response.begin()
        return self._response

    def line(self) -> dict[str, Any]:
        return fitting(self.response.readline())

    def rest(self) -> list[dict[str, Any]]:
        return [fitting(line) for line in self.response.read().splitlines()]

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


# ---- whole segments


def test_segments_of_one_name_and_two_credentials_are_two_streams() -> None:
    with served() as (port, backend, _):
        for secret in ({}, {"authorization": "Bearer one"}, {"authorization": "Bearer two"}, {"authorization": "Bearer one"}):
            assert {line["stream"] for line in lines_of(ask(port, "POST", PATH, SEGMENT, **secret))} == {"camera-1"}
        plain, one, two = backend.streams
        assert plain == "camera-1"
        assert one.startswith("camera-1/")
        assert two.startswith("camera-1/")


def test_a_segment_has_a_line_for_every_frame(port: int) -> None:
    lines = lines_of(ask(port, "POST", PATH, SEGMENT))
    assert [line["frame"] for line in lines] == list(range(8))
    assert {line["stream"] for line in lines} == {"camera-1"}
    assert np.allclose(np.diff([line["pts"] for line in lines]), 0.1)
    assert {(line["width"], line["height"]) for line in lines} == {(80, 64)}
    assert [line["keyframe"] for line in lines] == [True] + [False] * 7
    assert {line["found"] for line in lines} == {line["level"] for line in lines} == {"h264-crf18"}
    assert lines[0]["milliseconds"].keys() == {"decode", "level", "queue", "network"}
    assert sum(each["share"] for each in lines[0]["classes"]) == pytest.approx(1, abs=1e-3)


def test_the_watch_job_writes_the_same_lines(tmp_path: Path) -> None:
    publish(Store(str(tmp_path)), "scenes", level_names=("h264-crf36",), class_names=CLASS_NAMES)
    watching = gearnn_ray.video.watch(store=str(tmp_path), release="scenes", trust=list(TRUST), compare=True)
    lines = [fitting(written(line).encode()) for line in itertools.islice(watching, 15)]
    watching.close()
    assert {"classes", "original", "score"} <= lines[-1].keys()


def test_lines_are_in_order_and_only_a_few_frames_are_under_way() -> None:
    with served(Slow()) as (port, backend, _):
        lines = lines_of(ask(port, "POST", PATH, LONG))
        assert [line["frame"] for line in lines] == list(range(60))
        assert 1 < backend.at_once[1] <= FRAMES_AHEAD
        assert backend.at_once[0] == 0
        assert [status for _, status in backend.counted] == [200] * 60


def test_a_stream_is_remembered_from_segment_to_segment() -> None:
    with served() as (port, backend, _):
        for _ in range(2):
            ask(port, "POST", PATH, SEGMENT)
        ask(port, "POST", "/streams/other/segments", SEGMENT)
        assert backend.streams.keys() == {"camera-1", "other"}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"#EXTM3U\nfile:///etc/passwd\n", 415),
        (SEGMENT[:-100], 400),
        (encoded(moving(101, 32, 32), container="mpegts"), 413),
        (encoded(moving(1, 480, 640)), 413),
        (encoded(moving(3, 64, 80), "mpeg4"), 415),
        (bytes(300_000), 413),
    ],
    ids=["empty", "playlist", "truncated", "frames", "pixels", "codec", "bytes"],
)
def test_a_bad_segment_is_refused_in_one_sentence_whole_or_in_pieces(port: int, body: bytes, status: int) -> None:
    assert problem(ask(port, "POST", PATH, body))[0] == status
    if status != 413 and body != SEGMENT[:-100]:
        found = problem(ask(port, "POST", PATH, iter([body])))[0]
        assert 400 <= found < 500
    assert len(lines_of(ask(port, "POST", PATH, SEGMENT))) == 8  # and the server still works


def test_damage_that_only_the_decoder_sees_ends_the_lines_with_a_sentence(port: int) -> None:
    data = encoded(moving(8, 64, 80), container="h264")
    *lines, last = lines_of(ask(port, "POST", PATH, data[: len(data) * 3 // 4]))
    assert [line["frame"] for line in lines] == list(range(len(lines)))
    assert "last picture" in last["error"]


def test_a_bug_behind_a_frame_ends_the_lines_and_is_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    with served(Slow(fails_at=3)) as (port, backend, admitted):
        *lines, last = lines_of(ask(port, "POST", PATH, SEGMENT))
        assert [line["frame"] for line in lines] == [0, 1, 2]
        assert "secret" not in last["error"]
        assert "RuntimeError: secret inner state" in caplog.text
        assert backend.counted[-1] == ("none", 500)
        eventually(lambda: admitted.streams.used == admitted.memory.used == 0)


def test_a_corrupt_store_is_503(port: int) -> None:
    with served(Luma(fails=CorruptStoreError("try again later."))) as (own, _, _):
        answer = ask(own, "POST", PATH, SEGMENT)
        assert problem(answer) == (503, "try again later.")
        assert int(answer.headers["retry-after"]) > 0


@pytest.mark.parametrize("name", ["a b", "..%2f", "", "x" * 129, "a/b", "caf\u00e9"])
def test_the_name_of_a_stream_is_short_and_plain(port: int, name: str) -> None:
    path = f"/streams/{name}/segments".replace(" ", "%20").replace("\u00e9", "%C3%A9")
    assert problem(ask(port, "POST", path, SEGMENT))[0] == 400
    assert problem(ask(port, "GET", PATH))[0] == 405
    assert problem(ask(port, "POST", PATH, SEGMENT, serve_multiplexed_model_id="other:v1"))[0] == 404


# ---- uploads


def test_lines_of_an_upload_come_while_it_is_sent(port: int) -> None:
    with Client(port) as client:
        client.send(LONG[: len(LONG) // 2])
        assert [client.line()["frame"] for _ in range(15)] == list(range(15))
        client.send(LONG[len(LONG) // 2 :])
        client.send(b"")
        assert [line["frame"] for line in client.rest()] == list(range(15, 60))


def test_an_upload_without_frames_loses_its_place() -> None:
    with served(body_seconds=0.3) as (port, backend, admitted):
        with Client(port) as client:
            client.send(LONG[:500])
            assert client.response.status == 408
        with Client(port) as client:
            client.send(LONG[: len(LONG) // 2])
            *lines, last = client.rest()
            assert len(lines) > 15
            assert last["error"] == "no frame has arrived for 0.3 seconds: send the video without pauses."
            assert backend.counted[-1] == ("none", 408)
        eventually(lambda: admitted.streams.used == admitted.memory.used == 0)


def test_a_client_that_hangs_up_frees_its_place() -> None:
    with served() as (port, _, admitted):
        for head in ("transfer-encoding: chunked", f"content-length: {len(LONG)}"):
            with Client(port, head=head) as client:
                client.send(LONG[: len(LONG) // 2])
                eventually(lambda: admitted.streams.used == 1)
            eventually(lambda: admitted.streams.used == admitted.memory.used == 0)
        assert ask(port, "POST", PATH, SEGMENT).status == 200


def test_an_upload_far_ahead_of_its_processing_ends_with_a_sentence() -> None:
    with served(Luma(delays=[2.0])) as (port, _, _), Client(port) as client:
        for _ in range(10):
            client.send(LONG)  # 60 frames each; 200,000 bytes may wait
        assert "pace" in client.rest()[-1]["error"] if client.response.status == 200 else client.response.status == 413


# ---- limits


def test_more_streams_than_allowed_are_refused_at_once() -> None:
    with served(streams=1) as (port, _, admitted), Client(port) as client:
        client.send(LONG[: len(LONG) // 2])
        client.line()
        answer = ask(port, "POST", PATH, SEGMENT)
        assert problem(answer)[0] == 503
        assert "retry-after" in answer.headers
        assert ask(port, "POST", "/predict", still(picture())).status == 200
        client.send(b"")
        client.rest()
        eventually(lambda: admitted.streams.used == 0)
        assert ask(port, "POST", PATH, SEGMENT).status == 200


def test_the_answer_of_a_stream_has_a_limit() -> None:
    with served(answer_bytes=5000) as (port, backend, _):
        *lines, last = lines_of(ask(port, "POST", PATH, LONG))
        assert 5 < len(lines) < 20
        assert "another request" in last["error"]
        assert backend.counted[-1] == ("none", 413)


def test_a_body_that_comes_too_slowly_is_refused() -> None:
    with served(body_seconds=0.3) as (port, _, admitted):
        for path, head in (("/predict", "content-length: 1000"), (PATH, "content-length: 1000")):
            with Client(port, path, head) as client:
                client.socket.sendall(b"x")
                start = time.monotonic()
                assert client.response.status == 408
                assert time.monotonic() - start < 2
                said = json.loads(client.response.read())["detail"]
                assert said == "The body did not arrive within 0.3 seconds: send it faster, or less of it."
        assert admitted.requests.used == admitted.streams.used == admitted.memory.used == 0


def test_with_all_places_taken_health_and_the_page_answer_and_frames_are_refused_at_once() -> None:
    frame = still(picture())
    with served(Luma(delays=[1.5] * 5), requests=5) as (port, _, admitted), contextlib.ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(Client(port, "/predict", f"content-length: {len(frame)}")).socket.sendall(frame)
        eventually(lambda: admitted.requests.used == 5)
        start = time.monotonic()
        answer = ask(port, "POST", "/predict", frame)
        assert problem(answer) == (503, "the service is busy with requests, at most 5: try again in a few seconds.")
        assert (ask(port, "GET", "/health").status, ask(port, "GET", "/").status) == (200, 200)
        assert time.monotonic() - start < 1
        eventually(lambda: admitted.requests.used == 0)
        assert ask(port, "POST", "/predict", frame).status == 200


def test_a_frame_takes_a_place_when_all_of_it_has_arrived() -> None:
    with served(requests=1) as (port, _, admitted), contextlib.ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(Client(port, "/predict", "content-length: 1000")).socket.sendall(b"x")
        eventually(lambda: admitted.memory.used == 5)
        assert ask(port, "POST", "/predict", still(picture())).status == 200


def test_bytes_in_flight_have_a_limit() -> None:
    frame = still(picture(300, 400), "JPEG")
    with served(memory=150_000) as (port, _, admitted):
        assert problem(ask(port, "POST", "/predict", frame))[0] == 503  # its pixels have 360,000 bytes
        assert problem(ask(port, "POST", PATH, iter([SEGMENT])))[0] == 503  # of an upload 200,000 bytes may wait
        assert ask(port, "POST", "/predict", still(picture())).status == 200
        assert lines_of(ask(port, "POST", PATH, SEGMENT))[-1]["frame"] == 7
        assert admitted.memory.used == 0


def test_an_answer_counts_twice_while_it_is_held_and_encoded() -> None:
    """Logits [4, 300, 400] have 1.9 MB, and as much again as a file."""
    frame, logits = still(picture(300, 400), "JPEG"), {"accept": "application/x-npy"}
    with served(memory=6_000_000) as (port, backend, admitted), ThreadPoolExecutor(1) as other:
        backend.delays = [1.0]
        first = other.submit(ask, port, "POST", "/predict", frame, **logits)
        eventually(lambda: admitted.memory.used == 2 * 4 * 4 * 300 * 400 + 3 * 300 * 400)
        refused = ask(port, "POST", "/predict", frame, **logits)
        assert problem(refused)[0] == 503
        assert refused.headers["retry-after"] == "2"
        assert ask(port, "POST", "/predict", frame).status == 200  # a map of classes is small
        assert first.result().status == 200
        assert admitted.memory.used == 0
        assert ask(port, "POST", "/predict", frame, **logits).status == 200


def test_logits_beyond_the_limit_are_refused_before_the_network_runs() -> None:
    with served(Slow(), answer_bytes=100_000) as (port, backend, admitted):
        status, sentence = problem(ask(port, "POST", "/predict", still(picture(100, 100)), accept="application/x-npy"))
        assert status == 413
        assert "160,000 bytes" in sentence
        assert backend.predicted == 0
        assert ask(port, "POST", "/predict", still(picture(100, 100))).status == 200
        assert ask(port, "POST", "/predict", still(picture(50, 50)), accept="application/x-npy").status == 200
        assert admitted.memory.used == 0


def test_the_operators_limits_are_those_of_the_replica() -> None:
    admitted = Admission.of_config(ServeConfig(max_batch=4, limits=LimitsConfig(body_mib=2, megapixels=1, streams=3)))
    assert (admitted.frame.body_bytes, admitted.frame.pixels) == (2 * 2**20, 1_000_000)
    assert (admitted.requests.most, admitted.streams.most, admitted.memory.most) == (136, 3, 512 * 2**20)
    with pytest.raises(ValueError, match="in_flight_mib is 100, but one request may need"):
        LimitsConfig(in_flight_mib=100)
