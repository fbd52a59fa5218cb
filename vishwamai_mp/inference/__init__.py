"""Generation: key-value cache, choices over vocabulary-parallel logits."""
