"""The momentum gated delta rule in chunks, as Triton kernels: the same equations as `chunks.py` and `coefficients.py`.

Forward: `prepare` (all chunks at once), `scan` (chunk after chunk, each block of value columns for itself). Backward:
`states`, `scan_back`, `pairs`, `vectors`, `finish`. `delta_rule_on_gpu.py` launches them. This file imports Triton; it
is imported where kernels run.

Shapes: T tokens, E batch elements × heads, N chunks, C tokens of a chunk, K key width, V value width (both padded to
powers of two in registers: KP, VP), R reads (1 or 2), P parts of the state (M and S, or M). Keys, values and reads are
addressed by a stride per token and one per row (of E); gates are (T, E); all that kernels pass on is fp32:

    columns (E, N, 8, C)    rows: f, h, f₋, h₋ (worth of the carried M and S in M after and before token t), g, η (worth
                            of t's write in M and S after the chunk), 1/‖k‖; see `_CARRY` for the last
    scales (E, N, R, C)     1/‖q‖, or −1/‖q‖
    inverse (E, N, C, C)    A⁻¹
    scores (E, N, R, C, C)  q k ⊙ G
    updates (E, N·C, V)     U
    states (E, N, P, K, V)  Z before each chunk
"""

import triton
import triton.language as tl

_EPSILON = tl.constexpr(1e-12)  # added to squared lengths, as in chunks.py
_CARRY = tl.constexpr(7)  # row of `columns` whose first three entries are the worth of M in M, S in M, S in S


@triton.jit
def _column(columns, chunk, row, C: tl.constexpr):
    return tl.load(columns + (chunk * 8 + row) * C + tl.arange(0, C))


@triton.jit
def _put(columns, chunk, row, x, C: tl.constexpr):
    tl.store(columns + (chunk * 8 + row) * C + tl.arange(0, C), x)


@triton.jit
def _square(matrices, place, C: tl.constexpr):
    """Pointers to a (C, C) matrix."""
    rows = tl.arange(0, C)
    return matrices + tl.cast(place, tl.int64) * C * C + rows[:, None] * C + rows[None, :]


@triton.jit
def _tile(x, row, per_token, per_row, tokens, columns, length, width):
    """(C, columns) of keys, values or reads, in fp32; zeros outside."""
    inside = (tokens < length)[:, None] & (columns < width)[None, :]
    start = x + row.to(tl.int64) * per_row
    return tl.load(start + tokens.to(tl.int64)[:, None] * per_token + columns[None, :], inside, 0.0).to(tl.float32)


@triton.jit
def _put_tile(x, row, per_token, per_row, tokens, columns, length, width, value):
    inside = (tokens < length)[:, None] & (columns < width)[None, :]
    start = x + row.to(tl.int64) * per_row
    tl.store(start + tokens.to(tl.int64)[:, None] * per_token + columns[None, :], value, inside)


@triton.jit
def _state(states, place, lines, columns, width, value_width):
    """Pointers to (lines, columns) of a part of a state, and where they are inside of it."""
    start = states + place.to(tl.int64) * width * value_width
    inside = (lines < width)[:, None] & (columns < value_width)[None, :]
    return start + lines[:, None] * value_width + columns[None, :], inside


@triton.jit
def _load_state(states, number, lines, columns, width, value_width, MOMENTUM: tl.constexpr, GIVEN: tl.constexpr):
    """(lines, columns) of M and S of a state; M twice where there is no momentum; zeros where no state is GIVEN."""
    place, inside = _state(states, number * (2 if MOMENTUM else 1), lines, columns, width, value_width)
    memory = tl.zeros((lines.shape[0], columns.shape[0]), tl.float32)
    if GIVEN:
        memory = tl.load(place, inside, 0.0)
    momentum = memory
    if MOMENTUM and GIVEN:
        momentum = tl.load(place + width * value_width, inside, 0.0)
    return memory, momentum


@triton.jit
def _put_state(states, number, lines, columns, width, value_width, memory, momentum, MOMENTUM: tl.constexpr):
    place, inside = _state(states, number * (2 if MOMENTUM else 1), lines, columns, width, value_width)
    tl.store(place, memory, inside)
    if MOMENTUM:
        tl.store(place + width * value_width, momentum, inside)


@triton.jit
def _gate(gate, tokens, row, rows_total, inside):
    return tl.load(gate + tokens.to(tl.int64) * rows_total + row, inside, 0.0).to(tl.float32)


@triton.jit
def _sums(gate, tokens, row, rows_total, length, C: tl.constexpr):
    """Sums of a gate's logarithms up to and including each token, and without it; fp64, for they are subtracted."""
    within = tl.arange(0, C)
    logs = _gate(gate, tokens, row, rows_total, tokens < length)
    earlier = _gate(gate, tokens - 1, row, rows_total, (tokens < length) & (within > 0))
    return tl.cumsum(logs.to(tl.float64), 0), tl.cumsum(earlier.to(tl.float64), 0)


