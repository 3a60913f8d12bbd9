"""HTTP requests and responses, with uvicorn alone and no Ray. Every error is one sentence."""

import asyncio
import http.client
import io
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import uvicorn
from PIL import Image
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from gearnn_ray.core.errors import CorruptStoreError, UserError
from gearnn_ray.service.admission import Admission, Quota
from gearnn_ray.service.backend import BundleHealth, Health, Prediction, UnknownBundleError
from gearnn_ray.service.http import answer
from gearnn_ray.serving.frames import Frame, Limits
from gearnn_ray.serving.level_estimation import LevelEstimate, LevelEstimator
from gearnn_ray.serving.stream_table import TooManyStreamsError
from gearnn_ray.tasks.base import Task
from gearnn_ray.video.decoding import VideoFrame
from gearnn_ray.video.stream_levels import StreamLevels
from tests.conftest import SEGMENTATION

LEVELS = ("clean", "jpeg-10", "jpeg-40", "jpeg-80")
VIDEO_LEVELS = ("h264-crf18", "h264-crf40")
CLASS_NAMES = ("dark", "dim", "light", "bright")
BUNDLES = {"street:latest": "sha256:" + "12" * 32, "night:latest": "sha256:" + "ab" * 32}
LIMITS = Limits(body_bytes=200_000, pixels=300_000)


def admission(**limits: Any) -> Admission:
    """What the servers of these tests admit; `limits` are fields of `Admission`, for quotas their sizes."""
    quotas = {"requests": 100, "streams": 8, "memory": 50_000_000}
    sizes = {"body_seconds": 10.0, "answer_bytes": 5_000_000, "segment_frames": 100, **quotas, **limits}
    return Admission(LIMITS, **{name: Quota(size, name) if name in quotas else size for name, size in sizes.items()})


class NoCameras:
    """No camera, whatever it is asked for."""

    async def state(self, name: str) -> None: ...

    async def picture(self, name: str) -> None: ...

    async def lines_after(self, name: str, number: int) -> list[Any]:
        return []

    async def all(self) -> Mapping[str, Any]:
        return {}


@dataclass
class Luma:
    """A backend whose networks classify pixels by luma; each level has other boundaries between the four classes."""

    untrained: Any = "nearest"
    fails: Exception | None = None
    problem: str | None = None
    delays: list[float] = field(default_factory=list)  # seconds, for the next answers in turn
    received: list[tuple[bytes, Mapping[str, str]]] = field(default_factory=list)  # bodies and headers of the requests
    streams: dict[str, StreamLevels] = field(default_factory=dict)
    counted: list[tuple[str, int]] = field(default_factory=list)  # levels and statuses of lines
    cameras: Any = field(default_factory=NoCameras)
    keys: list[str | None] = field(default_factory=list)  # of the streams of single frames
    digests: dict[str, str | None] = field(default_factory=lambda: dict(BUNDLES))

    def has_cameras(self, bundle: str | None) -> bool:
        return bundle in (None, "street:latest")

    def task(self, bundle: str | None) -> Task:
        if bundle not in (None, *BUNDLES):
            raise UnknownBundleError(f"There is no bundle {bundle!r} here, expected one of {', '.join(BUNDLES)}.")
        return SEGMENTATION

    async def predict(
        self, frame: Frame, level: str | None, stream: str | None, bundle: str | None, media_type: str
    ) -> Prediction:
        self.keys.append(stream)
        if self.delays:
            await asyncio.sleep(self.delays.pop(0))
        if self.fails:
            raise self.fails
        name = bundle or "street:latest"
        if level is not None and level not in LEVELS:
            raise UserError(f"There is no level {level!r} here, expected one of {', '.join(LEVELS)}.")
        found = LevelEstimator(LEVELS, None, self.untrained).estimate(frame.evidence, stream)
        used = LevelEstimate(level, None, 0.0, 0.0, found.found) if level else found
        scores = luma_logits(frame.pixels, used.level)
        return Prediction(
            scores if media_type == "application/x-npy" else scores.argmax(0).astype(np.uint8),
            used,
            f"{name.partition(':')[0]}@{BUNDLES[name]}",
            {"queue": 0.001, "network": 0.002},
        )

    def answer_bytes(self, bundle: str | None, media_type: str, height: int, width: int) -> int:
        return SEGMENTATION.answer_bytes(media_type, len(CLASS_NAMES), height, width)

    async def predict_next(self, frame: VideoFrame, stream: str, bundle: str | None) -> Prediction:
        levels = self.streams.setdefault(stream, StreamLevels(LevelEstimator(VIDEO_LEVELS, None), stream))
        estimate = levels.estimate(frame.evidence)
        if self.delays:
            await asyncio.sleep(self.delays.pop(0))
        if self.fails:
            raise self.fails
        classes = luma_logits(frame.pixels, "clean").argmax(0).astype(np.uint8)
        return Prediction(
            classes, estimate, f"street@{BUNDLES['street:latest']}", {"queue": 0.001, "network": 0.002}, CLASS_NAMES
        )

    def count_line(self, bundle: str | None, level: str, status: int) -> None:
        self.counted.append((level, status))

    def health(self) -> Health:
        bundles = {
            name: BundleHealth(digest, SEGMENTATION.name, LEVELS, CLASS_NAMES, self.problem)
            for name, digest in self.digests.items()
        }
        return Health("degraded" if self.problem else "ok", "cpu", bundles)


