"""Reading the cache as Triton kernels: the arithmetic of `read.py`, no weight of which is ever in the GPU's memory.

Forward: `attend`. Backward: `queries_back`, a tile of queries at a time, and `latents_back`, a tile of latents at a
time. `reading_on_gpu.py` launches them. This file imports Triton; it is imported where kernels run.

Shapes: G rows × heads, M blocks of Q queries, N segments of L latents, J segments that a block looks at, C = J·L, K
head width (padded to KP). A block's latents come from a list of segments (CHOSEN), or are all of them, of which a
query i sees those with since ≤ i < until. With CHOSEN each query has a segment of its own besides, or none.

Queries and results are addressed by a stride per token and one per group: they may lie in blocks or, ROWS, as the
tokens of rows do. Blocks then begin at every Q-th token or where a list says (LISTED), and a token sees the segments
with since ≤ its place in the row < until; see `pooling_kernels.py` for what else is listed.

    lse, delta (G, M, Q) fp32   logarithm of the softmax's denominator; Σ out ⊙ d_out
    parts (programs, 12) fp32   ROWS: sums of one program's measures and their weights, as `cache_module.py` names them
"""

import triton
import triton.language as tl

_NEVER = tl.constexpr(-1e30)  # score of what is not seen; finite, so that differences are
_SAMPLE = tl.constexpr(16)  # as in read.py


@triton.jit
def _rows(x, rows, inside, width, KP: tl.constexpr):
    """(rows, KP) of a matrix of `width` columns."""
    return _vectors(x, rows, width, inside, width, KP)


@triton.jit
def _vectors(x, rows, stride, inside, width, KP: tl.constexpr):
    """The same of one whose rows lie `stride` numbers apart."""
    columns = tl.arange(0, KP)
    at = x + rows[:, None] * stride + columns[None, :]
    return tl.load(at, inside[:, None] & (columns < width)[None, :], 0.0)


@triton.jit
def _begin(begins, counts, m, row, blocks, queries, tokens, LISTED: tl.constexpr):
    """A block's first token and how many it has."""
    if LISTED:
        return tl.load(begins + row * blocks + m), tl.load(counts + row * blocks + m)
    else:
        return m * queries, tl.minimum(queries, tokens - m * queries)


@triton.jit
def _latents(segments, known, block, first, looked, latents, BC: tl.constexpr, CHOSEN: tl.constexpr):  # fmt: skip
    """Rows of BC latents among the group's, which of them count, and their segments."""
    column = first + tl.arange(0, BC)
    place, inside = column // latents, column < looked * latents
    segment = place
    if CHOSEN:
        segment = tl.load(segments + block * looked + place, inside, 0).to(tl.int32)
        inside = inside & (tl.load(known + block * looked + place, inside, 0) != 0)
    return segment * latents + column % latents, inside, segment