@triton.jit
def _documents(starts, tokens, row, heads, batch, length, STARTS: tl.constexpr):
    """How many documents began in the chunk up to each token."""
    if STARTS:
        begins = tl.load(starts + tokens.to(tl.int64) * batch + row // heads, tokens < length, 0)
        return tl.cumsum(begins.to(tl.int32), 0)
    else:
        return tokens * 0


@triton.jit
def _worth(later, earlier, seen):
    between = (later[:, None] - earlier[None, :]).to(tl.float32)
    return tl.where(seen, tl.exp(tl.where(seen, between, 0.0)), 0.0)


@triton.jit
def _carried(sums, begun):
    return tl.where(begun == 0, tl.exp(sums.to(tl.float32)), 0.0)


@triton.jit
def _products(x, per_token, per_row, y, y_per_token, y_per_row, row, tokens, length, width,
              C: tl.constexpr, KP: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """x yᵀ, and the squared lengths of x."""
    block: tl.constexpr = min(KP, 32)
    out, squares = tl.zeros((C, C), tl.float32), tl.zeros((C,), tl.float32)
    for first in range(0, KP, block):
        lines = first + tl.arange(0, block)
        left = _tile(x, row, per_token, per_row, tokens, lines, length, width)
        right = _tile(y, row, y_per_token, y_per_row, tokens, lines, length, width)
        out = tl.dot(left, tl.trans(right), out, input_precision=PRECISION)
        squares += tl.sum(left * left, 1)
    return out, squares


@triton.jit
def _join(out, lower, SIZE: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr):
    """The inverse's blocks of 2 · SIZE from those of SIZE: −A₂₂⁻¹ A₂₁ A₁₁⁻¹ is what lies below the diagonal."""
    part = tl.arange(0, C) // SIZE
    joins = (part[:, None] == part[None, :] + 1) & (part % 2 == 1)[:, None]
    across = tl.dot(tl.where(joins, lower, 0.0), out, input_precision=PRECISION)
    return out - tl.dot(out, across, input_precision=PRECISION)


@triton.jit
def _inverse(lower, C: tl.constexpr, PRECISION: tl.constexpr):
    """Of 1 + `lower`, strictly lower triangular: blocks of 16 by substitution, all at once, then joined in pairs.

    Both steps are as stable as substitution; sums of powers of `lower` would not be.
    """
    rows = tl.arange(0, C)
    block = rows // 16
    same = block[:, None] == block[None, :]
    near = tl.where(same, lower, 0.0)
    out = tl.where(rows[:, None] == rows[None, :], 1.0, 0.0)
    for i in range(1, 16):
        here = (rows % 16 == i)[:, None]
        line = tl.sum(tl.where(here, near, 0.0), 0)
        known = tl.sum(line[:, None] * out, 0)
        out -= tl.where(here & same, known[None, :], 0.0)
    if C >= 32:
        out = _join(out, lower, 16, C, PRECISION)
    if C >= 64:
        out = _join(out, lower, 32, C, PRECISION)
    return out


@triton.jit
def _decays(log_forget, log_momentum, starts, tokens, row, rows_total, heads, batch, length,
            C: tl.constexpr, MOMENTUM: tl.constexpr, STARTS: tl.constexpr):  # fmt: skip
    """Products of α between tokens up to and before each token, of η, and of both since the chunk's beginning.

    Without momentum those of η are those of α.
    """
    within = tl.arange(0, C)
    begun = _documents(starts, tokens, row, heads, batch, length, STARTS)
    same = begun[:, None] == begun[None, :]
    upto, below = same & (within[:, None] >= within[None, :]), same & (within[:, None] > within[None, :])
    sums, before = _sums(log_forget, tokens, row, rows_total, length, C)
    forget, forget_before = _worth(sums, sums, upto), _worth(before, sums, below)
    after_m, before_m = _carried(sums, begun), _carried(before, begun)
    momentum, kept = forget, after_m
    if MOMENTUM:
        sums, _ = _sums(log_momentum, tokens, row, rows_total, length, C)
        momentum, kept = _worth(sums, sums, upto), _carried(sums, begun)
    return forget, forget_before, momentum, after_m, before_m, kept


@triton.jit
def prepare(
    keys, key_token, key_row, read_0, read_0_token, read_0_row, read_1, read_1_token, read_1_row,
    log_forget, log_momentum, rate, starts, columns, scales, inverse, scores,
    length, rows_total, heads, batch, width, chunks,
    C: tl.constexpr, KP: tl.constexpr, READS: tl.constexpr, MOMENTUM: tl.constexpr, STARTS: tl.constexpr,
    TAKEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What does not depend on the state. Grid: (N, E).

    TAKEN: the second read's scale is negative, and so are its scores and what comes of it, gradients included."""
    n, row = tl.program_id(0), tl.program_id(1)
    within = tl.arange(0, C)
    tokens = n * C + within
    chunk = row * chunks + n
    last = within == tl.minimum(C, length - n * C) - 1
    reach, reach_before, momentum, after_m, before_m, kept = _decays(
        log_forget, log_momentum, starts, tokens, row, rows_total, heads, batch, length, C, MOMENTUM, STARTS
    )
    _put(columns, chunk, 0, after_m, C)
    _put(columns, chunk, 2, before_m, C)
    carry = tl.where(within == 0, tl.sum(tl.where(last, after_m, 0.0), 0), 0.0)
    if MOMENTUM:
        after_s = tl.sum(reach * kept[None, :], 1)
        _put(columns, chunk, 1, after_s, C)
        _put(columns, chunk, 3, tl.sum(reach_before * kept[None, :], 1), C)
        _put(columns, chunk, 5, tl.sum(tl.where(last[:, None], momentum, 0.0), 0), C)
        carry += tl.where(within == 1, tl.sum(tl.where(last, after_s, 0.0), 0), 0.0)
        carry += tl.where(within == 2, tl.sum(tl.where(last, kept, 0.0), 0), 0.0)
        reach = tl.dot(reach, momentum, input_precision=PRECISION)
        reach_before = tl.dot(reach_before, momentum, input_precision=PRECISION)
    _put(columns, chunk, 4, tl.sum(tl.where(last[:, None], reach, 0.0), 0), C)
    _put(columns, chunk, _CARRY, carry, C)

    similar, squares = _products(
        keys, key_token, key_row, keys, key_token, key_row, row, tokens, length, width, C, KP, PRECISION
    )
    key_scale = tl.rsqrt(squares + _EPSILON)
    _put(columns, chunk, 6, key_scale, C)
    theta = _gate(rate, tokens, row, rows_total, tokens < length)
    lower = similar * reach_before * (theta * key_scale)[:, None] * key_scale[None, :]
    tl.store(_square(inverse, chunk, C), _inverse(lower, C, PRECISION))
    for r in tl.static_range(READS):
        read, read_token, read_row = read_0, read_0_token, read_0_row
        if r == 1:
            read, read_token, read_row = read_1, read_1_token, read_1_row
        found, squares = _products(
            read, read_token, read_row, keys, key_token, key_row, row, tokens, length, width, C, KP, PRECISION
        )
        read_scale = tl.rsqrt(squares + _EPSILON)
        if TAKEN and r == 1:
            read_scale = -read_scale
        tl.store(scales + (chunk * READS + r) * C + within, read_scale)
        tl.store(_square(scores, chunk * READS + r, C), found * reach * read_scale[:, None] * key_scale[None, :])


@triton.jit
def _carry_on(columns, chunk, key, update, memory, momentum, C: tl.constexpr, MOMENTUM: tl.constexpr,
              PRECISION: tl.constexpr):  # fmt: skip
    """The state after a chunk from that before it: D Z + XᵀU."""
    scale = _column(columns, chunk, 6, C)
    carry = columns + (chunk * 8 + _CARRY) * C
    across = tl.trans(key)
    worth = (_column(columns, chunk, 4, C) * scale)[:, None]
    memory = memory * tl.load(carry)
    if MOMENTUM:
        memory += momentum * tl.load(carry + 1)
        worth_s = (_column(columns, chunk, 5, C) * scale)[:, None]
        momentum = tl.dot(across, worth_s * update, momentum * tl.load(carry + 2), input_precision=PRECISION)
    return tl.dot(across, worth * update, memory, input_precision=PRECISION), momentum


@triton.jit
def _worth_of_state(left, worth, memory, worth_s, momentum, MOMENTUM: tl.constexpr, PRECISION: tl.constexpr):
    """[worth ⊙ left, worth_s ⊙ left] Z."""
    out = tl.dot(left, memory, input_precision=PRECISION) * worth[:, None]
    if MOMENTUM:
        out += tl.dot(left, momentum, input_precision=PRECISION) * worth_s[:, None]
    return out


@triton.jit
def scan(
    keys, key_token, key_row, values, value_token, value_row,
    read_0, read_0_token, read_0_row, read_1, read_1_token, read_1_row,
    rate, columns, scales, inverse, scores, state, out_1_token, out_1_row, final, out_0, out_1, updates, surprise,
    length, rows_total, width, value_width, chunks,
    C: tl.constexpr, KP: tl.constexpr, VB: tl.constexpr, READS: tl.constexpr, MOMENTUM: tl.constexpr,
    GIVEN: tl.constexpr, TAKEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """U, what is read, the last state and Σ‖u‖². Grid: (value blocks, E).

    TAKEN: the second read is taken off what `out_1` holds."""
    row = tl.program_id(1)
    lines, cols = tl.arange(0, KP), tl.program_id(0) * VB + tl.arange(0, VB)
    memory, momentum = _load_state(state, row, lines, cols, width, value_width, MOMENTUM, GIVEN)
    missed = tl.zeros((VB,), tl.float32)
    for n in range(chunks):
        tokens = n * C + tl.arange(0, C)
        chunk = row * chunks + n
        theta = _gate(rate, tokens, row, rows_total, tokens < length)
        key = _tile(keys, row, key_token, key_row, tokens, lines, length, width)
        rest = theta[:, None] * _tile(values, row, value_token, value_row, tokens, cols, length, value_width)
        erase = theta * _column(columns, chunk, 6, C)
        before_m = erase * _column(columns, chunk, 2, C)
        before_s = before_m
        if MOMENTUM:
            before_s = erase * _column(columns, chunk, 3, C)
        rest -= _worth_of_state(key, before_m, memory, before_s, momentum, MOMENTUM, PRECISION)
        update = tl.dot(tl.load(_square(inverse, chunk, C)), rest, input_precision=PRECISION)
        _put_tile(updates, row, value_width, chunks * C * value_width, tokens, cols, chunks * C, value_width, update)
        missed += tl.sum(update * update, 0)
        for r in tl.static_range(READS):
            read, read_token, read_row, out = read_0, read_0_token, read_0_row, out_0
            out_token, out_row = rows_total * value_width, value_width
            if r == 1:
                read, read_token, read_row, out = read_1, read_1_token, read_1_row, out_1
                out_token, out_row = out_1_token, out_1_row
            query = _tile(read, row, read_token, read_row, tokens, lines, length, width)
            scale = tl.load(scales + (chunk * READS + r) * C + tl.arange(0, C))
            after_m = scale * _column(columns, chunk, 0, C)
            after_s = after_m
            if MOMENTUM:
                after_s = scale * _column(columns, chunk, 1, C)
            found = _worth_of_state(query, after_m, memory, after_s, momentum, MOMENTUM, PRECISION)
            weights = tl.load(_square(scores, chunk * READS + r, C))
            found = tl.dot(weights, update, found, input_precision=PRECISION)
            if TAKEN and r == 1:  # `prepare` made it negative
                found += _tile(out, row, out_token, out_row, tokens, cols, length, value_width)
            _put_tile(out, row, out_token, out_row, tokens, cols, length, value_width, found)
        memory, momentum = _carry_on(columns, chunk, key, update, memory, momentum, C, MOMENTUM, PRECISION)
    _put_state(final, row, lines, cols, width, value_width, memory, momentum, MOMENTUM)
    tl.store(surprise + row * tl.num_programs(0) + tl.program_id(0), tl.sum(missed, 0))


@triton.jit
def states(
    keys, key_token, key_row, columns, state, updates, before,
    length, width, value_width, chunks,
    C: tl.constexpr, KP: tl.constexpr, VB: tl.constexpr, MOMENTUM: tl.constexpr, GIVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The state before each chunk, from U. Grid: (value blocks, E)."""
    row = tl.program_id(1)
    lines, cols = tl.arange(0, KP), tl.program_id(0) * VB + tl.arange(0, VB)
    memory, momentum = _load_state(state, row, lines, cols, width, value_width, MOMENTUM, GIVEN)
    for n in range(chunks):
        tokens = n * C + tl.arange(0, C)
        chunk = row * chunks + n
        _put_state(before, chunk, lines, cols, width, value_width, memory, momentum, MOMENTUM)
        key = _tile(keys, row, key_token, key_row, tokens, lines, length, width)
        update = _tile(updates, row, value_width, chunks * C * value_width, tokens, cols, chunks * C, value_width)
        memory, momentum = _carry_on(columns, chunk, key, update, memory, momentum, C, MOMENTUM, PRECISION)


@triton.jit
def scan_back(
    keys, key_token, key_row, read_0, read_0_token, read_0_row, read_1, read_1_token, read_1_row,
    rate, columns, scales, inverse, scores, d_out_0, d_out_1, d_final, d_after, d_state, d_rest, d_values,
    length, rows_total, width, value_width, chunks,
    C: tl.constexpr, KP: tl.constexpr, VB: tl.constexpr, READS: tl.constexpr, MOMENTUM: tl.constexpr,
    GIVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the state after each chunk, of θV − W Z, and of v. Grid: (value blocks, E)."""
    row = tl.program_id(1)
    lines, cols = tl.arange(0, KP), tl.program_id(0) * VB + tl.arange(0, VB)
    d_memory, d_momentum = _load_state(d_final, row, lines, cols, width, value_width, MOMENTUM, GIVEN)
    for back in range(chunks):
        n = chunks - 1 - back
        tokens = n * C + tl.arange(0, C)
        chunk = row * chunks + n
        _put_state(d_after, chunk, lines, cols, width, value_width, d_memory, d_momentum, MOMENTUM)
        key = _tile(keys, row, key_token, key_row, tokens, lines, length, width)
        scale = _column(columns, chunk, 6, C)
        worth = scale * _column(columns, chunk, 4, C)
        worth_s = worth
        if MOMENTUM:
            worth_s = scale * _column(columns, chunk, 5, C)
        d_update = _worth_of_state(key, worth, d_memory, worth_s, d_momentum, MOMENTUM, PRECISION)
        carry = columns + (chunk * 8 + _CARRY) * C
        if MOMENTUM:
            d_momentum = d_momentum * tl.load(carry + 2) + d_memory * tl.load(carry + 1)
        d_memory = d_memory * tl.load(carry)
        for r in tl.static_range(READS):
            read, read_token, read_row, d_out = read_0, read_0_token, read_0_row, d_out_0
            if r == 1:
                read, read_token, read_row, d_out = read_1, read_1_token, read_1_row, d_out_1
            d_found = _tile(d_out, row, rows_total * value_width, value_width, tokens, cols, length, value_width)
            weights = tl.load(_square(scores, chunk * READS + r, C))
            d_update = tl.dot(tl.trans(weights), d_found, d_update, input_precision=PRECISION)
            query = tl.trans(_tile(read, row, read_token, read_row, tokens, lines, length, width))
            found_scale = tl.load(scales + (chunk * READS + r) * C + tl.arange(0, C))
            after_m = (found_scale * _column(columns, chunk, 0, C))[:, None]
            d_memory = tl.dot(query, after_m * d_found, d_memory, input_precision=PRECISION)
            if MOMENTUM:
                after_s = (found_scale * _column(columns, chunk, 1, C))[:, None]
                d_momentum = tl.dot(query, after_s * d_found, d_momentum, input_precision=PRECISION)
        found = tl.dot(tl.trans(tl.load(_square(inverse, chunk, C))), d_update, input_precision=PRECISION)
        _put_tile(d_rest, row, value_width, chunks * C * value_width, tokens, cols, chunks * C, value_width, found)
        theta = _gate(rate, tokens, row, rows_total, tokens < length)
        d_value = theta[:, None] * found
        _put_tile(d_values, row, rows_total * value_width, value_width, tokens, cols, length, value_width, d_value)
        erase = -theta * scale
        across = tl.trans(key)
        before_m = (erase * _column(columns, chunk, 2, C))[:, None]
        d_memory = tl.dot(across, before_m * found, d_memory, input_precision=PRECISION)
        if MOMENTUM:
            before_s = (erase * _column(columns, chunk, 3, C))[:, None]
            d_momentum = tl.dot(across, before_s * found, d_momentum, input_precision=PRECISION)
    _put_state(d_state, row, lines, cols, width, value_width, d_memory, d_momentum, MOMENTUM)


@triton.jit
def pairs(
    keys, key_token, key_row, values, value_token, value_row,
    read_0, read_0_token, read_0_row, read_1, read_1_token, read_1_row,
    log_forget, log_momentum, rate, starts, columns, scales, updates, d_rest, d_out_0, d_out_1,
    d_products, d_reach, d_rate,
    length, rows_total, heads, batch, width, value_width, chunks,
    C: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, READS: tl.constexpr, MOMENTUM: tl.constexpr,
    STARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of products of keys with keys and reads (`d_products` (E, N, 1+R, C, C)), of G and G₋ (`d_reach`
    (E, N, 2, C, C)), and θ's share of both. Grid: (N, E)."""
    n, row = tl.program_id(0), tl.program_id(1)
    tokens = n * C + tl.arange(0, C)
    chunk = row * chunks + n
    reach, reach_before, momentum, _, _, _ = _decays(
        log_forget, log_momentum, starts, tokens, row, rows_total, heads, batch, length, C, MOMENTUM, STARTS
    )
    if MOMENTUM:
        reach = tl.dot(reach, momentum, input_precision=PRECISION)
        reach_before = tl.dot(reach_before, momentum, input_precision=PRECISION)
    block: tl.constexpr = min(VP, 32)
    d_lower, d_theta = tl.zeros((C, C), tl.float32), tl.zeros((C,), tl.float32)
    for first in range(0, VP, block):
        cols = first + tl.arange(0, block)
        update = _tile(updates, row, value_width, chunks * C * value_width, tokens, cols, chunks * C, value_width)
        rest = _tile(d_rest, row, value_width, chunks * C * value_width, tokens, cols, chunks * C, value_width)
        value = _tile(values, row, value_token, value_row, tokens, cols, length, value_width)
        d_theta += tl.sum(rest * value, 1)
        d_lower = tl.dot(-rest, tl.trans(update), d_lower, input_precision=PRECISION)
    key_scale = _column(columns, chunk, 6, C)
    found, _ = _products(
        keys, key_token, key_row, keys, key_token, key_row, row, tokens, length, width, C, KP, PRECISION
    )
    similar = found * key_scale[:, None] * key_scale[None, :]
    d_theta += tl.sum(d_lower * reach_before * similar, 1)
    tl.store(d_rate + tokens.to(tl.int64) * rows_total + row, d_theta, tokens < length)
    d_lower *= _gate(rate, tokens, row, rows_total, tokens < length)[:, None]
    d_similar = d_lower * reach_before
    tl.store(_square(d_products, chunk * (1 + READS), C), d_similar + tl.trans(d_similar))
    tl.store(_square(d_reach, chunk * 2 + 1, C), d_lower * similar)
    d_after = tl.zeros((C, C), tl.float32)
    for r in tl.static_range(READS):
        read, read_token, read_row, d_out = read_0, read_0_token, read_0_row, d_out_0
        if r == 1:
            read, read_token, read_row, d_out = read_1, read_1_token, read_1_row, d_out_1
        d_scores = tl.zeros((C, C), tl.float32)
        for first in range(0, VP, block):
            cols = first + tl.arange(0, block)
            update = _tile(updates, row, value_width, chunks * C * value_width, tokens, cols, chunks * C, value_width)
            d_found = _tile(d_out, row, rows_total * value_width, value_width, tokens, cols, length, value_width)
            d_scores = tl.dot(d_found, tl.trans(update), d_scores, input_precision=PRECISION)
        tl.store(_square(d_products, chunk * (1 + READS) + 1 + r, C), d_scores * reach)
        found, _ = _products(
            read, read_token, read_row, keys, key_token, key_row, row, tokens, length, width, C, KP, PRECISION
        )
        read_scale = tl.load(scales + (chunk * READS + r) * C + tl.arange(0, C))
        d_after += d_scores * found * read_scale[:, None] * key_scale[None, :]
    tl.store(_square(d_reach, chunk * 2, C), d_after)


@triton.jit
def _with_states(x, per_token, per_row, tokens, length, row, states, place, lines, width, value_width,
                 C: tl.constexpr, VP: tl.constexpr, LINES: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """(C, LINES): a tile's value columns times lines of a state."""
    block: tl.constexpr = min(VP, 32)
    out = tl.zeros((C, LINES), tl.float32)
    for first in range(0, VP, block):
        cols = first + tl.arange(0, block)
        left = _tile(x, row, per_token, per_row, tokens, cols, length, value_width)
        where, inside = _state(states, place, lines, cols, width, value_width)
        out = tl.dot(left, tl.trans(tl.load(where, inside, 0.0)), out, input_precision=PRECISION)
    return out


@triton.jit
def vectors(
    keys, key_token, key_row, read_0, read_0_token, read_0_row, read_1, read_1_token, read_1_row,
    rate, columns, scales, updates, d_rest, d_out_0, d_out_1, before, d_after, d_products,
    d_units, d_columns, d_scales,
    length, rows_total, width, value_width, chunks,
    C: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, READS: tl.constexpr, MOMENTUM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of unit keys and reads (`d_units` (E, 1+R, N·C, K)), of `columns` (but row 6: d k̂ · k̂, and of f₋ and h₋
    what is to be multiplied by θ) and d q̂ · q̂ (`d_scales`, like `scales`). Grid: (N, E)."""
    n, row = tl.program_id(0), tl.program_id(1)
    within = tl.arange(0, C)
    tokens = n * C + within
    chunk = row * chunks + n
    padded = chunks * C
    parts: tl.constexpr = 2 if MOMENTUM else 1
    block: tl.constexpr = min(KP, 32)
    value_block: tl.constexpr = min(VP, 32)
    part = width * value_width
    theta = _gate(rate, tokens, row, rows_total, tokens < length)
    key_scale = _column(columns, chunk, 6, C)
    zero = tl.zeros((C,), tl.float32)
    d_before_m, d_before_s, d_end_m, d_end_s, along = zero, zero, zero, zero, zero
    for first in range(0, KP, block):
        lines = first + tl.arange(0, block)
        key = _tile(keys, row, key_token, key_row, tokens, lines, length, width) * key_scale[:, None]
        d_key = tl.dot(tl.load(_square(d_products, chunk * (1 + READS), C)), key, input_precision=PRECISION)
        for p in tl.static_range(parts):
            erased = -_with_states(
                d_rest, value_width, padded * value_width, tokens, padded, row, before + p * part, chunk * parts,
                lines, width, value_width, C, VP, block, PRECISION,
            )  # fmt: skip
            written = _with_states(
                updates, value_width, padded * value_width, tokens, padded, row, d_after + p * part, chunk * parts,
                lines, width, value_width, C, VP, block, PRECISION,
            )  # fmt: skip
            d_key += erased * (theta * _column(columns, chunk, 2 + p, C))[:, None]
            d_key += written * _column(columns, chunk, 4 + p, C)[:, None]
            if p == 0:
                d_before_m += tl.sum(erased * key, 1)
                d_end_m += tl.sum(written * key, 1)
            else:
                d_before_s += tl.sum(erased * key, 1)
                d_end_s += tl.sum(written * key, 1)
        for r in tl.static_range(READS):
            read, read_token, read_row = read_0, read_0_token, read_0_row
            if r == 1:
                read, read_token, read_row = read_1, read_1_token, read_1_row
            read_scale = tl.load(scales + (chunk * READS + r) * C + within)
            query = _tile(read, row, read_token, read_row, tokens, lines, length, width) * read_scale[:, None]
            d_scores = tl.load(_square(d_products, chunk * (1 + READS) + 1 + r, C))
            d_key = tl.dot(tl.trans(d_scores), query, d_key, input_precision=PRECISION)
        along += tl.sum(d_key * key, 1)
        _put_tile(d_units, row * (1 + READS), width, padded * width, tokens, lines, padded, width, d_key)
    _put(d_columns, chunk, 2, d_before_m, C)
    _put(d_columns, chunk, 4, d_end_m, C)
    _put(d_columns, chunk, 6, along, C)
    if MOMENTUM:
        _put(d_columns, chunk, 3, d_before_s, C)
        _put(d_columns, chunk, 5, d_end_s, C)

    d_after_m, d_after_s = zero, zero
    for r in tl.static_range(READS):
        read, read_token, read_row, d_out = read_0, read_0_token, read_0_row, d_out_0
        if r == 1:
            read, read_token, read_row, d_out = read_1, read_1_token, read_1_row, d_out_1
        read_scale = tl.load(scales + (chunk * READS + r) * C + within)
        along = zero
        for first in range(0, KP, block):
            lines = first + tl.arange(0, block)
            key = _tile(keys, row, key_token, key_row, tokens, lines, length, width) * key_scale[:, None]
            query = _tile(read, row, read_token, read_row, tokens, lines, length, width) * read_scale[:, None]
            d_scores = tl.load(_square(d_products, chunk * (1 + READS) + 1 + r, C))
            d_query = tl.dot(d_scores, key, input_precision=PRECISION)
            for p in tl.static_range(parts):
                found = _with_states(
                    d_out, rows_total * value_width, value_width, tokens, length, row, before + p * part,
                    chunk * parts, lines, width, value_width, C, VP, block, PRECISION,
                )  # fmt: skip
                d_query += found * _column(columns, chunk, p, C)[:, None]
                if p == 0:
                    d_after_m += tl.sum(found * query, 1)
                else:
                    d_after_s += tl.sum(found * query, 1)
            along += tl.sum(d_query * query, 1)
            _put_tile(d_units, row * (1 + READS) + 1 + r, width, padded * width, tokens, lines, padded, width, d_query)
        tl.store(d_scales + (chunk * READS + r) * C + within, along)
    _put(d_columns, chunk, 0, d_after_m, C)
    if MOMENTUM:
        _put(d_columns, chunk, 1, d_after_s, C)

    zeros = tl.zeros((block, value_block), tl.float32)
    m_m, m_s, s_s = zeros, zeros, zeros
    for first in range(0, KP, block):
        lines = first + tl.arange(0, block)
        for first_column in range(0, VP, value_block):
            cols = first_column + tl.arange(0, value_block)
            where, inside = _state(before, chunk * parts, lines, cols, width, value_width)
            d_where, _ = _state(d_after, chunk * parts, lines, cols, width, value_width)
            d_memory = tl.load(d_where, inside, 0.0)
            m_m += d_memory * tl.load(where, inside, 0.0)
            if MOMENTUM:
                state = tl.load(where + part, inside, 0.0)
                m_s += d_memory * state
                s_s += tl.load(d_where + part, inside, 0.0) * state
    carry = tl.where(within == 0, tl.sum(m_m), 0.0)
    carry += tl.where(within == 1, tl.sum(m_s), 0.0) + tl.where(within == 2, tl.sum(s_s), 0.0)
    _put(d_columns, chunk, _CARRY, carry, C)


@triton.jit
def _put_unit_back(x, per_token, per_row, row, d_units, d_row, scale, along, out, tokens, length, rows_total,
                   width, padded, C: tl.constexpr, KP: tl.constexpr):  # fmt: skip
    """The gradient of vectors from that of their directions."""
    block: tl.constexpr = min(KP, 32)
    for first in range(0, KP, block):
        lines = first + tl.arange(0, block)
        unit = _tile(x, row, per_token, per_row, tokens, lines, length, width) * scale[:, None]
        grad = _tile(d_units, d_row, width, padded * width, tokens, lines, padded, width)
        grad = (grad - unit * along[:, None]) * scale[:, None]
        _put_tile(out, row, rows_total * width, width, tokens, lines, length, width, grad)


@triton.jit
def finish(
    keys, key_token, key_row, read_0, read_0_token, read_0_row, read_1, read_1_token, read_1_row,
    log_forget, log_momentum, rate, starts, columns, scales, d_units, d_columns, d_scales, d_reach,
    d_keys, d_read_0, d_read_1, d_log_forget, d_log_momentum, d_rate,
    length, rows_total, heads, batch, width, chunks,
    C: tl.constexpr, KP: tl.constexpr, READS: tl.constexpr, MOMENTUM: tl.constexpr, STARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of keys, reads and gates from those of their directions and coefficients. Grid: (N, E)."""
    n, row = tl.program_id(0), tl.program_id(1)
    within = tl.arange(0, C)
    tokens = n * C + within
    chunk = row * chunks + n
    padded = chunks * C
    here = tokens < length
    gate = tokens.to(tl.int64) * rows_total + row
    _put_unit_back(
        keys, key_token, key_row, row, d_units, row * (1 + READS), _column(columns, chunk, 6, C),
        _column(d_columns, chunk, 6, C), d_keys, tokens, length, rows_total, width, padded, C, KP,
    )  # fmt: skip
    for r in tl.static_range(READS):
        read, read_token, read_row, out = read_0, read_0_token, read_0_row, d_read_0
        if r == 1:
            read, read_token, read_row, out = read_1, read_1_token, read_1_row, d_read_1
        scale = tl.load(scales + (chunk * READS + r) * C + within)
        along = tl.load(d_scales + (chunk * READS + r) * C + within)
        _put_unit_back(
            read, read_token, read_row, row, d_units, row * (1 + READS) + 1 + r, scale, along, out,
            tokens, length, rows_total, width, padded, C, KP,
        )  # fmt: skip

    theta = _gate(rate, tokens, row, rows_total, here)
    d_before_m = _column(d_columns, chunk, 2, C)
    d_theta = tl.load(d_rate + gate, here, 0.0) + d_before_m * _column(columns, chunk, 2, C)
    last = within == tl.minimum(C, length - n * C) - 1
    carry = d_columns + (chunk * 8 + _CARRY) * C
    forget, forget_before, momentum, after_m, before_m, kept = _decays(
        log_forget, log_momentum, starts, tokens, row, rows_total, heads, batch, length, C, MOMENTUM, STARTS
    )
    d_forget = tl.load(_square(d_reach, chunk * 2, C))
    d_forget += tl.where(last[:, None], _column(d_columns, chunk, 4, C)[None, :], 0.0)
    d_forget_before = tl.load(_square(d_reach, chunk * 2 + 1, C))
    if MOMENTUM:
        d_before_s = _column(d_columns, chunk, 3, C)
        d_theta += d_before_s * _column(columns, chunk, 3, C)
        d_after_s = _column(d_columns, chunk, 1, C) + tl.where(last, tl.load(carry + 1), 0.0)
        d_kept = tl.where(last, tl.load(carry + 2), 0.0)
        d_kept += tl.sum(forget * d_after_s[:, None] + forget_before * (theta * d_before_s)[:, None], 0)
        d_momentum = tl.dot(tl.trans(forget), d_forget, input_precision=PRECISION)
        d_momentum = tl.dot(tl.trans(forget_before), d_forget_before, d_momentum, input_precision=PRECISION)
        d_momentum += tl.where(last[:, None], _column(d_columns, chunk, 5, C)[None, :], 0.0)
        d_momentum *= momentum
        d_sums = tl.sum(d_momentum, 1) - tl.sum(d_momentum, 0) + d_kept * kept
        later = tl.where(within[:, None] >= within[None, :], d_sums[:, None], 0.0)
        tl.store(d_log_momentum + gate, tl.sum(later, 0), here)
        across = tl.trans(momentum)
        d_forget = tl.dot(d_forget, across, input_precision=PRECISION) + d_after_s[:, None] * kept[None, :]
        d_forget_before = tl.dot(d_forget_before, across, input_precision=PRECISION)
        d_forget_before += (theta * d_before_s)[:, None] * kept[None, :]
    tl.store(d_rate + gate, d_theta, here)
    d_forget *= forget
    d_forget_before *= forget_before
    d_after_m = _column(d_columns, chunk, 0, C) + tl.where(last, tl.load(carry), 0.0)
    d_sums = tl.sum(d_forget, 1) - tl.sum(d_forget, 0) - tl.sum(d_forget_before, 0) + d_after_m * after_m
    d_before = tl.sum(d_forget_before, 1) + theta * d_before_m * before_m
    later = tl.where(within[:, None] >= within[None, :], d_sums[:, None], 0.0)
    later += tl.where(within[:, None] > within[None, :], d_before[:, None], 0.0)
    tl.store(d_log_forget + gate, tl.sum(later, 0), here)