def luma_logits(pixels: np.ndarray, level: str) -> np.ndarray:
    """[4, H, W]: for each pixel, minus the distance of its luma from the centre of each class."""
    luma = pixels @ np.array([0.299, 0.587, 0.114])
    centres = np.array([32, 96, 160, 224]) - 8 * LEVELS.index(level)
    return -np.abs(luma[None] - centres[:, None, None]).astype(np.float32)


@contextmanager
def serve(backend: Luma, admitted: Admission | None = None) -> Iterator[int]:
    """The port on loopback of a uvicorn server that calls `answer`, in a thread."""
    admitted = admitted or admission()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        body = bytearray()

        async def heard() -> Message:
            message = await receive()
            body.extend(message.get("body", b""))
            return message

        request = Request(scope, heard, send)
        response = await answer(request, backend, admitted)
        if body:
            backend.received.append((bytes(body), request.headers))
        await response(scope, receive, send)

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[int, Luma]]:
    backend = Luma()
    with serve(backend) as port:
        yield port, backend


@pytest.fixture
def backend(shared: tuple[int, Luma]) -> Iterator[Luma]:
    """The backend of the shared server, reset after the test."""
    yield shared[1]
    shared[1].__init__()  # type: ignore[misc]


@pytest.fixture
def port(shared: tuple[int, Luma], backend: Luma) -> int:
    return shared[0]


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def array(self) -> np.ndarray:
        return np.load(io.BytesIO(self.body)) if self.headers["content-type"] == "application/x-npy" else self.map[0]

    @property
    def map(self) -> tuple[np.ndarray, Image.Image]:
        image = Image.open(io.BytesIO(self.body))
        return np.asarray(image), image


def ask(port: int, method: str, path: str, body: Any = None, **headers: str) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        names = {name if name.startswith("serve_") else name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, names)
        response = connection.getresponse()
        return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
    finally:
        connection.close()


def problem(answer: Answer) -> tuple[int, str]:
    """Status and sentence of an error response, which must be one line of application/problem+json."""
    assert answer.headers["content-type"] == "application/problem+json"
    said = json.loads(answer.body)
    assert said["status"] == answer.status >= 400
    assert "\n" not in said["detail"]
    assert "Traceback" not in said["detail"]
    assert said["detail"].endswith(".")
    return answer.status, said["detail"]


