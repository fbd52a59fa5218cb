"""The transformer layer of VishwamAI."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from vishwamai_mp.model.key_values import KeyValues
from vishwamai_mp.model.rotary import angles_of_layer


class VishwamAILayer(TransformerLayer):
    """One decoder layer: its components, then attention and the MLP, each behind RMSNorm and a residual connection.

    A class of its own because launchers and wrappers (FSDP's layer class to wrap) name it.

    Args:
        config: megatron-core's.
        submodules: attention, MLP and norms.
        components: what makes each component of this layer, by name, in the order they run. Called with megatron-core's
            configuration, the process groups and the layer's number (from 1).
        output_norm: class of a norm of what attention and MLP add to the residual stream; None: no norm there.
        kind: which of the masks and of the angles is this layer's, where there are several.
        is_turned: whether positions turn its queries and keys.
        residual_multiplier: of what attention and MLP add to the residual stream; components add theirs as it is.
        shard: called with the layer when it is complete, so that no two layers are ever whole at a time.
        **options: megatron-core's.
    """

    def __init__(
        self,
        config: Any,
        submodules: Any,
        *,
        components: Mapping[str, Callable[..., nn.Module]],
        output_norm: Any = None,
        kind: int = 0,
        is_turned: bool = True,
        residual_multiplier: float | None = None,
        shard: Callable[[nn.Module], None] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(config, submodules, **options)
        self.offloading: Callable[[], AbstractContextManager[Any]] = nullcontext  # around a forward pass
        self.graphs: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor] | None = None  # runtime/layer_graphs.py
        self.component_names, self.kind, self.is_turned = tuple(components), kind, is_turned
        self.residual_multiplier = 1.0 if residual_multiplier is None else residual_multiplier
        if residual_multiplier is not None:
            self.self_attn_bda = self.mlp_bda = partial(_scaled_add, residual_multiplier)
        self._recomputes_mlp = config.recompute_granularity == "selective" and "mlp" in config.recompute_modules
        for part, module in {"self_attn": "self_attention", "mlp": "mlp"}.items() if output_norm else ():
            norm = output_norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
            self.add_module(f"{part}_output_norm", norm)
            getattr(self, module).register_forward_hook(partial(_normed, norm))
        for name, make in components.items():
            self.add_module(name, make(config, options["pg_collection"], self.layer_number))
        # The distributed optimizer gathers weights in the order of modules, each bucket ahead of those who need it.
        parts = dict(self._modules)
        self._modules.clear()
        for name in (*components, "input_layernorm", "self_attention", "self_attn_output_norm", *parts):
            if name in parts and name not in self._modules:
                self.register_module(name, parts[name])
        if shard is not None:
            shard(self)

    def train(self, mode: bool = True) -> "VishwamAILayer":
        """megatron-core would run the MLP as if to recompute it even where nothing is to be trained."""
        self.recompute_mlp = mode and self._recomputes_mlp
        return super().train(mode)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        context: Tensor | None = None,
        inference_context: KeyValues | None = None,
        rotary_pos_emb: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the layer on hidden states (S, B, D).

        Args:
            hidden_states: this rank's.
            attention_mask: (1 or B, masks, Q, S): one, or one without and one with the window.
            context: (B, T) document ids of whole rows, or None. megatron-core carries a tensor of this name to every
                layer, also through recomputation.
            inference_context: what is known of earlier tokens; hidden states are (N, 1, D) then, sequences end to end.
            rotary_pos_emb: angles of one kind of layers or of several (rotary.py).
            **options: megatron-core's.
        """
        if self.graphs and self.training and torch.is_grad_enabled() and inference_context is None:

            def run(given: Tensor) -> Tensor:
                return self._run(given, attention_mask, context, None, rotary_pos_emb, options)[0]

            return self.graphs(run, hidden_states), context
        with self.offloading():
            return self._run(hidden_states, attention_mask, context, inference_context, rotary_pos_emb, options)

    def _run(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        context: Tensor | None,
        inference_context: KeyValues | None,
        rotary_pos_emb: Tensor | None,
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        for name in self.component_names:
            component = getattr(self, name)
            if inference_context is None:
                hidden_states, _ = component(hidden_states, context)
            else:
                hidden_states = inference_context.run_component(self.layer_number, name, component, hidden_states)
        if attention_mask is not None and attention_mask.shape[1] > 1:
            attention_mask = attention_mask[:, self.kind : self.kind + 1]
        angles = None
        if rotary_pos_emb is not None and self.is_turned:
            angles = angles_of_layer(rotary_pos_emb, self.kind)
        hidden_states, _ = super().forward(
            hidden_states=hidden_states,
            attention_mask=attention_mask,
            context=None,
            inference_context=inference_context,
            rotary_pos_emb=angles,
            **options,
        )
        return hidden_states, context


def _scaled_add(multiplier: float, training: bool, fused: bool) -> Callable[..., Tensor]:
    """What megatron-core's layer calls in place of its `get_bias_dropout_add`."""

    def add(output: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
        x, bias = output
        x = F.dropout(x if bias is None else x + bias, dropout, training)
        return torch.add(residual.to(x.dtype), x, alpha=multiplier)

    return add


def _normed(
    norm: nn.Module, module: nn.Module, inputs: Any, output: tuple[Tensor, Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    """A hook of attention and MLP: behind it megatron-core adds residuals, with gradients even where there are none."""
    x, bias = output
    return norm(x if bias is None else x + bias), None
