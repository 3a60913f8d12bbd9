"""Video in, video out: `watch` takes a stream whose quality changes through the adaptive network."""

from gearnn_ray.video.watching import watch

__all__ = ["watch"]
