"""Layer specs: which classes a layer is made of, on Transformer Engine or without it, and which components it has."""

from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import nn

from vishwamai_mp.components.head_sharded import Linears
from vishwamai_mp.config import PretrainConfig
from vishwamai_mp.config.extensions import find_extension, is_own
from vishwamai_mp.config.layer_windows import layer_window
from vishwamai_mp.config.resolve_rotary import layer_is_turned
from vishwamai_mp.model.core_attention import CoreAttention
from vishwamai_mp.model.document_attention import DocumentAttention
from vishwamai_mp.model.gated_units import GATED_UNITS
from vishwamai_mp.model.key_values import KvSelfAttention
from vishwamai_mp.model.layer import VishwamAILayer
from vishwamai_mp.model.norm import RMSNorm
from vishwamai_mp.model.rotary import attention_factors
from vishwamai_mp.precision import PrecisionPolicy, use_transformer_engine
from vishwamai_mp.runtime.megatron_versions import mlp_spec


class TorchSpecProvider(LocalSpecProvider):
    """megatron-core's own linears with our norm and core attention: what runs without Transformer Engine."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        return RMSNorm

    def core_attention(self) -> type:
        return CoreAttention


def spec_provider(policy: PrecisionPolicy) -> BackendSpecProvider:
    """The classes for this machine and what is computed in."""
    if use_transformer_engine(policy):
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        return TESpecProvider()
    return TorchSpecProvider()


def layer_spec(
    backend: BackendSpecProvider, config: PretrainConfig, layer: int, shard: Callable[[nn.Module], None] | None = None
) -> ModuleSpec:
    """The `VishwamAILayer` number `layer` (from 0 in the whole model) of `backend`'s classes; `shard` as it has it.

    Names in sharded checkpoints are those of fused norms whichever backend it is, so checkpoints move between them.
    """
    fused = backend.fuse_layernorm_and_linear()
    norm = backend.layer_norm(rms_norm=True)
    model = config.model
    kind = int(layer_window(model, layer) is not None) if model.layer_pattern else 0
    norms_inputs, norms_outputs = model.norm_position != "post", model.norm_position != "pre"
    linear_in = backend.column_parallel_linear()  # of queries, keys and values, and of the MLP
    if norms_inputs and fused:
        linear_in = backend.column_parallel_layer_norm_linear()
    query_key_norm = backend.layer_norm(rms_norm=True, for_qk=True) if model.qk_norm == "head" else IdentityOp
    separate_norm = norm if norms_inputs and not fused else IdentityOp
    return ModuleSpec(
        module=VishwamAILayer,
        params={
            "components": layer_components(config, layer, _linears(backend)),
            "shard": shard,
            "output_norm": norm if norms_outputs else None,
            "is_turned": layer_is_turned(model, layer),
            "residual_multiplier": model.residual_multiplier,
            "kind": kind,
        },
        submodules=TransformerLayerSubmodules(
            input_layernorm=separate_norm,
            self_attention=ModuleSpec(
                module=_attention(config.model.attention),
                params={
                    "attn_mask_type": AttnMaskType.causal,
                    "full_qk_norm": model.qk_norm == "full",
                    "rotary_factor": attention_factors(model)[kind if model.window_rope_theta else 0],
                },
                submodules=SelfAttentionSubmodules(
                    linear_qkv=linear_in,
                    core_attention=_core_attention(backend, config),
                    linear_proj=backend.row_parallel_linear(),
                    q_layernorm=query_key_norm,
                    k_layernorm=query_key_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=separate_norm,
            mlp=mlp_spec(
                MLPSubmodules(
                    linear_fc1=linear_in,
                    linear_fc2=backend.row_parallel_linear(),
                    activation_func=None if fused else GATED_UNITS[model.activation],
                )
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={}
            if fused
            else {
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )


def layer_components(config: PretrainConfig, layer: int, linears: Linears) -> dict[str, Callable[..., nn.Module]]:
    """What makes the components of a layer, in the order they run.

    Args:
        config: resolved.
        layer: number in the whole model, from 0.
        linears: classes of this machine's backend.
    """
    made: dict[str, Any] = {}
    if config.memory.enabled and layer in (config.memory.layers or ()):
        from vishwamai_mp.neural_memory import ReasoningMemoryTransformer

        made["memory"] = partial(ReasoningMemoryTransformer, config.memory, linears=linears)
    if config.cache.enabled and layer in (config.cache.layers or ()):
        from vishwamai_mp.cache_augmentation import DifferentiableCacheAugmentation

        made["cache"] = partial(DifferentiableCacheAugmentation, config.cache, linears=linears)
    return dict(reversed(made.items())) if config.cache.before_memory else made


def _core_attention(backend: BackendSpecProvider, config: PretrainConfig) -> ModuleSpec | type:
    if config.model.attention_softcap is not None:
        return ModuleSpec(module=CoreAttention, params={"softcap": config.model.attention_softcap})
    if backend.fuse_layernorm_and_linear() and config.data.reset_attention_mask:
        return DocumentAttention
    return backend.core_attention()


def _attention(name: str) -> type[KvSelfAttention]:
    return find_extension("model.attention", name, KvSelfAttention) if is_own(name) else KvSelfAttention


def _linears(backend: BackendSpecProvider) -> Linears:
    return Linears(
        column=backend.column_parallel_linear(),
        row=backend.row_parallel_linear(),
        norm=backend.layer_norm(rms_norm=True),
    )


def block_spec(
    backend: BackendSpecProvider,
    config: PretrainConfig,
    layers: range,
    shard: Callable[[nn.Module], None] | None = None,
) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage (numbers in the whole model, from 0) and the norm after the last."""
    return TransformerBlockSubmodules(
        layer_specs=[layer_spec(backend, config, layer, shard) for layer in layers],
        layer_norm=backend.layer_norm(rms_norm=True),
    )
