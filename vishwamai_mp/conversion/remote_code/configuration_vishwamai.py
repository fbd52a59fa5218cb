"""Configuration of a VishwamAI model with a neural memory, a differentiable cache or a value head."""

from typing import Any

from transformers import MistralConfig


class VishwamaiConfig(MistralConfig):
    """A Mistral (a Llama with an optional sliding window), and what its layers carry besides.

    Attributes:
        memory: `layers` (numbers from 0), `heads`, `head_dim`, `levels`, `momentum`, `chunk_size`, `dropout`; or None.
        cache: `layers`, `heads`, `segment_length`, `latents_per_segment`, `retrieve_segments`, `max_segments`,
            `retrieval_factor`, `before_memory`, `dropout`; or None.
        value_head: whether there is one.
    """

    model_type = "vishwamai"
    memory: dict[str, Any] | None = None
    cache: dict[str, Any] | None = None
    value_head: bool = False
