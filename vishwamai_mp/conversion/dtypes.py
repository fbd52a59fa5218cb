"""Data types under the names that users, safetensors, manifests and torch have for them."""

from dataclasses import dataclass

import torch

from vishwamai_mp.config import UserError


@dataclass(frozen=True)
class DType:
    """One type of number. `option` is the command line's name, `tag` that of safetensors."""

    option: str
    tag: str
    torch: torch.dtype

    @property
    def name(self) -> str:
        """As manifests and `config.json` have it."""
        return str(self.torch).removeprefix("torch.")

    @property
    def size(self) -> int:
        """Bytes."""
        return self.torch.itemsize


FP32 = DType("fp32", "F32", torch.float32)
BF16 = DType("bf16", "BF16", torch.bfloat16)
FP16 = DType("fp16", "F16", torch.float16)
FP8 = DType("fp8", "F8_E4M3", torch.float8_e4m3fn)
_ALL = (FP32, BF16, FP16, FP8)
OPTIONS = tuple(dtype.option for dtype in _ALL)


def by_option(option: str) -> DType:
    """The type that the command line calls `option`, one of `OPTIONS`."""
    return next(dtype for dtype in _ALL if dtype.option == option)


def of_manifest(name: str, tensor: str) -> DType:
    """The type of a checkpoint's tensor.

    Raises:
        UserError: one that has no place in a model.
    """
    return _find(name, tensor, [dtype for dtype in _ALL if dtype.name == name])


def of_safetensors(tag: str, tensor: str) -> DType:
    """The type of a safetensors file's tensor. Raises as `of_manifest`."""
    return _find(tag, tensor, [dtype for dtype in _ALL if dtype.tag == tag])


def _find(name: str, tensor: str, found: list[DType]) -> DType:
    if not found:
        raise UserError(f"{tensor} is stored as {name}; only float32, bfloat16 and float16 weights can be converted")
    return found[0]


def cast(tensor: torch.Tensor, dtype: DType, name: str) -> torch.Tensor:
    """`tensor` in another type, rounded to nearest.

    Raises:
        UserError: fp16 cannot hold a value.
    """
    if tensor.dtype == dtype.torch:
        return tensor
    result = tensor.to(dtype.torch)
    if dtype is FP16 and bool((result.isinf() & tensor.isfinite()).any()):
        raise UserError(f"{name} has values beyond the range of fp16 (65504); use --dtype bf16 or fp32")
    return result
