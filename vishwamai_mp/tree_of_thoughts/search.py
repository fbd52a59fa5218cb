"""Tree of thoughts (arXiv 2305.10601): search over reasoning steps with shared prefixes.

Every rank of a replica makes the same calls with the same arguments.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist

from vishwamai_mp.config import TreeConfig, UserError
from vishwamai_mp.config.resolve_tree import resolve_tree
from vishwamai_mp.data.tokenizer import Tokenizer
from vishwamai_mp.inference import Engine
from vishwamai_mp.inference.added_text import AddedText, Decode, added_text
from vishwamai_mp.inference.blocks import KvSequence
from vishwamai_mp.inference.engine import check_fits
from vishwamai_mp.tree_of_thoughts.endings import ending_of_thoughts
from vishwamai_mp.tree_of_thoughts.growth import Grower, GrowingNode
from vishwamai_mp.tree_of_thoughts.result import Node, SearchResult
from vishwamai_mp.tree_of_thoughts.values import KeepsValues


@dataclass(frozen=True)
class Thought:
    """What a scorer or verifier sees: a path from the prompt to a node.

    Attributes:
        prompt: tokens.
        tokens: of the path behind the prompt.
        text: of these, where a decoder was given, else "".
        complete: nothing will follow.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str
    complete: bool


@runtime_checkable
class HasEngine(Protocol):
    """A model that is laid out when it is first run."""

    def engine(self) -> Engine: ...

    def tokenizer(self) -> Tokenizer | None: ...


Scorer = Callable[[Thought], float]
Verifier = Callable[[Thought], bool]


@dataclass
class _Tree:
    """One prompt's search as it goes: nodes by id, and those that may be expanded, last added last."""

    growing: list[GrowingNode]
    frontier: list[GrowingNode]
    expansions: int = 0
    reason: str | None = None
    budget: str | None = None  # why it ran out
    kept: list[Node] = field(default_factory=list)

    @property
    def generated(self) -> int:
        return sum(len(grower.node.tokens) for grower in self.growing[1:])


