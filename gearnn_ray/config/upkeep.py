"""The configurations of the jobs that look after a store: gc and verify."""

from pydantic import Field

from gearnn_ray.config.checks import Section
from gearnn_ray.config.split import DataConfig


class CacheConfig(Section):
    """The folder of cached images on this machine, and how much of it is kept."""

    cache: str = DataConfig.model_fields["cache"].default
    """folder of the cached distorted images"""
    max_age: float = Field(30, ge=0)
    """days after which cached images that no job has used go"""
    max_gib: float = Field(50, ge=0)
    """largest size of the cache in GiB: images that were used longest ago go first"""


class GcConfig(Section):
    """What no tag leads to, and how long it is kept."""

    store: str = "artifacts"
    """where releases are stored: a local path or a pyarrow.fs URI such as s3://bucket/prefix"""
    grace: float = Field(7, ge=0)
    """days that everything is kept after it was last written or used; must be longer than the longest job"""
    delete: bool = False
    """delete; without it the job only lists what it would delete"""
    data: CacheConfig = CacheConfig()


class VerifyConfig(Section):
    """The store that is read."""

    store: str = "artifacts"
    """where releases are stored: a local path or a pyarrow.fs URI such as s3://bucket/prefix"""
