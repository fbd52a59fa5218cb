"""Searches as one self-contained HTML page: the trees, the chosen path, and each thought's text on hover."""

from collections.abc import Sequence

from markupsafe import Markup

from vishwamai_mp.config.wording import counted
from vishwamai_mp.observability.page import page, render
from vishwamai_mp.tree_of_thoughts import SearchResult
from vishwamai_mp.tree_of_thoughts.picture import text_of, to_svg

STYLE = """
.tree { overflow-x: auto; }
.answer { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; padding: 12px 14px; min-height: 1.5em;
  border-left: 3px solid var(--best); background: color-mix(in srgb, var(--best) 7%, transparent);
  font: 13px/1.5 ui-monospace, monospace; }
.edge { fill: none; stroke: var(--line); stroke-width: 1.5; } .edge.best { stroke: var(--best); stroke-width: 3; }
.edge.pruned, .edge.dropped, .edge.unfinished { stroke-dasharray: 4 4; }
.node rect { stroke: var(--line); stroke-width: 1; } .node.best rect { stroke: var(--best); stroke-width: 2.5; }
.node text { font: 12px ui-monospace, monospace; fill: var(--ink); }
.node text.score { font-size: 10px; fill: var(--faint); text-anchor: end; }
.node.pruned, .node.dropped, .node.unfinished { opacity: .6; } .node:hover, .node:focus { opacity: 1; outline: none; }
.node:hover rect, .node:focus rect { stroke: var(--ink); stroke-width: 2; }
"""
# Listens to the whole document, for a tree may come later. The browser's own tip, for readers without scripts, goes.
SCRIPT = """
const nodeAt = event => event.target.closest?.('.node');
document.addEventListener('pointermove', event => {
  const node = nodeAt(event);
  if (!node) return hideTip();
  node.querySelector('title')?.remove();
  showTip(event.clientX, event.clientY, node.dataset.tip);
});
document.addEventListener('focusin', event => {
  const node = nodeAt(event);
  if (!node) return;
  const box = node.getBoundingClientRect();
  showTip(box.right, box.top, node.dataset.tip);
});
document.addEventListener('focusout', hideTip);
"""


def to_html(results: Sequence[SearchResult], title: str = "Tree of thoughts") -> str:
    """One page for all results. It loads nothing and works without a network."""
    return page(title, render("tree.html", title=title, searches=list(map(_search, results))), STYLE, SCRIPT)


def _search(result: SearchResult) -> dict[str, str]:
    pruned = sum(node.status == "pruned" for node in result.nodes)
    facts = (
        f"{counted(len(result.nodes) - 1, 'thought')}, {counted(result.generated_tokens, 'token')} generated,"
        f" {len(result.answer)} of them in the answer; {pruned} pruned. Search ended: {result.reason}."
    )
    answer = "".join(text_of(result, result.nodes[i]) for i in result.path[1:])
    return {"facts": facts, "answer": answer, "picture": Markup(to_svg(result))}
