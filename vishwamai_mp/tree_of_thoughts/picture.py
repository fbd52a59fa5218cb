"""A search as one self-contained HTML page: the tree as SVG, the chosen path, and each thought's text on hover."""

import html
from collections.abc import Sequence
from dataclasses import dataclass

from vishwamai_mp.tree_of_thoughts.result import Node, SearchResult

_COLUMN, _ROW, _WIDTH, _HEIGHT, _MARGIN = 250, 46, 190, 34, 24  # pixels
_LABEL_CHARACTERS = 24
_STATUS_TEXT = {
    "open": "not expanded",
    "expanded": "expanded",
    "pruned": "pruned: far below its best sibling",
    "dropped": "dropped: others of its depth scored better",
    "complete": "complete",
    "unfinished": "unfinished: the budget ended",
}
_STYLE = """
:root { --ink: #1c2430; --paper: #fbfaf7; --line: #c9ccd1; --best: #0b7a4b; --faint: #6d7683; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --paper: #15181d; --line: #3d444e; --best: #45d394; --faint: #98a1ad; } }
body { margin: 0; font: 14px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
main { max-width: 1400px; margin: 0 auto; padding: 24px; }
h1 { font-size: 20px; margin: 0 0 4px; } h2 { font-size: 15px; margin: 28px 0 6px; }
p.facts, figcaption { color: var(--faint); margin: 0 0 12px; }
figure { margin: 0; overflow-x: auto; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; padding: 12px 14px; border-left: 3px solid var(--best);
  background: color-mix(in srgb, var(--best) 7%, transparent); font: 13px/1.5 ui-monospace, monospace; }
.edge { fill: none; stroke: var(--line); stroke-width: 1.5; } .edge.best { stroke: var(--best); stroke-width: 3; }
.edge.pruned, .edge.dropped, .edge.unfinished { stroke-dasharray: 4 4; }
.node rect { stroke: var(--line); stroke-width: 1; } .node.best rect { stroke: var(--best); stroke-width: 2.5; }
.node text { font: 12px ui-monospace, monospace; fill: var(--ink); }
.node text.score { font-size: 10px; fill: var(--faint); text-anchor: end; }
.node.pruned, .node.dropped, .node.unfinished { opacity: .5; } .node:hover, .node:focus { opacity: 1; outline: none; }
.node:hover rect, .node:focus rect { stroke: var(--ink); stroke-width: 2; }
#tip { position: fixed; pointer-events: none; max-width: 420px; padding: 10px 12px; border-radius: 6px; opacity: 0;
  background: var(--ink); color: var(--paper); font: 12px/1.45 ui-monospace, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; transition: opacity .1s; box-shadow: 0 4px 18px #0004; }
"""
_SCRIPT = """
const tip = document.getElementById('tip');
document.querySelectorAll('.node').forEach(node => {
  const show = () => { tip.textContent = node.dataset.tip; tip.style.opacity = 1; };
  const place = (x, y) => {
    tip.style.left = Math.min(x + 16, innerWidth - tip.offsetWidth - 12) + 'px';
    tip.style.top = Math.min(y + 16, innerHeight - tip.offsetHeight - 12) + 'px'; };
  node.addEventListener('pointermove', event => { show(); place(event.clientX, event.clientY); });
  node.addEventListener('focus', () => {
    const box = node.getBoundingClientRect(); show(); place(box.right, box.top); });
  for (const name of ['pointerleave', 'blur']) node.addEventListener(name, () => { tip.style.opacity = 0; });
});
"""


def to_html(results: Sequence[SearchResult], title: str = "Tree of thoughts") -> str:
    """One page for all results. It loads nothing and works without a network."""
    parts = "".join(_section(result, i, len(results)) for i, result in enumerate(results))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body><main><h1>{html.escape(title)}</h1>\n{parts}</main>"
        f'<div id="tip" role="tooltip"></div><script>{_SCRIPT}</script></body></html>\n'
    )


def to_svg(result: SearchResult) -> str:
    """The tree alone: the root at the left, siblings from the best down."""
    layout = _Layout.of(result)
    path = set(result.path)
    width = _MARGIN * 2 + _COLUMN * max(node.depth for node in result.nodes) + _WIDTH
    height = _MARGIN * 2 + _ROW * (layout.rows - 1) + _HEIGHT
    highest = max((node.score for node in result.nodes[1:]), default=0) or 1
    # Edges first, the chosen path's last of them, so that nothing covers it.
    edges = sorted(result.nodes[1:], key=lambda node: node.id in path)
    drawn = [_edge(node, layout, node.id in path) for node in edges]
    drawn += [_box(node, result, layout, node.id in path, highest) for node in result.nodes]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
        f' viewBox="0 0 {width} {height}" role="img" aria-label="search tree">\n' + "\n".join(drawn) + "\n</svg>"
    )


