"""A store on S3 that fails: what gets better by waiting is repeated, what does not is said at once, no call takes for ever."""

import itertools
import time
from collections.abc import Iterator

import pytest

from gearnn_ray.core.errors import StoreUnavailableError, UserError
from gearnn_ray.store import patience
from gearnn_ray.store.files import FileTree
from gearnn_ray.store.patience import Patience, is_transient, patient
from gearnn_ray.store.releases import Store, digest_of
from tests.faulty_s3 import Fault, FaultyS3, faulty_s3, s3_server

pytest.importorskip("moto", reason="needs moto's S3 server")

BUSY = OSError("AWS Error UNKNOWN (HTTP status 503) during HeadObject operation: No response body.")
KEY = "a" * 64


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server("models") as address:
        yield address


@pytest.fixture
def proxy(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    monkeypatch.setattr(patience, "SILENT_SECONDS", 1.0)
    monkeypatch.setattr(patience, "_pauses", lambda: itertools.repeat(0.05))
    with faulty_s3(server) as proxy:
        yield proxy


def uri(proxy: FaultyS3, seconds: float, prefix: str = "store") -> str:
    return f"s3://models/{prefix}?endpoint_override={proxy.address}&scheme=http&patience={seconds:g}"


@pytest.mark.parametrize("fault", ["503", "reset", "hang", "truncate", "lose reply"])
def test_what_is_written_through_faults_is_whole_and_read_through_them(proxy: FaultyS3, fault: Fault) -> None:
    tree, data = FileTree(uri(proxy, 20, fault.replace(" ", "-"))), bytes(range(256)) * 40
    times = 1 if fault == "hang" else 3
    proxy.fail(fault, times)
    tree.write("refs/a", data)
    proxy.fail(fault, times)
    assert tree.read("refs/a") == data
    proxy.fail(fault, times)
    assert tree.files("refs") == ["a"]
    proxy.fail(fault, times)
    tree.delete("refs/a")
    assert tree.read("refs/a") is None


def test_an_upload_whose_part_never_arrives_shows_nothing_and_one_that_arrives_late_is_whole(proxy: FaultyS3) -> None:
    data = b"x" * 11_000_000  # two parts
    tree = FileTree(uri(proxy, 0, "parts"))
    proxy.fault = lambda _, path: "503" if "partNumber=2" in path else "none"
    with pytest.raises(StoreUnavailableError):
        tree.write("blob", data)
    assert tree.size("blob") is None
    failing = [3]

    def some_seconds(_: str, path: str) -> Fault:
        failing[0] -= (late := "partNumber=2" in path)
        return "503" if late and failing[0] >= 0 else "none"

    proxy.fault = some_seconds
    store = Store(uri(proxy, 20, "parts"))
    assert store.get_blob(store.put_blob(data)) == data
    assert failing[0] < 0


@pytest.mark.parametrize("fault", ["503", "reset", "hang", "truncate"])
def test_a_store_that_stays_away_ends_in_a_sentence_about_what_was_tried(proxy: FaultyS3, fault: Fault) -> None:
    Store(uri(proxy, 1)).put_record(KEY, {"a": 1})
    store = Store(uri(proxy, 1))
    proxy.fail(fault, 999, *(["GET"] if fault == "truncate" else []))
    started = time.monotonic()
    with pytest.raises(StoreUnavailableError, match=rf"does not answer: \d+ attempts? in \d+ s to read stages/{KEY}") as caught:
        store.get_record(KEY)
    assert 1 <= time.monotonic() - started < 10
    assert "\n" not in str(caught.value)


def test_what_a_server_refuses_is_not_tried_again(proxy: FaultyS3) -> None:
    address = uri(proxy, 60).replace("models", "nowhere")
    started = time.monotonic()
    with pytest.raises(UserError, match="cannot be written"):
        Store(address).check_writable()
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("text", "transient"),
    [
        ("AWS Error NETWORK_CONNECTION during PutObject operation: curlCode: 7, Could not connect", True),
        ("AWS Error SLOW_DOWN during PutObject operation: -", True),
        ("AWS Error UNKNOWN (HTTP status 500) during HeadObject operation", True),
        ("AWS Error UNKNOWN (HTTP status 429) during HeadObject operation", True),
        ("AWS Error ACCESS_DENIED during PutObject operation: Access Denied", False),
        ("AWS Error NO_SUCH_BUCKET during PutObject operation", False),
        ("AWS Error UNKNOWN (HTTP status 400) during HeadObject operation", False),
        ("[Errno 28] No space left on device", False),
    ],
)
def test_what_gets_better_by_waiting(text: str, transient: bool) -> None:
    assert is_transient(OSError(text)) == transient


def test_pauses_grow_and_end_with_the_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    now, pauses = [0.0], list[float]()

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        now[0] += seconds

    def fail() -> None:
        raise BUSY

    monkeypatch.setattr(patience.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(patience.time, "sleep", sleep)
    with pytest.raises(StoreUnavailableError, match=r"300 s to read a"):
        Patience("s3://models", 300)("read a", fail)
    assert sum(pauses) == pytest.approx(300)
    assert pauses[0] <= 0.5
    assert 7 < max(pauses) <= 15
    assert 20 < len(pauses) < 60


def test_a_job_is_patient_unless_its_address_says_otherwise() -> None:
    assert patient("s3://models/a") == "s3://models/a?patience=300"
    assert patient("s3://models/a?scheme=http") == "s3://models/a?scheme=http&patience=300"
    assert patient("s3://models/a?patience=5&scheme=http") == "s3://models/a?patience=5&scheme=http"
    assert patient("/data/artifacts") == "/data/artifacts"
    assert patient("file:///data") == "file:///data"


def test_an_invalid_patience_is_one_sentence() -> None:
    with pytest.raises(UserError, match="patience=long is not a number of seconds"):
        Store("s3://models/a?patience=long")


def test_two_addresses_with_another_patience_are_one_store(proxy: FaultyS3) -> None:
    digest = Store(uri(proxy, 1)).put_blob(b"weights")
    assert Store(uri(proxy, 9)).get_blob(digest) == b"weights"
    assert digest_of(b"weights") == digest


@pytest.mark.parametrize("fault", ["503", "reset", "hang", "truncate", "lose reply"])
def test_a_tag_that_moves_through_faults_moves_as_one_step(
    proxy: FaultyS3, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that does not answer for a while is no store without conditional writes."""
    tree = FileTree(uri(proxy, 20, f"one-step-{fault.replace(' ', '-')}"))
    tree.update("refs/a", lambda _: b"first", 256)
    monkeypatch.setattr(FileTree, "write", lambda *_: pytest.fail("the tag was written whoever else had moved it"))
    for method, content in (("GET", b"second"), ("PUT", b"third")):
        proxy.fail(fault, 1 if fault == "hang" else 4, method)
        started = time.monotonic()
        assert tree.update("refs/a", lambda before, to=content: to, 256) == content
        assert time.monotonic() - started < 15
        assert tree.read("refs/a") == content
    proxy.fail(fault, 999, "GET" if fault == "truncate" else "PUT")
    if fault != "lose reply":  # the first of these is done
        impatient = FileTree(uri(proxy, 1, f"one-step-{fault.replace(' ', '-')}"))
        with pytest.raises(StoreUnavailableError, match=r"does not answer: \d+ attempts? in \d+ s to update refs/a") as caught:
            impatient.update("refs/a", lambda _: b"fourth", 256)
        assert "\n" not in str(caught.value)
