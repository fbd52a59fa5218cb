"""The chunk-local part of the momentum gated delta rule, for a group of chunks, forward and backward.

Shapes: N chunks, E batch elements × heads, C tokens of a chunk, R reads per token, K key width, V value width, P parts
of the state: M and S, or M alone without momentum. Z is the state as (E, P·K, V).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vishwamai_mp.neural_memory.coefficients import coefficients, coefficients_backward
from vishwamai_mp.runtime.products import add_product, product

_EPSILON = 1e-12  # added to squared lengths


@dataclass(frozen=True)
class Inputs:
    """The tokens of a group. Also holds their gradients.

    Attributes:
        reads: q, (N, E, R·C, K), of any length: all tokens of one read, then the next.
        keys: k, (N, E, C, K), of any length.
        values: v, (N, E, C, V).
        log_forget: ln α, (N, E, C).
        log_momentum: ln η, (N, E, C), or None.
        rate: θ, (N, E, C).
    """

    reads: Tensor
    keys: Tensor
    values: Tensor
    log_forget: Tensor
    log_momentum: Tensor | None
    rate: Tensor


class Group:
    """Everything that does not depend on the state: computed for all chunks at once, then `run` from a state.

    With W, X (tokens by state) and A (tokens by tokens, unit lower triangular):  U = A⁻¹(θV − W Z),  Z' = D Z + XᵀU.
    """

    def __init__(self, inputs: Inputs, starts: Tensor | None) -> None:
        """`starts` (N, E, C) bool, True at a document's first token; None: nowhere."""
        self.inputs = inputs
        (self.reads, self.read_scale), (self.keys, self.key_scale) = unit(inputs.reads), unit(inputs.keys)
        k, theta = self.keys, inputs.rate[..., None]
        self.decays = coefficients(inputs.log_forget, inputs.log_momentum, starts)
        self.before = self.decays.delay(self.decays.reach[..., 1:])  # worth of a write in M before token t
        self.similarity = product(k, k.mT)
        strictly_lower = self.before * self.similarity
        eye = torch.eye(k.shape[-2], dtype=k.dtype, device=k.device).expand_as(strictly_lower)
        self.inverse = torch.linalg.solve_triangular(strictly_lower.mul_(theta), eye, upper=False, unitriangular=True)
        self.erase_W = _scale(k, [theta * worth for worth in self.decays.before()])
        self.write_X = _scale(k, self.decays.at_end())
        # D: worth of the carried parts after the chunk, each (N, E, 1, 1).
        self.carry = [column[:, :, -1:] for column in [*self.decays.after(), *self._momentum_carry()]]

    def _momentum_carry(self) -> list[Tensor]:
        return [] if self.decays.momentum is None else [self.decays.momentum[..., :1]]

    def run(self, state: Tensor, updates: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """From Z before the group: U, (N, E, C, V), and Z before each chunk and after the last, (N+1, E, P·K, V).

        Given U, only Z is computed.
        """
        known = updates is not None
        if updates is None:
            updates = self.inputs.values * self.inputs.rate[..., None]
        states = state.new_empty(len(updates) + 1, *state.shape)
        states[0] = state
        for n, update in enumerate(updates):
            if not known:
                rest = add_product(update.clone(), self.erase_W[n], states[n], scale=-1)
                product(self.inverse[n], rest, out=update)
            self._carry(n, states[n], states[n + 1])
            add_product(states[n + 1], self.write_X[n].mT, update)
        return updates, states

    def _carry(self, n: int, state: Tensor, out: Tensor) -> None:
        """D Z."""
        if len(self.carry) == 1:
            torch.mul(state, self.carry[0][n], out=out)
            return
        forget, reach, momentum = (part[n] for part in self.carry)
        (old_m, old_s), (new_m, new_s) = (z.chunk(2, dim=1) for z in (state, out))
        torch.mul(old_m, forget, out=new_m)
        new_m.addcmul_(old_s, reach)
        torch.mul(old_s, momentum, out=new_s)

    def _carry_back(self, n: int, grad: Tensor, into: Tensor) -> None:
        """Add Dᵀ dZ'."""
        if len(self.carry) == 1:
            into.addcmul_(grad, self.carry[0][n])
            return
        forget, reach, momentum = (part[n] for part in self.carry)
        (new_m, new_s), (old_m, old_s) = (z.chunk(2, dim=1) for z in (grad, into))
        old_m.addcmul_(new_m, forget)
        old_s.addcmul_(new_m, reach)
        old_s.addcmul_(new_s, momentum)

    def read(self, updates: Tensor, states: Tensor) -> Tensor:
        """O, (N, E, R·C, V)."""
        q = self.reads
        scores = product(q, self.keys.mT).mul_(self._reach(q))
        return add_product(product(self._read_weights(), states[:-1]), scores, updates)

    def _read_weights(self) -> Tensor:
        q = self.reads
        return _scale(q, [_tile(column, q) for column in self.decays.after()])

    def _reach(self, reads: Tensor) -> Tensor:
        """G: what a write is worth in M after token t, for each read. (N, E, R·C, C)."""
        return _tile(self.decays.reach[..., 1:], reads)

    def backward(self, updates: Tensor, states: Tensor, d_out: Tensor, d_state: Tensor) -> tuple[Inputs, Tensor]:
        """Gradients of the inputs and of the state before the group.

        Args:
            updates: U, as `run` gave it.
            states: as `run` gave them.
            d_out: of `read`'s result.
            d_state: of the state after the group, (E, P·K, V).
        """
        q, k, v = self.reads, self.keys, self.inputs.values
        products, reach = product(q, k.mT), self._reach(q)
        d_updates = product((products * reach).mT, d_out)
        d_states = torch.empty_like(states)
        product(self._read_weights().mT, d_out, out=d_states[:-1])
        d_states[-1] = d_state
        d_rest = d_updates  # of θV − W Z; takes the place of d_updates chunk by chunk
        for n in reversed(range(len(updates))):
            d_update = add_product(d_updates[n].clone(), self.write_X[n], d_states[n + 1])
            product(self.inverse[n].mT, d_update, out=d_rest[n])
            self._carry_back(n, d_states[n + 1], d_states[n])
            add_product(d_states[n], self.erase_W[n].mT, d_rest[n], scale=-1)
        theta = self.inputs.rate[..., None]
        d_values = d_rest * theta
        d_rate = (d_rest * v).sum(-1)
        before, at_end, after = self.decays.before(), self.decays.at_end(), self.decays.after()

        # W = θ [f₋k, h₋k] and X = [G_C k, η_C k], from U = A⁻¹(θV − W Z) and Z' = D Z + XᵀU.
        d_keys = torch.zeros_like(k)
        d_W = product(d_rest, states[:-1].mT).neg_()
        d_before = _scale_back(d_W, k, [theta * worth for worth in before], d_keys)
        d_rate += sum((d_b * worth)[..., 0] for d_b, worth in zip(d_before, before, strict=True))
        d_X = product(updates, d_states[1:].mT, out=d_W)
        d_at_end = _scale_back(d_X, k, at_end, d_keys)
        del d_W, d_X

        # A = 1 + θ ⊙ G₋ ⊙ KKᵀ
        d_A = product(d_rest, updates.mT).neg_()
        d_rate += torch.einsum("necj,necj,necj->nec", d_A, self.before, self.similarity)
        d_A.mul_(theta)
        d_similarity = d_A * self.before
        add_product(d_keys, d_similarity + d_similarity.mT, k)
        d_delayed = d_A.mul_(self.similarity)

        # O = [f q, h q] Z + (QKᵀ ⊙ G) U
        d_reads = torch.zeros_like(q)
        d_after = _scale_back(product(d_out, states[:-1].mT), q, [_tile(column, q) for column in after], d_reads)
        d_scores = product(d_out, updates.mT)
        d_products = d_scores * reach
        add_product(d_reads, d_products, k)
        add_product(d_keys, d_products.mT, q)
        d_reach = torch.zeros_like(self.decays.reach)
        d_reach[..., 1:] = _untile(d_scores.mul_(products), k)
        d_reach[..., 1:] += self.decays.undelay(d_delayed)

        # The state's own coefficients: into, through and out of the chunk.
        d_carry = self._d_carry(d_states[1:], states[:-1])
        d_columns = [
            _untile(d_column, k) + self.decays.undelay(theta * d_b)
            for d_column, d_b in zip(d_after, d_before, strict=True)
        ]
        for d_column, d_last in zip(d_columns, d_carry, strict=False):
            d_column[:, :, -1:] += d_last
        d_reach[:, :, -1, 1:] += d_at_end[0][..., 0]
        d_momentum_last = None
        if self.decays.momentum is not None:
            d_reach[..., :1] += d_columns[1]
            d_momentum_last = torch.cat((d_carry[2][..., 0], d_at_end[1][..., 0]), dim=-1)
        d_log_forget, d_log_momentum = coefficients_backward(
            self.decays, d_columns[0][..., 0], d_momentum_last, d_reach
        )
        d_reads, d_keys = _unit_back(d_reads, q, self.read_scale), _unit_back(d_keys, k, self.key_scale)
        return Inputs(d_reads, d_keys, d_values, d_log_forget, d_log_momentum, d_rate), d_states[0]

    def _d_carry(self, d_states: Tensor, states: Tensor) -> list[Tensor]:
        """Gradients of D's entries, each (N, E, 1, 1)."""
        if len(self.carry) == 1:
            return [_inner(d_states, states)]
        (d_m, d_s), (m, s) = (z.chunk(2, dim=2) for z in (d_states, states))
        return [_inner(d_m, m), _inner(d_m, s), _inner(d_s, s)]


def unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors of length 1 (0 where x is 0), and what x was multiplied by."""
    scale = (torch.linalg.vecdot(x, x)[..., None] + _EPSILON).rsqrt_()
    return x * scale, scale


def _unit_back(grad: Tensor, unit: Tensor, scale: Tensor) -> Tensor:
    """The gradient of x from that of its unit vector, which is consumed."""
    along = torch.linalg.vecdot(grad, unit)[..., None]
    return grad.addcmul_(unit, along, value=-1).mul_(scale)


def _scale(x: Tensor, columns: list[Tensor]) -> Tensor:
    """[c₁x, c₂x, …] side by side: (N, E, C, K) → (N, E, C, P·K)."""
    width = x.shape[-1]
    out = x.new_empty(*x.shape[:-1], len(columns) * width)
    for part, column in zip(out.split(width, dim=-1), columns, strict=True):
        torch.mul(x, column, out=part)
    return out


def _scale_back(grad: Tensor, x: Tensor, columns: list[Tensor], d_x: Tensor) -> list[Tensor]:
    """Gradients of `_scale`'s columns, (N, E, C, 1); that of x is added to `d_x`."""
    d_columns = []
    for part, column in zip(grad.split(x.shape[-1], dim=-1), columns, strict=True):
        d_x.addcmul_(part, column)
        d_columns.append((part * x).sum(-1, keepdim=True))
    return d_columns


def _tile(x: Tensor, reads: Tensor) -> Tensor:
    """(N, E, C, ·) for each of the R reads of a token: (N, E, R·C, ·)."""
    count = reads.shape[2] // x.shape[2]
    return x if count == 1 else x.repeat(1, 1, count, 1)


def _untile(grad: Tensor, tokens: Tensor) -> Tensor:
    length = tokens.shape[2]
    return grad if grad.shape[2] == length else grad.unflatten(2, (-1, length)).sum(2)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((-1, -2), keepdim=True)