@dataclass(frozen=True)
class _Layout:
    """Row of each node: leaves from the top, parents at the middle of their children."""

    row: dict[int, float]
    rows: int

    @classmethod
    def of(cls, result: SearchResult) -> "_Layout":
        children: dict[int, list[Node]] = {}
        for node in result.nodes[1:]:
            assert node.parent is not None
            children.setdefault(node.parent, []).append(node)
        row: dict[int, float] = {}
        leaves = 0
        order, stack = [], [0]
        while stack:  # parents before children, siblings by score
            current = stack.pop()
            order.append(current)
            below = sorted(children.get(current, []), key=lambda node: (-node.score, node.id))
            stack += [node.id for node in reversed(below)]
            if not below:
                row[current] = leaves
                leaves += 1
        for current in reversed(order):
            if current not in row:
                places = [row[node.id] for node in children[current]]
                row[current] = (min(places) + max(places)) / 2
        return cls(row, leaves)

    def place(self, node: Node) -> tuple[float, float]:
        return _MARGIN + _COLUMN * node.depth, _MARGIN + _ROW * self.row[node.id]


def _section(result: SearchResult, number: int, count: int) -> str:
    pruned = sum(node.status == "pruned" for node in result.nodes)
    facts = (
        f"{len(result.nodes) - 1} thoughts, {result.generated_tokens} tokens generated, {len(result.answer)} of them in"
        f" the answer; {pruned} pruned. Search ended: {result.reason}."
    )
    answer = "".join(_text(result, result.nodes[i]) for i in result.path[1:])
    heading = f"<h2>Prompt {number + 1}</h2>" if count > 1 else ""
    return (
        f"<section>{heading}<p class='facts'>{facts}</p><figure>{to_svg(result)}"
        "<figcaption>Green: the chosen path. Dashed: pruned or dropped. A box is filled the more, the higher its score."
        f"</figcaption></figure><h2>Answer</h2><pre>{html.escape(answer)}</pre></section>\n"
    )


def _edge(node: Node, layout: _Layout, best: bool) -> str:
    x, y = layout.place(node)
    parent_row = layout.row[node.parent or 0]
    start_x, start_y = x - _COLUMN + _WIDTH, _MARGIN + _ROW * parent_row + _HEIGHT / 2
    middle = (start_x + x) / 2
    kind = f"{node.status}{' best' if best else ''}"
    end_y = y + _HEIGHT / 2
    curve = f"M{start_x:g} {start_y:g}C{middle:g} {start_y:g} {middle:g} {end_y:g} {x:g} {end_y:g}"
    return f'<path class="edge {kind}" d="{curve}"/>'


def _box(node: Node, result: SearchResult, layout: _Layout, best: bool, highest: float) -> str:
    x, y = layout.place(node)
    text = " ".join(_text(result, node).split())
    label = text if len(text) <= _LABEL_CHARACTERS else text[: _LABEL_CHARACTERS - 1] + "…"
    share = 0 if node.parent is None else max(0.0, min(1.0, node.score / highest))
    score = "" if node.parent is None else f'<text class="score" x="{_WIDTH - 8}" y="29">{node.score:.3f}</text>'
    tip = html.escape(_tip(result, node))
    return (
        f'<g class="node {node.status}{" best" if best else ""}" tabindex="0" transform="translate({x:g} {y:g})"'
        f' data-tip="{tip}"><title>{tip}</title><rect width="{_WIDTH}" height="{_HEIGHT}" rx="6"'
        f' fill="#3b82f6" fill-opacity="{0.04 + 0.3 * share:.2f}"/>'
        f'<text x="9" y="16">{html.escape(label)}</text>{score}</g>'
    )


def _tip(result: SearchResult, node: Node) -> str:
    lines = [_text(result, node).strip()]
    if node.parent is not None:
        value = "" if node.value is None else f", value {node.value:.3f}"
        lines += [
            "",
            f"score {node.score:.3f}{value}, mean log-probability {node.mean_log_prob:.3f}",
            f"{len(node.tokens)} tokens, ended by {node.ending}; {_STATUS_TEXT[node.status]}",
        ]
    if node.solved is not None:
        lines.append("solved" if node.solved else "does not solve the task")
    return "\n".join(lines)


def _text(result: SearchResult, node: Node) -> str:
    return result.texts[node.id] if result.texts else " ".join(map(str, node.tokens))
