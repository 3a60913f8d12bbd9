"""A camera against the service's HTTP layer, without Ray: what it sends, and how it goes on whatever it is answered."""

import http.server
import itertools
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gearnn_ray.cli.main import run_camera
from gearnn_ray.config.camera import CameraConfig
from gearnn_ray.core.errors import UserError
from gearnn_ray.knobs.camera import Chosen, Filmed, Segment, film, head_of, report_of, usable
from gearnn_ray.knobs.controllers import Controllers
from gearnn_ray.knobs.encoding import encode
from gearnn_ray.knobs.knob import knobs_of, settings_of
from gearnn_ray.knobs.tiles import tiles_of
from gearnn_ray.knobs.uplink import Buffer, TokenBucket
from gearnn_ray.knobs.wire import CONTENT_TYPE, Advice, Costs, Head, Report
from gearnn_ray.service.bundles import saliency_at, weights_at
from gearnn_ray.serving.adaptive_model import AdaptiveModel
from gearnn_ray.serving.level_estimation import LevelEstimate
from gearnn_ray.store.releases import Store
from gearnn_ray.video.decoding import VideoFrame
from tests.nets import TRUST
from tests.served import publish
from tests.streams import Camera, access_units, encoded, moving
from tests.test_http import Luma, admission, ask, problem, serve
from tests.test_segment_requests import Client, fitting, lines_of

PATH = "/streams/gate/segments"
KNOBS = ("crf=18,28,38", "size=1,0.5")


@dataclass
class Steered(Luma):
    """A backend with controllers, for which each tile matters as much as any other."""

    controllers: Controllers = field(default_factory=Controllers)
    heads: list[Head] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)
    last: list[VideoFrame] = field(default_factory=list)
    weight: float = 1e-3

    async def advise(
        self, stream: str, bundle: str | None, frame: VideoFrame, estimate: LevelEstimate, head: Head, report: Report
    ) -> Advice:
        self.heads.append(head)
        self.reports.append(report)
        self.last.append(frame)
        weights = np.full(tiles_of(head.frame), self.weight, np.float32)
        return self.controllers.step(stream, Costs.of(head, report, weights))


@contextmanager
def service(**limits: Any) -> Iterator[tuple[int, Steered]]:
    backend = Steered()
    with serve(backend, admission(**limits)) as port:
        yield port, backend


def parts(
    specs: tuple[str, ...] = KNOBS, height: int = 64, width: int = 80, price: float = 1.0, **values: Any
) -> tuple[Head, bytes, Report]:
    """Of a segment of eight frames."""
    knobs, frames = knobs_of(specs), tuple(moving(8, height, width))
    chosen = {knob.name: values.get(knob.name, knob.values[0]) for knob in knobs}
    made = encode(frames, settings_of(knobs, chosen))
    probed = Chosen(chosen, {knob.name: knob.values[1] for knob in knobs})
    head = head_of(Segment(0, frames, 3.0, 0.8, 0.0), knobs, chosen, made, CameraConfig(price=price))
    return head, made.data, report_of(frames, knobs, probed, made)


def post(port: int, head: Head, data: bytes, report: Report | None, path: str = PATH) -> Any:
    body = head.line() + data + (b"" if report is None else report.line())
    return ask(port, "POST", path, body, content_type=CONTENT_TYPE)


# ---- the service


def test_a_segment_is_answered_by_its_frames_and_then_by_the_next_knobs() -> None:
    with service() as (port, backend):
        *frames, last = lines_of(post(port, *parts()))
        assert [line["pts"] for line in frames] == pytest.approx([3 + 0.1 * number for number in range(8)])
        assert {line["found"] for line in frames} == {"h264-crf18"}
        assert last["steps"] == 1
        assert last["knobs"].keys() == last["probes"].keys() == {"crf", "size"}
        assert [status for _, status in backend.counted] == [200] * 8


def test_the_level_is_what_the_camera_declares_and_of_what_it_does_not_the_decoded_frame_tells() -> None:
    head, data, report = parts(crf=38, size=0.5)
    with service() as (port, backend):
        lines = lines_of(post(port, head, data, report))
        assert {line["found"] for line in lines[:-1]} == {"h264-crf38"}
        for size, is_believed in (((32, 40), True), ((64, 80), False)):
            other = head.model_copy(update={"crf": 21, "size": size})
            found = {line["found"] for line in lines_of(post(port, other, data, report))[:-1]}
            assert ("h264-crf21" in found) == is_believed
        assert {frame.pixels.shape for frame in backend.last} == {(32, 40, 3)}


