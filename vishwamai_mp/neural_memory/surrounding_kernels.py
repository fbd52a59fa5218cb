"""What surrounds the delta rule in the memory, as Triton kernels: the arithmetic of `convolution.py`, `gates.py` and
the end of `memory_module.py`.

`enter` convolves and opens the gates, `leave` mixes the levels, normalises and gates what was read; `leave_back` and
`enter_back` are their backward passes. `memory_on_gpu.py` launches them. This file imports Triton; it is imported where
kernels run. Each program takes a row (a batch element's head) and `span` tokens of it, TB at a time.

Shapes: T tokens, B batch, H heads, E = B·H rows, K head width (padded to KP), L levels, G gates of a level, J = 4 taps,
P programs of a row. Features of a head in `projected` (T, E, F): 3·L·K for the convolution, K of the read gate, L·G.

    mixed (T, E, 3·L, K)        queries, keys and values of each level
    gates (3, L, T, E) fp32     θ, ln α, ln of the momentum's coefficient
    parts (P, E, ·) fp32        sums of one program's tokens, to be added up. Of gradients of parameters (P, B, N): one
                                parameter, all heads, behind the other, as each lies in memory; the columns of one
                                kernel behind those of the other, so that (P, B) are `across` numbers apart
    d_mixed (4·L − 1, T, E, K)  gradients of a level's queries, keys and values and of the answer to the next one's keys
"""

import triton
import triton.language as tl

_LIMIT = tl.constexpr(30.0)  # as in gates.py, and the next
_MOST = tl.constexpr(0.9)
_LOG_MOST = tl.constexpr(-0.10536051565782628)
_TAPS = tl.constexpr(4)


@triton.jit
def _log1p(x):
    """Of x ≥ 0 exact to rounding: log(1 + x) alone would lose a forget gate that is nearly 1."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + _log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _starts(documents, tokens, b, length, STARTS: tl.constexpr):
    """Which tokens begin a document; tokens outside of the row do not."""
    if STARTS:
        inside = (tokens >= 0) & (tokens < length)
        row = documents + b.to(tl.int64) * length
        own = tl.load(row + tokens, inside, 0)
        earlier = tl.load(row + tokens - 1, inside & (tokens > 0), 0)
        return inside & (own != earlier)
    else:
        return tokens < -_TAPS


@triton.jit
def _features(x, tokens, row, rows, features, columns, inside):
    return tl.load(x + (tokens.to(tl.int64)[:, None] * rows + row) * features + columns[None, :], inside, 0.0).to(
        tl.float32
    )


@triton.jit
def _inputs(projected, before, tokens, row, rows, features, place, convolved, length, width, KP: tl.constexpr,
            BEFORE: tl.constexpr):  # fmt: skip
    """(TB, KP) of the features from `place` on; tokens before the row are `before`'s, or 0."""
    columns = tl.arange(0, KP)
    narrow = (columns < width)[None, :]
    here = ((tokens >= 0) & (tokens < length))[:, None] & narrow
    x = _features(projected, tokens, row, rows, features, place + columns, here)
    if BEFORE:
        there = ((tokens < 0) & (tokens > -_TAPS))[:, None] & narrow
        x += _features(before, tokens + (_TAPS - 1), row, rows, convolved, place + columns, there)
    return x


@triton.jit
def _gate(logit, bias, inside):
    """A gate's logit, bias included, within its limits."""
    x = tl.load(logit, inside, 0.0).to(tl.float32) + tl.load(bias).to(tl.float32)
    return tl.minimum(tl.maximum(x, -_LIMIT), _LIMIT)


@triton.jit
def _passed(grad, logit, bias, inside):
    """The gradient where the limits let it through."""
    x = tl.load(logit, inside, 0.0).to(tl.float32) + tl.load(bias).to(tl.float32)
    return tl.where(inside & (tl.abs(x) <= _LIMIT), grad, 0.0)


@triton.jit
def _ratio(held_logit):
    """ln η/(1 − η)."""
    return -_softplus(-held_logit) - tl.log(1.0 - _sigmoid(held_logit) * _MOST) + _LOG_MOST


