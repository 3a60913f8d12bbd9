"""The configuration of the serve job."""

import re
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from gearnn_ray.config.checks import Section, each_once
from gearnn_ray.config.release_ref import Reference, TrustedModules
from gearnn_ray.config.resources import Gpus

FRAMES_AHEAD = 4
"""Decoded frames of one stream that wait or are processed at the same time."""
Untrained = Literal["nearest", "interpolate", "entropy"]
"""The weights for a level between two levels of a release: those of the nearest one, or a mixture of both, by the level's
coordinate or by how certain both networks are of the frame (`serving.mixing`)."""


class LimitsConfig(Section):
    """How large a request may be, and how much is processed at a time; what is beyond is refused, before memory is allocated."""

    body_mib: float = Field(16, gt=0, le=1024)
    """largest body of one request, and most bytes of an endless upload that may wait, in MiB"""
    body_seconds: float = Field(10, gt=0, le=3600)
    """within this time the head of a request and then its whole body must have arrived, and an endless upload must bring its next
    frame"""
    megapixels: float = Field(8.5, gt=0, le=100)
    """largest frame, and largest sum of the frames in one batch, in million pixels; a 4K frame has 8.3"""
    answer_mib: float = Field(128, gt=0, le=4096)
    """largest answer, in MiB: logits of one frame, or all lines of one segment or upload"""
    segment_frames: int = Field(3000, ge=1)
    """most frames of a segment that is sent whole"""
    streams: int = Field(16, ge=1, le=1024)
    """most segments and uploads that a replica processes at the same time"""
    in_flight_mib: float = Field(512, gt=0)
    """most memory of a replica for bodies, decoded frames and answers of all requests, and as much again of the HTTP proxy for
    answers on their way to clients, in MiB"""

    @model_validator(mode="after")
    def _room_for_one(self) -> Self:
        one = self.body_mib + 2 * self.answer_mib + FRAMES_AHEAD * 3e6 * self.megapixels / 2**20
        if self.in_flight_mib < one:
            raise ValueError(
                f"in_flight_mib is {self.in_flight_mib:g}, but one request may need {one:.0f}: raise it, or lower others"
            )
        return self


class ServeConfig(Section):
    """Serving releases over HTTP; each frame is answered by the network of its own distortion level."""

    store: str = "artifacts"
    """where releases are stored: a local path or a pyarrow.fs URI such as s3://bucket/prefix"""
    bundles: tuple[Reference, ...] = ("drn22-scenes-jpeg:latest",)
    """releases to serve, as name:tag (followed when it moves) or name@sha256:…; the first answers requests that name none"""
    trust: TrustedModules = ()
    """import paths of networks' modules that a release may name, such as my_package.nets; built-in networks need none"""
    require_signature: str | None = None
    """public ed25519 key, as a PEM file or 64 hexadecimal digits; releases that it did not sign are refused"""
    host: str = Field("127.0.0.1", min_length=1)
    """address to listen on; 127.0.0.1 accepts only this machine, 0.0.0.0 also others"""
    allowed_hosts: tuple[str, ...] = ()
    """host names under which clients reach the service, beside its address and localhost; requests to others are refused"""
    port: int = Field(8000, ge=1, le=65535)
    """HTTP port"""
    device: str = "auto"
    """cpu, cuda, or auto: cuda if a GPU is reserved, else cpu"""
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    """arithmetic of the networks; auto: bfloat16 where the processor gains from it"""
    replicas: int = Field(1, ge=1)
    """server processes; each holds every release"""
    num_cpus: float = Field(1, gt=0)
    """CPUs that a replica reserves; torch uses as many threads"""
    num_gpus: Gpus | None = Field(None, ge=0)
    """GPUs that a replica reserves; default: one if the cluster has any and device is not cpu"""
    max_batch: int = Field(16, ge=1, le=1024)
    """most frames in one batch; they may have different levels"""
    batch_wait_ms: float = Field(2, ge=0, le=1000)
    """how long the first frame of a batch waits for others, in milliseconds"""
    untrained: Untrained = "nearest"
    """adaptor for a frame whose level lies between released ones: the nearest level's, an interpolation of its neighbours', or
    entropy: their mixture by how certain each of them is of the frame, which takes half a pass more"""
    poll_seconds: float = Field(10, gt=0)
    """seconds between two checks whether a tag has moved"""
    cache: str = "~/.cache/gearnn_ray_releases"
    """folder where each node keeps copies of the last releases that it has served; a replica that starts while the store or the
    newest release cannot be read serves from them"""
    limits: LimitsConfig = LimitsConfig()
    cameras: dict[str, float] = Field(default_factory=dict)
    """mean luma (0 to 255) of a camera's undistorted frames, by its x-gearnn-stream header; default: the training images'"""

    watch: tuple[str, ...] = ()
    """cameras that the service keeps open, as NAME=ADDRESS, such as gate=rtsp://10.0.0.7/stream; the first bundle answers them"""
    slow: Literal["newest", "all"] = "newest"
    """what happens where a camera's frames come faster than they are processed: newest, all others are dropped and counted; all,
    the camera waits"""
    hosts: tuple[str, ...] = ()
    """hosts whose files a camera's playlist may name, beside its own"""

    @property
    def watched(self) -> dict[str, str]:
        """The addresses of the cameras, by name."""
        return dict(each.split("=", 1) for each in self.watch)

    @field_validator("watch")
    @classmethod
    def _named(cls, watch: tuple[str, ...]) -> tuple[str, ...]:
        for each in watch:
            name, _, address = each.partition("=")
            if not re.fullmatch(r"[A-Za-z0-9._:@+-]{1,128}", name) or not address:
                raise ValueError(f"watch has {each!r}: expected NAME=ADDRESS, such as gate=rtsp://10.0.0.7/stream")
        each_once("camera", tuple(each.partition("=")[0] for each in watch))
        return watch

    @field_validator("allowed_hosts")
    @classmethod
    def _names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if not re.fullmatch(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*", name):
                raise ValueError(
                    f"allowed_hosts has {name!r}: expected a name in lower case, such as cameras.example, and no port"
                )
        return names

    @field_validator("bundles")
    @classmethod
    def _one_or_more(cls, bundles: tuple[str, ...]) -> tuple[str, ...]:
        if not bundles:
            raise ValueError("no bundle is given: expected at least one, such as drn22-scenes-jpeg:latest")
        return each_once("bundle", bundles)

    @field_validator("cameras")
    @classmethod
    def _lumas(cls, cameras: dict[str, float]) -> dict[str, float]:
        for camera, luma in cameras.items():
            if not 0 < luma <= 255:
                raise ValueError(f"the mean luma of camera {camera} is {luma:g}: expected above 0 and at most 255")
        return cameras