def test_odd_sides_are_answered_without_their_padding() -> None:
    with service() as (port, backend):
        lines = lines_of(post(port, *parts(("crf=18,28",), 63, 79)))
        assert {(line["width"], line["height"]) for line in lines[:-1]} == {(79, 63)}
        assert backend.last[0].evidence.crf == 18


def test_stills_are_answered_as_video_is() -> None:
    with service() as (port, _):
        *frames, last = lines_of(post(port, *parts(("jpeg=90,50", "rate=1,2"), rate=2)))
        assert [line["pts"] for line in frames] == pytest.approx([3, 3.2, 3.4, 3.6])
        assert last["knobs"].keys() == {"jpeg", "rate"}


def test_lines_come_before_the_report_does() -> None:
    head, data, report = parts()
    with service() as (port, _), Client(port, PATH, f"transfer-encoding: chunked\r\ncontent-type: {CONTENT_TYPE}") as client:
        client.send(head.line() + data)
        assert [client.line()["frame"] for _ in range(8)] == list(range(8))
        client.send(report.line())
        client.send(b"")
        assert client.rest()[0]["steps"] == 1


def test_what_is_wrong_with_a_camera_s_segment_is_one_sentence() -> None:
    head, data, report = parts()
    wrong: list[tuple[int, bytes]] = [
        (400, b""), (400, b"{}\n"), (400, b"x" * 40_000), (400, head.line()), (400, head.line() + data[:-50]),
        (415, head.line() + bytes(len(data)) + report.line()),
        (413, head.model_copy(update={"bytes": 300_000}).line() + data),
        (413, head.model_copy(update={"frame": (4000, 4000)}).line() + data),
        (413, head.model_copy(update={"frames": 200, "sent": tuple(range(200))}).line() + data),
    ]  # fmt: skip
    with service(body_seconds=2.0) as (port, _):
        for status, body in wrong:
            assert problem(ask(port, "POST", PATH, body, content_type=CONTENT_TYPE))[0] == status, body[:100]
        late: list[tuple[Head, Report | None]] = [
            (head, None), (head.model_copy(update={"sent": (0, 1)}), report),
            (head, report.model_copy(update={"errors": report.errors.model_copy(update={"data": "AAAA"})})),
        ]  # fmt: skip
        for told, rest in late:
            *_, last = lines_of(post(port, told, data, rest))
            assert last.keys() == {"error"}
        assert len(lines_of(post(port, head, data, report))) == 9, "and the server still works"


def test_a_report_beyond_its_size_is_not_kept() -> None:
    head, data, _ = parts()
    with service() as (port, _), Client(port, PATH, f"transfer-encoding: chunked\r\ncontent-type: {CONTENT_TYPE}") as client:
        client.send(head.line() + data)
        client.send(b" " * (head.report_bytes + 1))
        *frames, last = client.rest()
        assert len(frames) == 8
        assert "has no end within" in last["error"]


def test_errors_count_alike_or_as_the_gradient_says_at_the_level_of_the_answer(tmp_path: Path) -> None:
    publish(Store(tmp_path), "tiny", level_names=("h264-crf18", "h264-crf40"))
    model = AdaptiveModel.pull(str(tmp_path), "tiny", untrained="interpolate", trust=TRUST)
    frame = VideoFrame(moving(1, 64, 80)[0], None, True, 0, None, 0.0, 0.0)  # type: ignore[arg-type]
    each = [saliency_at(model, frame, model.level_estimator.match(level), (128, 160)) for level in ("h264-crf18", "h264-crf29")]
    assert {one.shape for one in each} == {(8, 10)}
    assert all(np.isfinite(one).all() and one.max() > 0 for one in each)
    assert not np.allclose(*each)
    head, *_ = parts()
    alike = weights_at(model, frame, LevelEstimate("h264-crf18"), head)
    assert alike.shape == tiles_of(head.frame)
    assert (alike == 1).all()
    weighed = weights_at(model, frame, LevelEstimate("h264-crf18"), head.model_copy(update={"gradient": True}))
    assert weighed.shape == alike.shape
    assert weighed.std() > 0
    gone = LevelEstimate("h264-crf20")
    assert saliency_at(model, frame, gone, (64, 80)).shape == (4, 5)


# ---- the camera


@pytest.fixture
def clip(tmp_path: Path) -> str:
    """Four segments of a quarter of a second."""
    path = tmp_path / "street.mp4"
    path.write_bytes(encoded(moving(40, 64, 80), rate=40))
    return str(path)


def config(port: int, source: str, **changed: Any) -> CameraConfig:
    return CameraConfig(source=source, server=f"http://127.0.0.1:{port}", knobs=KNOBS, **{"price": 1.0, **changed})


