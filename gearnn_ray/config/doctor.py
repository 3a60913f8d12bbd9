"""The configuration of the doctor command."""

from pydantic import Field

from gearnn_ray.config.checks import Section
from gearnn_ray.config.split import DataConfig


class DoctorConfig(Section):
    """What is examined beside the machine itself."""

    store: str = "artifacts"
    """where releases are stored: a local path or a pyarrow.fs URI such as s3://bucket/prefix"""
    cache: str = DataConfig.model_fields["cache"].default
    """folder of the cached distorted images"""
    port: int = Field(8000, ge=1, le=65535)
    """port that the service would use"""
