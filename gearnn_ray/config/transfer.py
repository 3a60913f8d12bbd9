"""The configuration of the commands that copy, export and sign a release."""

from typing import Annotated

import tyro

from gearnn_ray.config.checks import Section
from gearnn_ray.config.release_ref import Reference, TrustedModules


class CopyConfig(Section):
    """Copying a release between this store and another one."""

    release: Annotated[Reference, tyro.conf.Positional] = "drn22-scenes-jpeg:latest"
    """the release, as name, name:tag or name@sha256:…; the tag is copied too"""
    other: Annotated[str, tyro.conf.Positional] = ""
    """the other store: a path, or a pyarrow.fs URI such as s3://bucket/prefix"""
    store: str = "artifacts"
    """this store: a local path or a pyarrow.fs URI"""
    require_signature: str | None = None
    """public ed25519 key, as a PEM file or 64 hexadecimal digits; a release that it did not sign is refused"""


class ExportConfig(Section):
    """The network of one level as a file for other runtimes."""

    release: Annotated[Reference, tyro.conf.Positional] = "drn22-scenes-jpeg:latest"
    """the release, as name, name:tag or name@sha256:…"""
    level: Annotated[str, tyro.conf.Positional] = ""
    """level of the release, such as jpeg-10; clean is the base; all: one .onnx or .pt2 file whose second input is the level"""
    file: Annotated[str, tyro.conf.Positional] = ""
    """file to write; its suffix names the format: .onnx (needs the extra onnx), .pt2 (torch.export) or .safetensors"""
    store: str = "artifacts"
    """where releases are stored: a local path or a pyarrow.fs URI such as s3://bucket/prefix"""
    image_size: tuple[int, int] | None = None
    """height and width of the images in pixels; default: the size of the training images"""
    trust: TrustedModules = ()
    """import paths of networks' modules that a release may name, such as my_package.nets; built-in networks need none"""
    require_signature: str | None = None
    """public ed25519 key, as a PEM file or 64 hexadecimal digits; a release that it did not sign is refused"""


class SignConfig(Section):
    """Signing a release."""

    release: Annotated[Reference, tyro.conf.Positional] = "drn22-scenes-jpeg:latest"
    """the release, as name, name:tag or name@sha256:…"""
    store: str = "artifacts"
    """where releases are stored: a local path or a pyarrow.fs URI such as s3://bucket/prefix"""
    key: str = "release.key"
    """PEM file with the private ed25519 key, without a passphrase"""
