"""The configuration of the serve job."""

from typing import Literal

from pydantic import Field, field_validator

from gearnn_ray.config.checks import Section, each_once
from gearnn_ray.config.release_ref import Reference, TrustedModules
from gearnn_ray.config.resources import Gpus


class LimitsConfig(Section):
    """How large a request may be; a larger one is refused before memory is allocated for it."""

    body_mib: float = Field(16, gt=0, le=1024)
    """largest body of one request, in MiB"""
    megapixels: float = Field(8.5, gt=0, le=100)
    """largest frame, and largest sum of the frames in one batch, in million pixels; a 4K frame has 8.3"""


class ServeConfig(Section):
    """Serving releases over HTTP; each frame is answered by the network of its own distortion level."""

    store: str = "artifacts"
    """where releases are stored: a local path or a pyarrow.fs URI such as s3://bucket/prefix"""
    bundles: tuple[Reference, ...] = ("drn22-scenes-jpeg:latest",)
    """releases to serve, as name:tag (followed when it moves) or name@sha256:…; the first answers requests that name none"""
    trust: TrustedModules = ()
    """import paths of networks' modules that a release may name, such as my_package.nets; built-in networks need none"""
    host: str = Field("127.0.0.1", min_length=1)
    """address to listen on; 127.0.0.1 accepts only this machine, 0.0.0.0 also others"""
    port: int = Field(8000, ge=1, le=65535)
    """HTTP port"""
    device: str = "auto"
    """cpu, cuda, or auto: cuda if a GPU is reserved, else cpu"""
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
    untrained: Literal["nearest", "interpolate"] = "nearest"
    """adaptor for a frame whose level lies between released ones: the nearest level's, or an interpolation of its neighbours'"""
    poll_seconds: float = Field(10, gt=0)
    """seconds between two checks whether a tag has moved"""
    limits: LimitsConfig = LimitsConfig()
    cameras: dict[str, float] = Field(default_factory=dict)
    """mean luma (0 to 255) of a camera's undistorted frames, by its x-gearnn-stream header; default: the training images'"""

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
