"""A search for people: as SVG (the tree, the chosen path, a thought's text on hover; `observability.tree_page` styles
it), and as indented plain text for logs."""

import html
from dataclasses import dataclass

from vishwamai_mp.config.wording import counted
from vishwamai_mp.tree_of_thoughts.result import Node, SearchResult

_COLUMN, _ROW, _WIDTH, _HEIGHT, _MARGIN = 250, 46, 190, 34, 24  # pixels
_LABEL_CHARACTERS = 24
_MARKS = {"pruned": "x", "dropped": "-", "unfinished": "…"}  # in plain text
_STATUS_TEXT = {
    "open": "not expanded",
    "expanded": "expanded",
    "pruned": "pruned: far below its best sibling",
    "dropped": "dropped: others of its depth scored better",
    "complete": "complete",
    "unfinished": "unfinished: the budget ended",
}


def to_text(result: SearchResult, width: int = 100) -> str:
    """One line per thought, children below their parent, the best first; `>` marks the chosen path.

    `x` marks what was pruned, `-` what was dropped, `…` what the budget cut off.
    """
    path = set(result.path)
    lines: list[str] = []
    stack = [result.nodes[0]]
    while stack:
        node = stack.pop()
        lines.append(_line(result, node, node.id in path, width))
        stack += sorted(result.children(node.id), key=lambda child: (child.score, -child.id))
    return "\n".join(lines)


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
    text = " ".join(text_of(result, node).split())
    label = text if len(text) <= _LABEL_CHARACTERS else text[: _LABEL_CHARACTERS - 1] + "…"
    share = 0 if node.parent is None else max(0.0, min(1.0, node.score / highest))
    score = "" if node.parent is None else f'<text class="score" x="{_WIDTH - 8}" y="29">{_number(node.score)}</text>'
    tip = html.escape(_tip(result, node))
    return (
        f'<g class="node {node.status}{" best" if best else ""}" tabindex="0" transform="translate({x:g} {y:g})"'
        f' data-tip="{tip}"><title>{tip}</title><rect width="{_WIDTH}" height="{_HEIGHT}" rx="6"'
        f' fill="#3b82f6" fill-opacity="{0.04 + 0.3 * share:.2f}"/>'
        f'<text x="9" y="16">{html.escape(label)}</text>{score}</g>'
    )


def _tip(result: SearchResult, node: Node) -> str:
    lines = [text_of(result, node).strip()]
    if node.parent is not None:
        value = "" if node.value is None else f", value {_number(node.value)}"
        lines += [
            "",
            f"score {_number(node.score)}{value}, mean log-probability {node.mean_log_prob:.3f}",
            f"{counted(len(node.tokens), 'token')}, ended by {node.ending}; {_STATUS_TEXT[node.status]}",
        ]
    if node.solved is not None:
        lines.append("solved" if node.solved else "does not solve the task")
    return "\n".join(lines)


def text_of(result: SearchResult, node: Node) -> str:
    """A node's text; its token ids where the search was not given a `decode`."""
    return result.texts[node.id] if result.texts else " ".join(map(str, node.tokens))


def _line(result: SearchResult, node: Node, chosen: bool, width: int) -> str:
    text = " ".join((result.texts[node.id] if result.texts else " ".join(map(str, node.tokens))).split())
    mark = ">" if chosen else _MARKS.get(node.status, " ")
    score = "" if node.parent is None else f"{_number(node.score)} "
    line = f"{mark} {'  ' * node.depth}{score}{text}"
    return line if len(line) <= width else line[: width - 1] + "…"


def _number(score: float) -> str:
    """Three decimals; two digits of what is small, as the scores of a model that has hardly learnt are."""
    return f"{score:.2g}" if 0 < abs(score) < 0.01 else f"{score:.3f}"
