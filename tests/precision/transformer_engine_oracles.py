"""A program: counts where our FP8 and FP4 arithmetic differs from Transformer Engine's and torchao's own, as JSON.

usage: transformer_engine_oracles.py FOLDER

FOLDER holds the packages' Python files. What Transformer Engine compiles is stood in for; its references are torch.
"""

import contextlib
import itertools
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.model.transformer_engine_build import import_transformer_engine

_FOLDER = sys.argv[1]
if __name__ == "__main__":
    import_transformer_engine(_FOLDER)
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from vishwamai_mp.precision import nvfp4, scaling  # noqa: E402
from vishwamai_mp.precision.delayed import update_scales_  # noqa: E402
from vishwamai_mp.precision.formats import E4M3, E5M2, Format  # noqa: E402
from vishwamai_mp.precision.fp8_linear import CurrentScaling, Nvfp4Scaling, Scaling, _Fp8Linear  # noqa: E402

_FORMATS = {"e4m3": E4M3, "e5m2": E5M2}
_GENERATOR = torch.Generator().manual_seed(11)


def differing(ours: Tensor, theirs: Tensor) -> int:
    """Numbers that are not the same; NaN is the same as NaN, −0 as 0."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return int(((ours != theirs) & ~(ours.isnan() & theirs.isnan())).sum())


def all_positive_bf16() -> Tensor:
    return torch.arange(1, 0x7F80, dtype=torch.int16).view(torch.bfloat16)


def positive_fp32(count: int) -> Tensor:
    return torch.randint(1, 0x7F800000, (count,), dtype=torch.int32, generator=_GENERATOR).view(torch.float32)


def scales() -> dict[str, list[int]]:
    """[differing, compared] of scales from amaxes."""
    from transformer_engine.pytorch.custom_recipes.reference_current_scaling import _scale_from_amax_tensor

    found = {}
    for (name, to), power_of_two in itertools.product(_FORMATS.items(), (False, True)):
        for amax in (all_positive_bf16(), positive_fp32(2_000_000)):
            theirs, _, _ = _scale_from_amax_tensor(
                amax.dtype, amax.float(), to.dtype, eps=0.0, pow_2_scales=power_of_two
            )
            ours = scaling.scale_from_amax(amax, to, amax.dtype, power_of_two)
            found[f"{name} {amax.dtype} {'power of two' if power_of_two else 'any'}"] = [
                differing(ours, theirs),
                amax.numel(),
            ]
    return found


def delayed() -> dict[str, list[int]]:
    """[differing histories and scales, scales off because of a reciprocal, compared] over 40 updates.

    Given the format's maximum as a Python number, their function computes reciprocal × maximum, which their CUDA
    kernel does not; given a tensor it divides.
    """
    from transformer_engine.common.recipe import DelayedScaling
    from transformer_engine.pytorch.quantization import _amax_and_scale_update

    found = {}
    for algorithm, length in itertools.product(("max", "most_recent"), (1, 2, 16, 1024)):
        recipe = DelayedScaling(amax_history_len=length, amax_compute_algo=algorithm)
        state = [[torch.zeros(length, 6), torch.ones(6)] for _ in range(3)]
        wrong = reciprocal = 0
        for step in range(40):
            amax = torch.rand(6, generator=_GENERATOR).exp2() * 2.0 ** (step % 7 - 3)
            amax[step % 6] = (0.0, torch.inf, torch.nan, 1e-45)[step % 4] if length < 16 else 0.0
            for history, _ in state:
                history[0].copy_(amax)
            (ours, our_scale), (theirs, their_scale), (loose, loose_scale) = state
            update_scales_(ours, our_scale, E4M3.maximum, algorithm)
            _amax_and_scale_update(theirs, their_scale, torch.tensor(E4M3.maximum), recipe)
            _amax_and_scale_update(loose, loose_scale, E4M3.maximum, recipe)
            wrong += differing(ours, theirs) + differing(our_scale, their_scale)
            reciprocal += differing(our_scale, loose_scale)
            assert torch.allclose(our_scale, loose_scale, rtol=2e-7)
        found[f"{algorithm} {length}"] = [wrong, reciprocal, 40 * 6]
    return found


def current() -> dict[str, int]:
    """Differing codes of whole matrices, by format."""
    from transformer_engine.pytorch.custom_recipes.reference_current_scaling import CurrentScalingQuantizerRef

    found = {}
    for name, to in _FORMATS.items():
        x = (torch.randn(300, 257, generator=_GENERATOR) * torch.rand(300, 1, generator=_GENERATOR).exp2()).bfloat16()
        theirs = CurrentScalingQuantizerRef(to.dtype).quantize(x)
        ours = scaling.scaled_operand(x, to, scaling.scale_from_amax(x.abs().amax(), to, x.dtype))
        assert ours.scale is not None
        found[name] = differing(ours.values, theirs.data.float()) + differing(ours.scale.reciprocal(), theirs.scale)
    return found


class _Nearest(Nvfp4Scaling):
    """NVFP4 that rounds gradients to the nearest, as the reference does."""

    def __init__(self) -> None:
        super().__init__("", mock.Mock())

    def _bits(self, along: int) -> Any:
        return None


def linear() -> dict[str, list[int]]:
    """`_linear` with one scale per tensor."""
    from transformer_engine.pytorch.custom_recipes.reference_current_scaling import current_scaling_ref_factory

    return _linear(CurrentScaling(), current_scaling_ref_factory)


def fp4_linear() -> dict[str, list[int]]:
    """`_linear` in NVFP4, rounding to the nearest."""
    from transformer_engine.pytorch.custom_recipes.reference_nvfp4 import nvfp4_ref_rht_2d_factory

    return _linear(_Nearest(), nvfp4_ref_rht_2d_factory)


def _linear(scaling_of_ours: Scaling, their_factory: Any) -> dict[str, list[int]]:
    """[differing, compared, more than one last place apart] of y, dx, dw.

    `fp32`: our products in fp32, as theirs are; `bf16`: in bf16, where the hardware has it.
    """
    x = torch.randn(256, 192, generator=_GENERATOR).bfloat16()
    w = (torch.randn(320, 192, generator=_GENERATOR) * 0.05).bfloat16()
    grad = (torch.randn(256, 320, generator=_GENERATOR) * 1e-3).bfloat16()
    theirs = _their_linear(x, w, grad, their_factory)
    found = {}
    native = scaling.multiplies_natively(torch.bfloat16)
    for arithmetic in ("fp32", "bf16") if native else ("fp32",):
        with mock.patch.object(scaling, "multiplies_natively", return_value=arithmetic == "bf16"):
            ours = _our_linear(x, w, grad, scaling_of_ours)
        for name, one, other in zip(("y", "dx", "dw"), ours, theirs, strict=True):
            apart = (one.view(torch.int16).int() - other.view(torch.int16).int()).abs()
            found[f"{name} {arithmetic}"] = [differing(one, other), one.numel(), int((apart > 1).sum())]
    return found


def _our_linear(x: Tensor, w: Tensor, grad: Tensor, ours: Scaling) -> list[Tensor]:
    layer = types.SimpleNamespace(fp8_scaling=ours, fp8_observer=None)
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = _Fp8Linear.apply(x, w, layer, False, False, None)
    y.backward(grad)
    assert x.grad is not None
    assert w.grad is not None
    return [y.detach(), x.grad, w.grad]


def _their_linear(x: Tensor, w: Tensor, grad: Tensor, factory: Any) -> list[Tensor]:
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import CustomRecipe

    with _as_if_on_a_gpu():
        layer = te.Linear(w.shape[1], w.shape[0], bias=False, params_dtype=torch.bfloat16, device="cpu")
        with torch.no_grad():
            layer.weight.copy_(w)
        x = x.clone().requires_grad_()
        with te.autocast(enabled=True, recipe=CustomRecipe(qfactory=factory)):
            y = layer(x)
        y.backward(grad)
    assert x.grad is not None
    return [y.detach(), x.grad, layer.weight.grad]


@contextlib.contextmanager
def _as_if_on_a_gpu() -> Iterator[None]:
    """For the plain torch code of a reference quantizer, which a GPU's checks stand before."""
    patches: list[Any] = [
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("torch.cuda.current_device", return_value="cpu"),
        mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)),
        mock.patch("torch.cuda.get_device_properties", return_value=types.SimpleNamespace(major=9, minor=0)),
        mock.patch("torch.cuda.current_stream"),
        mock.patch("torch.cuda.is_current_stream_capturing", return_value=False),
        mock.patch.object(Tensor, "is_cuda", True, create=True),
        mock.patch.object(Tensor, "cuda", lambda self, *_, **__: self),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def blocks() -> dict[str, int]:
    """Differing scales and codes of 1 × 128, 128 × 1 and 128 × 128 blocks, by the reference's rule for scales."""
    from transformer_engine.pytorch.custom_recipes.reference_current_scaling import _scale_from_amax_tensor

    found = {}
    for rows, columns in ((1, 128), (128, 1), (128, 128)):
        x = _uneven(384, 512)
        ours = scaling.quantize_blocks(x, E4M3, rows, columns)
        wrong = 0
        for i, j in itertools.product(range(384 // rows), range(512 // columns)):
            block = x[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns].float()
            scale, inverse, _ = _scale_from_amax_tensor(
                x.dtype, block.abs().max(), E4M3.dtype, eps=0.0, pow_2_scales=True
            )
            wrong += differing(ours.codes[i, :, j], (block * scale).to(E4M3.dtype).float())
            wrong += differing(ours.scale_inverse[i, 0, j, 0], inverse)
        found[f"{rows}x{columns}"] = wrong
    return found


def mx() -> dict[str, int]:
    """Differing scales and codes against torchao's RCEIL, for ordinary matrices and for every bf16 amax.

    Codes are apart where the scale is 2^-127, which torchao raises to fp32's smallest normal number: counted by
    themselves.
    """
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    found: dict[str, int] = {}
    formats: dict[str, Format] = _FORMATS
    for name, to in formats.items():
        for what, x in (("matrix", _uneven(256, 512)), ("every amax", all_positive_bf16()[:, None].expand(-1, 32))):
            exponents, codes = to_mx(x.contiguous(), to.dtype, 32, ScaleCalculationMode.RCEIL)[:2]
            ours = scaling.quantize_mx(x, to, 1, 32)
            theirs = exponents.view(torch.uint8).int()
            biased = scaling.e8m0_from_amax(x.unflatten(1, (-1, 32)).abs().amax(-1), to)
            found[f"{name} {what}: scales"] = differing(biased, theirs)
            our_codes, smallest = ours.codes.view(-1, 32), (biased == 0).view(-1)
            their_codes = codes.float().view(-1, 32)
            found[f"{name} {what}: codes"] = differing(our_codes[~smallest], their_codes[~smallest])
            found[f"{name} {what}: codes at scale 2^-127"] = differing(our_codes[smallest], their_codes[smallest])
    return found


def fp4() -> dict[str, list[int]]:
    """[differing numbers, block scales and tensor scales, compared] of NVFP4 operands.

    Forward: 1 × 16 blocks along the sum. Tokens: the same along the other dimension, rotated. Weights: 16 × 16 blocks.
    """
    found = {}
    for name, x in {"matrix": _uneven(1024, 768), **_extreme_blocks()}.items():
        for kind, (tile, rotated) in {"forward": (1, False), "tokens": (1, True), "weights": (16, False)}.items():
            found[f"{name}, {kind}"] = _compare_fp4(x, tile, rotated)
    return found


def _compare_fp4(x: Tensor, tile: int, rotated: bool) -> list[int]:
    from transformer_engine.pytorch.custom_recipes import reference_utils
    from transformer_engine.pytorch.custom_recipes.reference_nvfp4 import NVFP4QuantizerRef, cast_from_fp4x2

    reference = NVFP4QuantizerRef(
        reference_utils.Fp4Formats.E2M1, rowwise=not rotated, quant_tile_shape=(tile, 16), with_rht=rotated
    )
    with torch.backends.mkldnn.flags(enabled=False):  # whose bf16 products take subnormal numbers for zeros
        theirs = reference.quantize(x)
    codes, scales, amax = (
        (theirs.data_t, theirs.scale_t, theirs.global_amax_col)
        if rotated
        else (theirs.data, theirs.scale, theirs.global_amax_row)
    )
    ours = nvfp4.rotate_tokens(x).t().contiguous() if rotated else x
    scale = nvfp4.tensor_scale(scaling.largest_absolute(ours))
    quantized = nvfp4.quantize_nvfp4(ours, scale, tile, 16)
    our_scales = quantized.scale_inverse.expand(-1, tile, -1, 1).reshape(scales.shape)
    wrong = differing(our_scales, scales.float())
    known = ~scales.isnan().repeat_interleave(16, 1)  # a NaN's code is any; what it means is NaN
    wrong += differing(
        quantized.codes.view(x.shape[::-1] if rotated else x.shape)[known], cast_from_fp4x2(codes, torch.float32)[known]
    )
    # They keep the amax and apply its part of the scale after the product.
    wrong += differing(scale, torch.minimum(torch.tensor(2688.0) / amax, torch.tensor(torch.finfo(torch.float32).max)))
    operand = nvfp4.nvfp4_operand(ours, tile, 16)
    wrong += differing(operand.values.float(), quantized.dequantize_())
    return [wrong, x.numel()]


def _extreme_blocks() -> dict[str, Tensor]:
    """bf16 matrices of 16 columns for what a block and a tensor can meet."""
    every = all_positive_bf16()[:, None].repeat(1, 16)[: 32639 // 32 * 32]
    signs = torch.randint(0, 2, every.shape, generator=_GENERATOR) * 2 - 1
    spread = torch.randint(1, 0x7F80, (32 * 16, 64), dtype=torch.int16, generator=_GENERATOR).view(torch.bfloat16)
    special = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 2.0**-133, 2.0**-126, 3e37, -3e37]).bfloat16()
    mixed = special[torch.randint(0, len(special), (256, 256), generator=_GENERATOR)]
    subnormal = torch.randint(0, 0x80, (256, 256), dtype=torch.int16, generator=_GENERATOR).view(torch.bfloat16)
    grid = (torch.arange(-96, 96) / 16).repeat(1024).view(-1, 64).bfloat16()  # all E2M1 numbers and middles
    infinite, nan = _uneven(64, 64), _uneven(64, 64)
    infinite[5, 7], nan[9, 11] = torch.inf, torch.nan
    return {
        "all-equal blocks of every size below 2^124": (every.float() * signs).bfloat16()[: 251 * 128 // 32 * 32],
        "all sizes": spread,
        "zeros, subnormal and huge numbers": mixed,
        "subnormal numbers": subnormal,
        "middles": grid,
        "zeros": torch.zeros(64, 64, dtype=torch.bfloat16),
        "one infinity": infinite,
        "one NaN": nan,
    }


def _uneven(rows: int, columns: int) -> Tensor:
    """bf16 numbers whose size changes over the matrix, some of them zero."""
    size = torch.randn(rows, columns // 32, generator=_GENERATOR).mul(6).exp2().repeat_interleave(32, dim=1)
    x = torch.randn(rows, columns, generator=_GENERATOR) * size
    x[torch.rand(rows, columns, generator=_GENERATOR) < 0.02] = 0.0
    x[3] = 0.0
    return x.bfloat16()


def main() -> None:
    checks = [scales, delayed, current, linear, blocks, fp4, fp4_linear]
    if (Path(_FOLDER) / "torchao").is_dir():
        checks.append(mx)
    print(json.dumps({check.__name__: check() for check in checks}))


if __name__ == "__main__":
    main()
