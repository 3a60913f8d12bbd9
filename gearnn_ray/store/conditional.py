"""Objects on S3 that are replaced only where nobody else has changed them (If-None-Match, If-Match), which pyarrow does not
offer.
"""

from collections.abc import Callable
from urllib.parse import parse_qs, urlsplit

from pyarrow import fs

from gearnn_ray.core.errors import UserError

_ATTEMPTS = 20


class NotConditionalError(Exception):
    """The store has no conditional writes, or obstore has no access to it."""


class ConditionalBucket:
    """The objects of an s3:// URI through `obstore`, beside the pyarrow file system of the same URI. Credentials come from the
    environment, the container, the instance or a web identity, but not from a profile.
    """

    def __init__(self, uri: str, file_system: fs.FileSystem) -> None:
        from obstore.store import S3Store

        parts = urlsplit(uri)
        options = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        endpoint, scheme = options.get("endpoint_override"), options.get("scheme", "https")
        self._store = S3Store(
            parts.netloc,
            prefix=parts.path.strip("/") or None,
            region=getattr(file_system, "region", None),
            endpoint=endpoint if endpoint is None or "://" in endpoint else f"{scheme}://{endpoint}",
            client_options={"allow_http": scheme == "http"},
        )

    def update(self, path: str, change: Callable[[bytes | None], bytes | None], at_most: int) -> bytes | None:
        """Replace an object's content (None: it is absent) by what `change` makes of it, unless somebody changes it in between:
        then `change` is asked again. Returns the content that is there afterwards. Raises NotConditionalError where that is
        impossible, UserError if others change it all the time. An object of more than `at_most` bytes counts as empty.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError, BaseError, NotSupportedError, PreconditionError

        for _ in range(_ATTEMPTS):
            before: bytes | None = None
            etag: str | None = None
            try:
                found = obstore.get(self._store, path)
                etag = found.meta["e_tag"]
                before = bytes(found.bytes()) if found.meta["size"] <= at_most else b""
            except FileNotFoundError:
                pass
            except BaseError as error:  # no credentials, most often
                raise NotConditionalError from error
            after = change(before)
            if after is None or after == before:
                return before
            try:
                obstore.put(self._store, path, after, mode="create" if etag is None else {"e_tag": etag})
                return after
            except (AlreadyExistsError, PreconditionError):
                continue
            except (NotSupportedError, NotImplementedError) as error:
                raise NotConditionalError from error
        raise UserError(f"{path} changed {_ATTEMPTS} times while it was to be replaced. Try again.")
