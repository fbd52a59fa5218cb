"""Tokenizers, indexed files, blends, batches and the exact position in the data."""
