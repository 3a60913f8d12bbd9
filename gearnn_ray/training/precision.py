"""Which arithmetic a processor gains from, and the settings of a process that results depend on."""

import contextlib
from typing import Any, Literal

import torch

Precision = Literal["bfloat16", "float32"]


def fastest_precision(device: torch.device) -> Precision:
    """bfloat16 where `device` multiplies in it: AMX or AVX512_BF16, or CUDA from compute capability 8; else float32. With
    AVX512_BF16 alone a training step of DRN-D-22 takes about half as long as in float32 (`benchmarks/precision.py`).
    """
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device)[0] >= 8 else "float32"
    return "bfloat16" if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported() else "float32"


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """torch's autocast for bfloat16, nothing for float32."""
    if precision != "bfloat16":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def prepare_process(threads: int) -> None:
    """Settings of a worker process that results and speed depend on: threads, denormals, deterministic kernels."""
    torch.set_num_threads(max(1, threads))
    torch.set_flush_denormal(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