def filmed(told: CameraConfig, pause: float = 0.1) -> tuple[list[dict[str, Any]], Filmed]:
    seen = Filmed()
    return list(film(told, seen, lambda: itertools.repeat(pause))), seen


def test_the_knobs_of_an_answer_are_those_of_the_next_segment(clip: str, tmp_path: Path) -> None:
    ndjson = tmp_path / "lines.ndjson"
    with service() as (port, backend):
        lines, seen = filmed(config(port, clip, ndjson=str(ndjson), price=1e4))
        assert (seen.segments, seen.answered, seen.refused, seen.dropped) == (4, 4, 0, 0)
        assert [line["segment"] for line in lines] == [0, 1, 2, 3]
        for line, following in itertools.pairwise(lines):
            assert following["knobs"] == line["next"]
        assert len({json.dumps(line["knobs"]) for line in lines}) > 1, "the price moves them"
        assert [head.values for head in backend.heads] == [line["knobs"] for line in lines]
        assert all(report.errors is not None for report in backend.reports)
        assert [head.start for head in backend.heads] == pytest.approx([0, 0.25, 0.5, 0.75])
    assert sum(line["bytes"] for line in lines) == seen.bytes
    assert len([fitting(line) for line in ndjson.read_bytes().splitlines()]) == sum(line["sent"] for line in lines)


def test_a_segment_does_not_wait_for_a_decision(clip: str) -> None:
    with service() as (port, backend):
        backend.delays = [0.0] * 9 + [0.6]  # the answer to the first segment's last frame
        lines, seen = filmed(config(port, clip))
        assert (seen.answered, seen.dropped) == (4, 0)
        assert lines[1]["seconds"] > lines[3]["seconds"]


def test_while_the_service_is_away_the_camera_goes_on_and_sends_what_still_waits(clip: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    lines, seen = filmed(config(port, clip))
    assert (seen.segments, seen.answered, seen.dropped) == (4, 0, 4)
    away = [line for line in lines if line["state"] == "away"]
    assert len(away) > 2
    assert "does not answer (Connection refused)" in away[0]["problem"]
    assert [line["segment"] for line in lines if line["state"] == "dropped"] == [0, 1, 2, 3]


def test_when_the_service_is_back_it_gets_what_waited(clip: str) -> None:
    busy = admission(streams=0)
    with serve(Steered(), busy) as port:
        threading.Timer(0.6, lambda: setattr(busy.streams, "most", 8)).start()
        lines, seen = filmed(config(port, clip))
        assert (seen.answered, seen.dropped) == (4, 0)
        assert "503" in next(line["problem"] for line in lines if line["state"] == "away")


class Rubbish(http.server.BaseHTTPRequestHandler):
    answers: Iterator[tuple[int, bytes]] = iter(())

    def do_POST(self) -> None:
        while size := int(self.rfile.readline(), 16):
            self.rfile.read(size + 2)
        self.rfile.readline()
        status, body = next(self.answers)
        self.send_response(status)
        self.send_header("content-type", "application/problem+json" if status == 400 else "text/html")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@contextmanager
def rubbish(answers: list[tuple[int, bytes]]) -> Iterator[int]:
    """The port of a server that gives these answers, whatever it is asked."""
    Rubbish.answers = iter(answers)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Rubbish) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_what_a_proxy_answers_without_its_service_counts_as_away(clip: str) -> None:
    good = (200, json.dumps({"knobs": {"crf": 28, "size": 0.5}}).encode())
    with rubbish([(404, b"Path '/streams' not found."), (302, b""), *[good] * 4]) as port:
        lines, seen = filmed(config(port, clip))
    assert [line["state"] for line in lines] == ["away"] * 2 + ["answered"] * 4
    assert (seen.refused, seen.dropped) == (0, 0)