@triton.jit
def _write_limit(held):
    """The largest β and its derivative."""
    wide = 1.0 + held * held / _MOST
    share = 1.0 / (wide * (1.0 + _MOST))
    d_share = -share * (2.0 * held / _MOST) / wide
    first, second = 2.0 * (1.0 - held * held) * share, tl.sqrt(share)
    d_first = -4.0 * held * share + 2.0 * (1.0 - held * held) * d_share
    return tl.minimum(first, second), tl.where(first < second, d_first, d_share / (2.0 * second))


@triton.jit
def _keep(recent, x, tokens, row, rows, convolved, columns, narrow, documents, b, length, STARTS: tl.constexpr):
    """The last J − 1 tokens' features, 0 where they are of another document than the last."""
    same = tokens < length
    for delay in tl.static_range(1, _TAPS - 1):
        same = same & ~_starts(documents, tokens + delay, b, length, STARTS)
    place = tokens - (length - (_TAPS - 1))
    at = recent + (place.to(tl.int64)[:, None] * rows + row) * convolved + columns[None, :]
    tl.store(at, tl.where(same[:, None], x, 0.0), (place >= 0)[:, None] & (tokens < length)[:, None] & narrow[None, :])


@triton.jit
def enter(
    projected, before, taps, gate_bias, ratios, documents, starts, mixed, gates, recent, last_ratios, parts,
    length, rows, heads, features, width, span,
    LEVELS: tl.constexpr, GATES: tl.constexpr, TB: tl.constexpr, KP: tl.constexpr, BEFORE: tl.constexpr,
    STARTS: tl.constexpr,
):  # fmt: skip
    """`mixed`, `gates`, starts of documents, what later tokens need; of `parts` (P, E, 3·L + 1) the sums of α and β.

    Grid: (P, E)."""
    p, row = tl.program_id(0), tl.program_id(1)
    slices: tl.constexpr = 3 * LEVELS
    count: tl.constexpr = GATES * LEVELS
    head, b = row % heads, row // heads
    columns = tl.arange(0, KP)
    narrow = columns < width
    convolved = slices * width
    total = length.to(tl.int64) * rows
    begin, end = p * span, tl.minimum(length, (p + 1) * span)
    for s in range(slices):
        tap = taps + (head * convolved + s * width + columns) * _TAPS
        for first in range(begin, end, TB):
            tokens = first + tl.arange(0, TB)
            same = tokens < length
            found = tl.zeros((TB, KP), tl.float32)
            for delay in tl.static_range(_TAPS):
                if delay > 0:
                    same = same & ~_starts(documents, tokens - (delay - 1), b, length, STARTS)
                x = _inputs(
                    projected, before, tokens - delay, row, rows, features, s * width, convolved, length, width, KP,
                    BEFORE,
                )  # fmt: skip
                if delay == 0:
                    _keep(recent, x, tokens, row, rows, convolved, s * width + columns, narrow, documents, b, length,
                          STARTS)  # fmt: skip
                weight = tl.load(tap + (_TAPS - 1 - delay), narrow, 0.0).to(tl.float32)
                found += tl.where(same[:, None], x, 0.0) * weight[None, :]
            at = mixed + ((tokens.to(tl.int64)[:, None] * rows + row) * slices + s) * width + columns[None, :]
            tl.store(at, found, (tokens < length)[:, None] & narrow[None, :])
    for level in range(LEVELS):
        retained, written = tl.zeros((TB,), tl.float32), tl.zeros((TB,), tl.float32)
        for first in range(begin, end, TB):
            tokens = first + tl.arange(0, TB)
            here = tokens < length
            logit = projected + (tokens.to(tl.int64) * rows + row) * features + convolved + width + level * GATES
            bias = gate_bias + head * count + level * GATES
            write = _sigmoid(_gate(logit, bias, here))
            log_forget = -_softplus(_gate(logit + 1, bias + 1, here))
            at = gates + level * total + tokens.to(tl.int64) * rows + row
            rate = write
            if GATES == 3:
                held_logit = _gate(logit + 2, bias + 2, here)
                ratio = _ratio(_gate(logit + 2 - rows.to(tl.int64) * features, bias + 2, here & (tokens > 0)))
                # Before the first token nothing is held back, so any finite number will do.
                earlier = 0.0
                if BEFORE:
                    earlier = tl.load(ratios + level * rows + row)
                ratio = tl.where(tokens > 0, ratio, earlier)
                held = _sigmoid(held_logit) * _MOST
                limit, _ = _write_limit(held)
                write *= limit
                rate = write * (1.0 - held)
                tl.store(at + 2 * LEVELS * total, log_forget + tl.log(1.0 - held) + ratio, here)
                tl.store(last_ratios + level * rows + row + tokens * 0, _ratio(held_logit), tokens == length - 1)
            tl.store(at, rate, here)
            tl.store(at + LEVELS * total, log_forget, here)
            retained += tl.where(here, tl.exp(log_forget), 0.0)
            written += tl.where(here, write, 0.0)
            if STARTS:
                begins = _starts(documents, tokens, b, length, STARTS).to(tl.uint8)
                if head + level == 0:
                    tl.store(starts + tokens.to(tl.int64) * (rows // heads) + b, begins, here)
        part = parts + (p * rows + row) * (3 * LEVELS + 1) + level
        tl.store(part + LEVELS, tl.sum(retained, 0))
        tl.store(part + 2 * LEVELS, tl.sum(written, 0))


@triton.jit
def enter_back(
    projected, before, taps, gate_bias, documents, d_mixed, d_gates, d_last_ratios, d_projected, parts,
    length, rows, heads, features, width, span, across,
    LEVELS: tl.constexpr, GATES: tl.constexpr, TB: tl.constexpr, KP: tl.constexpr, BEFORE: tl.constexpr,
    STARTS: tl.constexpr, CARRIED: tl.constexpr,
):  # fmt: skip
    """Gradients of the features that convolution and gates saw; of taps and biases, (P, B, H·3·L·K·J + H·L·G)."""
    p, row = tl.program_id(0), tl.program_id(1)
    slices: tl.constexpr = 3 * LEVELS
    count: tl.constexpr = GATES * LEVELS
    head, b = row % heads, row // heads
    columns = tl.arange(0, KP)
    narrow = columns < width
    convolved = slices * width
    total = length.to(tl.int64) * rows
    part = parts + (p * (rows // heads) + b).to(tl.int64) * across
    begin, end = p * span, tl.minimum(length, (p + 1) * span)
    for s in range(slices):
        tap = taps + (head * convolved + s * width + columns) * _TAPS
        found = d_mixed + ((4 * (s // 3) + s % 3) * total + row) * width
        # The keys of a level but the first were read by the level before: that gradient lies behind its three.
        answer = d_mixed + ((4 * (s // 3) - 1) * total + row) * width
        answered = (s % 3 == 1) & (s > 3)
        d_0, d_1 = tl.zeros((KP,), tl.float32), tl.zeros((KP,), tl.float32)
        d_2, d_3 = d_0, d_1
        # The first program also sees the tokens before the row, for the taps that reached back to them.
        for first in range(tl.where(p == 0, begin - (_TAPS - 1), begin), end, TB):
            tokens = first + tl.arange(0, TB)
            own = tokens < end
            x = _inputs(projected, before, tokens, row, rows, features, s * width, convolved, length, width, KP, BEFORE)
            same = own
            d_x = tl.zeros((TB, KP), tl.float32)
            for delay in tl.static_range(_TAPS):
                later = tokens + delay
                if delay > 0:
                    same = same & ~_starts(documents, later, b, length, STARTS)
                inside = (same & (later >= 0) & (later < length))[:, None] & narrow[None, :]
                at = later.to(tl.int64)[:, None] * rows * width + columns[None, :]
                grad = tl.load(found + at, inside, 0.0).to(tl.float32)
                grad += tl.load(answer + at, inside & answered, 0.0).to(tl.float32)
                weight = tl.load(tap + (_TAPS - 1 - delay), narrow, 0.0).to(tl.float32)
                d_x += grad * weight[None, :]
                d_tap = tl.sum(grad * x, 0)
                if delay == 0:
                    d_0 += d_tap
                elif delay == 1:
                    d_1 += d_tap
                elif delay == 2:
                    d_2 += d_tap
                else:
                    d_3 += d_tap
            at = d_projected + (tokens.to(tl.int64)[:, None] * rows + row) * features + s * width + columns[None, :]
            tl.store(at, d_x, (own & (tokens >= 0))[:, None] & narrow[None, :])
        at = part + (head * convolved + s * width + columns) * _TAPS
        tl.store(at + 3, d_0, narrow)
        tl.store(at + 2, d_1, narrow)
        tl.store(at + 1, d_2, narrow)
        tl.store(at, d_3, narrow)
    for level in range(LEVELS):
        d_write, d_forget = tl.zeros((TB,), tl.float32), tl.zeros((TB,), tl.float32)
        d_held = tl.zeros((TB,), tl.float32)
        for first in range(begin, end, TB):
            tokens = first + tl.arange(0, TB)
            here = tokens < end
            place = (tokens.to(tl.int64) * rows + row) * features + convolved + width + level * GATES
            logit, bias = projected + place, gate_bias + head * count + level * GATES
            write, forget_logit = _sigmoid(_gate(logit, bias, here)), _gate(logit + 1, bias + 1, here)
            at = d_gates + level * total + tokens.to(tl.int64) * rows + row
            d_rate = tl.load(at, here, 0.0)
            d_log_forget = tl.load(at + LEVELS * total, here, 0.0)
            if GATES == 3:
                held_share = _sigmoid(_gate(logit + 2, bias + 2, here))
                held = held_share * _MOST
                limit, d_limit = _write_limit(held)
                momentum = at + 2 * LEVELS * total
                d_log_momentum = tl.load(momentum, here, 0.0)
                last = tokens == length - 1
                d_ratio = tl.load(momentum + rows, here & ~last, 0.0)
                if CARRIED:
                    d_ratio += tl.where(last, tl.load(d_last_ratios + level * rows + row), 0.0)
                d_log_forget += d_log_momentum
                by_held = d_rate * write * (d_limit * (1.0 - held) - limit)
                by_held -= (d_log_momentum - d_ratio) / (1.0 - held)
                found = d_ratio * (1.0 - held_share) + by_held * held * (1.0 - held_share)
                found = _passed(found, logit + 2, bias + 2, here)
                tl.store(d_projected + place + 2, found, here)
                d_held += found
                d_rate *= limit * (1.0 - held)
            found = _passed(d_rate * write * (1.0 - write), logit, bias, here)
            tl.store(d_projected + place, found, here)
            d_write += found
            found = _passed(-d_log_forget * _sigmoid(forget_logit), logit + 1, bias + 1, here)
            tl.store(d_projected + place + 1, found, here)
            d_forget += found
        at = part + heads * convolved * _TAPS + head * count + level * GATES
        tl.store(at, tl.sum(d_write, 0))
        tl.store(at + 1, tl.sum(d_forget, 0))
        if GATES == 3:
            tl.store(at + 2, tl.sum(d_held, 0))


@triton.jit
def _shares(mix, head, LEVELS: tl.constexpr, LP: tl.constexpr):
    """Of the levels in what is read: softmax."""
    levels = tl.arange(0, LP)
    logits = tl.load(mix + head * LEVELS + levels, levels < LEVELS, -float("inf")).to(tl.float32)
    worth = tl.exp(logits - tl.max(logits, 0))
    return worth / tl.sum(worth, 0)


@triton.jit
def _one(shares, level, LP: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, LP) == level, shares, 0.0), 0)


@triton.jit
def _read(outputs, shares, at, inside, stride, TB: tl.constexpr, KP: tl.constexpr, LEVELS: tl.constexpr,
          LP: tl.constexpr):  # fmt: skip
    found = tl.zeros((TB, KP), tl.float32)
    for level in range(LEVELS):
        found += tl.load(outputs + level * stride + at, inside, 0.0).to(tl.float32) * _one(shares, level, LP)
    return found


@triton.jit
def leave(
    outputs, projected, mix, norm, surprise, gated, parts,
    length, rows, heads, features, width, span, epsilon, blocks,
    LEVELS: tl.constexpr, LP: tl.constexpr, TB: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """gate ⊙ norm(Σ share · output); in `parts` (P, E, 3·L + 1) the gate's sum, the last, and those of ‖u‖², the first,
    which `surprise` (L, E, blocks) holds. Grid: (P, E)."""
    p, row = tl.program_id(0), tl.program_id(1)
    head = row % heads
    columns = tl.arange(0, KP)
    narrow = columns < width
    stride = length.to(tl.int64) * rows * width
    shares = _shares(mix, head, LEVELS, LP)
    weight = tl.load(norm + head * width + columns, narrow, 0.0).to(tl.float32)
    opened = tl.zeros((TB,), tl.float32)
    for first in range(p * span, tl.minimum(length, (p + 1) * span), TB):
        tokens = first + tl.arange(0, TB)
        inside = (tokens < length)[:, None] & narrow[None, :]
        token_row = tokens.to(tl.int64)[:, None] * rows + row
        at = token_row * width + columns[None, :]
        read = _read(outputs, shares, at, inside, stride, TB, KP, LEVELS, LP)
        scale = tl.rsqrt(tl.sum(read * read, 1) / width + epsilon)
        logit = tl.load(projected + token_row * features + 3 * LEVELS * width + columns[None, :], inside, 0.0)
        gate = _sigmoid(logit.to(tl.float32))
        tl.store(gated + at, read * scale[:, None] * weight[None, :] * gate, inside)
        opened += tl.sum(tl.where(inside, gate, 0.0), 1)
    part = parts + (p * rows + row) * (3 * LEVELS + 1)
    tl.store(part + 3 * LEVELS, tl.sum(opened, 0))
    for level in range(LEVELS):
        missed = 0.0
        for place in range(tl.where(p == 0, blocks, 0)):  # once for all programs of a row
            missed += tl.load(surprise + (level * rows + row) * blocks + place)
        tl.store(part + level, missed)


@triton.jit
def leave_back(
    outputs, projected, mix, norm, d_gated, d_outputs, d_projected, parts,
    length, rows, heads, features, width, span, epsilon, across,
    LEVELS: tl.constexpr, LP: tl.constexpr, TB: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Gradients of each level's output and of the read gate; of the norm's weight and the mix, (P, B, H·K + H·L)."""
    p, row = tl.program_id(0), tl.program_id(1)
    head = row % heads
    columns = tl.arange(0, KP)
    narrow = columns < width
    stride = length.to(tl.int64) * rows * width
    shares = _shares(mix, head, LEVELS, LP)
    weight = tl.load(norm + head * width + columns, narrow, 0.0).to(tl.float32)
    d_weight, d_shares = tl.zeros((KP,), tl.float32), tl.zeros((LP,), tl.float32)
    for first in range(p * span, tl.minimum(length, (p + 1) * span), TB):
        tokens = first + tl.arange(0, TB)
        inside = (tokens < length)[:, None] & narrow[None, :]
        token_row = tokens.to(tl.int64)[:, None] * rows + row
        at = token_row * width + columns[None, :]
        read = _read(outputs, shares, at, inside, stride, TB, KP, LEVELS, LP)
        scale = tl.rsqrt(tl.sum(read * read, 1) / width + epsilon)[:, None]
        normed = read * scale
        place = token_row * features + 3 * LEVELS * width + columns[None, :]
        gate = _sigmoid(tl.load(projected + place, inside, 0.0).to(tl.float32))
        grad = tl.load(d_gated + at, inside, 0.0).to(tl.float32)
        d_weight += tl.sum(grad * gate * normed, 0)
        d_normed = grad * gate * weight[None, :]
        tl.store(d_projected + place, d_normed * normed * (1.0 - gate), inside)
        d_read = scale * (d_normed - normed * (tl.sum(d_normed * normed, 1) / width)[:, None])
        for level in range(LEVELS):
            tl.store(d_outputs + level * stride + at, _one(shares, level, LP) * d_read, inside)
            # The softmax's gradient of a share is that share times what its output has beyond the mix.
            out = tl.load(outputs + level * stride + at, inside, 0.0).to(tl.float32)
            d_shares += tl.where(tl.arange(0, LP) == level, tl.sum(tl.sum(d_read * (out - read), 1), 0), 0.0)
    part = parts + (p * (rows // heads) + row // heads).to(tl.int64) * across
    tl.store(part + head * width + columns, d_weight, narrow)
    levels = tl.arange(0, LP)
    tl.store(part + heads * width + head * LEVELS + levels, d_shares * shares, levels < LEVELS)
