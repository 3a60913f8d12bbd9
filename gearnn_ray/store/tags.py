"""Tags: which release a name leads to. Moving one brings the release's tables and figures to their paths."""

import re
from collections.abc import Sequence
from contextlib import suppress

from gearnn_ray.core.errors import CorruptStoreError, UserError
from gearnn_ray.store.blobs import Blob, BlobStore, blob_path, is_digest
from gearnn_ray.store.manifest import MANIFEST_BYTES, NAME_PATTERN, Manifest, manifest_path, read_manifest

REF_BYTES = 256
"""The largest ref: a digest has 71 bytes, and an editor may have added a line."""

ANYTHING = "anything"
"""Whatever a tag points to, nothing included."""


class LostRaceError(UserError):
    """A tag does not point to what its mover expected."""


class TaggedStore(BlobStore):
    """A store whose manifests have tags."""

    def tag(self, name: str, tag: str, digest: str, *, expected: str | None = ANYTHING) -> None:
        """Point a tag at a manifest in the store; moving `latest` back is a rollback, and brings back the release's tables and
        figures. `expected`: move it only if it points to this digest now, or None: only if there is no such tag. Raises
        LostRaceError if that is not so, UserError for an unsafe name or tag and for a manifest of another name, CorruptStoreError
        if the manifest or a blob of it is missing or altered.
        """
        check_name("name", name)
        check_name("tag", tag)
        release = self._manifest(name, digest)
        with self._files.plain_errors("written"):
            if not self._files.refresh(manifest_path(digest)):  # a collector took it since it was read
                raise CorruptStoreError(f"{digest} is missing from {self.uri}. Publish the release again.")
            for blob in release.needed:
                path = blob_path(blob.digest)
                if self._files.size(path) != blob.bytes or not self._files.refresh(path):
                    raise CorruptStoreError(f"{blob.digest} is missing from {self.uri}, or cut off. Publish the release again.")
            self._point(release, digest, [tag], expected)

    def untag(self, name: str, tag: str) -> None:
        """Remove a tag. The release stays until `gc` finds that no tag leads to it. Raises UserError if there is no such tag."""
        digest = self._ref(name, tag) if self.tag_digest(name, tag) else None
        with self._files.plain_errors("written"):
            if digest is not None:
                self._files.refresh(manifest_path(digest))
            if not self._files.delete(_ref_path(name, tag)):
                raise UserError(f"No tag {name}:{tag} in {self.uri}. Its tags: {', '.join(self.tags(name)) or 'none'}.")

    def tag_digest(self, name: str, tag: str) -> str | None:
        """The manifest digest that a tag points to, or None if the tag does not exist. Reads no other file. Raises UserError for
        an unsafe name or tag, CorruptStoreError if the file holds no digest.
        """
        check_name("name", name)
        check_name("tag", tag)
        with self._files.plain_errors("read"):
            text = self._ref(name, tag)
        if text is not None and not is_digest(text):
            raise CorruptStoreError(
                f"refs/{name}/{tag} in {self.uri} holds {text[:80]!r}, expected a digest. "
                "Publish the release again, or write the digest of its manifest there."
            )
        return text

    def tags(self, name: str) -> dict[str, str]:
        """A release's tags and their manifest digests; empty for an unknown name. Files without a digest are left out."""
        check_name("name", name)
        with self._files.plain_errors("read"):
            tags = [file for file in self._files.files(f"refs/{name}") if re.fullmatch(NAME_PATTERN, file)]
            texts = {tag: self._ref(name, tag) for tag in tags}
        return {tag: text for tag, text in texts.items() if text is not None and is_digest(text)}

    def names(self) -> list[str]:
        """The names that releases are published under."""
        with self._files.plain_errors("read"):
            return sorted({path.partition("/")[0] for path in self._files.files("refs") if "/" in path})

    def _ref(self, name: str, tag: str) -> str | None:
        return _ref_text(self._files.read(_ref_path(name, tag), REF_BYTES))

    def _point(self, release: Manifest, digest: str, tags: Sequence[str], expected: str | None = ANYTHING) -> None:
        """Write refs. The releases that they pointed to become young: `gc` leaves them for its grace period, for a rollback."""
        latest = self._points_to(release.name, "latest")
        for tag in dict.fromkeys(tags):
            if (left := self._points_to(release.name, tag)) not in (None, digest):
                self._files.refresh(manifest_path(left))

            def swap(data: bytes | None, tag: str = tag) -> bytes:
                found = _ref_text(data)
                if expected not in (ANYTHING, found) and found != digest:
                    raise LostRaceError(
                        f"{release.name}:{tag} in {self.uri} is {found or 'no tag'}, expected {expected or 'no tag'}: another "
                        "writer moved it. Look at the release that it points to now, and tag again."
                    )
                return digest.encode()

            self._files.update(_ref_path(release.name, tag), swap, REF_BYTES)
        # A collector on S3 looks at a file's time and deletes it in two steps. If we relied on it in between, it is gone now.
        for path, its in ((manifest_path(digest), digest), *((blob_path(blob.digest), blob.digest) for blob in release.needed)):
            if self._files.size(path) is None:
                raise CorruptStoreError(f"{its} was deleted from {self.uri} meanwhile. Publish the release again.")
        if "latest" in tags or latest is None:
            self._lay_out(release, digest, latest)

    def _points_to(self, name: str, tag: str) -> str | None:
        """The digest that a tag points to, or None if the tag is absent or damaged."""
        with suppress(CorruptStoreError):
            return self.tag_digest(name, tag)
        return None

    def _lay_out(self, release: Manifest, digest: str, before: str | None) -> None:
        """Write the tables and figures of `latest` (of this release, where there is no `latest`) to their paths, and remove those
        that only the release `before` has. Until `latest` stays the same meanwhile: of two writers the last one sees the last.
        """
        while True:
            latest = self._points_to(release.name, "latest") or digest
            after = release if latest == digest else self._manifest(release.name, latest)
            for path, blob in after.files.items():
                self._files.write(path, bytes(self._intact(blob)))
            stale = set[str]()
            with suppress(UserError):  # a release that is gone or damaged: what it listed stays
                stale = self._manifest(release.name, before).files.keys() - after.files.keys() if before else stale
            for path in stale:
                self._files.delete(path)
            if (self._points_to(release.name, "latest") or digest) == latest:
                return
            before = latest

    def _manifest(self, name: str, digest: str) -> Manifest:
        data = self._verified(manifest_path(digest), digest, at_most=MANIFEST_BYTES)
        manifest = read_manifest(bytes(data), digest)
        if manifest.name != name:
            raise UserError(f"The manifest {digest} is a release of {manifest.name!r}, not of {name!r}.")
        return manifest

    def _intact(self, blob: Blob) -> memoryview:
        """The bytes of a blob. Raises CorruptStoreError unless they have the manifest's length, compared first, and digest."""
        return self._verified(blob_path(blob.digest), blob.digest, blob.bytes)


def _ref_path(name: str, tag: str) -> str:
    return f"refs/{name}/{tag}"


def _ref_text(data: bytes | None) -> str | None:
    return None if data is None else data.decode(errors="replace").strip()


def check_name(what: str, text: str) -> None:
    """Raise UserError for a name or a tag that is no safe part of a path."""
    if not re.fullmatch(NAME_PATTERN, text):
        raise UserError(
            f"The {what} {text!r} cannot be used: expected up to 128 letters, digits, dots, dashes and underscores, "
            "starting with a letter or digit."
        )