def test_whatever_the_service_answers_the_last_good_knobs_stay(clip: str) -> None:
    good = {"knobs": {"crf": 28, "size": 0.5}, "probes": {"crf": 38, "size": 1}}
    bad: list[tuple[int, bytes]] = [
        (200, json.dumps(good).encode()), (200, b"<html>"), (200, b""), (200, b'{"error": "the video is cut short."}\n'),
        (400, b'{"detail": "The head is wrong."}'), (400, b"\xff\xfe"), (200, b"\xff\xfe\n" * 5),
        *((200, json.dumps({**good, **change}).encode()) for change in (
            {"knobs": {"crf": 29, "size": 1}}, {"knobs": {"crf": 28}}, {"knobs": {"crf": 28, "size": 0.5, "iso": 100}},
            {"knobs": {"crf": float("nan"), "size": 1}}, {"probes": {"crf": "best"}}, {"knobs": [1, 2]}, {"price": float("inf")},
        )),
    ]  # fmt: skip
    with rubbish(bad) as port:
        lines, seen = filmed(config(port, clip, segment_frames=40 // len(bad)))
    assert lines[0]["knobs"] == {"crf": 18, "size": 1}
    assert all(line["knobs"] == good["knobs"] for line in lines[1 : len(bad)])
    assert all(line["problem"] for line in lines[1 : len(bad)])
    assert seen.refused == 3
    assert {line["state"] for line in lines[: len(bad)]} == {"answered", "refused"}


def test_a_camera_over_rtsp_is_filmed_until_the_job_ends() -> None:
    with (
        service() as (port, _),
        Camera(access_units(moving(40, 64, 80)), 0.02) as source,
        closing(film(config(port, source.url), Filmed())) as lines,
    ):
        line = next(lines)
        assert (line["segment"], line["state"], line["frames"]) == (0, "answered", 10)


def test_a_link_that_is_too_slow_drops_the_oldest_segments() -> None:
    buffer: Buffer[int] = Buffer(2)
    assert [buffer.put(number) for number in range(4)] == [None, None, 0, 1]
    assert buffer.take() == 2
    assert buffer.give_back(2)
    assert not buffer.give_back(1)
    buffer.close()
    assert [buffer.take() for _ in range(3)] == [2, 3, None]


def test_a_bucket_lets_a_burst_through_and_then_its_rate() -> None:
    bucket = TokenBucket(rate=100, burst=50)
    assert bucket.take(50, now=7.0) == 0
    assert bucket.take(100, now=7.0) == pytest.approx(1)
    assert bucket.take(20, now=7.5) == pytest.approx(0.7)
    assert bucket.take(50, now=100.0) == 0, "a rest is worth one burst"
    assert bucket.take(1, now=100.0) == pytest.approx(0.01)


def test_the_link_limits_what_is_sent(clip: str) -> None:
    with service() as (port, backend):
        start = time.monotonic()
        _, seen = filmed(config(port, clip, link="200k", price=0.0))
        assert 8 * (seen.bytes - 4096) / (time.monotonic() - start) < 200_000
        assert backend.heads[0].ceiling is None
        filmed(config(port, clip, link="1M", price=None))
        assert backend.heads[-1].ceiling == 900_000


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--server", "camera"), "server is camera: expected an address such as http://127.0.0.1:8000"),
        (("--link", "fast"), "fast is no rate: expected 1k bits a second or more, such as 500k or 1.5M"),
        (("--price", "1", "--ceiling", "300k"), "price and ceiling are both given"),
        (("--knobs", "iso=100,200"), "there is no knob 'iso'"),
        (("--knobs", "crf=18"), "the knob crf has 1 value"),
        (("--knobs", "regions=0,4"), "a camera has no knob regions"),
        (("missing.mp4",), "missing.mp4"),
        (("--segment-frames", "41", "CLIP"), "has fewer than the 41 frames of a segment"),
        (("CLIP", "--ndjson", "CLIP"), "is the source itself"),
    ],
    ids=str,
)
def test_what_cannot_be_filmed_is_one_sentence(
    arguments: tuple[str, ...], sentence: str, clip: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_camera([clip if each == "CLIP" else each for each in arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert sentence in said
    assert said.count("\n") == 1


def test_the_job_prints_a_line_for_each_segment(clip: str, capsys: pytest.CaptureFixture[str]) -> None:
    with service() as (port, _):
        assert run_camera([clip, "--server", f"http://127.0.0.1:{port}", "--json"]) == 0
        *lines, last = map(json.loads, capsys.readouterr().out.splitlines())
        assert [line["segment"] for line in lines] == [0, 1, 2, 3]
        assert (last["answered"], last["problem"]) == (4, None)
        assert run_camera([clip, "--server", f"http://127.0.0.1:{port}"]) == 0
        said = capsys.readouterr().out
        assert "segment 0  crf=18 size=1 rate=1  10 of 10 frames" in said
        assert "4 segments: 4 answered at" in said
    assert run_camera([clip, "--server", f"http://127.0.0.1:{port}"]) == 1
    assert "the service is away" in capsys.readouterr().out


def test_knobs_that_the_camera_does_not_have_are_not_used() -> None:
    knobs = knobs_of(KNOBS)
    usable(Advice(knobs={"crf": 28, "size": 1}), knobs)
    for advice in ({"crf": 28}, {"crf": 28, "size": 0.75}, {"crf": 28, "size": 1, "rate": 2}):
        with pytest.raises(UserError):
            usable(Advice(knobs=advice), knobs)
