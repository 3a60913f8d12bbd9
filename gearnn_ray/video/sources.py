"""Opens what a video is read from: a file, an HTTP, RTSP or playlist address, or a camera device.

FFmpeg would open whatever a playlist names. Here every address goes through a `_Door`: a playlist may name files below its own
folder, or its own host and the hosts that the operator allows, over HTTP alone. Whatever else it names is not opened.
"""

import io
import os
import time
import urllib.error
import urllib.request
from collections.abc import Collection
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote, urlsplit

import av
from av.codec.hwaccel import HWAccel
from av.container import InputContainer

from gearnn_ray.core.errors import UserError
from gearnn_ray.data.video_files import FILE_FORMATS
from gearnn_ray.serving.frames import Limits

__all__ = ["FORMATS", "Source", "SourceError", "is_live", "open_source", "sentence_of"]

FORMATS = f"{FILE_FORMATS},mpjpeg,hls,dash,rtsp"
"""FFmpeg's readers that are used. Others, such as concat, exist to open further files."""
_NETWORK = ("http", "https")
_LIVE = ("rtsp", "rtsps")
_OPEN_SECONDS, _READ_SECONDS = 10.0, 10.0  # without data after this time a source counts as gone
_GROWS_SECONDS = 2.0  # a file changed no longer ago than this may still be written
_DEVICE = "/dev/"
DEFAULT_LIMITS = Limits()


class SourceError(UserError):
    """A video cannot be opened, or cannot be read any further. `status` is the matching HTTP status."""

    status = int(HTTPStatus.UNPROCESSABLE_ENTITY)


@dataclass(frozen=True)
class Source:
    """An open video. refused: addresses that a playlist named and that were not opened."""

    container: InputContainer
    address: str
    refused: list[str]

    def close(self) -> None:
        self.container.close()


def is_live(address: str) -> bool:
    """Whether frames come at their own pace and do not wait for the reader: a camera's address or device."""
    return address.startswith(_DEVICE) or urlsplit(address).scheme in _LIVE


def open_source(
    address: str, hosts: Collection[str] = (), hardware: str | None = None, limits: Limits = DEFAULT_LIMITS
) -> Source:
    """Open the video at an address: a path, http(s)://…, rtsp(s)://… or /dev/video0; HTTP and paths may be playlists (HLS, DASH).

    A file that is still written is followed until it has not changed for two seconds. hosts: whose files a playlist may name,
    beside its own. hardware: FFmpeg's name of a hardware decoder's type, such as "cuda" or "vaapi"; where it cannot decode the
    stream, the CPU does. limits: `pixels` of a frame, because FFmpeg decodes some to see what is there. Raises SourceError if the
    address is no video that can be opened.
    """
    scheme = urlsplit(address).scheme
    # read by this process alone, so that a name of one letter is a path (of Windows) and not a scheme
    if len(scheme) > 1 and scheme not in (*_NETWORK, *_LIVE, "file"):
        raise SourceError(f"{address} begins with {scheme}: expected a path, http, https, rtsp, rtsps or /dev/video0")
    door = _Door(address, hosts)
    pixels = {"max_pixels": str(limits.pixels)}
    options = {**pixels, "format_whitelist": FORMATS, "http_persistent": "0"}
    given: dict[str, Any] = {"io_open": door.open}
    if scheme in _LIVE:  # FFmpeg opens the connection itself
        given = {}
        options = {**pixels, "rtsp_transport": "tcp", "protocol_whitelist": "rtsp,rtsps,rtp,udp,tcp,tls"}
    elif address.startswith(_DEVICE):
        given, options = {"format": "v4l2"}, pixels
    elif scheme not in _NETWORK:
        address = unquote(urlsplit(address).path) if scheme == "file" else address
        _check_file(address)
    if hardware is not None:
        given["hwaccel"] = _accelerator(hardware)
    try:
        container = av.open(address, options=options, timeout=(_OPEN_SECONDS, _READ_SECONDS), **given)
    except (av.FFmpegError, OSError, HTTPException, ValueError) as error:
        raise SourceError(_not_opened(address, error, door)) from error
    return Source(cast(InputContainer, container), address, door.refused)


def sentence_of(error: BaseException) -> str:
    """The reason in an error of FFmpeg or the system, without its number and file name."""
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answers {error.code}"
    if isinstance(error, urllib.error.URLError):
        return sentence_of(error.reason) if isinstance(error.reason, BaseException) else str(error.reason)
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(reason[0].lower() + reason[1:])


def _check_file(path: str) -> None:
    if not os.path.exists(path):
        raise SourceError(f"the file {path} does not exist: check the path")
    if os.path.isdir(path):
        raise SourceError(f"{path} is a folder: give a video file")


def _accelerator(hardware: str) -> HWAccel:
    from av.codec.hwaccel import hwdevices_available

    if hardware not in (available := hwdevices_available()):
        raise SourceError(f"this FFmpeg has no hardware decoder {hardware!r}: expected one of {', '.join(sorted(available))}")
    try:
        return HWAccel(hardware, allow_software_fallback=True)
    except (av.FFmpegError, RuntimeError, ValueError) as error:
        raise SourceError(f"the hardware decoder {hardware} cannot be used ({sentence_of(error)}): leave it out") from error


