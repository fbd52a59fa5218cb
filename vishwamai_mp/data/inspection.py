"""What a pair of indexed token files holds, for people: lengths of its documents, their tokens, and a page of both."""

import html
import os
from dataclasses import dataclass, field

import numpy as np

from vishwamai_mp.config.errors import UserError
from vishwamai_mp.config.wording import counted
from vishwamai_mp.data.indexed import IndexedStats, check_indexed, document_spans
from vishwamai_mp.data.tokenizer import Tokenizer

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color-scheme:light dark}"
    "td,th{padding:0 .8rem 0 0;text-align:right}td:last-child{width:100%;text-align:left}"
    ".bar{height:1rem;background:#4878cf}pre{white-space:pre-wrap;overflow-wrap:anywhere}"
)


@dataclass(frozen=True)
class ShownDocument:
    """The beginning of one document.

    Attributes:
        number: of the document, from 0.
        length: of the whole document, in tokens.
        ids: its first token ids.
        text: what they decode to; None without a tokenizer.
        tokens: how the tokenizer spells each of them; empty without one.
    """

    number: int
    length: int
    ids: list[int]
    text: str | None = None
    tokens: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Inspection:
    """A checked pair, what its documents measure, and some of them.

    Attributes:
        lengths: tokens of a document, by quantile: 0, 0.25, 0.5, 0.75, 0.9, 0.99 and 1.
        histogram: (shortest, longest, documents) by powers of two: 0 tokens, 1, 2 to 3, 4 to 7, and so on.
    """

    stats: IndexedStats
    lengths: dict[float, int]
    histogram: list[tuple[int, int, int]]
    documents: list[ShownDocument]


def inspect_indexed(
    prefix: str | os.PathLike[str],
    tokenizer: Tokenizer | None = None,
    *,
    first: int = 0,
    count: int = 3,
    max_tokens: int = 64,
) -> Inspection:
    """Measure all documents of a pair and show `count` of them from number `first` on.

    Reads the index and of the tokens only what is shown; takes a few dozen bytes of memory per document.

    Args:
        max_tokens: of a document that are shown at most.

    Raises:
        UserError: the pair is not whole, has no document `first`, or shows a token that the tokenizer lacks.
    """
    stats = check_indexed(prefix)
    if stats.num_documents == 0:
        raise UserError(f"{stats.prefix} has no documents: preprocess it again")
    if not 0 <= first < stats.num_documents:
        raise UserError(f"--first {first}: {stats.prefix} has documents 0 to {stats.num_documents - 1}")
    starts = document_spans(prefix)
    lengths = np.diff(starts)
    tokens = np.memmap(f"{stats.prefix}.bin", dtype=stats.dtype, mode="r")
    shown = []
    for number in range(first, min(first + count, stats.num_documents)):
        begin, length = int(starts[number]), int(lengths[number])
        ids = [int(i) for i in tokens[begin : begin + min(length, max_tokens)]]
        shown.append(_shown(number, length, ids, tokenizer))
    quantiles = (0, 0.25, 0.5, 0.75, 0.9, 0.99, 1)
    measured = np.quantile(lengths, quantiles, method="lower")
    return Inspection(stats, dict(zip(quantiles, map(int, measured), strict=True)), _histogram(lengths), shown)


def _shown(number: int, length: int, ids: list[int], tokenizer: Tokenizer | None) -> ShownDocument:
    if tokenizer is None:
        return ShownDocument(number, length, ids)
    return ShownDocument(number, length, ids, tokenizer.decode(ids), [tokenizer.id_to_token(i) for i in ids])


def _histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    exponents = np.frexp(lengths)[1]  # exact: 0 for 0 tokens, k for 2**(k-1) to 2**k - 1
    counts = np.bincount(exponents)
    return [(0, 0, int(counts[0])), *((1 << k >> 1, (1 << k) - 1, int(counts[k])) for k in range(1, counts.size))]


def render_text(inspection: Inspection) -> str:
    """For a terminal: nothing that a document holds reaches it as a control character."""
    lines = [_summary(inspection), "tokens of a document: " + _quantiles(inspection)]
    most = max(documents for _, _, documents in inspection.histogram)
    for low, high, documents in inspection.histogram:
        lines.append(f"{_range(low, high):>24} {documents:>12}  {'#' * _width(documents, most, 40)}".rstrip())
    for shown in inspection.documents:
        lines += ["", _heading(shown)]
        lines.append("  ids    " + (" ".join(map(str, shown.ids)) or "none"))
        if shown.text is not None:
            lines.append("  tokens " + " ".join(map(repr, shown.tokens)))
            lines.append("  text   " + repr(shown.text))
    return "\n".join(lines)


def render_html(inspection: Inspection) -> str:
    """One page that needs no network and runs nothing."""
    title = html.escape(inspection.stats.prefix)
    most = max(documents for _, _, documents in inspection.histogram)
    rows = "".join(
        f"<tr><td>{_range(low, high)}</td><td>{documents}</td>"
        f'<td><div class="bar" style="width:{_width(documents, most, 100)}%"></div></td></tr>\n'
        for low, high, documents in inspection.histogram
    )
    documents = ""
    for shown in inspection.documents:
        content = " ".join(map(str, shown.ids)) if shown.text is None else shown.text
        documents += f"<h3>{_heading(shown)}</h3><pre>{html.escape(content)}</pre>\n"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body>\n<h1>{title}</h1>\n"
        f"<p>{html.escape(_summary(inspection))}<br>tokens of a document: {_quantiles(inspection)}</p>\n"
        f"<table><tr><th>tokens</th><th>documents</th><th></th></tr>\n{rows}</table>\n{documents}</body></html>\n"
    )


def _summary(inspection: Inspection) -> str:
    stats = inspection.stats
    documents, tokens = counted(stats.num_documents, "document"), counted(stats.num_tokens, "token")
    return f"{stats.prefix}: {documents}, {tokens} of {stats.dtype}"


def _quantiles(inspection: Inspection) -> str:
    names = {0: "least", 0.5: "median", 1: "most"}
    return ", ".join(f"{names.get(q, f'{q:.0%}')} {length}" for q, length in inspection.lengths.items())


def _heading(shown: ShownDocument) -> str:
    more = f", the first {len(shown.ids)}" if len(shown.ids) < shown.length else ""
    return f"document {shown.number}: {counted(shown.length, 'token')}{more}"


def _range(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"


def _width(documents: int, most: int, full: int) -> int:
    """A bar's length; where there is any document, at least 1."""
    return -(-documents * full // most)
