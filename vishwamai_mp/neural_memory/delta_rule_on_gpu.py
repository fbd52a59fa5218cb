"""The momentum delta rule by the kernels of `delta_rule_kernels.py`: which cases they take, and their launches.

Shapes: as in `delta_rule_kernels.py`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vishwamai_mp.runtime import triton_kernels
from vishwamai_mp.runtime.triton_kernels import kernels_take, power_of_two

_WIDEST = 128
_WARPS = 8
# Of the state, for one program that goes from chunk to chunk: with 16, `scan` needs more registers than there are. In
# four warps two such programs fit on a multiprocessor, so that all of them run at once.
_COLUMNS, _COLUMN_WARPS = 8, 4


def supports(reads: Sequence[Tensor], keys: Tensor, values: Tensor) -> bool:
    """Whether the kernels compute this case; if not, torch's operators do, on any device.

    They take one or two reads and heads up to 128 wide, where kernels run at all.
    """
    return kernels_take(keys, values, *reads) and max(keys.shape[-1], values.shape[-1]) <= _WIDEST and len(reads) <= 2


class DeltaRuleOnGpu(torch.autograd.Function):
    """`delta_rule._DeltaRule` by kernels: same arguments, results and gradients. Keeps inputs, U, first state."""

    @staticmethod
    def forward(ctx: Any, chunk_size: int, starts: Tensor | None, state: Tensor, *tokens: Tensor | None) -> Any:
        call = Launches(chunk_size, starts, state.contiguous(), *tokens)
        outputs, final, surprise, updates = call.forward()
        surprise = surprise.sum()
        ctx.chunk_size = chunk_size
        ctx.save_for_backward(starts, state, updates, *tokens)
        ctx.mark_non_differentiable(surprise)
        ctx.set_materialize_grads(False)
        return final, surprise, *outputs

    @staticmethod
    def backward(ctx: Any, d_final: Tensor | None, _: Any, *d_reads: Tensor | None) -> Any:
        starts, state, updates, *tokens = ctx.saved_tensors
        call = Launches(ctx.chunk_size, starts, state.contiguous(), *tokens)
        d_outputs = [torch.zeros_like(call.values) if grad is None else grad.contiguous() for grad in d_reads]
        d_state, *grads = call.backward(updates, d_outputs, None if d_final is None else d_final.contiguous())
        return None, None, d_state, *grads


class Launches:
    """The kernels' launches for one call, on the device of its tensors.

    Args:
        chunk_size: wished; the kernels' is 16 or 32: with 64, `scan` needs more shared memory than an H100 has.
        starts: (T, B) bool or None.
        state: (B, H, P, K, V) fp32, contiguous; None: the empty one.
        tokens: keys, values, ln α, ln η or None, θ, and the reads; as `momentum_delta_rule` gets them.
        taken: the second read is taken off what the tensor holds where it is to be put.
    """

    def __init__(
        self,
        chunk_size: int,
        starts: Tensor | None,
        state: Tensor | None,
        *tokens: Tensor | None,
        taken: bool = False,
    ) -> None:
        keys, values, log_forget, log_momentum, rate, *reads = tokens
        assert keys is not None and values is not None and log_forget is not None and rate is not None  # noqa: PT018
        self.keys, self.values, self.state = _by_rows(keys), _by_rows(values), state
        self.reads = [_by_rows(read) for read in reads if read is not None]
        self.log_forget, self.rate = log_forget.contiguous(), rate.contiguous()
        self.log_momentum = None if log_momentum is None else log_momentum.contiguous()
        self.starts = None if starts is None else starts.contiguous().view(torch.uint8)
        self.length, self.batch, self.heads, self.width = keys.shape
        self.value_width, self.rows = values.shape[-1], self.batch * self.heads
        self.chunk = min(32, max(16, power_of_two(min(chunk_size, self.length))))
        self.chunks = -(-self.length // self.chunk)
        self.parts, self.taken = 1 if log_momentum is None else 2, taken and len(self.reads) > 1
        self.key_block, self.value_block = power_of_two(self.width), power_of_two(self.value_width)
        self.precision = "tf32x3" if values.dtype == torch.float32 else "tf32"

    def forward(
        self, outputs: list[Tensor] | None = None, surprise: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        """What was read, (T, B, H, V) each; the last state; numbers that add up to Σ‖u‖²; U.

        Args:
            outputs: where to put what was read; new ones if None. The first is contiguous.
            surprise: likewise, as many numbers as `surprise_count`.
        """
        prepared = self._prepare()
        if outputs is None:
            outputs = [torch.empty_like(self.values, memory_format=torch.contiguous_format) for _ in self.reads]
        final, updates = self._new_state(), self._new(self.chunks * self.chunk, self.value_width)
        second = outputs[-1]
        grid = self._columns_grid()
        surprise = self._new(grid[0]) if surprise is None else surprise
        self._launch(
            "scan",
            grid,
            [
                *(*_at(self.keys), *_at(self.values), *self._reads(), self.rate, *prepared),
                *(self.rate if self.state is None else self.state, *_at(second)[1:]),
            ],
            [final, outputs[0], second, updates, surprise],
            [self.length, self.rows, self.width, self.value_width, self.chunks],
            self._constants("KP", "VB", "READS", "MOMENTUM") | {"GIVEN": self.state is not None, "TAKEN": self.taken},
            self._state_products(1 + len(self.reads)) + self._state_products(1) + self._pair_products(1, True),
        )
        return outputs, final, surprise, updates

    @property
    def surprise_count(self) -> int:
        return self.rows * self._columns_grid()[0]

    def backward(
        self,
        updates: Tensor,
        d_outputs: list[Tensor],
        d_final: Tensor | None,
        into: Sequence[Tensor | None] | None = None,
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the state and of `tokens`.

        Args:
            updates: U, as `forward` gave it.
            d_outputs: of what was read, contiguous.
            d_final: of the last state, contiguous; None: there is none.
            into: contiguous, where to put the gradients of `tokens`; new ones if None.
        """
        if into is None:
            given = (self.keys, self.values, self.log_forget, self.log_momentum, self.rate, *self.reads)
            into = [None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in given]
        d_keys, d_values, d_log_forget, d_log_momentum, d_rate, *others = into
        d_reads = [read for read in others if read is not None]
        assert d_keys is not None and d_values is not None and d_log_forget is not None and d_rate is not None  # noqa: PT018
        columns, scales, inverse, scores = prepared = self._prepare()
        count = len(self.reads)
        before = self._new(self.chunks, self.parts, self.width, self.value_width)
        after, d_rest, d_state = torch.empty_like(before), torch.empty_like(updates), self._new_state()
        keys, reads, d_outs = _at(self.keys), self._reads(), _pair(d_outputs)
        self._launch(
            "states",
            self._columns_grid(),
            [*keys, columns],
            [self.rate if self.state is None else self.state, updates, before],
            [self.length, self.width, self.value_width, self.chunks],
            self._constants("KP", "VB", "MOMENTUM") | {"GIVEN": self.state is not None},
            self._state_products(1),
        )
        self._launch(
            "scan_back",
            self._columns_grid(),
            [*keys, *reads, self.rate, *prepared, *d_outs, self.rate if d_final is None else d_final],
            [after, d_state, d_rest, d_values],
            [self.length, self.rows, self.width, self.value_width, self.chunks],
            self._constants("KP", "VB", "READS", "MOMENTUM") | {"GIVEN": d_final is not None},
            self._state_products(2 + count) + self._pair_products(1 + count, True),
        )
        del inverse, scores, prepared
        d_products = self._new(self.chunks, 1 + count, self.chunk, self.chunk)
        d_reach = self._new(self.chunks, 2, self.chunk, self.chunk)
        gates = [self.log_forget, self._momentum(), self.rate, self._starts()]
        sizes = [self.length, self.rows, self.heads, self.batch, self.width]
        self._launch(
            "pairs",
            (self.chunks, self.rows),
            [*keys, *_at(self.values), *reads, *gates, columns, scales, updates, d_rest, *d_outs],
            [d_products, d_reach, d_rate],
            [*sizes, self.value_width, self.chunks],
            self._constants("KP", "VP", "READS", "MOMENTUM", "STARTS"),
            self._pair_products(1 + count, True) + self._pair_products(1 + count) + self._decay_products(2),
        )
        d_units = self._new(1 + count, self.chunks * self.chunk, self.width)
        d_columns, d_scales = torch.empty_like(columns), torch.empty_like(scales)
        self._launch(
            "vectors",
            (self.chunks, self.rows),
            [*keys, *reads, self.rate, columns, scales, updates, d_rest, *d_outs, before, after, d_products],
            [d_units, d_columns, d_scales],
            [self.length, self.rows, self.width, self.value_width, self.chunks],
            self._constants("KP", "VP", "READS", "MOMENTUM"),
            self._state_products(2 + count) + self._pair_products(1 + 2 * count),
        )
        del before, after, d_products
        self._launch(
            "finish",
            (self.chunks, self.rows),
            [*keys, *reads, *gates, columns, scales, d_units, d_columns, d_scales, d_reach],
            [
                d_keys,
                *_pair(d_reads),
                d_log_forget,
                d_log_forget if d_log_momentum is None else d_log_momentum,
                d_rate,
            ],
            [*sizes, self.chunks],
            self._constants("KP", "READS", "MOMENTUM", "STARTS"),
            self._decay_products(4),
        )
        return d_state, d_keys, d_values, d_log_forget, d_log_momentum, d_rate, *d_reads

    def _prepare(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`columns`, `scales`, `inverse`, `scores`."""
        count, square = len(self.reads), (self.chunk, self.chunk)
        made = (
            self._new(self.chunks, 8, self.chunk),
            self._new(self.chunks, count, self.chunk),
            self._new(self.chunks, *square),
            self._new(self.chunks, count, *square),
        )
        self._launch(
            "prepare",
            (self.chunks, self.rows),
            [*_at(self.keys), *self._reads(), self.log_forget, self._momentum(), self.rate, self._starts()],
            list(made),
            [self.length, self.rows, self.heads, self.batch, self.width, self.chunks],
            self._constants("KP", "READS", "MOMENTUM", "STARTS") | {"TAKEN": self.taken},
            self._pair_products(1 + count) + self._decay_products(2) + self._inverse_products(),
        )
        return made

    def _launch(
        self,
        name: str,
        grid: tuple[int, int],
        inputs: list[Any],
        outputs: list[Tensor],
        sizes: list[int],
        constants: dict[str, Any],
        flops: int,
    ) -> None:
        warps = _COLUMN_WARPS if "VB" in constants else _WARPS
        triton_kernels.run_kernel(
            "neural_memory.delta_rule_kernels", name, grid, inputs, outputs, sizes, constants, flops, warps
        )

    def _constants(self, *names: str) -> dict[str, Any]:
        values = {
            "KP": self.key_block,
            "VP": self.value_block,
            "VB": min(_COLUMNS, self.value_block),
            "READS": len(self.reads),
            "MOMENTUM": self.log_momentum is not None,
            "STARTS": self.starts is not None,
        }
        return {"C": self.chunk, **{name: values[name] for name in names}, "PRECISION": self.precision}

    def _columns_grid(self) -> tuple[int, int]:
        return -(-self.value_width // min(_COLUMNS, self.value_block)), self.rows

    def _new_state(self) -> Tensor:
        return self._new(self.parts, self.width, self.value_width).unflatten(0, (self.batch, self.heads))

    def _new(self, *shape: int) -> Tensor:
        return torch.empty((self.rows, *shape), dtype=torch.float32, device=self.keys.device)

    def _reads(self) -> list[Any]:
        """Of two reads; a kernel that takes one ignores the second."""
        return [*_at(self.reads[0]), *_at(self.reads[-1])]

    def _momentum(self) -> Tensor:
        return self.log_forget if self.log_momentum is None else self.log_momentum

    def _starts(self) -> Tensor:
        return self.log_forget if self.starts is None else self.starts

    def _state_products(self, count: int) -> int:
        """FLOPs of `count` products of all tokens' vectors with the state."""
        return count * 2 * self.rows * self.chunks * self.chunk * self.parts * self.width * self.value_width

    def _pair_products(self, count: int, values: bool = False) -> int:
        """FLOPs of `count` products over pairs of a chunk's tokens, of keys or of values."""
        return count * 2 * self.rows * self.chunks * self.chunk**2 * (self.value_width if values else self.width)

    def _decay_products(self, count: int) -> int:
        return 0 if self.log_momentum is None else count * 2 * self.rows * self.chunks * self.chunk**3

    def _inverse_products(self) -> int:
        joins = {16: 0, 32: 1}[self.chunk]
        return 2 * joins * 2 * self.rows * self.chunks * self.chunk**3


def _by_rows(x: Tensor) -> Tensor:
    """(T, B, H, ·) such that a token's rows lie at equal distances, as they do in slices of a projection."""
    regular = x.stride(-1) == 1 and (x.shape[1] == 1 or x.stride(1) == x.shape[2] * x.stride(2))
    return x if regular else x.contiguous()


def _at(x: Tensor) -> list[Any]:
    """A tensor, its stride per token and per row."""
    return [x, x.stride(0), x.stride(2)]


def _pair(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensors[0], tensors[-1]]
