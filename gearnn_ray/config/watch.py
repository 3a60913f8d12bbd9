"""The configuration of the watch job."""

from typing import Annotated, Literal

import tyro
from pydantic import Field

from gearnn_ray.config.checks import Section
from gearnn_ray.config.release_ref import Reference, TrustedModules
from gearnn_ray.config.serve import Untrained


class WatchConfig(Section):
    """A video through the adaptive network."""

    source: Annotated[str | None, tyro.conf.Positional] = None
    """a video file, an http(s):// or rtsp:// address, a playlist (HLS, DASH), or a device such as /dev/video0; default: a minute
    of generated streets whose bitrate, size and light fall and rise again"""
    store: str = "artifacts"
    """where releases are stored: a local path or a pyarrow.fs URI such as s3://bucket/prefix"""
    release: Reference = "drn22-scenes-jpeg:latest"
    """the release, as name, name:tag or name@sha256:…"""
    trust: TrustedModules = ()
    """import paths of networks' modules that a release may name, such as my_package.nets; built-in networks need none"""
    stream: str | None = Field(None, pattern=r"^[A-Za-z0-9._:@+-]{1,128}$")
    """name of the stream in what is written; default: the source's file name"""
    ndjson: str | None = None
    """file that gets a line of JSON for every frame"""
    mp4: str | None = None
    """MP4 file that gets a picture for every frame, with the network's answer drawn"""
    compare: bool = False
    """also process each frame with the original network: beside the adapted one in the MP4, and in each line"""
    port: int | None = Field(None, ge=1, le=65535)
    """port on this machine of a page that shows the stream as it is processed, and of its metrics; default: none"""
    slow: Literal["newest", "all"] | None = None
    """what happens where frames come faster than they are processed: newest, all others are dropped and counted; all, the source
    waits; default: newest for cameras, all for files"""
    score: float | None = Field(None, ge=0, le=1)
    """least score of a detection; default: 0.05 in lines, 0.3 in pictures"""
    untrained: Untrained = "nearest"
    """weights for a level between two levels of the release: the nearest level's, or a mixture of its neighbours'"""
    hosts: tuple[str, ...] = ()
    """hosts whose files a playlist may name, beside its own"""
    hardware: str | None = None
    """FFmpeg's name of a hardware decoder, such as cuda or vaapi; such decoders do not tell the QP of H.264; default: the CPU"""
    megapixels: float = Field(8.5, gt=0, le=100)
    """largest frame in million pixels; a 4K frame has 8.3"""
    device: str = "cpu"
    """cpu or cuda"""
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    """arithmetic of the network; auto: bfloat16 where the processor gains from it"""
