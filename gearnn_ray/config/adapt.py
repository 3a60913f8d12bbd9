"""The configuration of the adapt job."""

from typing import Annotated

import tyro
from pydantic import Field, model_validator

from gearnn_ray.config.checks import Section
from gearnn_ray.config.release_ref import Reference, SafeName, TrustedModules
from gearnn_ray.config.resources import TaskResources


class AdaptConfig(Section):
    """A camera's knobs steered by OneAdapt and by every rival, over the same video."""

    source: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """video files, or folders of frames in the order of their names; default: a minute of generated streets with a tunnel"""
    store: str = "artifacts"
    """where releases are stored: a local path or a pyarrow.fs URI such as s3://bucket/prefix"""
    release: Reference = "centre-video:latest"
    """the release, as name, name:tag or name@sha256:…"""
    trust: TrustedModules = ()
    """import paths of networks' modules that a release may name, such as my_package.nets; built-in networks need none"""
    name: SafeName | None = None
    """name under which tables, figures and the page are stored; default: the release's"""
    labels: str | None = None
    """folder of label images (class ids, 255 = ignored) with the names of a folder's frames; default: the network's own answers
    to the frames as they were before they are encoded"""
    classes: tuple[str, ...] = ()
    """names of the classes whose objects count; default: all"""
    knobs: tuple[str, ...] = ("crf=18,24,30,36,42", "size=1,0.75,0.5", "rate=1,2")
    """what is steered, the best value first: name=value,value,… or the import path of a knob of your own"""
    rate: float = Field(10, gt=0, le=240)
    """frames a second that are taken from a video; a video with fewer keeps its own. Of a folder: its frames' rate"""
    length: int = Field(10, ge=1, le=1000)
    """frames of a segment, for which the knobs are the same"""
    segments: int | None = Field(None, ge=1)
    """segments of each source that are used, from its beginning; default: all"""
    seeds: int = Field(1, ge=1, le=100)
    """how many generated clips of different streets are compared, without a source"""
    within: float = Field(0.5, ge=0)
    """points of accuracy below that of the best values, with the original network, that count as equal"""
    ceiling: float | None = Field(None, gt=0)
    """bits a second that controllers are to hold, in one run more"""
    floor: float | None = Field(None, gt=0, le=100)
    """accuracy in percent that controllers are to hold, in one run more"""
    resources: TaskResources = TaskResources()

    @model_validator(mode="after")
    def _one_goal(self) -> "AdaptConfig":
        if self.ceiling is not None and self.floor is not None:
            raise ValueError("ceiling and floor are both given: a controller holds one of them, so leave the other out")
        if self.labels is not None and len(self.source) != 1:
            raise ValueError(f"labels are given for {len(self.source)} sources: give one folder of frames that they belong to")
        if self.seeds > 1 and self.source:
            raise ValueError(f"seeds is {self.seeds}, which is for generated clips, and a source is given: leave one of them out")
        if twice := next((each for each in self.source if self.source.count(each) > 1), None):
            raise ValueError(f"the source {twice} is given twice: give each source once")
        return self
