"""Where an unfinished fine-tune stands: weights, momentum and average after an epoch, as one safetensors file."""

import json
from collections.abc import Mapping
from typing import Protocol

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn


class Checkpoint(Protocol):
    """Where the state of an unfinished fine-tune is kept. `load` gives None where there is none, or only a torn one."""

    def load(self) -> bytes | None: ...
    def save(self, data: bytes) -> None: ...


def snapshot(
    model: nn.Module, momentum: Mapping[str, Tensor], average: Mapping[str, Tensor], next_epoch: int, *, everything: bool
) -> bytes:
    """The state after an epoch. everything: all tensors; else only those that a partial fine-tune may change: the parameters
    with a momentum, and all buffers.
    """
    moving = momentum.keys() | {name for name, _ in model.named_buffers()}
    tensors = {f"model.{n}": t for n, t in model.state_dict().items() if everything or n in moving}
    tensors |= {f"momentum.{name}": buffer for name, buffer in momentum.items()}
    tensors |= {f"average.{name}": mean for name, mean in average.items()}
    contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    return safetensors.torch.save(contiguous, {"state": json.dumps({"next_epoch": next_epoch})})


def restore(
    checkpoint: Checkpoint | None, model: nn.Module, momentum: Mapping[str, Tensor], average: Mapping[str, Tensor]
) -> int:
    """Continue from a checkpoint if there is a readable one; returns the epoch to begin with."""
    data = checkpoint.load() if checkpoint is not None else None
    if data is None:
        return 0
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        next_epoch = int(json.loads(header["__metadata__"]["state"])["next_epoch"])
        moving = [(buffer, tensors[f"momentum.{name}"]) for name, buffer in momentum.items()]
        moving += [(mean, tensors[f"average.{name}"]) for name, mean in average.items()]
    except (SafetensorError, KeyError, ValueError):
        return 0  # not one of ours: begin again rather than fail
    model.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}, strict=False)
    for tensor, saved in moving:
        tensor.copy_(saved)
    return next_epoch
