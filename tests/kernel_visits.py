"""Programs that look at Triton kernels: how tests run them, and what they do with a launch in place of launching."""

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: pip install triton"
)


def said_by(program: Path, *arguments: str) -> dict[str, Any]:
    """The last line that a program prints, which is JSON."""
    run = subprocess.run([sys.executable, str(program), *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def compiling(found: dict[str, dict[str, int]], target: int, wanted: str | None) -> Callable[..., None]:
    """Compile each kernel for sm_`target`; note its registers, bytes on the stack and shared memory; see `run_kernel`.

    Args:
        found: by kernel's name, filled.
        target: 80, 90, 100, ….
        wanted: a kernel's name; None: all.
    """
    import triton
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def compile_one(
        module: str,
        name: str,
        grid: Any,
        inputs: Any,
        outputs: Any,
        sizes: Any,
        constants: Any,
        flops: int = 0,
        warps: int = 8,
    ) -> None:
        if wanted not in (None, name) or name in found:
            return
        kernel, arguments = getattr(import_module(f"vishwamai_mp.{module}"), name), [*inputs, *outputs, *sizes]
        types = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.uint8: "*u8", torch.int64: "*i64"}
        types[torch.int32] = "*i32"
        signature = {
            label: types[x.dtype] if isinstance(x, Tensor) else "fp32" if isinstance(x, float) else "i32"
            for label, x in zip(kernel.arg_names, arguments, strict=False)
        }
        # What Triton itself finds out at a launch: pointers and sizes that 16 divides.
        divisible = {
            (place,): [["tt.divisibility", 16]]
            for place, x in enumerate(arguments)
            if isinstance(x, Tensor) or (isinstance(x, int) and x % 16 == 0)
        }
        source = ASTSource(
            kernel, signature=signature | dict.fromkeys(constants, "constexpr"), constexprs=constants, attrs=divisible
        )
        options = {"num_warps": warps, "num_stages": 1}
        compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            program = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
            usage = subprocess.run([program, "-res-usage", file.name], capture_output=True, text=True, check=True)
        counts = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout))
        found[name] = {
            "registers": int(counts["REG"]),
            "spilled_bytes": int(counts["STACK"]) + int(counts["LOCAL"]),
            "shared_bytes": compiled.metadata.shared,
        }
        print(name, found[name], file=sys.stderr, flush=True)

    return compile_one


def counting(found: dict[str, dict[str, float]], peak: float = 495) -> Callable[..., None]:
    """Note bytes and FLOPs of each launch, and its least time on an H100, each tensor moved once; see `run_kernel`.

    `peak` is that of its products in TFLOP/s: by the data sheet 495 in TF32, 989 in bf16.
    """

    def count(
        module: str,
        name: str,
        grid: Any,
        inputs: Any,
        outputs: Any,
        sizes: Any,
        constants: Any,
        flops: int = 0,
        warps: int = 8,
    ) -> None:
        tensors = {id(x): x for x in (*inputs, *outputs) if isinstance(x, Tensor)}
        moved = sum(x.numel() * x.element_size() for x in tensors.values())
        found[name] = {
            "gigabytes": moved / 1e9,
            "teraflops": flops / 1e12,
            "milliseconds": 1e3 * max(moved / 3.35e12, flops / (peak * 1e12)),
        }

    return count
