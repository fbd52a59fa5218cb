"""Reading the cache as Triton kernels: the arithmetic of `read.py`, no weight of which is ever in the GPU's memory.

Forward: `attend`. Backward: `queries_back`, a tile of queries at a time, and `latents_back`, a tile of latents at a
time. `reading_on_gpu.py` launches them. This file imports Triton; it is imported where kernels run.

Shapes: G rows × heads, M blocks of Q queries, N segments of L latents, J segments that a block looks at, C = J·L, K
head width (padded to KP). A block's latents come from a list of segments (CHOSEN), or are all of them, of which a
query i sees those with since ≤ i < until. With CHOSEN each query has a segment of its own besides, or none.

    lse, delta (G, M, Q) fp32   logarithm of the softmax's denominator; Σ out ⊙ d_out
"""

import triton
import triton.language as tl

_NEVER = tl.constexpr(-1e30)  # score of what is not seen; finite, so that differences are
_SAMPLE = tl.constexpr(16)  # as in read.py


@triton.jit
def _rows(x, rows, inside, width, KP: tl.constexpr):
    """(rows, KP) of a matrix of `width` columns."""
    columns = tl.arange(0, KP)
    at = x + rows[:, None] * width + columns[None, :]
    return tl.load(at, inside[:, None] & (columns < width)[None, :], 0.0)


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
def _scores(q, key, bias, rows, inside, since, until, block, first, query, looked, latents, scale, BC: tl.constexpr,
            CHOSEN: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """(queries, BC); `_NEVER` where a query does not see a latent."""
    sees = tl.load(bias + rows, inside, _NEVER)
    scores = tl.dot(q, tl.trans(key), input_precision=PRECISION) * scale + tl.maximum(sees, _NEVER)[None, :]
    if CHOSEN:
        return tl.where(inside[None, :], scores, _NEVER)
    else:
        place = (first + tl.arange(0, BC)) // latents
        begins = tl.load(since + block * looked + place, inside, 1)
        ends = tl.load(until + block * looked + place, inside, 0)
        seen = (query[:, None] >= begins[None, :]) & (query[:, None] < ends[None, :])
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
    q, keys, values, bias, segments, known, own, own_known, since, until, real,
    out, null, entropy, lse, mass,
    blocks, queries, segments_total, looked, latents, width, samples, scale,
    QB: tl.constexpr, BC: tl.constexpr, KP: tl.constexpr, CHOSEN: tl.constexpr, MASS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What is read and its measures; `mass` is added to. Grid: (M · ⌈Q / QB⌉, G)."""
    tiles = tl.cdiv(queries, QB)
    m, group = tl.program_id(0) // tiles, tl.program_id(1)
    block = (group * blocks + m).to(tl.int64)
    query = (tl.program_id(0) % tiles) * QB + tl.arange(0, QB)
    here = query < queries
    at = block * queries + query
    held, asked = group.to(tl.int64) * segments_total * latents, block * queries * width
    keys, values, bias, mass = keys + held * width, values + held * width, bias + held, mass + group * segments_total
    own_query = _rows(q + asked, query, here, width, KP)
    top, total, spread = tl.full((QB,), _NEVER, tl.float32), tl.zeros((QB,), tl.float32), tl.zeros((QB,), tl.float32)
    nothing, found = top, tl.zeros((QB, KP), tl.float32)
    for first in range(0, looked * latents, BC):
        rows, inside, _ = _latents(segments, known, block, first, looked, latents, BC, CHOSEN)
        key, value = _rows(keys, rows, inside, width, KP), _rows(values, rows, inside, width, KP)
        scores = _scores(
            own_query, key, bias, rows, inside, since, until, block, first, query, looked, latents, scale, BC, CHOSEN,
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
    tl.store(
        out + asked + query[:, None] * width + columns[None, :],
        found / total[:, None],
        here[:, None] & (columns < width)[None, :],
    )
    tl.store(lse + at, all_weight, here)
    tl.store(null + at, _weights(nothing, all_weight), here)
    sampled = here & (query % _SAMPLE == 0)
    tl.store(entropy + block * samples + query // _SAMPLE, all_weight - spread / total, sampled)
    if MASS:
        counts = tl.load(real + at, here, 0).to(tl.float32)
        for first in range(0, looked * latents, BC):
            rows, inside, segment = _latents(segments, known, block, first, looked, latents, BC, CHOSEN)
            key = _rows(keys, rows, inside, width, KP)
            scores = _scores(
                own_query, key, bias, rows, inside, since, until, block, first, query, looked, latents, scale, BC,
                CHOSEN, PRECISION,
            )  # fmt: skip
            weights = _weights(scores, all_weight[:, None]) * counts[:, None]
            tl.atomic_add(mass + segment, tl.sum(weights, 0), inside)
        if CHOSEN:
            for latent in range(latents):
                _, score = _own_latent(keys, bias, own_row + latent, owned, own_query, scale, width, KP)
                tl.atomic_add(mass + own_row // latents, _weights(score, all_weight) * counts, owned)


@triton.jit
def queries_back(
    q, keys, values, bias, segments, known, own, own_known, since, until, out, lse, d_out,
    d_q, delta, d_keys, d_values, d_bias,
    blocks, queries, segments_total, looked, latents, width, scale,
    QB: tl.constexpr, BC: tl.constexpr, KP: tl.constexpr, CHOSEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of queries; of each one's own segment's latents, which are added to. Grid: (M · ⌈Q / QB⌉, G)."""
    tiles = tl.cdiv(queries, QB)
    m, group = tl.program_id(0) // tiles, tl.program_id(1)
    block = (group * blocks + m).to(tl.int64)
    query = (tl.program_id(0) % tiles) * QB + tl.arange(0, QB)
    here = query < queries
    at = block * queries + query
    held, asked = group.to(tl.int64) * segments_total * latents, block * queries * width
    keys, values, bias = keys + held * width, values + held * width, bias + held
    own_query, grad = _rows(q + asked, query, here, width, KP), _rows(d_out + asked, query, here, width, KP)
    along = tl.sum(grad.to(tl.float32) * _rows(out + asked, query, here, width, KP).to(tl.float32), 1)
    tl.store(delta + at, along, here)
    all_weight = tl.load(lse + at, here, 0.0)
    found = tl.zeros((QB, KP), tl.float32)
    for first in range(0, looked * latents, BC):
        rows, inside, _ = _latents(segments, known, block, first, looked, latents, BC, CHOSEN)
        key, value = _rows(keys, rows, inside, width, KP), _rows(values, rows, inside, width, KP)
        scores = _scores(
            own_query, key, bias, rows, inside, since, until, block, first, query, looked, latents, scale, BC, CHOSEN,
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
        own_query, grad = _rows(q + asked, query, here, width, KP), _rows(d_out + asked, query, here, width, KP)
        for latent in range(latents):
            row = own_row + latent
            key, score = _own_latent(keys, bias, row, owned, own_query, scale, width, KP)
            value = _rows(values, row, owned, width, KP)
            weight = _weights(score, all_weight)
            d_weight = tl.sum(grad.to(tl.float32) * value.to(tl.float32), 1)
            d_score = weight * (d_weight - along)
            found += (d_score * scale)[:, None] * key.to(tl.float32)
            place, inside = row[:, None] * width + columns[None, :], owned[:, None] & narrow
            tl.atomic_add(d_keys + place, (d_score * scale)[:, None] * own_query.to(tl.float32), inside)
            tl.atomic_add(d_values + place, weight[:, None] * grad.to(tl.float32), inside)
            tl.atomic_add(d_bias + row, d_score, owned)
    tl.store(d_q + asked + query[:, None] * width + columns[None, :], found, here[:, None] & narrow)


@triton.jit
def latents_back(
    q, keys, values, bias, segments, known, since, until, lse, delta, d_out,
    d_keys, d_values, d_bias,
    blocks, queries, segments_total, looked, latents, width, scale,
    QB: tl.constexpr, BC: tl.constexpr, KP: tl.constexpr, CHOSEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of what blocks look at, which are added to. Grid: (M · ⌈C / BC⌉, G)."""
    tiles = tl.cdiv(looked * latents, BC)
    m, group = tl.program_id(0) // tiles, tl.program_id(1)
    block = (group * blocks + m).to(tl.int64)
    first = (tl.program_id(0) % tiles) * BC
    rows, inside, _ = _latents(segments, known, block, first, looked, latents, BC, CHOSEN)
    held, asked = group.to(tl.int64) * segments_total * latents, block * queries * width
    keys, values, bias = keys + held * width, values + held * width, bias + held
    d_keys, d_values, d_bias = d_keys + held * width, d_values + held * width, d_bias + held
    key, value = _rows(keys, rows, inside, width, KP), _rows(values, rows, inside, width, KP)
    d_key, d_value = tl.zeros((BC, KP), tl.float32), tl.zeros((BC, KP), tl.float32)
    d_own = tl.zeros((BC,), tl.float32)
    for first_query in range(0, queries, QB):
        query = first_query + tl.arange(0, QB)
        here = query < queries
        at = block * queries + query
        own_query, grad = _rows(q + asked, query, here, width, KP), _rows(d_out + asked, query, here, width, KP)
        scores = _scores(
            own_query, key, bias, rows, inside, since, until, block, first, query, looked, latents, scale, BC, CHOSEN,
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
