"""Video in, video out: `watch` takes a stream whose quality changes through the adaptive network.

It is imported when it is first used: processes that only decode need no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gearnn_ray.video.watching import watch

__all__ = ["watch"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gearnn_ray.video import watching

    return getattr(watching, name)
