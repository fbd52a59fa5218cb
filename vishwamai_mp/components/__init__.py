"""What the in-layer components (memory, cache) share: their base class, and life outside a model."""

import vishwamai_mp.runtime  # noqa: F401  (before megatron.core)

# isort: split
from vishwamai_mp.components.head_sharded import HeadShardedModule, Linears
from vishwamai_mp.components.standalone import Standalone, alone

__all__ = ["HeadShardedModule", "Linears", "Standalone", "alone"]
