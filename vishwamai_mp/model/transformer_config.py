"""From our configuration to megatron-core's `TransformerConfig`: the only place that names its fields."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig

from vishwamai_mp.config import PretrainConfig
from vishwamai_mp.config.check_gpu_attention import check_gpu_attention
from vishwamai_mp.config.layer_windows import layer_windows
from vishwamai_mp.model.rotary import attention_factors
from vishwamai_mp.precision import PrecisionPolicy, check_fp8_hardware, use_transformer_engine
from vishwamai_mp.runtime import device, is_accelerator


def transformer_config(config: PretrainConfig) -> TransformerConfig:
    """megatron-core's view of a resolved configuration."""
    model, parallel = config.model, config.parallel
    policy = PrecisionPolicy.of_run(config)
    check_fp8_hardware(policy)
    fused = use_transformer_engine(policy)
    if fused:
        check_gpu_attention(config)
    chunks = parallel.virtual_pipeline_model_parallel_size
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_key_value_heads,
        kv_channels=model.head_dim,
        softmax_scale=model.attention_multiplier,
        ffn_hidden_size=model.intermediate_size,
        attention_dropout=model.attention_dropout,
        hidden_dropout=model.hidden_dropout,
        window_size=(model.sliding_window - 1, 0) if model.sliding_window else None,
        window_attn_skip_freq=[int(window is not None) for window in layer_windows(model)]
        if model.layer_pattern
        else None,
        add_qkv_bias=model.attention_bias,
        qk_layernorm=model.qk_norm == "head",  # gradients of these norms are then summed over tensor parallel ranks
        normalization="RMSNorm",
        layernorm_epsilon=model.rms_norm_eps,
        layernorm_zero_centered_gamma=model.norm_zero_centered,
        gated_linear_unit=True,
        # megatron-core's fused kernel for gated GELU approximates it by tanh.
        activation_func={"swiglu": F.silu, "geglu": F.gelu}[model.activation],
        add_bias_linear=False,
        # Initialisation is ours (initialization.py). Without it "cpu initialisation" only means that parameters are
        # allocated on torch's default device, which a meta-device build relies on.
        perform_initialization=False,
        use_cpu_initialization=not is_accelerator(device()),
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=chunks,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        num_layers_in_first_pipeline_stage=parallel.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=parallel.num_layers_in_last_pipeline_stage,
        # Batched point-to-point calls on a two-stage interleaved pipeline over gloo give silently wrong results.
        overlap_p2p_comm=bool(chunks),
        batch_p2p_comm=not chunks,
        # Loss and gradients are sums over tokens, divided once by the step's token count: masked tokens, micro-batches
        # and context shards then weigh the same in every layout.
        calculate_per_token_loss=True,
        bias_activation_fusion=fused,
        use_te_activation_func=not fused,  # megatron-core's name for: the layer spec brings it (gated_units.py)
        # The fused kernel turns all rows alike; packed documents it turns each from its start. It knows no factor.
        apply_rope_fusion=fused
        and set(attention_factors(model)) == {1}
        and (config.data.reset_attention_mask or not config.data.reset_position_ids),
        # Transformer Engine's default, a ring of point-to-point messages, knows no window.
        cp_comm_type="all_gather" if fused and model.sliding_window and parallel.context_parallel_size > 1 else None,
        deterministic_mode=config.training.deterministic,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        **_precision_fields(policy),
        # Without Transformer Engine megatron-core would call its functions all the same; the emulation needs no field.
        **(policy.fp8.megatron_fields() if policy.fp8 and fused else {}),
        **_recompute_fields(config),
    )


def _precision_fields(policy: PrecisionPolicy) -> dict[str, Any]:
    return {
        "params_dtype": policy.compute,
        "pipeline_dtype": policy.compute,
        "autocast_dtype": policy.compute,
        "fp16": policy.name == "fp16",
        "bf16": policy.compute == torch.bfloat16,
        "attention_softmax_in_fp32": True,
    }


def _recompute_fields(config: PretrainConfig) -> dict[str, Any]:
    training = config.training
    match training.recompute:
        case "none":
            return {}
        case "selective":
            return {
                "recompute_granularity": "selective",
                "recompute_modules": training.recompute_modules or ["core_attn"],
            }
        case _:
            layers = training.recompute_layers
            return {
                "recompute_granularity": "full",
                "recompute_method": "block" if layers else "uniform",  # block: so many layers of a chunk, one by one
                "recompute_num_layers": layers or 1,
            }
