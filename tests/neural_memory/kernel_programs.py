"""Programs that look at the memory's Triton kernels without a GPU; each runs in a process of its own.

usage: kernel_programs.py interpret            the kernels' results beside the CPU's, by Triton's interpreter
       kernel_programs.py compile SM [KERNEL]  registers, spills and shared memory of the kernels on sm_SM
       kernel_programs.py roofline             bytes, FLOPs and the least time of each launch on an H100

Each prints JSON. The first two need Triton.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
if "interpret" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

import torch
from torch import Tensor

from tests.neural_memory.test_delta_rule import everything, furthest, tokens
from vishwamai_mp.neural_memory.delta_rule import empty_state, momentum_delta_rule
from vishwamai_mp.neural_memory.delta_rule_on_gpu import WARPS, DeltaRuleOnGpu, Launches

# Tokens, chunk, rows, heads, widths of keys and values, reads, momentum, documents, carried state.
_CASES: list[tuple[int, int, int, int, int, int, int, bool, bool, bool]] = [
    (20, 16, 1, 1, 16, 16, 1, True, False, False),
    (9, 16, 2, 2, 8, 6, 2, True, True, True),
    (40, 32, 1, 1, 40, 33, 1, False, True, True),
    (70, 64, 1, 1, 128, 128, 2, True, True, True),
    (3, 64, 1, 2, 4, 4, 2, False, False, False),
]


def _by_kernels(
    reads: list[Tensor],
    keys: Tensor,
    values: Tensor,
    log_forget: Tensor,
    log_momentum: Tensor | None,
    rate: Tensor,
    starts: Tensor | None,
    state: Tensor | None,
    chunk_size: int,
) -> Any:
    if state is None:
        state = empty_state(keys, values, log_momentum is not None)
    final, surprise, *outputs = DeltaRuleOnGpu.apply(
        chunk_size, starts, state, keys, values, log_forget, log_momentum, rate, *reads
    )
    return outputs, final, surprise


def interpret() -> None:
    """Of each case the largest difference of any result or gradient, in terms of its largest entry."""
    found = {}
    for case in _CASES:
        length, chunk, batch, heads, width, value_width, reads, momentum, documents, carried = case
        inputs = tokens(
            length,
            batch=batch,
            heads=heads,
            width=width,
            values=value_width,
            reads=reads,
            momentum=momentum,
            dtype=torch.float32,
        )
        generator = torch.Generator().manual_seed(2)
        starts = torch.rand(length, batch, generator=generator) < 0.1 if documents else None
        shape = (batch, heads, 2 if momentum else 1, width, value_width)
        state = torch.randn(shape, generator=generator) if carried else None
        ours = everything(_by_kernels, inputs, starts, state, chunk_size=chunk)
        theirs = everything(momentum_delta_rule, inputs, starts, state, chunk_size=chunk)
        found[" ".join(map(str, case))] = furthest(ours, theirs)
    print(json.dumps(found))


class _Compiled(Launches):
    """Compiles what would be launched."""

    target: int
    wanted: str | None
    found: dict[str, dict[str, int]]

    def _launch(
        self, name: str, grid: Any, inputs: Any, outputs: Any, sizes: Any, constants: dict[str, Any], flops: int
    ) -> None:
        if self.wanted not in (None, name) or name in self.found:
            return
        import triton
        from triton.backends import nvidia
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        from vishwamai_mp.neural_memory import delta_rule_kernels

        kernel, arguments = getattr(delta_rule_kernels, name), [*inputs, *outputs, *sizes]
        types = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.uint8: "*u8"}
        signature = {
            label: types[x.dtype] if isinstance(x, Tensor) else "i32"
            for label, x in zip(kernel.arg_names, arguments, strict=False)
        }
        # What Triton itself finds out at a launch: pointers and sizes that 16 divides.
        divisible = {
            (place,): [["tt.divisibility", 16]]
            for place, x in enumerate(arguments)
            if isinstance(x, Tensor) or x % 16 == 0
        }
        source = ASTSource(
            kernel, signature=signature | dict.fromkeys(constants, "constexpr"), constexprs=constants, attrs=divisible
        )
        options = {"num_warps": WARPS, "num_stages": 1}
        compiled = triton.compile(source, target=GPUTarget("cuda", self.target, 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            program = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
            usage = subprocess.run([program, "-res-usage", file.name], capture_output=True, text=True, check=True)
        counts = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout))
        self.found[name] = {
            "registers": int(counts["REG"]),
            "spilled_bytes": int(counts["STACK"]) + int(counts["LOCAL"]),
            "shared_bytes": compiled.metadata.shared,
        }
        print(name, self.found[name], file=sys.stderr, flush=True)


class _Counted(Launches):
    """Adds up what would be launched."""

    found: dict[str, dict[str, float]]

    def _launch(
        self, name: str, grid: Any, inputs: Any, outputs: Any, sizes: Any, constants: dict[str, Any], flops: int
    ) -> None:
        tensors = {id(x): x for x in (*inputs, *outputs) if isinstance(x, Tensor)}
        moved = sum(x.numel() * x.element_size() for x in tensors.values())
        # An H100's data sheet: 3.35 TB/s; 495 TFLOP/s of products in TF32.
        self.found[name] = {
            "gigabytes": moved / 1e9,
            "teraflops": flops / 1e12,
            "milliseconds": 1e3 * max(moved / 3.35e12, flops / 495e12),
        }


def roofline() -> None:
    """One level of 16 heads, 128 wide, over 32,768 tokens in bf16, each tensor moved once."""
    found: dict[str, dict[str, float]] = {}
    _walk(_Counted, 32768, 16, found)
    print(json.dumps(found))


def _walk(kind: type[Launches], length: int, heads: int, found: dict[str, Any], **attributes: Any) -> None:
    """All launches of the largest case: bf16, heads 128 wide, two reads, momentum and documents."""

    def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(length, 1, heads, *shape, dtype=dtype, device="meta")

    starts = torch.empty(length, 1, dtype=torch.bool, device="meta")
    state = torch.empty(1, heads, 2, 128, 128, device="meta")
    gates = [tensor(dtype=torch.float32) for _ in range(3)]
    call = kind(64, starts, state, tensor(128), tensor(128), *gates, tensor(128), tensor(128))
    for name, value in (attributes | {"found": found}).items():
        setattr(call, name, value)
    _, final, _, updates = call.forward()
    call.backward(updates, [tensor(128), tensor(128)], final)


def compile_for(target: int, wanted: str | None) -> None:
    """Of the launches in `_walk`."""
    found: dict[str, dict[str, int]] = {}
    _walk(_Compiled, 2048, 4, found, target=target, wanted=wanted)
    print(json.dumps(found))


if __name__ == "__main__":
    if sys.argv[1] == "interpret":
        interpret()
    elif sys.argv[1] == "roofline":
        roofline()
    else:
        compile_for(int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)
