"""One line of JSON for every frame of a stream. `frames.schema.json` beside this file is its schema."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from gearnn_ray.serving.level_estimation import LevelEstimate
from gearnn_ray.video.decoding import VideoFrame

__all__ = ["Line", "line_of", "name_of_stream", "written"]

Line = dict[str, object]


def name_of_stream(source: str | None, given: str | None = None) -> str:
    """The name of a stream in what is written: the given one, or the source's file name."""
    name = given or Path(urlsplit(source).path if source else "generated").stem
    return re.sub(r"[^A-Za-z0-9._:@+-]", "-", name)[:128] or "stream"


def line_of(
    stream: str,
    number: int,
    frame: VideoFrame,
    estimate: LevelEstimate,
    release: str,
    milliseconds: Mapping[str, float],
    answer: Mapping[str, object],
) -> Line:
    """The line of one frame.

    number: of the frame in its stream, from 0. release: name@sha256:<hex>. milliseconds: by part. answer: `Task.described`.
    """
    return {
        "stream": stream,
        "frame": number,
        "pts": None if frame.seconds is None else round(frame.seconds, 6),
        "width": frame.evidence.width,
        "height": frame.evidence.height,
        "keyframe": frame.keyframe,
        "bytes": frame.bytes,
        "lost": frame.lost,
        "found": estimate.found,
        "level": estimate.spelled,
        "distance": float(f"{estimate.distance:.4g}"),
        "release": release,
        "milliseconds": {name: round(value, 3) for name, value in milliseconds.items()},
        **answer,
    }


def written(line: Line) -> str:
    """The line as text, with its end."""
    return json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"
