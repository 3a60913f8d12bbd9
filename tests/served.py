"""A tiny release to serve: a small network, levels whose outputs differ clearly, and the expected answers of each level."""

import io
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from gearnn_ray.models.layers import network_state
from gearnn_ray.models.registry import build_model
from gearnn_ray.store.releases import Store
from tests.manifests import CLEAN, level_entry, manifest_of
from tests.tiny import CLASSES

LEVELS = ("jpeg-10", "jpeg-50")
MEAN, STD = (0.4, 0.4, 0.4), (0.3, 0.3, 0.3)
CLASS_NAMES = ("road", "car", "sky")
ADAPTED = ("bn2.weight", "head.weight", "head.bias")


def connected(port: int, sent: bytes = b"") -> socket.socket:
    """A client that has sent this, and has room for so little of an answer that it waits in the server."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(20)
    connection.connect(("127.0.0.1", port))
    connection.sendall(sent)
    return connection


def publish(
    store: Store,
    name: str = "tiny",
    seed: int = 0,
    tags: tuple[str, ...] = (),
    shared: bool = False,
    network_name: str = "tests.nets:small",
    level_names: Sequence[str] = LEVELS,
    class_names: Sequence[str] = CLASS_NAMES,
    latest: bool = True,
    input_size: tuple[int, int] | None = None,
) -> str:
    """A release of `tests.nets:small` with random weights, under any name of a network. Returns its digest.

    Every level has its own head, or with `shared` all levels have the same. latest: as in `Store.publish`.
    """
    torch.manual_seed(seed)
    network = build_model("tests.nets:small", len(class_names))
    state = network_state(network)
    base = store.put_state(state)
    levels: dict[str, Any] = {"clean": CLEAN}
    adaptors = [{key: torch.randn_like(state[key]) for key in ADAPTED} for _ in level_names]
    for level, adaptor in zip(level_names, adaptors[:1] * len(level_names) if shared else adaptors, strict=True):
        blob = store.put_state(adaptor)
        levels[level] = level_entry(blob, sum(tensor.numel() for tensor in adaptor.values()), ADAPTED)
    manifest = manifest_of(
        name, network_name, len(class_names), base, levels, class_names=list(class_names),
        reference={"height": 64, "width": 80, "luma": 100.0, "luma_spread": 0.3},
        normalisation={"mean": MEAN, "std": STD}, input_size=input_size,
    )  # fmt: skip
    return store.publish(manifest, {}, tags, latest=latest)


def picture(seed: int = 0, height: int = 64, width: int = 80) -> NDArray[np.uint8]:
    """Smooth colours [H, W, 3] that JPEG changes little."""
    rough = np.random.default_rng(seed).integers(20, 236, (4, 5, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC))


def jpeg(pixels: NDArray[np.uint8], quality: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return file.getvalue()


def png(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def expected_logits(store: Path | str, ref: str, level: str, frame: bytes) -> NDArray[np.float32]:
    """[K, H, W] of the level's own plain network, without any code of `gearnn_ray.serving`."""
    release = Store(store).pull(ref)
    network = build_model("tests.nets:small", CLASSES)
    network.load_state_dict({**release.base_state(), **({} if level == "clean" else release.adaptor_state(level))})
    pixels = np.asarray(Image.open(io.BytesIO(frame)).convert("RGB")).astype(np.float32) / 255
    x = torch.from_numpy((pixels - np.float32(MEAN)) / np.float32(STD)).permute(2, 0, 1)[None]
    with torch.no_grad():
        logits: NDArray[np.float32] = network.eval()(x)[0].numpy()
    return logits