def _not_opened(address: str, error: BaseException, door: "_Door") -> str:
    if door.problem is not None:  # FFmpeg's own error only says that an address was not opened
        error = door.problem
    if door.refused:
        return f"{address} names {door.refused[0]}, which may not be opened here: allow its host, if it is to be trusted"
    if isinstance(error, av.InvalidDataError) and urlsplit(address).path.endswith(".mpd") and not _reads_dash():
        lacking = "which this FFmpeg cannot read (PyAV's own is built without libxml2)"
        return f"{address} is a DASH manifest, {lacking}: give an HLS playlist"
    if isinstance(error, av.InvalidDataError):
        return f"{address} is no video that can be read, or is damaged: give H.264, H.265, VP9, AV1 or MJPEG in a usual container"
    return f"{address} cannot be opened ({sentence_of(error)}): check that it exists and can be reached"


def _reads_dash() -> bool:
    try:
        return bool(av.ContainerFormat("dash", "r").is_input)
    except ValueError:
        return False


class _Door:
    """Opens every address that FFmpeg asks for while it reads one source; FFmpeg itself opens nothing."""

    def __init__(self, source: str, hosts: Collection[str]) -> None:
        parts = urlsplit(source)
        self._network = parts.scheme in _NETWORK
        self._hosts = {host.lower() for host in hosts} | ({parts.hostname or ""} if self._network else set())
        self._file = None if self._network else Path(source.removeprefix("file://")).resolve()
        self._opener = urllib.request.build_opener(_Redirects(self))
        self.refused: list[str] = []
        self.problem: BaseException | None = None

    def open(self, url: str, flags: int, options: dict[str, str]) -> io.RawIOBase:
        """As `av.open` wants it. Errors are kept, because FFmpeg reports its own."""
        try:
            if not self.admits(url):
                self.refused.append(url)
                raise PermissionError(f"{url} may not be opened")
            if urlsplit(url).scheme in _NETWORK:
                return _HttpFile(url, self._opener)
            return _GrowingFile(_path_of(url))
        except (OSError, HTTPException) as error:
            self.problem = error
            raise

    def admits(self, url: str) -> bool:
        """Whether this source may read from an address."""
        parts = urlsplit(url)
        if parts.scheme in _NETWORK:
            return (parts.hostname or "").lower() in self._hosts
        if self._file is None or (len(parts.scheme) > 1 and parts.scheme != "file"):
            return False
        path = _path_of(url).resolve()
        return path == self._file or path.is_relative_to(self._file.parent)


def _path_of(url: str) -> Path:
    if not url.startswith("file:"):
        return Path(url)
    return Path(unquote(url.removeprefix("file:").removeprefix("//")))


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to admitted hosts only."""

    def __init__(self, door: _Door) -> None:
        self._door = door

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if not self._door.admits(newurl):
            self._door.refused.append(newurl)
            raise PermissionError(f"{newurl} may not be opened")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _HttpFile(io.RawIOBase):
    """A file or an endless stream over HTTP. It can seek where the server sends parts of files (range requests)."""

    def __init__(self, url: str, opener: urllib.request.OpenerDirector) -> None:
        self._url, self._opener, self._position = url, opener, 0
        self._response = self._request(0)
        length = self._response.headers.get("content-length")
        self._length = int(length) if length and self._response.headers.get("accept-ranges") == "bytes" else None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._length is not None

    def read(self, size: int = -1) -> bytes:
        data = self._response.read1(size)
        self._position += len(data)
        return data

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if self._length is None:
            raise io.UnsupportedOperation("the server sends no parts of this file")
        place = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence] + offset
        if place != self._position:
            self._response.close()
            self._response = self._request(min(place, self._length))
            self._position = place
        return place

    def close(self) -> None:
        self._response.close()
        super().close()

    def _request(self, start: int) -> HTTPResponse:
        headers = {"range": f"bytes={start}-"} if start else {}
        try:
            response = self._opener.open(urllib.request.Request(self._url, headers=headers), timeout=_READ_SECONDS)
        except urllib.error.HTTPError as error:
            if start and error.code == 416:  # beyond the end
                return cast(HTTPResponse, _Nothing())
            raise
        return cast(HTTPResponse, response)


class _Nothing(io.BytesIO):
    """The response to a request for bytes beyond the end of a file."""


class _GrowingFile(io.RawIOBase):
    """A file that may still be written: its end is where it has not changed for `_GROWS_SECONDS`."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def read(self, size: int = -1) -> bytes:
        while not (data := self._file.read(size)) and time.time() - os.fstat(self._file.fileno()).st_mtime < _GROWS_SECONDS:
            time.sleep(0.05)
        return data or b""

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def close(self) -> None:
        self._file.close()
        super().close()
