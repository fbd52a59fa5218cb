"""Where segments lie and what they are pooled into, as Triton kernels: the arithmetic of `segments.py` and `write.py`.

`lay_out` finds segments and blocks, `pool` writes latents and their summaries, `pool_back` is its backward pass.
`cache_on_gpu.py` launches them. This file imports Triton; it is imported where kernels run.

Shapes: T tokens, V rows that differ in their documents (1 without documents), B rows, H heads, G = B·H, N segments, the
null segment included, of S tokens and L latents, M blocks of S tokens, K head width, E width of the importance net, F
features of a head in `projected` (T, G, F): query K, key K, value K, importance E, pooling L.

    since, until (V, N) i32     a token may read a segment from the one on and before the other; until 0: no segment
    begins, counts (V, M) i32   of each block the first token, and how many there are
    flags (V, T) u8             1: in a block; 2: in a segment; 4: in neither's block, and its entropy is sampled
"""

import triton
import triton.language as tl

_ALWAYS = tl.constexpr(2**31 - 1)  # until when the null segment may be read
_SAMPLE = tl.constexpr(16)  # as in read.py


@triton.jit
def _later(one, other):
    return tl.maximum(one, other)


@triton.jit
def lay_out(
    documents, since, until, begins, counts, flags, within, ends, length, tokens, segments, blocks,
    TB: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Segments; with documents (LISTED) also blocks and flags, `within` and `ends` (V, T) being room to work in.

    A block is `length` tokens of a document or what is left of it. The first one of each is left out, for it may read
    the null segment alone: so blocks are not more than segments. Grid: (V,)."""
    row, span = tl.program_id(0).to(tl.int64), tl.arange(0, TB)
    since, until, begins, counts = (
        since + row * segments,
        until + row * segments,
        begins + row * blocks,
        counts + row * blocks,
    )
    documents, flags, within, ends = (
        documents + row * tokens,
        flags + row * tokens,
        within + row * tokens,
        ends + row * tokens,
    )
    for first in range(0, segments, TB):
        n = first + span
        tl.store(since + n, tl.where(n == 0, 0, tokens if LISTED else n * length), n < segments)
        tl.store(until + n, tl.where(n == 0, _ALWAYS, 0 if LISTED else tokens), n < segments)
    if LISTED:
        for first in range(0, blocks, TB):
            tl.store(begins + first + span, span * 0, first + span < blocks)
            tl.store(counts + first + span, span * 0, first + span < blocks)
        tl.debug_barrier()
        begun, closed, opened = 0, 0, 0
        for first in range(0, tokens, TB):
            token = first + span
            inside = token < tokens
            own = tl.load(documents + token, inside, 0)
            starts = (token == 0) | (own != tl.load(documents + token - 1, inside & (token > 0), 0))
            lasts = (token == tokens - 1) | (own != tl.load(documents + token + 1, token < tokens - 1, 0))
            start = tl.maximum(tl.associative_scan(tl.where(inside & starts, token, 0), 0, _later), begun)
            place = token - start
            tl.store(within + token, place, inside)
            tl.store(ends + start, token + 1, inside & lasts)
            closes = inside & (place % length == length - 1)
            tl.store(since + closed + tl.cumsum(closes.to(tl.int32), 0), token + 1, closes)
            opens = inside & (place % length == 0) & (place > 0)
            tl.store(begins + opened + tl.cumsum(opens.to(tl.int32), 0) - 1, token, opens)
            begun = tl.max(start, 0)
            closed += tl.sum(closes.to(tl.int32), 0)
            opened += tl.sum(opens.to(tl.int32), 0)
        tl.debug_barrier()
        for first in range(0, segments, TB):
            n = first + span
            there = (n > 0) & (n <= closed)
            last = tl.load(since + n, there, 1) - 1
            start = last - tl.load(within + last, there, 0)
            tl.store(until + n, tl.load(ends + start, there, 0), there)
        for first in range(0, blocks, TB):
            there = first + span < opened
            begin = tl.load(begins + first + span, there, 0)
            end = tl.load(ends + begin - tl.load(within + begin, there, 0), there, 0)
            tl.store(counts + first + span, tl.minimum(end - begin, length), there)
        for first in range(0, tokens, TB):
            token = first + span
            inside = token < tokens
            place = tl.load(within + token, inside, 0)
            end = tl.load(ends + token - place, inside, 0)
            found = tl.where(place >= length, 1, tl.where(place % _SAMPLE == 0, 4, 0))
            found += tl.where(token - place % length + length <= end, 2, 0)
            tl.store(flags + token, found.to(tl.uint8), inside)


@triton.jit
def _shares(x, per_token, tokens, there, first, position, latents, length, LP: tl.constexpr, SP: tl.constexpr):
    """(LP, SP) what each latent takes of each token of a segment: softmax; 0 outside."""
    latent, place = tl.arange(0, LP)[:, None], tl.arange(0, SP)[None, :]
    inside = (latent < latents) & (place < length)
    logits = tl.load(x + tokens[None, :] * per_token + first + latent, inside & there[None, :], 0.0).to(tl.float32)
    logits += tl.load(position + latent * length + place, inside, 0.0).to(tl.float32)
    logits = tl.where(place < length, logits, -float("inf"))
    worth = tl.exp(logits - tl.max(logits, 1)[:, None])
    return tl.where(latent < latents, worth / tl.sum(worth, 1)[:, None], 0.0)


@triton.jit
def _content(x, per_token, tokens, there, first, columns, end):
    """(SP, columns) of what is pooled, up to a column."""
    inside = there[:, None] & (columns < end)[None, :]
    return tl.load(x + tokens[:, None] * per_token + first + columns[None, :], inside, 0.0)


@triton.jit
def _importance(hidden, weight, bias, E: tl.constexpr, EP: tl.constexpr):
    """The importance net's parameters, what stands before its sum, and σ's argument, of latents (LP, EP)."""
    columns = tl.arange(0, EP)
    own = tl.load(weight + columns, columns < E, 0.0).to(tl.float32)[None, :]
    active = hidden / (1.0 + tl.exp(-hidden))
    return own, active, tl.sum(active * own, 1) + tl.load(bias).to(tl.float32)


@triton.jit
def pool(
    projected, since, until, position, importance, importance_bias, null,
    keys, values, bias, summaries, summary_bias,
    groups, heads, per_row, features, segments, latents, length, width,
    LP: tl.constexpr, SP: tl.constexpr, CB: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Latents (G, N, L, ·) and summaries (G, N, ·), the null segment's among them. Grid: (N, G)."""
    n, group = tl.program_id(0), tl.program_id(1)
    head, row = group % heads, group // per_row
    latent = tl.arange(0, LP)
    kept = latent < latents
    held = (group * segments + n).to(tl.int64)
    keys, values = keys + held * latents * width, values + held * latents * width
    if n == 0:
        for first in range(0, width, CB):
            columns = first + tl.arange(0, CB)
            narrow = columns < width
            at, inside = latent[:, None] * width + columns[None, :], kept[:, None] & narrow[None, :]
            key = tl.load(null + head * width + columns, narrow, 0.0).to(tl.float32)
            tl.store(keys + at, tl.where((latent == 0)[:, None], key[None, :], 0.0), inside)
            tl.store(values + at, tl.zeros((LP, CB), tl.float32), inside)
        tl.store(bias + held * latents + latent, tl.where(latent == 0, 0.0, -float("inf")), kept)
    else:
        place = tl.arange(0, SP)
        tokens = (tl.load(since + row * segments + n) - length + place).to(tl.int64)
        there = (place < length) & (tl.load(until + row * segments + n) > place * 0)
        x, per_token = projected + group.to(tl.int64) * features, groups.to(tl.int64) * features
        content_end = 3 * width + E
        shares = _shares(
            x, per_token, tokens, there, content_end, position + head * latents * length, latents, length, LP, SP
        )
        net = _content(x, per_token, tokens, there, 3 * width, tl.arange(0, EP), E)
        taken = shares.to(net.dtype)
        hidden = tl.dot(taken, net, input_precision=PRECISION).to(net.dtype).to(tl.float32)
        _, _, logit = _importance(hidden, importance + head * E, importance_bias + head, E, EP)
        worth = tl.minimum(logit, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(logit)))
        tl.store(bias + held * latents + latent, worth, kept)
        worth = tl.where(kept, worth, -float("inf"))
        top = tl.max(worth, 0)
        share = tl.exp(worth - top)
        total = tl.sum(share, 0)
        tl.store(summary_bias + held, top + tl.log(total))
        share = (share / total).to(net.dtype).to(tl.float32)
        for first in range(0, width, CB):
            columns = first + tl.arange(0, CB)
            narrow = columns < width
            at, inside = latent[:, None] * width + columns[None, :], kept[:, None] & narrow[None, :]
            key = tl.dot(taken, _content(x, per_token, tokens, there, width, columns, width), input_precision=PRECISION)
            key = key.to(net.dtype)
            tl.store(keys + at, key, inside)
            tl.store(summaries + held * width + columns, tl.sum(share[:, None] * key.to(tl.float32), 0), narrow)
            value = _content(x, per_token, tokens, there, 2 * width, columns, width)
            tl.store(values + at, tl.dot(taken, value, input_precision=PRECISION), inside)