@triton.jit
def _scores(q, key, bias, rows, inside, since, until, plan, first, place, looked, latents, scale, BC: tl.constexpr,
            CHOSEN: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """(queries, BC); `_NEVER` where a query does not see a latent: `plan` is a row of the intervals."""
    sees = tl.load(bias + rows, inside, _NEVER)
    scores = tl.dot(q, tl.trans(key), input_precision=PRECISION) * scale + tl.maximum(sees, _NEVER)[None, :]
    if CHOSEN:
        return tl.where(inside[None, :], scores, _NEVER)
    else:
        segment = (first + tl.arange(0, BC)) // latents
        begins = tl.load(since + plan * looked + segment, inside, 1)
        ends = tl.load(until + plan * looked + segment, inside, 0)
        seen = (place[:, None] >= begins[None, :]) & (place[:, None] < ends[None, :])
        return tl.where(seen & inside[None, :], scores, _NEVER)


@triton.jit
def _own_latent(keys, bias, own_row, known, q, scale, width, KP: tl.constexpr):
    """Of each query's own segment one latent's key and score."""
    key = _rows(keys, own_row, known, width, KP)
    score = tl.sum(q.to(tl.float32) * key.to(tl.float32), 1) * scale
    score += tl.maximum(tl.load(bias + own_row, known, _NEVER), _NEVER)
    return key, tl.where(known, score, _NEVER)


@triton.jit
def _weights(scores, lse):
    return tl.where(scores > 0.5 * _NEVER, tl.exp(scores - lse), 0.0)


@triton.jit
def attend(
    q, keys, values, bias, segments, known, own, own_known, since, until, real, begins, counts, flags,
    out, null, entropy, lse, mass, parts,
    blocks, queries, segments_total, looked, latents, width, samples, scale,
    tokens, heads, q_token, q_group, out_token, out_group, capacity,
    QB: tl.constexpr, BC: tl.constexpr, KP: tl.constexpr, LP: tl.constexpr, CHOSEN: tl.constexpr, ROWS: tl.constexpr,
    LISTED: tl.constexpr, MASS: tl.constexpr, REAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What is read and its measures; `mass` is added to. Grid: (M · ⌈Q / QB⌉, G).

    LISTED: tokens that are in no block are given what the null slot alone gives: zeros."""
    tiles = tl.cdiv(queries, QB)
    m, group = tl.program_id(0) // tiles, tl.program_id(1)
    row = group // heads
    block = (group * blocks + m).to(tl.int64)
    query = (tl.program_id(0) % tiles) * QB + tl.arange(0, QB)
    begin, count = _begin(begins, counts, m, row, blocks, queries, tokens, LISTED)
    here = query < count
    at = block * queries + query
    token = (begin + query).to(tl.int64)
    plan, place = block, query
    if ROWS:
        plan, place = row.to(tl.int64), begin + query
    held = group.to(tl.int64) * segments_total * latents
    keys, values, bias, mass = keys + held * width, values + held * width, bias + held, mass + group * segments_total
    out += group.to(tl.int64) * out_group
    own_query = _vectors(q + group.to(tl.int64) * q_group, token, q_token, here, width, KP)
    top, total, spread = tl.full((QB,), _NEVER, tl.float32), tl.zeros((QB,), tl.float32), tl.zeros((QB,), tl.float32)
    nothing, found = top, tl.zeros((QB, KP), tl.float32)
    for first in range(0, looked * latents, BC):
        rows, inside, _ = _latents(segments, known, block, first, looked, latents, BC, CHOSEN)
        key, value = _rows(keys, rows, inside, width, KP), _rows(values, rows, inside, width, KP)
        scores = _scores(
            own_query, key, bias, rows, inside, since, until, plan, first, place, looked, latents, scale, BC, CHOSEN,
            PRECISION,
        )  # fmt: skip
        column = first + tl.arange(0, BC)
        nothing = tl.maximum(nothing, tl.max(tl.where((column == 0)[None, :], scores, _NEVER), 1))
        higher = tl.maximum(top, tl.max(scores, 1))
        kept = tl.exp(top - higher)
        weights = _weights(scores, higher[:, None])
        total = total * kept + tl.sum(weights, 1)
        spread = spread * kept + tl.sum(weights * scores, 1)
        found = tl.dot(weights.to(value.dtype), value, found * kept[:, None], input_precision=PRECISION)
        top = higher
    if CHOSEN:
        owned = here & (tl.load(own_known + at, here, 0) != 0)
        own_row = tl.load(own + at, owned, 0).to(tl.int32) * latents
        for latent in range(latents):
            _, score = _own_latent(keys, bias, own_row + latent, owned, own_query, scale, width, KP)
            value = _rows(values, own_row + latent, owned, width, KP)
            higher = tl.maximum(top, score)
            kept, weight = tl.exp(top - higher), _weights(score, higher)
            total = total * kept + weight
            spread = spread * kept + weight * score
            found = found * kept[:, None] + weight[:, None] * value.to(tl.float32)
            top = higher
    all_weight = top + tl.log(total)
    columns = tl.arange(0, KP)
    narrow = (columns < width)[None, :]
    tl.store(out + token[:, None] * out_token + columns[None, :], found / total[:, None], here[:, None] & narrow)
    tl.store(lse + at, all_weight, here)
    nothing, spread = _weights(nothing, all_weight), all_weight - spread / total
    sampled = here & (query % _SAMPLE == 0)
    if ROWS:
        entropy_count, count = tl.sum(sampled.to(tl.int32), 0), tl.sum(here.to(tl.int32), 0)
        null_sum = tl.sum(tl.where(here, nothing, 0.0), 0)
        if LISTED:
            other = m * queries + query
            inside = (query < queries) & (other < tokens)
            flag = tl.load(flags + row * tokens + other, inside, 1)
            alone = (flag & 1) == 0
            tl.store(
                out + other.to(tl.int64)[:, None] * out_token + columns[None, :],
                tl.zeros((QB, KP), tl.float32),
                alone[:, None] & narrow,
            )
            null_sum += tl.sum(alone.to(tl.float32), 0)
            count += tl.sum(alone.to(tl.int32), 0)
            entropy_count += tl.sum((flag & 4).to(tl.int32), 0) // 4
        # Each block's first program also measures one segment: the next behind the null segment.
        latent, following = tl.arange(0, LP), m + 1
        written = (following < segments_total) & (tl.program_id(0) % tiles == 0)
        written = written & (tl.load(until + row * segments_total + following, written, 0) > 0)
        once, one = tl.where(tl.program_id(0) == 0, 1.0, 0.0), tl.where(written, 1.0, 0.0)
        measured = latent < tl.where(written, latents, 0)
        importance = tl.exp(tl.load(bias + following * latents + latent, measured, -float("inf")))
        parts += (group * tl.num_programs(0) + tl.program_id(0)) * 12
        tl.store(parts, tl.sum(tl.where(sampled, spread, 0.0), 0))
        tl.store(parts + 1, null_sum)
        tl.store(parts + 2, tl.sum(importance, 0))
        tl.store(parts + 3, tl.sum(importance * importance, 0))
        tl.store(parts + 4, one)
        tl.store(parts + 5, 0.0)
        tl.store(parts + 6, entropy_count.to(tl.float32))
        tl.store(parts + 7, count.to(tl.float32))
        tl.store(parts + 8, one * latents)
        tl.store(parts + 9, one * latents)
        tl.store(parts + 10, once * capacity)
        tl.store(parts + 11, once)
    else:
        tl.store(null + at, nothing, here)
        tl.store(entropy + block * samples + query // _SAMPLE, spread, sampled)
    if MASS:
        counted = here.to(tl.float32)
        if REAL:
            counted = tl.load(real + at, here, 0).to(tl.float32)
        for first in range(0, looked * latents, BC):
            rows, inside, segment = _latents(segments, known, block, first, looked, latents, BC, CHOSEN)
            key = _rows(keys, rows, inside, width, KP)
            scores = _scores(
                own_query, key, bias, rows, inside, since, until, plan, first, place, looked, latents, scale, BC,
                CHOSEN, PRECISION,
            )  # fmt: skip
            weights = _weights(scores, all_weight[:, None]) * counted[:, None]
            tl.atomic_add(mass + segment, tl.sum(weights, 0), inside)
        if CHOSEN:
            for latent in range(latents):
                _, score = _own_latent(keys, bias, own_row + latent, owned, own_query, scale, width, KP)
                tl.atomic_add(mass + own_row // latents, _weights(score, all_weight) * counted, owned)


@triton.jit
def queries_back(
    q, keys, values, bias, segments, known, own, own_known, since, until, begins, counts, flags, out, lse, d_out,
    d_q, delta, d_keys, d_values, d_bias,
    blocks, queries, segments_total, looked, latents, width, scale,
    tokens, heads, q_token, q_group, out_token, out_group, features, pooled_until,
    QB: tl.constexpr, BC: tl.constexpr, KP: tl.constexpr, CHOSEN: tl.constexpr, ROWS: tl.constexpr,
    LISTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of queries; of each one's own segment's latents, which are added to. Grid: (M · ⌈Q / QB⌉, G).

    ROWS: and zeros for what no kernel gives a gradient: queries that are in no block, and of tokens in no segment (in
    one row: from `pooled_until` on) the features behind the query."""
    tiles = tl.cdiv(queries, QB)
    m, group = tl.program_id(0) // tiles, tl.program_id(1)
    row, group_64 = group // heads, group.to(tl.int64)
    block = group_64 * blocks + m
    query = (tl.program_id(0) % tiles) * QB + tl.arange(0, QB)
    begin, count = _begin(begins, counts, m, row, blocks, queries, tokens, LISTED)
    here = query < count
    at = block * queries + query
    token = (begin + query).to(tl.int64)
    plan, place = block, query
    if ROWS:
        plan, place = row.to(tl.int64), begin + query
    held = group_64 * segments_total * latents
    keys, values, bias = keys + held * width, values + held * width, bias + held
    own_query = _vectors(q + group_64 * q_group, token, q_token, here, width, KP)
    grad = _vectors(d_out + group_64 * out_group, token, out_token, here, width, KP)
    read = _vectors(out + group_64 * out_group, token, out_token, here, width, KP)
    along = tl.sum(grad.to(tl.float32) * read.to(tl.float32), 1)
    tl.store(delta + at, along, here)
    all_weight = tl.load(lse + at, here, 0.0)
    found = tl.zeros((QB, KP), tl.float32)
    for first in range(0, looked * latents, BC):
        rows, inside, _ = _latents(segments, known, block, first, looked, latents, BC, CHOSEN)
        key, value = _rows(keys, rows, inside, width, KP), _rows(values, rows, inside, width, KP)
        scores = _scores(
            own_query, key, bias, rows, inside, since, until, plan, first, place, looked, latents, scale, BC, CHOSEN,
            PRECISION,
        )  # fmt: skip
        d_weights = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
        d_scores = _weights(scores, all_weight[:, None]) * (d_weights - along[:, None])
        found = tl.dot((d_scores * scale).to(key.dtype), key, found, input_precision=PRECISION)
    columns = tl.arange(0, KP)
    narrow = (columns < width)[None, :]
    if CHOSEN:
        owned = here & (tl.load(own_known + at, here, 0) != 0)
        own_row = tl.load(own + at, owned, 0).to(tl.int32) * latents
        d_keys, d_values, d_bias = d_keys + held * width, d_values + held * width, d_bias + held
        own_query = _vectors(q + group_64 * q_group, token, q_token, here, width, KP)
        grad = _vectors(d_out + group_64 * out_group, token, out_token, here, width, KP)
        for latent in range(latents):
            line = own_row + latent
            key, score = _own_latent(keys, bias, line, owned, own_query, scale, width, KP)
            value = _rows(values, line, owned, width, KP)
            weight = _weights(score, all_weight)
            d_weight = tl.sum(grad.to(tl.float32) * value.to(tl.float32), 1)
            d_score = weight * (d_weight - along)
            found += (d_score * scale)[:, None] * key.to(tl.float32)
            there, inside = line[:, None] * width + columns[None, :], owned[:, None] & narrow
            tl.atomic_add(d_keys + there, (d_score * scale)[:, None] * own_query.to(tl.float32), inside)
            tl.atomic_add(d_values + there, weight[:, None] * grad.to(tl.float32), inside)
            tl.atomic_add(d_bias + line, d_score, owned)
    d_q += group_64 * q_group
    tl.store(d_q + token[:, None] * q_token + columns[None, :], found, here[:, None] & narrow)
    if ROWS:
        other = m * queries + query
        inside = (query < queries) & (other < tokens)
        rest = inside & (other >= pooled_until)
        zeros = tl.zeros((QB, KP), tl.float32)
        other_q = d_q + other.to(tl.int64)[:, None] * q_token
        if LISTED:
            flag = tl.load(flags + row * tokens + other, inside, 3)
            tl.store(other_q + columns[None, :], zeros, ((flag & 1) == 0)[:, None] & narrow)
            rest = inside & ((flag & 2) == 0)
        for first in range(width, features, KP):
            tl.store(other_q + first + columns[None, :], zeros, rest[:, None] & (first + columns < features)[None, :])


@triton.jit
def latents_back(
    q, keys, values, bias, segments, known, since, until, begins, counts, lse, delta, d_out,
    d_keys, d_values, d_bias,
    blocks, queries, segments_total, looked, latents, width, scale,
    tokens, heads, q_token, q_group, out_token, out_group,
    QB: tl.constexpr, BC: tl.constexpr, KP: tl.constexpr, CHOSEN: tl.constexpr, ROWS: tl.constexpr,
    LISTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of what blocks look at, which are added to. Grid: (M · ⌈C / BC⌉, G)."""
    tiles = tl.cdiv(looked * latents, BC)
    m, group = tl.program_id(0) // tiles, tl.program_id(1)
    block = (group * blocks + m).to(tl.int64)
    first = (tl.program_id(0) % tiles) * BC
    rows, inside, _ = _latents(segments, known, block, first, looked, latents, BC, CHOSEN)
    begin, count = _begin(begins, counts, m, group // heads, blocks, queries, tokens, LISTED)
    group_64 = group.to(tl.int64)
    q, d_out = q + group_64 * q_group, d_out + group_64 * out_group
    held = group_64 * segments_total * latents
    keys, values, bias = keys + held * width, values + held * width, bias + held
    d_keys, d_values, d_bias = d_keys + held * width, d_values + held * width, d_bias + held
    key, value = _rows(keys, rows, inside, width, KP), _rows(values, rows, inside, width, KP)
    d_key, d_value = tl.zeros((BC, KP), tl.float32), tl.zeros((BC, KP), tl.float32)
    d_own = tl.zeros((BC,), tl.float32)
    for first_query in range(0, queries, QB):
        query = first_query + tl.arange(0, QB)
        here = query < count
        at = block * queries + query
        token = (begin + query).to(tl.int64)
        plan, place = block, query
        if ROWS:
            plan, place = (group // heads).to(tl.int64), begin + query
        own_query = _vectors(q, token, q_token, here, width, KP)
        grad = _vectors(d_out, token, out_token, here, width, KP)
        scores = _scores(
            own_query, key, bias, rows, inside, since, until, plan, first, place, looked, latents, scale, BC, CHOSEN,
            PRECISION,
        )  # fmt: skip
        weights = tl.where(here[:, None], _weights(scores, tl.load(lse + at, here, 0.0)[:, None]), 0.0)
        d_weights = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
        d_scores = weights * (d_weights - tl.load(delta + at, here, 0.0)[:, None])
        d_value = tl.dot(tl.trans(weights).to(grad.dtype), grad, d_value, input_precision=PRECISION)
        scaled = tl.trans(d_scores * scale).to(own_query.dtype)
        d_key = tl.dot(scaled, own_query, d_key, input_precision=PRECISION)
        d_own += tl.sum(d_scores, 0)
    columns = tl.arange(0, KP)
    at = rows[:, None] * width + columns[None, :]
    there = inside[:, None] & (columns < width)[None, :]
    tl.atomic_add(d_keys + at, d_key, there)
    tl.atomic_add(d_values + at, d_value, there)
    tl.atomic_add(d_bias + rows, d_own, inside)
