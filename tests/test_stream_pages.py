"""The page of one live stream: over real HTTP on loopback, without Ray."""

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

uvicorn = pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")

from gearnn_ray.core.errors import UserError  # noqa: E402
from gearnn_ray.service.stream_pages import stream_page_at  # noqa: E402
from gearnn_ray.video.live import LiveStream  # noqa: E402


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as door:
        return int(door.getsockname()[1])


@pytest.fixture
def live() -> LiveStream:
    return LiveStream("gate")


@pytest.fixture
def page(live: LiveStream) -> Iterator[str]:
    with stream_page_at(free_port(), live) as address:
        yield address


def get(url: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def add(live: LiveStream, level: str = "jpeg-10", pts: float = 0.1) -> None:
    picture = np.zeros((32, 48, 3), np.uint8)
    live.add({"stream": "gate", "pts": pts, "level": level}, 0.5, level, lambda: picture)


def test_the_state_is_that_of_the_stream(live: LiveStream, page: str) -> None:
    assert json.loads(get(f"{page}/state")[1])["online"] is False
    add(live, "jpeg-10", 0.1)
    add(live, "clean", 0.2)
    live.count(dropped=3, lost=1, problem=None)
    state = json.loads(get(f"{page}/state")[1])
    assert (state["online"], state["frames"], state["dropped"], state["lost"]) == (True, 2, 3, 1)
    assert state["levels"] == [[0.1, "jpeg-10"], [0.2, "clean"]]
    assert state["level_frames"] == {"jpeg-10": 1, "clean": 1}
    live.count(dropped=3, lost=1, problem="no power")
    state = json.loads(get(f"{page}/state")[1])
    assert (state["online"], state["problem"]) == (False, "no power")


def test_a_picture_is_drawn_only_where_somebody_looks(live: LiveStream, page: str) -> None:
    add(live)
    assert get(f"{page}/picture")[0] == 204
    add(live)
    status, picture = get(f"{page}/picture")
    assert status == 200
    assert picture.startswith(b"\xff\xd8")


def test_lines_follow_the_stream(live: LiveStream, page: str) -> None:
    add(live, pts=1.0)
    with urllib.request.urlopen(f"{page}/lines", timeout=10) as answer:
        assert json.loads(answer.readline())["pts"] == 1.0
        add(live, pts=2.0)
        assert json.loads(answer.readline())["pts"] == 2.0


def test_the_page_loads_nothing_from_elsewhere(page: str) -> None:
    status, html = get(page)
    assert status == 200
    assert b"http://" not in html
    assert b"https://" not in html


def test_metrics_have_the_streams_numbers(live: LiveStream, page: str) -> None:
    add(live)
    text = get(page.replace("/streams/gate", "/metrics"))[1].decode()
    assert 'gearnn_stream_frames_total{stream="gate"} 1.0' in text
    assert 'gearnn_stream_level_frames_total{level="jpeg-10",stream="gate"} 1.0' in text
    assert 'gearnn_stream_online{stream="gate"} 1.0' in text


@pytest.mark.parametrize(
    "path", ["/streams/other", "/streams/other/picture", "/streams/gate/secrets", "/streams/", "/etc/passwd"]
)
def test_there_is_no_other_stream(page: str, path: str) -> None:
    status, said = get(page.replace("/streams/gate", path))
    assert status == 404
    assert "use /streams/gate" in json.loads(said)["detail"]


def test_a_page_of_another_name_sees_nothing_of_the_stream(page: str) -> None:
    for path in ("/streams/gate", "/streams/gate/picture", "/metrics"):
        request = urllib.request.Request(page.replace("/streams/gate", path), headers={"host": "evil.example"})
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=10)
        assert refused.value.code == 421


def test_a_port_that_is_taken_is_refused_in_one_sentence(live: LiveStream) -> None:
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} cannot be used"), stream_page_at(port, live):
            pass


def test_the_page_is_one_file() -> None:
    from importlib import resources

    assert Path(str(resources.files("gearnn_ray.service").joinpath("stream.html"))).is_file()
