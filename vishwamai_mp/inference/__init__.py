"""Generation: key-value cache, choices over vocabulary-parallel logits."""

import vishwamai_mp.runtime  # noqa: F401  (before megatron.core)