def picture(height: int = 48, width: int = 64) -> np.ndarray:
    ramp = np.linspace(0, 255, width)[None, :, None] * np.ones((height, 1, 3))
    return (ramp + np.random.default_rng(0).normal(0, 12, ramp.shape)).clip(0, 255).astype(np.uint8)


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def raw(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, pixels)
    return file.getvalue()


# ---- answers


def test_a_class_map_is_a_palette_png_whose_pixel_values_are_the_class_ids(port: int) -> None:
    got = ask(port, "POST", "/predict", encoded(picture()), content_type="image/png")
    assert (got.status, got.headers["content-type"]) == (200, "image/png")
    classes, image = got.map
    assert image.mode == "P"
    assert np.array_equal(classes, luma_logits(picture(), "clean").argmax(0))
    colours = np.array(image.getpalette()).reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) == 256
    assert colours[0].tolist() == [128, 64, 128]  # road, as in Cityscapes


def test_logits_are_the_backends_own_to_the_bit(port: int) -> None:
    got = ask(port, "POST", "/predict", encoded(picture()), accept="application/x-npy")
    assert (got.status, got.headers["content-type"]) == (200, "application/x-npy")
    assert got.array.dtype == np.float32
    assert np.array_equal(got.array, luma_logits(picture(), "clean"))


def test_jpeg_png_and_raw_frames_are_read_whatever_the_content_type_says(port: int) -> None:
    jpeg = encoded(picture(), "JPEG", quality=100)
    pixels = np.asarray(Image.open(io.BytesIO(jpeg)))
    for body, expected in ((encoded(picture()), picture()), (raw(picture()), picture()), (jpeg, pixels)):
        for headers in ({}, {"content_type": "application/octet-stream"}):
            got = ask(port, "POST", "/predict", body, x_gearnn_level="clean", **headers)
            assert np.array_equal(got.array, luma_logits(expected, "clean").argmax(0))


@pytest.mark.parametrize(("quality", "level", "distance"), [(10, "jpeg-10", "0"), (34, "jpeg-40", "1.2"), (80, "jpeg-80", "0")])
def test_headers_have_the_level_found_and_the_level_used(port: int, quality: int, level: str, distance: str) -> None:
    headers = ask(port, "POST", "/predict", encoded(picture(), "JPEG", quality=quality)).headers
    assert headers["x-gearnn-found"] == f"jpeg-{quality}"
    assert (headers["x-gearnn-level"], headers["x-gearnn-distance"]) == (level, distance)
    assert headers["x-gearnn-release"] == f"street@{BUNDLES['street:latest']}"


def test_the_header_of_a_mixture_has_both_shares(port: int, backend: Luma) -> None:
    backend.untrained = "interpolate"
    headers = ask(port, "POST", "/predict", encoded(picture(), "JPEG", quality=30)).headers
    assert headers["x-gearnn-level"] == "jpeg-40*0.67, jpeg-10*0.33"


def test_a_level_can_be_forced_and_a_bundle_chosen(port: int) -> None:
    jpeg = encoded(picture(), "JPEG", quality=10)
    pixels = np.asarray(Image.open(io.BytesIO(jpeg)))
    for header in ("serve_multiplexed_model_id", "x_gearnn_stream", "serve-multiplexed-model-id"):
        got = ask(port, "POST", "/predict", jpeg, x_gearnn_level="jpeg-80", **{header: "night:latest"})
        bundle = "street" if header == "x_gearnn_stream" else "night"
        assert got.headers["x-gearnn-release"] == f"{bundle}@{BUNDLES[f'{bundle}:latest']}"
        assert (got.headers["x-gearnn-level"], got.headers["x-gearnn-found"]) == ("jpeg-80", "jpeg-10")
        assert np.array_equal(got.array, luma_logits(pixels, "jpeg-80").argmax(0))


