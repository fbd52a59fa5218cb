"""Tree of thoughts: search, scoring, pruning, and the value head's use."""

import vishwamai_mp.runtime  # noqa: F401  (before megatron.core)

# isort: split
from vishwamai_mp.config import TreeConfig
from vishwamai_mp.tree_of_thoughts.endings import ending_of_thoughts
from vishwamai_mp.tree_of_thoughts.result import Node, SearchResult
from vishwamai_mp.tree_of_thoughts.rollouts import Rollout, rollout_rows, rollouts_of, write_rollouts
from vishwamai_mp.tree_of_thoughts.search import Thought, TreeOfThoughts

__all__ = [
    "Node",
    "Rollout",
    "SearchResult",
    "Thought",
    "TreeConfig",
    "TreeOfThoughts",
    "ending_of_thoughts",
    "rollout_rows",
    "rollouts_of",
    "write_rollouts",
]