@triton.jit
def _piece_back(x, d_x, per_token, tokens, there, first, columns, end, shares, d_pooled, d_shares,
                PRECISION: tl.constexpr):  # fmt: skip
    """Of some columns: the gradient of what is pooled, stored, and that of the shares, added to."""
    content = _content(x, per_token, tokens, there, first, columns, end)
    grad = d_pooled.to(content.dtype)
    d_shares = tl.dot(grad, tl.trans(content), d_shares, input_precision=PRECISION)
    found = tl.dot(tl.trans(shares.to(content.dtype)), grad, input_precision=PRECISION)
    at = d_x + tokens[:, None] * per_token + first + columns[None, :]
    tl.store(at, found, there[:, None] & (columns < end)[None, :])
    return d_shares


@triton.jit
def pool_back(
    projected, since, until, position, importance, importance_bias, d_keys, d_values, d_bias,
    d_projected, parts,
    groups, heads, per_row, features, segments, latents, length, width, span,
    LP: tl.constexpr, SP: tl.constexpr, CB: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of all features of segments' tokens but queries; of position bias, importance net and null key, of
    `span` segments each, (P, B, H·L·S + H·E + H + H·K). Grid: (P, G)."""
    p, group = tl.program_id(0), tl.program_id(1)
    head, row = group % heads, group // per_row
    latent, place = tl.arange(0, LP), tl.arange(0, SP)
    kept, narrow = latent < latents, tl.arange(0, EP) < E
    group_64, per_token = group.to(tl.int64), groups.to(tl.int64) * features
    x, d_x = projected + group_64 * features, d_projected + group_64 * features
    content_end = 3 * width + E
    position += head * latents * length
    d_position, d_weight = tl.zeros((LP, SP), tl.float32), tl.zeros((EP,), tl.float32)
    d_offset = 0.0
    for n in range(1 + p * span, tl.minimum(segments, 1 + (p + 1) * span)):
        if tl.load(until + row * segments + n) > 0:
            held = (group_64 * segments + n) * latents
            tokens = (tl.load(since + row * segments + n) - length + place).to(tl.int64)
            there = place < length
            shares = _shares(x, per_token, tokens, there, content_end, position, latents, length, LP, SP)
            few = tl.arange(0, EP)
            net = _content(x, per_token, tokens, there, 3 * width, few, E)
            hidden = tl.dot(shares.to(net.dtype), net, input_precision=PRECISION).to(net.dtype).to(tl.float32)
            own, active, logit = _importance(hidden, importance + head * E, importance_bias + head, E, EP)
            d_logit = tl.load(d_bias + held + latent, kept, 0.0) / (1.0 + tl.exp(logit))
            d_offset += tl.sum(d_logit, 0)
            d_weight += tl.sum(d_logit[:, None] * active, 0)
            opened = 1.0 / (1.0 + tl.exp(-hidden))
            d_hidden = d_logit[:, None] * own * (opened + active * (1.0 - opened))
            d_shares = tl.zeros((LP, SP), tl.float32)
            d_shares = _piece_back(
                x, d_x, per_token, tokens, there, 3 * width, few, E, shares, d_hidden, d_shares, PRECISION
            )
            for first in range(0, width, CB):
                columns = first + tl.arange(0, CB)
                at = held * width + latent[:, None] * width + columns[None, :]
                inside = kept[:, None] & (columns < width)[None, :]
                d_shares = _piece_back(
                    x, d_x, per_token, tokens, there, width, columns, width, shares,
                    tl.load(d_keys + at, inside, 0.0), d_shares, PRECISION,
                )  # fmt: skip
                d_shares = _piece_back(
                    x, d_x, per_token, tokens, there, 2 * width, columns, width, shares,
                    tl.load(d_values + at, inside, 0.0), d_shares, PRECISION,
                )  # fmt: skip
            d_logits = shares * (d_shares - tl.sum(shares * d_shares, 1)[:, None])
            at = d_x + tokens[None, :] * per_token + content_end + latent[:, None]
            tl.store(at, d_logits, kept[:, None] & there[None, :])
            d_position += d_logits
    part = parts + (p * (groups // heads) + group // heads).to(tl.int64) * heads * (latents * length + E + 1 + width)
    at = head * latents * length + latent[:, None] * length + place[None, :]
    tl.store(part + at, d_position, kept[:, None] & (place < length)[None, :])
    part += heads * latents * length
    tl.store(part + head * E + tl.arange(0, EP), d_weight, narrow)
    tl.store(part + heads * E + head, d_offset)
    part += heads * (E + 1)
    for first in range(0, width, CB):
        columns = first + tl.arange(0, CB)
        d_null = tl.load(
            d_keys + group_64 * segments * latents * width + columns, columns < tl.where(p == 0, width, 0), 0.0
        )
        tl.store(part + head * width + columns, d_null, columns < width)
