"""The device that is measured on: its name, what it could do at best, its memory, and the libraries around it."""

from __future__ import annotations

import gc
import re
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from benchmarks.fresh_process import forget_peak, peak_bytes, resident_bytes

_PEAKS = (
    (r"B200", 2250e12),
    (r"GH200|H200", 989e12),
    (r"H100 NVL", 835e12),
    (r"H100 PCIe", 756e12),
    (r"H100", 989e12),
    (r"A100", 312e12),
    (r"L40S", 362e12),
    (r"RTX 6000 Ada", 364e12),
    (r"RTX A6000", 155e12),
    (r"RTX 4090", 165e12),
    (r"RTX 3090", 71e12),
    (r"L4", 121e12),
    (r"A10", 125e12),
)
"""Dense bfloat16 FLOP/s with float32 sums, from the vendor's data sheets, by a word of the device's name."""

_LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "liger-kernel", "flash-attn")


def peak_flops(name: str) -> float | None:
    """The most bfloat16 FLOP/s of a device; None for one that is not in the table."""
    return next((flops for word, flops in _PEAKS if re.search(rf"\b({word})\b", name)), None)


def describe() -> dict[str, Any]:
    """The facts of this machine. `attention`: each implementation, and why it is not there (None: it is)."""
    import torch

    is_cuda = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if is_cuda else "CPU"
    return {
        "device": name,
        "kind": "cuda" if is_cuda else "cpu",
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if is_cuda else None,
        "peak_bf16_flops": peak_flops(name),
        "bf16": torch.cuda.is_bf16_supported() if is_cuda else True,
        "cuda": torch.version.cuda,
        "versions": {library: _version(library) for library in _LIBRARIES},
        "attention": _attention(is_cuda=is_cuda),
        "liger": _liger(is_cuda=is_cuda),
    }


class Memory:
    """The most memory held since this object was made: the GPU's, or this process's."""

    def __init__(self) -> None:
        import torch

        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with suppress(OSError):  # not every kernel can
            forget_peak()
        self._before = resident_bytes()

    def peaks(self) -> dict[str, int]:
        """Peak bytes, beyond what the process held before where it is the machine's own memory."""
        import torch

        if torch.cuda.is_available():
            return {
                "peak_bytes": torch.cuda.max_memory_allocated(),
                "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
            }
        return {"peak_bytes": peak_bytes() - self._before}


def _attention(*, is_cuda: bool) -> dict[str, str | None]:
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_torch_flex_attn_available

    def lacking(available: bool, what: str) -> str | None:
        if available:
            return None
        return f"{what} is not installed" if is_cuda else f"{what} needs a GPU"

    return {
        "sdpa": None,
        "flash_attention_2": lacking(is_flash_attn_2_available(), "flash-attn"),
        "flash_attention_3": lacking(is_flash_attn_3_available(), "flash-attn 3"),
        "flex_attention": lacking(is_torch_flex_attn_available(), "a PyTorch with flex attention")
        if is_cuda
        else "FlexAttention has no backward on a CPU",
    }


def _liger(*, is_cuda: bool) -> str | None:
    if not is_cuda:
        return "Liger's kernels need a GPU"
    return None if _version("liger-kernel") else "liger-kernel is not installed: pip install 'fedloom[benchmarks]'"


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
