"""A search as indented plain text, for logs."""

from vishwamai_mp.tree_of_thoughts.result import Node, SearchResult

_MARKS = {"pruned": "x", "dropped": "-", "unfinished": "…"}


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


def _line(result: SearchResult, node: Node, chosen: bool, width: int) -> str:
    text = " ".join((result.texts[node.id] if result.texts else " ".join(map(str, node.tokens))).split())
    mark = ">" if chosen else _MARKS.get(node.status, " ")
    score = "" if node.parent is None else f"{node.score:.3f} "
    line = f"{mark} {'  ' * node.depth}{score}{text}"
    return line if len(line) <= width else line[: width - 1] + "…"
