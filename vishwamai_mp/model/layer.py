"""The transformer layer of VishwamAI."""

from collections.abc import Callable, Mapping
from typing import Any

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn


class VishwamAILayer(TransformerLayer):
    """One decoder layer: its components, then attention and SwiGLU, each behind RMSNorm and a residual connection.

    A class of its own because launchers and wrappers (FSDP's layer class to wrap) name it.

    Args:
        config: megatron-core's.
        submodules: attention, SwiGLU and norms.
        components: what makes each component of this layer, by name, in the order they run. Called with megatron-core's
            configuration, the process groups and the layer's number (from 1).
        shard: called with the layer when it is complete, so that no two layers are ever whole at a time.
        **options: megatron-core's.
    """

    def __init__(
        self,
        config: Any,
        submodules: Any,
        *,
        components: Mapping[str, Callable[..., nn.Module]],
        shard: Callable[[nn.Module], None] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(config, submodules, **options)
        self.component_names = tuple(components)
        for name, make in components.items():
            self.add_module(name, make(config, options["pg_collection"], self.layer_number))
        if shard is not None:
            shard(self)

    def forward(
        self, hidden_states: Tensor, *, context: Tensor | None = None, inference_context: Any = None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Run the layer on hidden states (S, B, D).

        Args:
            hidden_states: this rank's.
            context: (B, T) document ids of whole rows, or None. megatron-core carries a tensor of this name to every
                layer, also through recomputation.
            inference_context: key-value cache; `component_states[layer number, component]` is what a component knows
                of the tokens before.
            **options: megatron-core's: mask, angles.
        """
        for name in self.component_names:
            states = {} if inference_context is None else inference_context.component_states
            key = (self.layer_number, name)
            hidden_states, states[key] = getattr(self, name)(hidden_states, context, states.get(key))
        hidden_states, _ = super().forward(
            hidden_states=hidden_states, context=None, inference_context=inference_context, **options
        )
        return hidden_states, context
