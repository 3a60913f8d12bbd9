"""Tags of releases: moved, moved back, raced for and removed, with the tables and figures that belong to them.

`TagBattery` runs against any kind of store; `test_store_s3.py` runs it against an S3 server.
"""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gearnn_ray.core.errors import CorruptStoreError, UserError
from gearnn_ray.store.manifest import content_key
from gearnn_ray.store.releases import Store
from gearnn_ray.store.tags import LostRaceError
from tests.stores import (
    ABSENT,
    KEY,
    TABLE,
    Folder,
    OnAStore,
    Place,
    content_of,
    files_of,
    forge,
    listed_table,
    manifest_of,
    table,
)


class TagBattery(OnAStore):
    def test_a_tag_moves_back_and_forth(self, store: Store) -> None:
        a = store.publish(manifest_of(store, 1.0), {})
        b = store.publish(manifest_of(store, 2.0), {})
        store.tag("street", "latest", a)
        store.tag("street", "next", b)
        assert store.pull("street").digest == a
        assert store.pull("street:next").digest == b
        for digest, reason in ((ABSENT, ABSENT), ("../x", "not a digest")):
            with pytest.raises(UserError, match=reason):
                store.tag("street", "latest", digest)
        with pytest.raises(UserError, match="of 'street', not of 'road'"):
            store.tag("road", "latest", a)
        assert store.tags("street") == {"latest": a, "next": b}

    def test_a_rollback_brings_back_the_tables_and_figures_of_the_release(self, store: Store, place: Place) -> None:
        figure, own = "figures/street/accuracy.png", "tables/street/selection/jpeg-20.parquet"
        a = store.publish(manifest_of(store, 1.0), {TABLE: table(0.1)}, figures={figure: b"picture of a"})
        b = store.publish(manifest_of(store, 2.0), {TABLE: table(0.2), own: table(0.3)}, figures={figure: b"picture of b"})
        assert store.get_table(TABLE).equals(table(0.2))
        assert store.manifest("street")[1].tables[TABLE] == listed_table(store, 0.2)

        store.tag("street", "latest", a)
        assert store.get_table(TABLE).equals(table(0.1))
        assert place.read(figure) == b"picture of a"
        with pytest.raises(UserError, match=own):
            store.get_table(own)  # only b has it
        store.tag("street", "latest", b)
        assert store.get_table(TABLE).equals(table(0.2))
        assert store.get_table(own).equals(table(0.3))
        assert place.read(figure) == b"picture of b"

    def test_tables_are_those_of_latest_whatever_else_is_published(self, store: Store) -> None:
        store.publish(manifest_of(store, 1.0), {TABLE: table(0.1)}, ("partial",), latest=False)
        assert store.get_table(TABLE).equals(table(0.1))  # while there is no latest
        store.publish(manifest_of(store, 2.0), {TABLE: table(0.2)})
        partial = store.publish(manifest_of(store, 3.0), {TABLE: table(0.3)}, ("partial",), latest=False)
        store.tag("street", "v1", partial)
        assert store.get_table(TABLE).equals(table(0.2))

    def test_a_release_without_a_list_of_tables_is_as_good_as_before(self, store: Store, place: Place) -> None:
        old = forge(place, {**content_of(store), "created": "2026-01-01T00:00:00Z"})
        place.write(TABLE, b"written beside it")
        assert store.pull("street").digest == old
        assert store.verify() == []
        store.publish(manifest_of(store, 2.0), {TABLE: table()})
        store.tag("street", "latest", old)
        assert store.pull("street").digest == old

    def test_a_release_lists_no_files_of_others(self, store: Store) -> None:
        for path in ("tables/road/summary.parquet", "tables/streets/summary.parquet"):
            with pytest.raises(CorruptStoreError, match=f"{path}.*expected a path tables/street/….parquet"):
                store.publish(manifest_of(store), {path: table()})
        assert store.names() == []

    def test_a_tag_moves_only_from_where_it_is_expected(self, store: Store) -> None:
        a = store.publish(manifest_of(store, 1.0), {TABLE: table(0.1)})
        b = store.publish(manifest_of(store, 2.0), {TABLE: table(0.2)})
        for expected in (a, None):
            with pytest.raises(LostRaceError, match=f"street:latest in .* is {b}, expected {expected or 'no tag'}") as caught:
                store.tag("street", "latest", a, expected=expected)
            assert "\n" not in str(caught.value)
        assert store.tag_digest("street", "latest") == b
        assert store.get_table(TABLE).equals(table(0.2))
        store.tag("street", "latest", a, expected=b)
        store.tag("street", "v1", a, expected=None)
        with pytest.raises(LostRaceError, match="is no tag, expected"):
            store.tag("street", "v2", a, expected=a)
        assert store.tags("street") == {"latest": a, "v1": a}

    def test_of_many_who_move_a_tag_one_wins(self, store: Store, place: Place) -> None:
        base = store.publish(manifest_of(store, 0.0), {})
        digests = [store.publish(manifest_of(store, float(i)), {}, (f"v{i}",), latest=False) for i in range(1, 5)]
        start = threading.Barrier(4)

        def move(digest: str) -> bool:
            mine = Store(place.uri)
            start.wait()
            try:
                mine.tag("street", "latest", digest, expected=base)
            except LostRaceError:
                return False
            return True

        with ThreadPoolExecutor(4) as pool:
            won = list(pool.map(move, digests))
        assert sum(won) == 1
        assert store.tag_digest("street", "latest") == digests[won.index(True)]

    def test_equal_content_has_one_digest_whoever_is_first(self, store: Store, place: Place) -> None:
        manifest = manifest_of(store)
        start = threading.Barrier(6)

        def publish(i: int) -> str:
            mine = Store(place.uri)
            start.wait()
            return mine.publish(manifest, {}, (f"v{i}",), stages=[f"{i}" * 64])

        with ThreadPoolExecutor(6) as pool:
            digests = set(pool.map(publish, range(6)))
        assert len(digests) == 1
        assert set(store.tags("street").values()) == digests
        record = store.get_record(content_key(manifest.as_json()))
        assert record is not None
        assert record["stages"] == [f"{i}" * 64 for i in range(6)]

    def test_what_is_computed_again_is_the_release_that_it_was_with_its_first_tables(self, store: Store, place: Place) -> None:
        digest = store.publish(manifest_of(store), {TABLE: table(0.1)}, figures={"figures/street/a.png": b"first"})
        for tables in ({TABLE: table(0.2)}, {}):  # other seconds, or none
            assert store.publish(manifest_of(store), tables) == digest
        assert store.get_table(TABLE).equals(table(0.1))
        more = "tables/street/scores.parquet"
        assert store.publish(manifest_of(store), {more: table(0.3)}) != digest
        with pytest.raises(UserError, match=TABLE):
            store.get_table(TABLE)

    def test_first_tables_that_are_damaged_are_replaced(self, store: Store, place: Place) -> None:
        digest = store.publish(manifest_of(store), {TABLE: table(0.1)})
        place.write(f"blobs/sha256/{listed_table(store, 0.1).digest[7:]}", b"damaged")
        assert store.verify()
        again = store.publish(manifest_of(store), {TABLE: table(0.2)})
        assert again != digest
        assert store.get_table(TABLE).equals(table(0.2))
        assert store.verify() == []

    def test_a_tag_can_be_removed(self, store: Store) -> None:
        digest = store.publish(manifest_of(store), {}, ["v1"])
        store.untag("street", "v1")
        assert store.tags("street") == {"latest": digest}
        for name, tag, reason in (
            ("street", "v1", "Its tags: latest"),
            ("road", "v1", "none"),
            ("street", "../x", "cannot be used"),
        ):
            with pytest.raises(UserError, match=reason):
                store.untag(name, tag)

    def test_what_no_tag_leads_to_can_be_deleted(self, store: Store, place: Place) -> None:
        a = store.publish(manifest_of(store, 1.0), {TABLE: table(0.1)})
        b = store.publish(manifest_of(store, 2.0), {TABLE: table(0.2)})
        store.put_checkpoint(KEY, b"epoch 1")
        assert store.gc(3600, dry_run=False) == []
        time.sleep(1.1)  # S3's times are whole seconds
        before = files_of(place)
        lines = store.gc(0)
        assert files_of(place) == before
        assert len(lines) == 5  # manifest, its record, adaptor, table, checkpoint
        assert any(line.startswith(f"manifests/{a[7:]}.json: ") for line in lines)
        assert store.gc(0, dry_run=False) == lines
        gone = {line.partition(":")[0] for line in lines}
        assert files_of(place) == before - gone
        assert store.pull("street").digest == b
        assert store.verify() == []
        with pytest.raises(CorruptStoreError, match=a):
            store.tag("street", "latest", a)


class TestLocalTags(TagBattery):
    @pytest.fixture
    def place(self, tmp_path: Path) -> Folder:
        return Folder(tmp_path / "a" / "store")
