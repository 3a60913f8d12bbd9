"""Looking after a store: `verify` finds what is wrong, `gc` deletes what no tag leads to and nothing else."""

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gearnn_ray.cli.main import run_gc, run_verify
from gearnn_ray.core.errors import CorruptStoreError
from gearnn_ray.store.blobs import canonical_json
from gearnn_ray.store.manifest import content_key, manifest_path
from gearnn_ray.store.releases import Store
from tests.stores import ABSENT, KEY, OTHER_KEY, TABLE, adaptor_state, manifest_of, table

FIGURE = "figures/street/accuracy.png"
HOUR, DAY = 3600.0, 86400.0


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(root: Path) -> Store:
    return Store(root)


def published(store: Store, shift: float = 1.0, **more: object) -> str:
    return store.publish(manifest_of(store, shift), {TABLE: table(shift)}, figures={FIGURE: b"png"}, **more)  # type: ignore[arg-type]


def age(root: Path, seconds: float = DAY, pattern: str = "**/*") -> None:
    """As if nobody had written or used these files for so long."""
    for path in root.glob(pattern):
        if path.is_file():
            os.utime(path, (time.time() - seconds,) * 2)


def paths(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


# ── gc ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_a_tag_leads_to_stays_however_old_it_is(store: Store, root: Path) -> None:
    store.put_record(KEY, {"stage": "full", "result": {}, "blobs": []})
    evidence = store.put_blob(b"evidence")
    store.put_record(OTHER_KEY, {"stage": "partial", "result": {}, "blobs": [evidence]})
    a = published(store, 1.0, tags=["v1"], stages=[KEY, OTHER_KEY])
    published(store, 2.0)
    before = paths(root)
    age(root)
    assert store.gc(HOUR, dry_run=False) == []
    assert paths(root) == before
    store.tag("street", "latest", a)
    assert store.pull("street").digest == a
    assert store.verify() == []


def test_a_record_whose_result_is_a_blob_of_a_release_stays(store: Store, root: Path) -> None:
    base = manifest_of(store).base
    store.put_record(KEY, {"stage": "base", "result": {"digest": base.digest}, "blobs": [base.digest]})
    published(store)
    age(root)
    assert store.gc(HOUR, dry_run=False) == []
    assert store.get_record(KEY) is not None


def test_what_no_tag_leads_to_goes_after_the_grace_period(store: Store, root: Path) -> None:
    a = published(store, 1.0)
    old = store.manifest("street")[1]
    b = published(store, 2.0)
    lonely = store.put_blob(b"lonely")
    store.put_record(KEY, {"stage": "full", "result": {"digest": lonely}, "blobs": [lonely]})
    store.put_checkpoint(KEY, b"epoch 1")
    for name in ("refs/street", "blobs/sha256", "stages", "."):
        (root / name / ".tmp-1-ab").write_bytes(b"half of a file")
    store.put_table("tables/road/summary.parquet", table())
    store.put_figure("figures/road/accuracy.png", b"png")
    store.put_report("reports/road/evaluation.html", "page")
    store.put_table("tables/street/evaluation/accuracy.parquet", table())  # of a name with tags: stays
    (root / "leases").mkdir()
    (root / "leases/job.json").write_bytes(b"{}")
    (root / "notes.txt").write_text("not the store's own: stays")
    before = paths(root)
    assert store.gc(HOUR, dry_run=False) == []  # all is young

    age(root)
    gone = {
        f"manifests/{a[7:]}.json",
        *(f"blobs/sha256/{str(each)[7:]}" for each in (lonely, old.levels["brightness-0.4+jpeg-30"].digest)),
        f"blobs/sha256/{old.tables[TABLE].digest[7:]}",
        f"stages/{KEY}.json",
        f"stages/{content_key(old.as_json())}.json",
        f"checkpoints/{KEY}.safetensors",
        *(f"{name}/.tmp-1-ab" for name in ("refs/street", "blobs/sha256", "stages")),
        ".tmp-1-ab",
        "leases/job.json",
        "tables/road/summary.parquet",
        "figures/road/accuracy.png",
        "reports/road/evaluation.html",
    }
    lines = store.gc(HOUR)
    assert {line.partition(":")[0] for line in lines} == gone
    sizes = {path: (root / path).stat().st_size for path in gone}
    assert set(lines) == {f"{path}: {size:,} bytes" for path, size in sizes.items()}
    assert paths(root) == before  # a dry run
    assert store.gc(HOUR, dry_run=False) == lines
    assert paths(root) == before - gone
    assert store.pull("street").digest == b
    assert store.verify() == []
    assert store.gc(HOUR) == []


@pytest.mark.parametrize("use", [lambda store, digest: store.put_blob(b"content"), lambda store, digest: store.is_intact(digest)])
def test_a_blob_that_is_used_again_is_young_again(store: Store, root: Path, use: Callable[[Store, str], object]) -> None:
    digest = store.put_blob(b"content")
    age(root)
    inode = (root / "blobs/sha256" / digest[7:]).stat().st_ino
    use(store, digest)
    assert store.gc(HOUR, dry_run=False) == []
    assert (root / "blobs/sha256" / digest[7:]).stat().st_ino == inode  # and was not written
    assert store.is_intact(digest)


def test_a_record_that_is_used_is_young_again_and_keeps_its_blobs(store: Store, root: Path) -> None:
    digest = store.put_blob(b"adaptor")
    store.put_record(KEY, {"stage": "partial", "result": {}, "blobs": [digest]})
    age(root)
    assert store.get_record(KEY) is not None
    assert store.gc(HOUR, dry_run=False) == []
    assert store.is_intact(digest)


def test_a_record_of_an_earlier_version_keeps_every_blob_it_names(store: Store, root: Path) -> None:
    digest = store.put_blob(b"adaptor")
    store.put_record(KEY, {"stage": "partial", "result": {"digest": digest, "full": ABSENT}})
    age(root, pattern="blobs/**/*")
    assert store.gc(HOUR, dry_run=False) == []
    assert store.verify() == []


def test_publishing_makes_all_that_it_relies_on_young(store: Store, root: Path) -> None:
    manifest = manifest_of(store)
    age(root)
    digest = store.publish(manifest, {TABLE: table()}, latest=False)  # no ref at all leads to it
    age(root, pattern="manifests/*")
    assert {line.split("/")[0] for line in store.gc(HOUR)} == {"manifests"}
    assert digest


def test_a_release_can_be_rolled_back_to_for_the_grace_period_after_its_last_tag_left(store: Store, root: Path) -> None:
    a = published(store, 1.0)
    age(root)
    b = published(store, 2.0)  # takes the tag from a, which is a day old
    assert store.gc(HOUR, dry_run=False) == []
    store.tag("street", "latest", a, expected=b)
    store.tag("street", "kept", b)
    age(root)
    store.untag("street", "kept")
    assert store.gc(HOUR, dry_run=False) == []
    store.tag("street", "kept", b)
    assert store.verify() == []


def test_a_rollback_is_safe_from_a_collector_that_has_looked_before(
    store: Store, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = published(store, 1.0)
    published(store, 2.0)
    age(root)
    delete = type(store._files).delete_if_older

    def late(files: object, path: str, limit: float) -> bool:
        Store(root).tag("street", "latest", a)
        return delete(files, path, limit)  # type: ignore[arg-type]

    monkeypatch.setattr(type(store._files), "delete_if_older", late)
    assert [line for line in store.gc(HOUR, dry_run=False) if not line.startswith("stages")] == []
    assert store.pull("street").digest == a
    assert store.verify() == []


def test_a_rollback_to_what_a_collector_takes_at_that_moment_is_refused(
    store: Store, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = published(store, 1.0)
    b = published(store, 2.0)
    age(root)
    refresh = type(store._files).refresh

    def collected_first(files: object, path: str, *data: bytes) -> bool:
        if path == manifest_path(a):  # read already, and not yet young
            (root / path).unlink()
        return refresh(files, path, *data)  # type: ignore[arg-type]

    monkeypatch.setattr(type(store._files), "refresh", collected_first)
    with pytest.raises(CorruptStoreError, match="is missing from"):
        store.tag("street", "latest", a)
    assert store.tag_digest("street", "latest") == b


def test_the_clock_of_this_process_does_not_matter(store: Store, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lonely = store.put_blob(b"lonely")
    for shift in (-DAY, DAY):
        monkeypatch.setattr(time, "time", lambda shift=shift, now=time.time: now() + shift)
        assert store.gc(HOUR, dry_run=False) == []
        monkeypatch.undo()
    age(root, 2 * HOUR)
    assert len(store.gc(HOUR, dry_run=False)) == 1
    assert not store.is_intact(lonely)


@pytest.mark.parametrize("damage", ["ref", "manifest", "missing"])
def test_nothing_is_deleted_while_a_tag_cannot_be_read(store: Store, root: Path, damage: str) -> None:
    digest = published(store)
    store.put_blob(b"lonely")
    manifest = root / "manifests" / f"{digest[7:]}.json"
    if damage == "ref":
        (root / "refs/street/latest").write_bytes(b"torn")
    elif damage == "manifest":
        manifest.write_bytes(b"{}")
    else:
        manifest.unlink()
    age(root)
    before = paths(root)
    with pytest.raises(CorruptStoreError, match="Nothing was deleted") as caught:
        store.gc(HOUR, dry_run=False)
    assert "\n" not in str(caught.value)
    assert paths(root) == before


def test_an_empty_store_has_nothing_to_delete_and_stays_empty(store: Store, root: Path) -> None:
    assert store.gc(0, dry_run=False) == []
    assert store.verify() == []
    assert not root.exists()


# ── verify ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("path", "damage", "sentence"),
    [
        ("base", b"", "street:latest: {digest} has 0 bytes, but the manifest says"),
        ("base", None, "street:latest: {digest} is missing from"),
        ("adaptor", "flip", "street:latest: {digest} is altered in"),
        ("table", "flip", "street:latest: {digest} is altered in"),
        ("refs/street/latest", b"torn", "street:latest: refs/street/latest in .* holds 'torn'"),
        ("refs/street/latest", ABSENT.encode(), f"street:latest: {ABSENT} is missing"),
        ("refs/street/latest", b"x" * 300, "street:latest: .*refs/street/latest has 300 bytes, expected at most 256"),
        ("manifest", b"{}", "street:latest: {digest} is altered in"),
        (TABLE, b"another", f"street:latest: {TABLE} is not the one that the release lists .*has 7 bytes"),
        (FIGURE, None, f"street:latest: {FIGURE} is not the one that the release lists .*missing"),
        (f"stages/{KEY}.json", b"torn", f"stages/{KEY}.json is altered or cut off"),
    ],
)
def test_everything_that_is_wrong_is_a_sentence(
    store: Store, root: Path, path: str, damage: bytes | str | None, sentence: str
) -> None:
    digest = published(store)
    store.put_record(KEY, {"stage": "full", "blobs": []})
    assert store.verify() == []
    manifest = store.manifest("street")[1]
    named = {
        "base": manifest.base.digest,
        "adaptor": str(manifest.levels["brightness-0.4+jpeg-30"].digest),
        "table": manifest.tables[TABLE].digest,
        "manifest": digest,
    }
    of = named.get(path, "")
    file = root / (path if not of else f"manifests/{of[7:]}.json" if path == "manifest" else f"blobs/sha256/{of[7:]}")
    whole = file.read_bytes()
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage if isinstance(damage, bytes) else whole[:-1] + bytes([whole[-1] ^ 1]))
    found = store.verify()
    assert len(found) == 1, found
    assert re.search(sentence.format(digest=of), found[0]), found
    assert "\n" not in found[0]
    file.write_bytes(whole)
    assert store.verify() == []


def test_a_record_that_names_a_missing_blob_is_found(store: Store, root: Path) -> None:
    digest = store.put_blob(b"adaptor")
    store.put_record(KEY, {"stage": "partial", "blobs": [digest]})
    store.put_record(OTHER_KEY, {"digest": digest})
    assert store.verify() == []
    (root / "blobs/sha256" / digest[7:]).unlink()
    found = store.verify()
    assert [line.partition(" names ")[0] for line in found] == [f"stages/{KEY}.json", f"stages/{OTHER_KEY}.json"]
    assert all(digest in line for line in found)


def test_an_adaptor_that_does_not_fit_is_found_though_its_digest_is_right(store: Store) -> None:
    content = manifest_of(store).as_json()
    content["levels"]["brightness-0.4+jpeg-30"]["floats"] = 5
    store.publish(manifest_of(store).model_validate(content), {})
    (found,) = store.verify()
    assert "it holds 4 numbers, but the manifest says 5" in found


def test_verifying_changes_nothing_and_makes_nothing_young(store: Store, root: Path) -> None:
    published(store)
    store.put_record(KEY, {"digest": store.put_state(adaptor_state(3.0)).digest})
    age(root)
    before = {path: (root / path).stat().st_mtime_ns for path in paths(root)}
    assert store.verify() == []
    assert {path: (root / path).stat().st_mtime_ns for path in paths(root)} == before


def test_a_hostile_manifest_writes_nowhere_but_in_its_own_folders(store: Store, root: Path) -> None:
    published(store)
    content = store.manifest("street")[1].as_json()
    blob = content["tables"][TABLE]
    outside = ("tables/street/../../x.parquet", "/tmp/x.parquet", "tables/road/x.parquet", "refs/street/latest")
    for path in (*outside, "tables/street/.parquet"):
        data = canonical_json({**content, "tables": {path: blob}})
        digest = store.put_blob(data)
        (root / "manifests" / f"{digest[7:]}.json").write_bytes(data)
        with pytest.raises(CorruptStoreError, match="expected a path tables/street/"):
            store.tag("street", "latest", digest)


# ── the jobs ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_jobs_list_delete_and_say_what_is_wrong(
    store: Store, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published(store)
    lonely = root / "blobs/sha256" / store.put_blob(b"lonely")[7:]
    cached = tmp_path / "cache" / ("a" * 64)
    cached.mkdir(parents=True)
    age(root)
    os.utime(cached, (time.time() - 40 * DAY,) * 2)
    options = ["--store", str(root), "--data.cache", str(tmp_path / "cache"), "--grace", "0.5"]
    assert run_gc(options) == 0
    text = capsys.readouterr().out
    assert f"blobs/sha256/{lonely.name}: 6 bytes\n{cached}: 0 bytes\n" in text
    assert "1 files of the store" in text
    assert "--delete deletes them" in text
    assert lonely.exists()
    assert run_gc([*options, "--delete", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["deleted"], len(result["files"]), len(result["images"])) == (True, 1, 1)
    assert not lonely.exists()
    assert not cached.exists()

    assert run_verify(["--store", str(root)]) == 0
    assert capsys.readouterr().out == f"Nothing is wrong in {root}.\n"
    (root / TABLE).write_bytes(b"another")
    assert run_verify(["--store", str(root)]) == 1
    assert capsys.readouterr().out.endswith(f"One thing is wrong in {root}.\n")
    (root / "refs/street/latest").write_bytes(b"torn")
    assert run_gc(options) == 2
    assert "Nothing was deleted" in capsys.readouterr().err
    for job in (run_gc, run_verify):
        assert job(["--store", "ftp://host/x"]) == 2
        assert job(["--grace", "-1"]) == 2
