"""Objects on S3 that are replaced only where nobody else has changed them (If-None-Match, If-Match), which pyarrow does not
offer.
"""

import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit

from pyarrow import fs

from gearnn_ray.core.errors import UserError
from gearnn_ray.store import patience
from gearnn_ray.store.patience import Patience

_ATTEMPTS = 20
_REFUSED = re.compile(r"\b(4(?!08|29)\d\d|501) [A-Z]")  # by the server, whenever it is asked


class NotConditionalError(Exception):
    """The store has no conditional writes, or obstore has no access to it."""


class ConditionalBucket:
    """The objects of an s3:// URI through `obstore`, beside the pyarrow file system of the same URI. Credentials come from the
    environment, the container, the instance or a web identity, but not from a profile.
    """

    def __init__(self, uri: str, file_system: fs.FileSystem, repeats: Patience) -> None:
        from obstore.store import S3Store

        parts = urlsplit(uri)
        options = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        endpoint, scheme = options.get("endpoint_override"), options.get("scheme", "https")
        self._store = S3Store(
            parts.netloc,
            prefix=parts.path.strip("/") or None,
            region=getattr(file_system, "region", None),
            endpoint=endpoint if endpoint is None or "://" in endpoint else f"{scheme}://{endpoint}",
            client_options={
                "allow_http": scheme == "http",
                "connect_timeout": timedelta(seconds=patience.CONNECT_SECONDS),
                "read_timeout": timedelta(seconds=patience.SILENT_SECONDS),
            },
            retry_config={"max_retries": 1},  # what does not get better soon is repeated here, as all other requests
        )
        self._repeats = repeats

    def update(self, path: str, change: Callable[[bytes | None], bytes | None], at_most: int) -> bytes | None:
        """Replace an object's content (None: it is absent) by what `change` makes of it, unless somebody changes it in between:
        then `change` is asked again. Returns the content that is there afterwards. Raises NotConditionalError where that is
        impossible, UserError if others change it all the time. An object of more than `at_most` bytes counts as empty.
        """
        return self._repeats(f"update {path}", lambda: self._update(path, change, at_most))

    def _update(self, path: str, change: Callable[[bytes | None], bytes | None], at_most: int) -> bytes | None:
        """`update` once. Raises ConnectionError where the server does not answer."""
        import obstore
        from obstore.exceptions import AlreadyExistsError, BaseError, NotSupportedError, PreconditionError

        for _ in range(_ATTEMPTS):
            before: bytes | None = None
            etag: str | None = None
            try:
                found = obstore.get(self._store, path)
                etag = found.meta["e_tag"]
                before = self._content(found, path) if found.meta["size"] <= at_most else b""
            except FileNotFoundError:
                pass
            except BaseError as error:
                if problem := _no_answer(error, path):
                    raise problem from error
                raise NotConditionalError from error  # no credentials, most often
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
            except BaseError as error:
                raise _no_answer(error, path) or OSError(_sentence(error)) from error
        raise UserError(f"{path} changed {_ATTEMPTS} times while it was to be replaced. Try again.")

    @staticmethod
    def _content(found: Any, path: str) -> bytes:
        """The bytes of an object whose head has arrived. Raises ConnectionError where they break off."""
        from obstore.exceptions import BaseError

        try:
            return bytes(found.bytes())
        except BaseError as error:
            raise ConnectionError(f"{path} was cut off: {_sentence(error)}") from error


def _no_answer(error: Exception, path: str) -> ConnectionError | None:
    """What a request for this object failed with, unless the server refused it. Others are for credentials."""
    sentence = _sentence(error)
    return ConnectionError(sentence) if path in sentence and not _REFUSED.search(sentence) else None


def _sentence(error: Exception) -> str:
    return str(error).split("\n", 1)[0]