class TreeOfThoughts(KeepsValues):
    """Searches for the continuation that scores best, thought by thought.

    A node is expanded into `branching` children that start with different tokens, drawn without replacement at the
    temperature. Children score (value_weight · value + logprob_weight · exp(mean log-probability of the path)) /
    (value_weight + logprob_weight); below `pruning_threshold` × the best sibling's score they are pruned.

    - `beam` keeps the best `beam_width` of each depth.
    - `best-first` expands the best open node of all, `dfs` the best child of the newest: both until the node they come
      to is complete (with a verifier: solved), or as many nodes are expanded as `beam` may expand.

    Args:
        model: what runs it; or a model that has an engine when one is asked for, whose tokenizer then says how thoughts
            end and read.
        config: None: the defaults.
        stop_tokens: ids that end a thought, such as that of `[STEP]`.
        end_token: id that ends a text.
        decode: text of tokens; for stop strings, scorers and the result's texts.
        stop_string: ends a thought too; needs `decode`.
        scorer: takes the place of the score above; must return a finite number from 0 on.
        verifier: says whether a complete path solves the task; the first that does ends the search.
    """

    def __init__(
        self,
        model: Engine | HasEngine,
        config: TreeConfig | None = None,
        *,
        stop_tokens: Sequence[int] = (),
        end_token: int | None = None,
        decode: Decode | None = None,
        stop_string: str | None = None,
        scorer: Scorer | None = None,
        verifier: Verifier | None = None,
    ) -> None:
        self.config = resolve_tree(config or TreeConfig())
        if decode is None and isinstance(model, HasEngine) and (tokenizer := model.tokenizer()):
            decode = tokenizer.decode
            if not stop_tokens and stop_string is None:
                ending = ending_of_thoughts(tokenizer, self.config.stop)
                stop_tokens, stop_string = ending.get("stop_tokens", ()), ending.get("stop_string")
                end_token = ending["end_token"] if end_token is None else end_token
        if stop_string is not None and decode is None:
            raise UserError("a stop string needs a tokenizer; give stop_tokens")
        self.model, self.decode, self.scorer, self.verifier = model, decode, scorer, verifier
        self._ends = stop_tokens, end_token, stop_string
        if isinstance(model, Engine):
            self._use(model)

    def _use(self, engine: Engine) -> None:
        if self.scorer is None and self.config.value_weight > 0 and not engine.config.tree.enabled:
            raise UserError(
                f"tree.value_weight={self.config.value_weight}: the model has no value head (trained with"
                " tree.enabled=false); set tree.value_weight=0 tree.logprob_weight=1, or give a scorer"
            )
        stop_tokens, end_token, stop_string = self._ends
        self.engine = engine
        self._grower = Grower(engine, self.config, stop_tokens, end_token, stop_string)

    @torch.inference_mode()
    def search(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int | None = None,
        max_seconds: float | None = None,
        watch: Callable[[list[SearchResult]], None] | None = None,
        before_pass: Callable[[], None] = lambda: None,
    ) -> list[SearchResult]:
        """One tree per prompt; all of them grow in one batch.

        Args:
            prompts: token ids.
            max_tokens: generated per prompt at most.
            max_seconds: for the whole call. When a budget ends, the best so far is returned and marked.
            watch: called with the trees as they are, each time some have grown; what it raises ends the search.
            before_pass: called before each pass of the model, so that others may have theirs; likewise.

        Raises:
            UserError: an empty or too long prompt, a budget that is not positive, a scorer or verifier that fails.
        """
        if isinstance(self.model, HasEngine):
            self._use(self.model.engine())
        self._check(prompts, max_tokens, max_seconds)
        deadline = math.inf if max_seconds is None else time.monotonic() + max_seconds

        def turn(trees: Sequence[_Tree]) -> None:
            before_pass()
            if deadline < math.inf and self._agree(time.monotonic() > deadline):
                for tree in trees:
                    tree.budget = tree.budget or "time"

        trees = [self._plant(prompt) for prompt in prompts]
        try:
            self._grow([(tree, tree.growing[0]) for tree in trees], None, lambda _: before_pass())
            while running := [tree for tree in trees if tree.reason is None]:
                self._advance(running, max_tokens, turn)
                if watch is not None:
                    watch([self._result(tree) for tree in trees])
        finally:
            for tree in trees:
                for grower in tree.growing:
                    self.engine.release(grower.sequence)
        return [self._result(tree) for tree in trees]

    def _check(self, prompts: Sequence[Sequence[int]], max_tokens: int | None, max_seconds: float | None) -> None:
        vocabulary = self.engine.config.model.vocab_size
        for name, budget in (("max_tokens", max_tokens), ("max_seconds", max_seconds)):
            if budget is not None and not budget > 0:
                raise UserError(f"{name}={budget}: use a positive number, or leave it out")
        if not prompts:
            raise UserError("the prompt is empty; give at least one token")
        for prompt in prompts:
            if not prompt:
                raise UserError("the prompt is empty; give at least one token")
            if not all(0 <= token < vocabulary for token in prompt):
                raise UserError(f"the prompt has a token outside the vocabulary of {vocabulary}; encode it again")
            check_fits(len(prompt), self.engine.context)

    def _plant(self, prompt: Sequence[int]) -> _Tree:
        added = None if self.decode is None else AddedText(self.decode, prompt)
        root = GrowingNode(Node(0, None, 0, list(prompt)), KvSequence(), added=added, read=len(prompt))
        return _Tree([root], [root])

    def _advance(self, trees: list[_Tree], max_tokens: int | None, turn: Callable[[Sequence[_Tree]], None]) -> None:
        """Expand what each tree's strategy says, score, prune, keep."""
        families = []
        for tree in trees:
            chosen = self._to_expand(tree)
            for parent in chosen:
                parent.node.status = "expanded"
                tree.expansions += 1
                children = [self._grower.child(parent, i, len(tree.growing) + i) for i in range(len(parent.first))]
                tree.growing += children
                families.append((tree, children))
                self.engine.release(parent.sequence)
        self._grow([(tree, child) for tree, children in families for child in children], max_tokens, turn)
        for tree, children in families:
            self._judge(tree, children)
        for tree in trees:
            self._keep(tree, [child for owner, children in families if owner is tree for child in children])

    def _to_expand(self, tree: _Tree) -> list[GrowingNode]:
        if self.config.strategy == "beam" or tree.frontier[0].node.depth == 0:
            level, tree.frontier = tree.frontier, []
            return level
        chosen = tree.frontier[-1] if self.config.strategy == "dfs" else max(tree.frontier, key=_rank)
        tree.frontier = [grower for grower in tree.frontier if grower is not chosen]
        return [chosen]

    def _grow(
        self,
        owners: list[tuple[_Tree, GrowingNode]],
        max_tokens: int | None,
        turn: Callable[[Sequence[_Tree]], None],
    ) -> None:
        tree_of = {id(grower): tree for tree, grower in owners}
        spent = {id(tree): tree.generated for tree, _ in owners}

        def may_go_on(grower: GrowingNode) -> bool:
            tree = tree_of[id(grower)]
            if tree.budget is None and max_tokens is not None and spent[id(tree)] >= max_tokens:
                tree.budget = "tokens"
            spent[id(tree)] += 1
            return tree.budget is None

        trees = [tree for tree, _ in owners]
        self._grower.grow([grower for _, grower in owners], may_go_on, lambda: turn(trees))

    def _agree(self, flag: bool) -> bool:
        """Whether any rank of this replica says so."""
        groups = self.engine.runtime.groups
        word = torch.tensor([int(flag)], device=self.engine.runtime.device)
        for group in (groups.tp, groups.pp):
            if group.size() > 1:
                dist.all_reduce(word, dist.ReduceOp.MAX, group=group)
        return bool(word)

    def _judge(self, tree: _Tree, children: list[GrowingNode]) -> None:
        """Score siblings and prune those far below the best."""
        for child in children:
            node = child.node
            if node.status == "open" and (
                node.ending in ("end", "context") or node.depth == self.config.max_depth or not child.first
            ):
                node.status = "complete"
            node.score = self._score(tree, node)
        best = max(child.node.score for child in children)
        for child in children:
            if child.node.score < self.config.pruning_threshold * best:
                child.node.status = "pruned"
                self.engine.release(child.sequence)

    def _score(self, tree: _Tree, node: Node) -> float:
        if self.scorer is not None:
            score = self._ask(self.scorer, "scorer", tree, node)
            if not 0 <= score < math.inf:
                raise UserError(f"the scorer gave {score} for node {node.id}; it must give a finite number from 0 on")
            return float(score)
        config = self.config
        likelihood = math.exp(node.mean_log_prob)
        value = 0.0 if node.value is None else node.value
        total = config.value_weight + config.logprob_weight
        return (config.value_weight * value + config.logprob_weight * likelihood) / total

    def _ask(self, judge: Callable[[Thought], float], what: str, tree: _Tree, node: Node) -> float:
        tokens: list[int] = []
        current = node
        while current.parent is not None:
            tokens = current.tokens + tokens
            current = tree.growing[current.parent].node
        text = "" if self.decode is None else added_text(self.decode, tree.growing[0].node.tokens, tokens)
        thought = Thought(tuple(tree.growing[0].node.tokens), tuple(tokens), text, node.status == "complete")
        try:
            return judge(thought)
        except Exception as error:
            raise UserError(f"the {what} failed on node {node.id}: {type(error).__name__}: {error}") from error

    def _keep(self, tree: _Tree, children: list[GrowingNode]) -> None:
        """What stays in the frontier, and whether the search is over."""
        stayed = sorted((c for c in children if c.node.status in ("open", "complete")), key=_rank, reverse=True)
        if self.config.strategy == "beam":
            for child in stayed[self.config.beam_width :]:
                child.node.status = "dropped"
                self.engine.release(child.sequence)
            stayed = stayed[: self.config.beam_width]
        tree.kept += [child.node for child in stayed]
        if self.verifier is not None:
            for child in stayed:
                if child.node.status == "complete":
                    child.node.solved = bool(self._ask(self.verifier, "verifier", tree, child.node))
        tree.frontier += reversed(stayed)  # the best last, which is where dfs goes on
        tree.reason = self._end(tree)

    def _end(self, tree: _Tree) -> str | None:
        """Why the search is over, or None."""
        if any(node.solved for node in tree.kept):
            return "solved"
        if tree.budget is not None:
            return tree.budget
        if self.config.strategy == "beam" or self.verifier is not None:
            tree.frontier = [grower for grower in tree.frontier if grower.node.status == "open"]
        if not tree.frontier:
            return "complete"
        if self.config.strategy == "beam":
            return None
        following = tree.frontier[-1] if self.config.strategy == "dfs" else max(tree.frontier, key=_rank)
        if following.node.status == "complete":
            return "complete"
        limit = 1 + self.config.beam_width * (self.config.max_depth - 1)
        return "expansions" if tree.expansions >= limit else None

    def _result(self, tree: _Tree) -> SearchResult:
        nodes = [grower.node for grower in tree.growing]
        complete = [node for node in tree.kept if node.status == "complete"]
        best = max(complete or tree.kept or nodes, key=lambda node: _merit(node, by_depth=not complete))
        return SearchResult(nodes, best.id, tree.reason or "complete", self._texts(tree))

    def _texts(self, tree: _Tree) -> list[str]:
        """Of each node's tokens, behind the text before it: along a path they make up the path's text."""
        if self.decode is None:
            return []
        root, *thoughts = tree.growing
        parents = {grower.node.parent for grower in thoughts}
        texts = [self.decode(root.node.tokens)]
        for grower in thoughts:
            text = grower.text()
            assert grower.added is not None
            texts.append(text if grower.node.id in parents else text + grower.added.fork().end())
        return texts


def _merit(node: Node, by_depth: bool) -> tuple[bool, int, float, int]:
    """Larger is better: of complete paths the solved and best, else how far the search came counts first."""
    return bool(node.solved), node.depth if by_depth else 0, node.score, -node.id


def _rank(grower: GrowingNode) -> tuple[float, int]:
    """Larger is better; equals in the order of creation."""
    return grower.node.score, -grower.node.id
