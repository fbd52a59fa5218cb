"""The transformer layer of VishwamAI."""

from megatron.core.transformer.transformer_layer import TransformerLayer


class VishwamAILayer(TransformerLayer):
    """One decoder layer: attention and SwiGLU, each behind RMSNorm and a residual connection.

    A class of its own because launchers and wrappers (FSDP's layer class to wrap) name it.
    """