def test_server_timing_has_all_parts_in_milliseconds(port: int) -> None:
    timing = ask(port, "POST", "/predict", encoded(picture())).headers["server-timing"]
    parts = dict(part.strip().split(";dur=") for part in timing.split(","))
    assert list(parts) == ["decode", "queue", "network", "encode"]
    assert (float(parts["queue"]), float(parts["network"])) == (1, 2)
    assert 0 < float(parts["decode"]) < 1000


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("*/*", "image/png"),
        ("image/*", "image/png"),
        ("application/*;q=0.5", "application/x-npy"),
        ("text/html, image/png;q=0.2, application/x-npy;q=0.3", "application/x-npy"),
        ("IMAGE/PNG ; q=1", "image/png"),
        ("*/*;q=0.1, image/png;q=0", "application/x-npy"),
        ("", "image/png"),
        ("text/html", None),
        ("image/jpeg, image/png;q=0", None),
        (";;,,q=", None),
    ],
)
def test_the_answer_has_the_accepted_type(port: int, accept: str, expected: str | None) -> None:
    got = ask(port, "POST", "/predict", encoded(picture()), accept=accept)
    if expected is None:
        assert problem(got)[0] == 406
    else:
        assert (got.status, got.headers["content-type"]) == (200, expected)


# ---- page and health


def test_the_page_is_one_file_and_loads_nothing_from_other_hosts(port: int) -> None:
    got = ask(port, "GET", "/")
    assert (got.status, got.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert b"<!doctype html>" in got.body
    assert "default-src 'none'" in got.headers["content-security-policy"]
    assert b"http://" not in got.body.replace(b"http://www.w3.org/2000/svg", b"")
    assert b"https://" not in got.body
    head = ask(port, "HEAD", "/")
    assert (head.status, head.body) == (200, b"")


def test_health_is_200_and_gives_the_reason_if_degraded(port: int, backend: Luma) -> None:
    assert json.loads(ask(port, "GET", "/health").body)["status"] == "ok"
    backend.problem = "The store at s3://bucket does not answer."
    got = ask(port, "GET", "/health")
    said = json.loads(got.body)
    assert (got.status, said["status"]) == (200, "degraded")
    assert said["bundles"]["street:latest"] == {
        "digest": BUNDLES["street:latest"], "task": "segmentation", "levels": [*LEVELS], "class_names": [*CLASS_NAMES],
        "problem": backend.problem, "is_copy": False,
    }  # fmt: skip


def test_health_is_503_while_a_bundle_has_no_release(port: int, backend: Luma) -> None:
    backend.problem, backend.digests = "The store is away.", {"night:latest": None}
    got = ask(port, "GET", "/health")
    assert got.status == 503
    assert json.loads(got.body)["bundles"]["night:latest"]["problem"] == backend.problem


# ---- refusals


@pytest.mark.parametrize("path", ["/nothing", "/predict/", "/%00", "/../etc/passwd"])
def test_other_paths_are_not_found(port: int, path: str) -> None:
    assert problem(ask(port, "GET", path))[0] == 404


@pytest.mark.parametrize(
    ("method", "path", "allow"), [("GET", "/predict", "POST"), ("POST", "/", "GET, HEAD"), ("PUT", "/health", "GET, HEAD")]
)
def test_other_methods_are_refused_with_those_allowed(port: int, method: str, path: str, allow: str) -> None:
    got = ask(port, method, path, b"")
    assert problem(got)[0] == 405
    assert got.headers["allow"] == allow


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, b""),
        (400, encoded(picture())[:-30]),
        (415, b"%PDF-1.7 not an image at all"),
        (422, encoded(np.zeros((8, 1000, 3), np.uint8))),
        (413, encoded(np.zeros((600, 600, 3), np.uint8))),
    ],
    ids=["empty", "truncated", "pdf", "thin", "pixels"],
)
def test_a_body_that_is_not_a_frame_is_refused_in_one_sentence(port: int, status: int, body: bytes) -> None:
    assert problem(ask(port, "POST", "/predict", body))[0] == status
    assert ask(port, "POST", "/predict", encoded(picture())).status == 200  # and the server still works


