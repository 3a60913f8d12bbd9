"""What every request needs: its headers and its body, read within their limits, and its refusal in one sentence."""

import asyncio
import hashlib
import logging
import re
from collections.abc import Sequence

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from gearnn_ray.core.errors import CorruptStoreError, UserError
from gearnn_ray.service.admission import Admission, Reservation
from gearnn_ray.service.backend import UnknownBundleError

__all__ = [
    "RefusedError", "bundle_of", "busy", "error", "key_of", "least_score_of", "media_type_of", "name_of", "refusal", "whole_body",
]  # fmt: skip

_BUNDLE = ("serve_multiplexed_model_id", "serve-multiplexed-model-id")  # Ray Serve reads both spellings
_ID = re.compile(r"[A-Za-z0-9._:@+-]{1,128}")
_LOG = logging.getLogger(__name__)


class RefusedError(UserError):
    """A request that is refused with this HTTP status."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


def refusal(problem: Exception, request: str) -> tuple[int, str]:
    """HTTP status and sentence for anything that went wrong with a request; the log names it where the server is to blame."""
    if isinstance(problem, UnknownBundleError):
        return 404, str(problem)
    if isinstance(problem, CorruptStoreError):  # not a fault of the request
        return 503, str(problem)
    if isinstance(problem, UserError):  # without a status: a level that is not served
        return getattr(problem, "status", 422), f"{str(problem).removesuffix('.')}."
    if isinstance(problem, ClientDisconnect):
        return 400, "The connection ended before the whole body was received."  # only the log shows this
    _LOG.error("%s failed", request, exc_info=problem)
    return 500, "The server failed on this request: try again, and see the server's log for the reason."


def error(status: int, sentence: str) -> Response:
    """An error in one sentence (RFC 9457): application/problem+json {"status", "detail"}."""
    return JSONResponse({"status": status, "detail": sentence}, status, media_type="application/problem+json")


def busy(sentence: str, status: int = 503) -> Response:
    """An error that passes: the client may try again in two seconds."""
    answer = error(status, sentence)
    answer.headers["retry-after"] = "2"
    return answer


def bundle_of(request: Request) -> str | None:
    """The bundle that the request names. Raises RefusedError."""
    return _header(request, *_BUNDLE)


def stream_of(request: Request) -> str | None:
    """The key of the stream that the header of the request names. Raises RefusedError."""
    name = _header(request, "x-gearnn-stream")
    return None if name is None else key_of(request, name)


def key_of(request: Request, stream: str) -> str:
    """What a stream's state is remembered under: its name, and behind a slash its client's credential, where it sends one.

    The level of a stream follows from its last frames, so that whoever can send frames under its name switches its level: three
    dark ones are enough. A client that sends `authorization` has streams of its own, which nobody reaches without that secret.
    The service does not judge the credential (a proxy before it does) and keeps only its digest. Clients that send none, or
    share one, share the streams of the same name.
    """
    credential = request.headers.get("authorization")
    return stream if credential is None else f"{stream}/{hashlib.sha256(credential.encode()).hexdigest()[:32]}"


def name_of(text: str, what: str) -> str:
    """A name that a client has given to `what`. Raises RefusedError."""
    if not _ID.fullmatch(text):
        raise RefusedError(400, f"{what} has other than 1 to 128 characters of A-Z, a-z, 0-9 and . _ : @ + -: rename it.")
    return text


def least_score_of(request: Request) -> float | None:
    """The least score of a detection that the request asks for, None without. Raises RefusedError."""
    if (value := request.headers.get("x-gearnn-score")) is None:
        return None
    if not re.fullmatch(r"0(\.\d{0,9})?|\.\d{1,9}|1(\.0{0,9})?", value):
        raise RefusedError(400, f"x-gearnn-score is {value[:100]}, expected a number from 0 to 1 such as 0.3: correct it.")
    return float(value)


def media_type_of(request: Request, offers: Sequence[str]) -> str:
    """The offered media type that the request prefers; the first of those that it likes equally. Raises RefusedError."""
    accept = ", ".join(request.headers.getlist("accept"))
    ranges: dict[str, float] = {}
    for item in filter(None, map(str.strip, accept.split(","))):
        kind, *parameters = (part.strip().lower() for part in item.split(";"))
        weight = next((part[2:] for part in parameters if part.startswith("q=")), "1")
        ranges[kind] = float(weight) if re.fullmatch(r"[01](\.\d{0,3})?", weight) else 0.0
    if not ranges:
        return offers[0]

    def preference(offer: str) -> float:
        family = offer.partition("/")[0]
        return next((ranges[kind] for kind in (offer, f"{family}/*", "*/*") if kind in ranges), 0.0)

    best = max(offers, key=preference)
    if preference(best) == 0:
        raise RefusedError(406, f"The accept header is {accept[:100]}: expected {' or '.join(offers)}.")
    return best


def is_endless(request: Request) -> bool:
    """Whether the body comes in chunks, without a length. Raises RefusedError for a request without a body."""
    if "content-length" in request.headers:
        return False
    if "transfer-encoding" not in request.headers:
        raise RefusedError(411, "The request has no content-length: send bytes as its body.")
    return True


async def whole_body(request: Request, admission: Admission, held: Reservation) -> bytes:
    """The body, whose bytes `held` counts as they arrive. Raises RefusedError for one that is too large, before or while it is
    received, or too slow, and BusyError.
    """
    most = admission.frame.body_bytes
    too_large = RefusedError(413, f"The body is larger than the {most:,} bytes allowed here: send less at once.")
    if not is_endless(request) and int(request.headers["content-length"]) > most:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(admission.body_seconds):
            async for chunk in request.stream():
                held.add(len(chunk))
                if len(body) + len(chunk) > most:
                    raise too_large
                body += chunk
    except TimeoutError:
        late = f"The body did not arrive within {admission.body_seconds:g} seconds: send it faster, or less of it."
        raise RefusedError(408, late) from None
    return bytes(body)


def _header(request: Request, *headers: str) -> str | None:
    """The value of the first of these headers that the request has; None if it has none of them."""
    return next((name_of(request.headers[header], header) for header in headers if header in request.headers), None)
