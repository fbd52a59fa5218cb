"""What a search returns: every node of the tree, and the path that was chosen."""

import json
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["open", "expanded", "pruned", "dropped", "complete", "unfinished"]
_DIGITS = 3  # decimals of scores in JSON: a layout changes the last bits of a number, and bytes shall be equal


@dataclass
class Node:
    """One thought.

    Attributes:
        id: 0 is the root, which holds the prompt; then in the order of creation.
        parent: its parent's id; None for the root.
        depth: thoughts from the root, this one included.
        tokens: of this thought alone, its ending included; the root's are the prompt.
        log_prob: of these tokens after all before them, in nats, under the model (temperature 1).
        path_log_prob, path_tokens: sums along the path, without the prompt.
        value: of the value head at the last token; None without one.
        score: what nodes are compared by.
        ending: why the thought ends: "stop", "cap" (`max_thought_tokens`), "end" (the end-of-document token),
            "context" (no room for more) or "budget".
        status: "open": could be expanded; "expanded"; "pruned": far below its best sibling; "dropped": not among the
            kept ones of its depth; "complete": nothing follows it; "unfinished": the budget ended first.
        solved: the verifier's verdict; None where it was not asked.
    """

    id: int
    parent: int | None
    depth: int
    tokens: list[int]
    log_prob: float = 0.0
    path_log_prob: float = 0.0
    path_tokens: int = 0
    value: float | None = None
    score: float = 0.0
    ending: str = "stop"
    status: Status = "open"
    solved: bool | None = None

    @property
    def mean_log_prob(self) -> float:
        """Per token of the path, in nats."""
        return self.path_log_prob / max(self.path_tokens, 1)


@dataclass
class SearchResult:
    """One prompt's tree.

    Attributes:
        nodes: by id.
        best: id of the chosen node: the end of the answer.
        reason: why the search ended: "solved", "complete", "expansions", "tokens" or "time" (budgets: `best` is then
            the best so far).
        texts: of each node's tokens, where a decoder was given: what they add to the text before them.
    """

    nodes: list[Node]
    best: int = 0
    reason: str = "complete"
    texts: list[str] = field(default_factory=list)

    @property
    def within_budget(self) -> bool:
        """False where the budget of tokens or time ended the search."""
        return self.reason not in ("tokens", "time")

    @property
    def path(self) -> list[int]:
        """Ids from the root to the chosen node."""
        return self.path_to(self.best)

    def path_to(self, node_id: int) -> list[int]:
        """Ids from the root to a node."""
        ids = []
        current: int | None = node_id
        while current is not None:
            ids.append(current)
            current = self.nodes[current].parent
        return ids[::-1]

    def answer_to(self, node_id: int) -> list[int]:
        """Tokens of a path, without the prompt."""
        return [token for step in self.path_to(node_id)[1:] for token in self.nodes[step].tokens]

    @property
    def answer(self) -> list[int]:
        """Tokens of the chosen path, without the prompt."""
        return self.answer_to(self.best)

    @property
    def answer_text(self) -> str:
        """Text of the chosen path, behind the prompt's; empty where no decoder was given."""
        return "".join(self.texts[i] for i in self.path[1:]) if self.texts else ""

    @property
    def generated_tokens(self) -> int:
        """Of all nodes below the root: what the search cost."""
        return sum(len(node.tokens) for node in self.nodes[1:])

    def children(self, node_id: int) -> list[Node]:
        return [node for node in self.nodes if node.parent == node_id]

    def to_dict(self) -> dict[str, Any]:
        """Plain values. The same seed gives the same at every layout; there are no times in it."""
        nodes = []
        for node in self.nodes:
            entry: dict[str, Any] = {
                "id": node.id,
                "parent": node.parent,
                "depth": node.depth,
                "status": node.status,
                "ending": node.ending,
                "score": _rounded(node.score),
                "value": _rounded(node.value),
                "mean_log_prob": _rounded(node.mean_log_prob),
                "solved": node.solved,
                "tokens": node.tokens,
            }
            if self.texts:
                entry["text"] = self.texts[node.id]
            nodes.append(entry)
        return {
            "best": self.best,
            "path": self.path,
            "reason": self.reason,
            "within_budget": self.within_budget,
            "prompt_tokens": len(self.nodes[0].tokens),
            "generated_tokens": self.generated_tokens,
            "answer_tokens": len(self.answer),
            "nodes": nodes,
        }

    def to_json(self) -> str:
        """`to_dict` as one line of JSON."""
        return json.dumps(self.to_dict(), ensure_ascii=False)


def _rounded(number: float | None) -> float | None:
    return None if number is None else round(number, _DIGITS) + 0.0  # + 0: −0.0 and 0.0 are one