@pytest.mark.parametrize("level", ["jpeg-101", "JPEG-10", "nonsense", "", "jpeg-10+clean", "a" * 500])
def test_an_invalid_level_is_unprocessable(port: int, level: str) -> None:
    assert problem(ask(port, "POST", "/predict", encoded(picture()), x_gearnn_level=level))[0] == 422


def test_a_level_or_bundle_that_is_not_served_is_named(port: int) -> None:
    status, sentence = problem(ask(port, "POST", "/predict", encoded(picture()), x_gearnn_level="jpeg-11"))
    assert status == 422
    assert "jpeg-11" in sentence
    status, sentence = problem(ask(port, "POST", "/predict", encoded(picture()), serve_multiplexed_model_id="other:v1"))
    assert status == 404
    assert "other:v1" in sentence


@pytest.mark.parametrize("name", ["x_gearnn_stream", "serve_multiplexed_model_id"])
@pytest.mark.parametrize("value", ["", "a" * 129, "a b", "../x", "caf\u00e9", "a;b"])
def test_ids_are_short_and_plain(port: int, name: str, value: str) -> None:
    assert problem(ask(port, "POST", "/predict", encoded(picture()), **{name: value}))[0] == 400


def test_a_body_too_large_is_refused_before_it_comes(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99999999999\r\n\r\n")
        assert connection.recv(12) == b"HTTP/1.1 413"


def test_a_body_too_large_is_refused_while_it_comes(port: int) -> None:
    """Chunks without a length or an end: the answer comes before the end."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n")
        for _ in range(LIMITS.body_bytes // 50_000 + 1):
            connection.sendall(b"C350\r\n" + bytes(50_000) + b"\r\n")
        assert connection.recv(12) == b"HTTP/1.1 413"


def test_a_body_in_chunks_is_read(port: int) -> None:
    body = encoded(picture())
    got = ask(port, "POST", "/predict", iter([body[:100], body[100:]]))
    assert np.array_equal(got.array, luma_logits(picture(), "clean").argmax(0))


def test_a_request_without_a_length_is_refused(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert connection.recv(12) == b"HTTP/1.1 411"


def test_a_client_that_hangs_up_does_no_harm(port: int, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\nabc")
    time.sleep(0.1)
    assert ask(port, "POST", "/predict", encoded(picture())).status == 200
    assert not caplog.records


def test_a_corrupt_store_is_not_the_clients_fault(port: int, backend: Luma) -> None:
    backend.fails = CorruptStoreError("sha256:12 is not what the store promises.")
    assert problem(ask(port, "POST", "/predict", encoded(picture()))) == (503, "sha256:12 is not what the store promises.")


def test_a_new_stream_while_all_are_in_use_may_come_again(port: int, backend: Luma) -> None:
    backend.fails = TooManyStreamsError("the service follows 4,096 streams, all of them in use: try again")
    got = ask(port, "POST", "/predict", encoded(picture()), x_gearnn_stream="new")
    assert problem(got) == (429, "the service follows 4,096 streams, all of them in use: try again.")
    assert got.headers["retry-after"] == "2"


def test_a_bug_is_logged_and_not_shown(port: int, backend: Luma, caplog: pytest.LogCaptureFixture) -> None:
    backend.fails = RuntimeError("secret inner state")
    status, sentence = problem(ask(port, "POST", "/predict", encoded(picture())))
    assert status == 500
    assert "secret" not in sentence
    assert "RuntimeError: secret inner state" in caplog.text


def test_requests_at_once_each_get_their_own_answer(port: int) -> None:
    rng = np.random.default_rng(1)
    frames = [rng.integers(0, 256, (32 + i, 48, 3), dtype=np.uint8) for i in range(8)]
    answers: dict[int, Answer] = {}

    def one(index: int) -> None:
        answers[index] = ask(port, "POST", "/predict", encoded(frames[index]), x_gearnn_level=LEVELS[index % 4])

    threads = [threading.Thread(target=one, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, frame in enumerate(frames):
        assert np.array_equal(answers[index].array, luma_logits(frame, LEVELS[index % 4]).argmax(0))
