"""The configuration of the camera job."""

import re
from typing import Annotated, Self
from urllib.parse import urlsplit

import tyro
from pydantic import Field, field_validator, model_validator

from gearnn_ray.config.checks import Section

_UNITS = {"": 1.0, "k": 1e3, "M": 1e6}
_SHARE_OF_LINK = 0.9  # the rest is for what a segment has too much at times


class CameraConfig(Section):
    """A camera that encodes in real time, and whose knobs the service steers."""

    source: Annotated[str | None, tyro.conf.Positional] = None
    """a video file, which is read at its own pace, an http(s):// or rtsp:// address, or a device such as /dev/video0; default: a
    minute of generated streets with a tunnel"""
    server: str = "http://127.0.0.1:8000"
    """address of the service (jobs/serve.py)"""
    stream: str | None = Field(None, pattern=r"^[A-Za-z0-9._:@+-]{1,128}$")
    """name of the stream at the service; default: the source's file name"""
    knobs: tuple[str, ...] = ("crf=18,24,30,36,42", "size=1,0.75,0.5", "rate=1,2")
    """what is steered, the best value first: name=value,value,… or the import path of a knob of your own"""
    price: float | None = Field(None, ge=0, le=1e15)
    """what it is worth to save the bits of the best values, in units of the loss (see gradient); default, without a ceiling or a
    link: as much as the knobs are found to lose for these bits in the first segment"""
    ceiling: str | None = None
    """bits a second that the knobs are to hold on average, such as 300k or 1.5M; default: 90% of the link's, if it is given"""
    link: str | None = None
    """bits a second that are sent at most, such as 500k; default: no limit"""
    gradient: bool = False
    """weigh the errors of pixels by the network's gradient, as OneAdapt does: a backward pass of the service for each segment,
    which was not found to save bits (docs/results/oneadapt.md); default: all pixels count alike"""
    segment_frames: int = Field(10, ge=1, le=1000)
    """frames of a segment, for which the knobs are the same"""
    ndjson: str | None = None
    """file that gets the service's line of JSON for every frame"""

    @property
    def link_rate(self) -> float | None:
        """Bits a second."""
        return None if self.link is None else _rate(self.link)

    @property
    def ceiling_rate(self) -> float | None:
        """Bits a second of the goal; None: the goal is a price."""
        if self.ceiling is not None:
            return _rate(self.ceiling)
        return None if self.price is not None or self.link_rate is None else _SHARE_OF_LINK * self.link_rate

    @field_validator("server")
    @classmethod
    def _is_address(cls, server: str) -> str:
        try:
            address = urlsplit(server)
            found = address.scheme in ("http", "https") and address.hostname and (address.port or 1) and not address.query
        except ValueError:
            found = None
        if not found:
            raise ValueError(f"server is {server}: expected an address such as http://127.0.0.1:8000")
        return server.rstrip("/")

    @field_validator("ceiling", "link")
    @classmethod
    def _is_rate(cls, rate: str | None) -> str | None:
        if rate is not None:
            _rate(rate)
        return rate

    @model_validator(mode="after")
    def _one_goal(self) -> Self:
        if self.price is not None and self.ceiling is not None:
            raise ValueError("price and ceiling are both given: a controller has one goal, so leave the other out")
        return self


def _rate(text: str) -> float:
    """Bits a second."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)([kM]?)", text, re.ASCII)
    if found is None or not (rate := float(found[1]) * _UNITS[found[2]]) >= 1000:
        raise ValueError(f"{text} is no rate: expected 1k bits a second or more, such as 500k or 1.5M")
    return rate
