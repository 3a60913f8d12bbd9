"""A page in the operator's own browser does not get into the service: not under a name of its own, and not by a POST to it."""

import json
from collections.abc import Iterator

import pytest

from gearnn_ray.service.origins import Hosts
from tests.test_http import Luma, admission, ask, encoded, picture, problem, serve

FRAME = encoded(picture())


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with serve(Luma(), admission(hosts=Hosts(named=("cameras.example",)))) as port:
        yield port


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "", "localhost.evil.example", "user@localhost", "10.0.0.7", "["]
)
def test_another_name_than_the_services_is_refused_on_every_path(port: int, host: str) -> None:
    for method, path in (("GET", "/"), ("GET", "/health"), ("GET", "/nothing"), ("POST", "/predict")):
        status, sentence = problem(ask(port, method, path, FRAME if method == "POST" else None, host=host))
        assert status == 421
        assert "--allowed-hosts" in sentence


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.0.0.1:80",
        "localhost:9",
        "LOCALHOST",
        "localhost.",
        "[::1]:8000",
        "cameras.example",
        "cameras.example:443",
    ],
)
def test_the_services_own_names_are_accepted_with_any_port(port: int, host: str) -> None:
    assert ask(port, "GET", "/health", host=host).status == 200
    assert ask(port, "POST", "/predict", FRAME, host=host).status == 200


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "null",
        "",
        "http://localhost:3000",
        "http://127.0.0.1",
        "file://",
        "http://cameras.example.evil.example",
    ],
)
def test_a_post_from_a_page_of_another_origin_is_refused_before_it_is_read(port: int, origin: str) -> None:
    for path in ("/predict", "/streams/gate/segments"):
        # a request of the kind that browsers send without asking first
        answer = ask(port, "POST", path, FRAME, origin=origin, content_type="text/plain")
        assert problem(answer)[0] == 403


def test_a_post_from_the_services_own_page_is_answered(port: int) -> None:
    for host, origin in (
        (f"127.0.0.1:{port}", f"http://127.0.0.1:{port}"),
        (f"localhost:{port}", f"http://localhost:{port}"),
        ("cameras.example", "https://cameras.example"),
        (f"127.0.0.1:{port}", "https://cameras.example"),  # a proxy that names its own upstream
    ):
        assert ask(port, "POST", "/predict", FRAME, host=host, origin=origin).status == 200


def test_a_service_for_other_machines_is_reached_by_any_address_and_by_no_other_name() -> None:
    with serve(Luma(), admission(hosts=Hosts("0.0.0.0"))) as port:
        for host, status in (("10.1.2.3:8000", 200), ("[fe80::1]", 200), ("localhost", 200), ("evil.example", 421)):
            assert ask(port, "GET", "/health", host=host).status == status


# ---- streams belong to their client


def test_a_clients_stream_has_another_key_with_its_credential() -> None:
    backend = Luma()
    with serve(backend) as port:
        for secret in ({}, {"authorization": "Bearer one"}, {"authorization": "Bearer two"}, {"authorization": "Bearer one"}):
            ask(port, "POST", "/predict", FRAME, x_gearnn_stream="gate", **secret)
        keys = backend.keys
    assert keys[0] == "gate"
    assert all(key.startswith("gate/") for key in keys[1:])
    assert keys[1] == keys[3] != keys[2]
    assert "one" not in json.dumps(keys)
