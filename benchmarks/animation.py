#!/usr/bin/env python3
"""An MP4 of jobs/watch.py as an animation for a README: ten seconds, below three megabytes.

uv run jobs/watch.py --release centre-video:latest --compare --mp4 seen.mp4
uv run benchmarks/animation.py seen.mp4 docs/results/video.webp
"""

import argparse

import av
from PIL import Image

MOST_BYTES = 3_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video")
    parser.add_argument("animation")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rate", type=int, default=8, help="frames a second")
    parser.add_argument("--width", type=int, default=820)
    options = parser.parse_args()
    with av.open(options.video) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    wanted = int(options.seconds * options.rate)
    chosen = [frames[number * len(frames) // wanted] for number in range(wanted)]
    size = options.width, round(chosen[0].height * options.width / chosen[0].width)
    small = [frame.resize(size, Image.Resampling.LANCZOS) for frame in chosen]
    for quality in range(80, 10, -10):
        small[0].save(
            options.animation,
            save_all=True,
            append_images=small[1:],
            duration=1000 // options.rate,
            loop=0,
            quality=quality,
            method=4,
        )
        with open(options.animation, "rb") as file:
            size_of_file = len(file.read())
        print(f"quality {quality}: {size_of_file:,} bytes")
        if size_of_file < MOST_BYTES:
            return


if __name__ == "__main__":
    main()
