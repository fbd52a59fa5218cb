"""The choice of segments as Triton kernels: the arithmetic of `selection.py`.

`compare` scores all segments that a block may read, `pick` chooses among them. `cache_on_gpu.py` launches them. This
file imports Triton; it is imported where kernels run.

Shapes: as in `pooling_kernels.py`; Q tokens of a block (S of a segment), R segments retrieved, G rows × heads.

    first (G, M, N) fp32    scores of each block's first query; −∞ where it may not read
    own (G, M, Q) i32       the segment of the best score of each query
    listed, known           (G, M, 1 + R) i32 and u8, as `read.Chosen` has them: the null segment first
"""

import triton
import triton.language as tl


@triton.jit
def compare(
    q, summaries, summary_bias, since, until, begins, first, own,
    heads, tokens, blocks, queries, segments, width, q_token, q_group, scale,
    QB: tl.constexpr, BC: tl.constexpr, KC: tl.constexpr, LISTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (M · ⌈Q / QB⌉, G)."""
    tiles = tl.cdiv(queries, QB)
    m, query_tile, group = tl.program_id(0) // tiles, tl.program_id(0) % tiles, tl.program_id(1)
    row, group_64 = group // heads, group.to(tl.int64)
    block = group_64 * blocks + m
    begin = m * queries
    if LISTED:
        begin = tl.load(begins + row * blocks + m)
    query = query_tile * QB + tl.arange(0, QB)
    # Behind its count a list's block reads on in the row: what comes of that is not looked at.
    here = (query < queries) & (begin + query < tokens)
    asked = q + group_64 * q_group + (begin + query).to(tl.int64)[:, None] * q_token
    held, shown = group_64 * segments, row * segments
    best, place = tl.full((QB,), -float("inf"), tl.float32), tl.zeros((QB,), tl.int32)
    for start in range(0, tl.minimum(segments, begin // queries + 1), BC):  # more are not complete before it
        n = start + tl.arange(0, BC)
        inside = (n > 0) & (n < segments)
        seen = inside & (tl.load(since + shown + n, inside, 0) <= begin)
        seen = seen & (begin < tl.load(until + shown + n, inside, 0))
        scores = tl.zeros((QB, BC), tl.float32)
        for column in range(0, width, KC):
            columns = column + tl.arange(0, KC)
            narrow = (columns < width)[None, :]
            query_part = tl.load(asked + columns[None, :], here[:, None] & narrow, 0.0)
            key = tl.load(summaries + (held + n)[:, None] * width + columns[None, :], seen[:, None] & narrow, 0.0)
            scores = tl.dot(query_part, tl.trans(key), scores, input_precision=PRECISION)
        scores = scores * scale + tl.load(summary_bias + held + n, seen, 0.0)[None, :]
        scores = tl.where(seen[None, :], scores, -float("inf"))
        at_first = tl.max(tl.where((query == 0)[:, None], scores, -float("inf")), 0)
        tl.store(first + block * segments + n, at_first, inside & (n < tl.where(query_tile == 0, segments, 0)))
        high = tl.max(scores, 1)
        found = start + tl.argmax(scores, 1)
        place = tl.where(high > best, found, place)
        best = tl.maximum(high, best)
    tl.store(own + block * queries + query, place, query < queries)


@triton.jit
def _ordered(score, n, SHIFT: tl.constexpr):
    """Integers in the order of scores, of equal ones the earlier first; no two are equal."""
    bits = score.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) + 2147483648
    return (ordered << SHIFT) + ((1 << SHIFT) - 1 - n)


@triton.jit
def pick(
    first, own, begins, listed, known, own_known,
    heads, blocks, queries, segments, retrieve,
    NP: tl.constexpr, SHIFT: tl.constexpr, RP: tl.constexpr, QP: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """The best `retrieve` by the block's first query: the least of them is found bit by bit. Grid: (M, G)."""
    m, group = tl.program_id(0), tl.program_id(1)
    block = group.to(tl.int64) * blocks + m
    begin = m * queries
    if LISTED:
        begin = tl.load(begins + (group // heads) * blocks + m)
    scores = first + block * segments
    n = tl.arange(0, NP)
    score = tl.load(scores + n, (n > 0) & (n < segments) & (n <= begin // queries), -float("inf"))
    there = score > -float("inf")
    order = tl.where(there, _ordered(score, n, SHIFT), -1)
    count = tl.minimum(tl.sum(there.to(tl.int32), 0), retrieve)
    least = tl.zeros((1,), tl.int64)
    for step in range(32 + SHIFT):
        higher = least + (tl.full((1,), 1, tl.int64) << (31 + SHIFT - step))
        enough = tl.sum((order >= higher).to(tl.int32), 0) >= count
        least = tl.where(enough, higher, least)
    chosen = there & (order >= least)
    looked = 1 + retrieve
    tl.store(listed + block * looked + tl.cumsum(chosen.to(tl.int32), 0), n, chosen)
    place = tl.arange(0, RP)
    tl.store(listed + block * looked + place, place * 0, (place < looked) & ((place == 0) | (place > count)))
    tl.store(known + block * looked + place, (place <= count).to(tl.uint8), place < looked)
    query = tl.arange(0, QP)
    inside = query < queries
    other = tl.load(own + block * queries + query, inside, 0)
    score = tl.load(scores + other, inside & (other > 0), -float("inf"))
    free = (score > -float("inf")) & (_ordered(score, other, SHIFT) < least)
    tl.store(own_known + block * queries + query, free.to(tl.uint8), inside)
