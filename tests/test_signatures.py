"""Signed releases: with a key required, nothing is read of a release that this key did not sign under this very name."""

from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from gearnn_ray.cli.early_checks import check_bundles
from gearnn_ray.cli.main import run_serve
from gearnn_ray.config.serve import ServeConfig
from gearnn_ray.core.errors import CorruptStoreError, UserError
from gearnn_ray.serving.adaptive_model import AdaptiveModel
from gearnn_ray.store.files import FileTree
from gearnn_ray.store.releases import Store
from gearnn_ray.store.signatures import SIGNATURE_BYTES, public_key
from tests import served


def write_keys(folder: Path, name: str = "release", protection: KeySerializationEncryption | None = None) -> tuple[Path, Path]:
    """A private and a public key in PEM files."""
    key, private, public = Ed25519PrivateKey.generate(), folder / f"{name}.key", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, protection or NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return write_keys(tmp_path)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store")
    served.publish(store, "tiny", tags=("stable",))
    served.publish(store, "other", seed=1)
    return store


@pytest.fixture
def files_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are read from here on."""
    found: list[str] = []
    read = FileTree.read_memory
    monkeypatch.setattr(FileTree, "read_memory", lambda tree, path, *more: found.append(path) or read(tree, path, *more))
    return found


def signature_file(store: Store, ref: str, public: Path) -> Path:
    digest = store.manifest(ref)[0].removeprefix("sha256:")
    return Path(store.uri) / "signatures" / digest / public_key(str(public))


def test_a_signed_release_is_pulled_by_tag_by_digest_and_by_the_keys_own_digits(store: Store, keys: tuple[Path, Path]) -> None:
    private, public = keys
    digits = store.sign("tiny", private)
    assert digits == public_key(str(public)) == public_key(digits)
    digest = store.manifest("tiny")[0]
    for ref in ("tiny", "tiny:stable", f"tiny@{digest}"):
        for key in (str(public), digits):
            assert store.pull(ref, require_signature=key).digest == digest
    assert AdaptiveModel.pull(store.uri, "tiny", trust=["tests.nets"], require_signature=digits).digest == digest


def test_signing_again_and_by_a_second_key_keeps_every_signature(store: Store, keys: tuple[Path, Path], tmp_path: Path) -> None:
    private, public = keys
    second, second_public = write_keys(tmp_path, "second")
    store.sign("tiny", private)
    before = signature_file(store, "tiny", public).stat().st_mtime_ns
    store.sign("tiny", second)
    store.sign("tiny", private)
    assert signature_file(store, "tiny", public).stat().st_mtime_ns == before
    for key in (public, second_public):
        store.pull("tiny", require_signature=str(key))


def test_signatures_are_not_looked_at_unless_a_key_is_required(
    store: Store, keys: tuple[Path, Path], files_read: list[str]
) -> None:
    store.sign("tiny", keys[0])
    signature_file(store, "tiny", keys[1]).write_bytes(b"rubbish")
    files_read.clear()
    store.pull("tiny")
    assert not [path for path in files_read if path.startswith("signatures")]


def unsigned(store: Store, private: Path, public: Path) -> None:
    pass


def forged(store: Store, private: Path, public: Path) -> None:
    store.sign("tiny", private)
    signature_file(store, "tiny", public).write_bytes(bytes(SIGNATURE_BYTES))


def one_bit_flipped(store: Store, private: Path, public: Path) -> None:
    store.sign("tiny", private)
    path = signature_file(store, "tiny", public)
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def truncated(store: Store, private: Path, public: Path) -> None:
    store.sign("tiny", private)
    path = signature_file(store, "tiny", public)
    path.write_bytes(path.read_bytes()[:-1])


def empty(store: Store, private: Path, public: Path) -> None:
    store.sign("tiny", private)
    signature_file(store, "tiny", public).write_bytes(b"")


def with_more_behind_it(store: Store, private: Path, public: Path) -> None:
    store.sign("tiny", private)
    path = signature_file(store, "tiny", public)
    path.write_bytes(path.read_bytes() + b"more")


def swapped_with_that_of_another_release(store: Store, private: Path, public: Path) -> None:
    store.sign("other", private)
    path = signature_file(store, "tiny", public)
    path.parent.mkdir(parents=True)
    path.write_bytes(signature_file(store, "other", public).read_bytes())


def by_another_key(store: Store, private: Path, public: Path) -> None:
    store.sign("tiny", write_keys(private.parent, "thief")[0])


def by_another_key_under_this_ones_name(store: Store, private: Path, public: Path) -> None:
    thief, thief_public = write_keys(private.parent, "thief")
    store.sign("tiny", thief)
    signature_file(store, "tiny", thief_public).rename(signature_file(store, "tiny", public))


def a_tag_moved_to_another_signed_release(store: Store, private: Path, public: Path) -> None:
    store.sign("tiny", private)
    store.sign("other", private)
    (Path(store.uri) / "refs/tiny/latest").write_text(store.manifest("other")[0])


def a_tag_moved_to_a_release_that_nobody_signed(store: Store, private: Path, public: Path) -> None:
    store.sign("tiny", private)
    served.publish(store, "tiny", seed=2)


@pytest.mark.parametrize(
    "attack",
    [
        unsigned, forged, one_bit_flipped, truncated, empty, with_more_behind_it, swapped_with_that_of_another_release,
        by_another_key, by_another_key_under_this_ones_name, a_tag_moved_to_another_signed_release,
        a_tag_moved_to_a_release_that_nobody_signed,
    ],
)  # fmt: skip
def test_a_release_without_a_valid_signature_is_refused_before_its_manifest_is_read(
    attack: Callable[[Store, Path, Path], None], store: Store, keys: tuple[Path, Path], files_read: list[str]
) -> None:
    attack(store, *keys)
    key = str(keys[1])
    doors: list[Callable[[], object]] = [
        lambda: store.pull("tiny", require_signature=key),
        lambda: store.manifest("tiny", require_signature=key),
        lambda: AdaptiveModel.pull(store.uri, "tiny", trust=["tests.nets"], require_signature=key),
        lambda: check_bundles(ServeConfig(store=store.uri, bundles=("tiny",), trust=("tests.nets",), require_signature=key)),
    ]
    for door in doors:
        files_read.clear()
        with pytest.raises(UserError, match=r"signature") as refusal:
            door()
        assert "\n" not in str(refusal.value)
        assert {path.partition("/")[0] for path in files_read} <= {"refs", "signatures"}


def test_a_signature_of_an_endless_size_is_not_read(store: Store, keys: tuple[Path, Path], files_read: list[str]) -> None:
    store.sign("tiny", keys[0])
    with signature_file(store, "tiny", keys[1]).open("wb") as file:
        file.truncate(2**40)
    files_read.clear()
    with pytest.raises(CorruptStoreError, match="signature"):
        store.pull("tiny", require_signature=str(keys[1]))
    assert files_read == ["refs/tiny/latest"]


def test_an_altered_manifest_behind_a_valid_signature_is_refused_by_its_digest(store: Store, keys: tuple[Path, Path]) -> None:
    store.sign("tiny", keys[0])
    digest = store.manifest("tiny")[0]
    path = Path(store.uri) / f"manifests/{digest.removeprefix('sha256:')}.json"
    path.write_bytes(path.read_bytes().replace(b'"tests.nets:small"', b'"tests.nets:large"'))
    with pytest.raises(CorruptStoreError, match="altered"):
        store.pull("tiny", require_signature=str(keys[1]))


def test_the_service_refuses_before_a_ray_starts_and_says_so_in_one_sentence(
    store: Store, keys: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--store", store.uri, "--bundles", "tiny", "--trust", "tests.nets", "--require-signature", str(keys[1])]
    assert run_serve(options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: tiny@sha256:")
    assert "has no signature by the key" in error
    assert error.count("\n") == 1


def test_a_replica_keeps_its_release_when_the_tag_moves_to_one_that_is_not_signed(store: Store, keys: tuple[Path, Path]) -> None:
    bundles = pytest.importorskip("gearnn_ray.service.bundles", reason="the extra `serve` is not installed")
    store.sign("tiny", keys[0])
    config = ServeConfig(
        store=store.uri,
        bundles=("tiny:latest",),
        trust=("tests.nets",),
        device="cpu",
        require_signature=str(keys[1]),
        cache=f"{store.uri}-copies",
    )
    bundle = bundles.Bundle("tiny:latest", config)
    bundle.refresh()
    signed = bundle.model().digest
    served.publish(store, "tiny", seed=2)
    bundle.refresh()
    assert bundle.model().digest == signed
    assert "has no signature by the key" in bundle.health().problem


def test_a_file_that_holds_no_such_key_is_refused_in_one_sentence(store: Store, keys: tuple[Path, Path], tmp_path: Path) -> None:
    private, public = keys
    ec = generate_private_key(SECP256R1())
    (tmp_path / "ec.key").write_bytes(ec.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (tmp_path / "ec.pub").write_bytes(ec.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    (tmp_path / "rubbish").write_bytes(b"\0\xff")
    locked, _ = write_keys(tmp_path, "locked", BestAvailableEncryption(b"secret"))
    refused: list[tuple[Callable[[], object], str]] = [
        (lambda: store.sign("tiny", tmp_path / "nowhere"), "cannot be read"),
        (lambda: store.sign("tiny", tmp_path / "rubbish"), "no private key"),
        (lambda: store.sign("tiny", public), "no private key"),
        (lambda: store.sign("tiny", tmp_path / "ec.key"), "not ed25519"),
        (lambda: store.sign("tiny", locked), "encrypted"),
        (lambda: public_key(str(tmp_path / "nowhere")), "cannot be read"),
        (lambda: public_key(str(tmp_path / "rubbish")), "no public key"),
        (lambda: public_key(str(private)), "no public key"),
        (lambda: public_key(str(tmp_path / "ec.pub")), "not ed25519"),
    ]
    for call, reason in refused:
        with pytest.raises(UserError, match=reason) as refusal:
            call()
        assert "\n" not in str(refusal.value)
    assert not (Path(store.uri) / "signatures").exists()
