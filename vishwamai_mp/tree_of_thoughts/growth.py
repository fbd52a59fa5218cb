"""Grows the children of many nodes, of many prompts, as one batch: every token is computed once.

Shapes: N rows of logits, V vocabulary (local), D width, K different first tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from vishwamai_mp.config import TreeConfig, UserError
from vishwamai_mp.inference import Engine
from vishwamai_mp.inference.added_text import AddedText
from vishwamai_mp.inference.blocks import KvSequence
from vishwamai_mp.inference.noise import NoiseNames
from vishwamai_mp.inference.vocabulary import Shard, sample, sample_distinct
from vishwamai_mp.tree_of_thoughts.result import Node


@dataclass
class GrowingNode:
    """A node whose tokens the model has read.

    Attributes:
        node: what the result shows.
        sequence: keys, values and component states up to its last token.
        first: candidates for the first token of each child, with log-probabilities.
        added: the text of its tokens, behind the text before it; None without a decoder. `text` brings it up to date.
        read: tokens that `added` has read; a prompt is text before it.
    """

    node: Node
    sequence: KvSequence
    first: list[tuple[int, float]] = field(default_factory=list)
    added: AddedText | None = None
    read: int = 0

    def text(self) -> str:
        """What its tokens add to the text before it, but for a character that is not finished."""
        assert self.added is not None
        self.added.add(self.node.tokens[self.read :])
        self.read = len(self.node.tokens)
        return self.added.text


class Grower:
    """Reads prompts and grows thoughts.

    Args:
        engine: the model and its memory.
        config: resolved.
        stop_tokens: a thought ends with one of these.
        end_token: with this a whole text ends.
        stop_string: a thought ends when its text has this; nodes then need `added`.
    """

    def __init__(
        self,
        engine: Engine,
        config: TreeConfig,
        stop_tokens: Sequence[int],
        end_token: int | None,
        stop_string: str | None,
    ) -> None:
        self.engine, self.config = engine, config
        self._stop_tokens, self._end_token, self._stop_string = frozenset(stop_tokens), end_token, stop_string

    def grow(
        self,
        growing: list[GrowingNode],
        may_go_on: Callable[[GrowingNode], bool],
        before_pass: Callable[[], None] = lambda: None,
    ) -> None:
        """Let nodes read their last token (a root: its prompt) and go on until each thought has ended.

        Args:
            growing: their nodes have tokens that are not read yet: one, or the prompt.
            may_go_on: asked before each further token; where it says no, the thought ends unfinished.
            before_pass: called before every pass of the model.
        """
        unread = [list(grower.node.tokens) for grower in growing]
        while growing:
            before_pass()
            for grower in growing:
                self._see_ending(grower)
            # A thought that has ended asks for its children's first tokens, another for its own next.
            ended = [bool(grower.node.ending) for grower in growing]
            output = self.engine.run([(g.sequence, tokens) for g, tokens in zip(growing, unread, strict=True)])
            choose = partial(self._choose, growing=growing, ended=ended)
            chosen = self.engine.decide(output, choose, 2 + 2 * self._branching)
            next_growing, unread = [], []
            for grower, is_ended, (value, least, *pairs) in zip(growing, ended, chosen.tolist(), strict=True):
                if not abs(least) < float("inf"):
                    raise UserError("the model's logits are not finite; its checkpoint is damaged")
                tokens = [int(token) for token in pairs[: self._branching]]
                log_probs = pairs[self._branching :]
                grower.node.value = value if self.engine.config.tree.enabled else None
                if is_ended:
                    grower.first = list(zip(tokens, log_probs, strict=True))
                elif may_go_on(grower):
                    grower.node.tokens.append(tokens[0])
                    self._count(grower.node, log_probs[0])
                    next_growing.append(grower)
                    unread.append(tokens[:1])
                else:
                    grower.node.ending, grower.node.status = "budget", "unfinished"
            growing = next_growing

    def child(self, parent: GrowingNode, index: int, node_id: int) -> GrowingNode:
        """A node that starts with the parent's `index`-th candidate; it shares the parent's memory."""
        token, log_prob = parent.first[index]
        above = parent.node
        node = Node(
            node_id,
            above.id,
            above.depth + 1,
            [token],
            path_log_prob=above.path_log_prob,
            path_tokens=above.path_tokens,
            ending="",
        )
        self._count(node, log_prob)
        if parent.added is None:
            return GrowingNode(node, self.engine.fork(parent.sequence))
        parent.text()
        return GrowingNode(node, self.engine.fork(parent.sequence), added=parent.added.fork())

    @property
    def _branching(self) -> int:
        assert self.config.branching is not None
        return min(self.config.branching, self.engine.config.model.vocab_size)

    @staticmethod
    def _count(node: Node, log_prob: float) -> None:
        node.log_prob += log_prob
        node.path_log_prob += log_prob
        node.path_tokens += 1

    def _see_ending(self, grower: GrowingNode) -> None:
        node, last = grower.node, grower.node.tokens[-1]
        if node.depth == 0:
            node.ending = "stop"
        elif last == self._end_token:
            node.ending = "end"
        elif last in self._stop_tokens or (self._stop_string is not None and self._stop_string in grower.text()):
            node.ending = "stop"
        elif grower.sequence.length + 1 >= self.engine.context:
            node.ending = "context"
        elif len(node.tokens) >= self.config.max_thought_tokens:
            node.ending = "cap"

    def _choose(self, shard: Shard, hidden_ND: Tensor, growing: list[GrowingNode], ended: list[bool]) -> Tensor:
        """(N, 2 + 2K): value, a number that is finite if the logits are, token ids, their log-probabilities."""
        device, branching = shard.values.device, self._branching
        ids = torch.zeros(len(growing), branching, dtype=torch.int64, device=device)
        names = NoiseNames.of(
            [(self.config.seed, g.node.id, g.sequence.length) for g in growing],
            device,
        )
        for which, draw in ((True, self._draw_first), (False, self._draw_next)):
            rows = torch.tensor([i for i, is_ended in enumerate(ended) if is_ended == which], device=device)
            if len(rows):
                ids[rows] = draw(shard.rows(rows), names.rows(rows))
        head = self.engine.model.value_head
        values = torch.zeros(len(growing), device=device) if head is None else head(hidden_ND)
        numbers = torch.cat((values[:, None], shard.highest[:, None], ids.double(), shard.log_probs(ids)), -1)
        return numbers.double()

    def _draw_first(self, shard: Shard, names: NoiseNames) -> Tensor:
        return sample_distinct(shard, self.config.temperature, names, self._branching)

    def _draw_next(self, shard: Shard, names: NoiseNames) -> Tensor:
        return sample(shard, self.config.temperature, names)[:, None]
