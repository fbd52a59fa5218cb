"""A program: what the double of Transformer Engine's compiled part gives and refuses; assertions say which."""

import math
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vishwamai_mp.runtime.simulated import transformer_engine_double

assert transformer_engine_double.install()
import pytest  # noqa: E402
import torch  # noqa: E402
import transformer_engine.pytorch as te  # noqa: E402
import transformer_engine_torch as tex  # noqa: E402
from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess  # noqa: E402
from transformer_engine.pytorch.module import base  # noqa: E402

from tests.training.layouts import SMALL  # noqa: E402
from vishwamai_mp.checkpoint.optimizer_shards import begin_with  # noqa: E402
from vishwamai_mp.checkpoint.sharded import (  # noqa: E402
    load_model,
    model_state,
    optimizer_state,
    restart_optimizer,
    unwrap,
)
from vishwamai_mp.config import PretrainConfig, UserError, load_config, resolve  # noqa: E402
from vishwamai_mp.model.decoding import Decoding  # noqa: E402
from vishwamai_mp.precision import PrecisionPolicy, use_transformer_engine  # noqa: E402
from vishwamai_mp.runtime.simulated import SimulatedJob, simulated_job  # noqa: E402
from vishwamai_mp.training.dry_run import dry_run, empty_batches, training_step  # noqa: E402
from vishwamai_mp.training.step import TrainStep  # noqa: E402

E4M3 = te.DType.kFloat8E4M3


def config(*overrides: str, ranks: int = 1) -> PretrainConfig:
    wide = ["model.hidden_size=256", "model.num_layers=1", "training.global_batch_size=2", "precision=bf16"]
    return resolve(load_config(SMALL, [*wide, *overrides]), ranks)


def products(job: SimulatedJob) -> None:
    """Shapes as `layout` says, FLOPs of a product, and what does not multiply."""
    weight, grad = torch.empty(96, 64, device="simulated"), torch.empty(10, 5, 96, device="simulated")
    before = job.recorder.flops["generic_gemm"]
    assert te.cpp_extensions.general_gemm(weight, grad, layout="NN")[0].shape == (10, 5, 64)
    assert te.cpp_extensions.general_gemm(weight[:, :32].contiguous(), grad[..., :32], layout="TN")[0].shape[-1] == 96
    x = torch.empty(50, 64, device="simulated")
    assert te.cpp_extensions.general_gemm(x, grad.view(50, 96), layout="NT")[0].shape == (96, 64)
    assert job.recorder.flops["generic_gemm"] - before == 2 * 50 * 96 * (64 + 32 + 64)
    with pytest.raises(RuntimeError, match="do not multiply"):
        te.cpp_extensions.general_gemm(weight, grad, layout="TN")


def quantizers(job: SimulatedJob) -> None:
    """What is kept of a matrix: codes in the directions asked for, and scales padded as the products read them."""
    x = torch.empty(256, 96, dtype=torch.bfloat16, device="simulated")
    one = torch.empty(1, device="simulated")
    delayed = te.Float8Quantizer(one, one, E4M3)(x)
    assert (delayed._data.shape, delayed._transpose.shape) == ((256, 96), (96, 256))  # a Hopper keeps both
    blocks = te.Float8BlockQuantizer(E4M3, rowwise=True, columnwise=True, block_scaling_dim=1)(x)
    assert (blocks._rowwise_scale_inv.shape, blocks._columnwise_scale_inv.shape) == ((1, 256), (2, 96))
    mx = te.MXFP8Quantizer(E4M3, rowwise=True, columnwise=True)(x)
    assert (mx._rowwise_scale_inv.shape, mx._columnwise_scale_inv.shape) == ((256, 4), (8, 128))
    with pytest.raises(RuntimeError, match="divisible by 32"):
        te.MXFP8Quantizer(E4M3)(x[:, :80])
    rows_only = te.Float8Quantizer(one, one, E4M3, columnwise=False)(x)
    with pytest.raises(RuntimeError, match="operand A holds no column-wise FP8 data"):
        te.cpp_extensions.general_gemm(rows_only, x.new_empty(10, 256), torch.bfloat16, layout="NN")


def refusals(job: SimulatedJob) -> None:
    here, host = torch.empty(4, 8, device="simulated"), torch.empty(4, 8)
    with pytest.raises(NotImplementedError, match=r"transformer_engine_torch\.gelu is no part of the simulation"):
        tex.gelu(here, None)
    with pytest.raises(RuntimeError, match="rmsnorm_fwd: expected tensors of the accelerator, got one of cpu"):
        tex.rmsnorm_fwd(host, host[0], 1e-5, None, None, te.DType.kFloat32, 0, False)
    with pytest.raises(RuntimeError, match="multi_tensor_scale: sizes"):
        tex.multi_tensor_scale(1, here, [[here], [here[0]]], 2.0)


BF16 = PrecisionPolicy.of("bf16")
assert not use_transformer_engine(BF16)  # outside of a job this is a CPU
with simulated_job(config(), 1, 0) as one_rank:
    assert use_transformer_engine(BF16)
    for rules in (products, quantizers, refusals):
        rules(one_rank)
fused = dry_run(config("model.num_layers=2"), 1, 0)
with mock.patch("vishwamai_mp.precision.policy.has_transformer_engine", return_value=False):
    plain = dry_run(config("model.num_layers=2"), 1, 0)
assert (fused.layers, plain.layers) == ("Transformer Engine", "torch")
assert fused.flops == plain.flops
assert fused.parameters == plain.parameters
assert fused.at_peak["gradients"] == plain.at_peak["gradients"]


# A GPU that lacks a recipe emulates it on torch's layers: as the CPU does, without waiting for the host once more.
for recipe, check in (
    ("fp8_delayed", "check_fp8_support"),
    ("fp8_current", "check_fp8_support"),
    ("fp8_blockwise", "check_fp8_block_scaling_support"),
    ("fp8_mx", "check_mxfp8_support"),
    ("nvfp4", "check_nvfp4_support"),
):
    tokens = [
        "training.sequence_length=128",
        "model.max_position_embeddings=128",
        "model.intermediate_size=256",
        "model.num_layers=2",
    ]
    wanted = config(f"precision={recipe}", *tokens)
    with mock.patch(f"transformer_engine.pytorch.fp8.{check}", return_value=(False, "Needs a Hopper.")):
        emulated = dry_run(wanted, 1, 0)
    assert emulated.layers == "torch"
    assert emulated.notes == []
    rotates = recipe == "nvfp4"  # tokens, in products that nobody plans
    assert (emulated.flops > emulated.predicted_flops) if rotates else (emulated.flops == emulated.predicted_flops)
    assert sum(emulated.host_waits.values()) == 1
    assert emulated.launches > 1.5 * dry_run(config(*tokens), 1, 0).launches  # something rounds


def scaling_of(step: TrainStep) -> list[torch.Tensor]:
    """Of linear layers: attention has a state too, which nothing is rounded by."""
    linears = [part for part in step.chunks[0].modules() if hasattr(part, "fp8_meta") and hasattr(part, "weight")]
    states = [part.fp8_meta for part in linears if "scaling_fwd" in part.fp8_meta]
    ways = [meta[f"scaling_{way}"] for meta in states for way in ("fwd", "bwd")]
    return [tensor for state in ways for tensor in (state.scale, state.amax_history)]


# What overlaps exchanges while it trains generates without, and its buffers go with the job.
tensor = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
overlapped = config("parallel.overlap_tensor_parallel=true", *tensor, ranks=2)
with simulated_job(overlapped, 2, 0) as job, training_step(overlapped, job) as training:
    linears = [part for part in training.chunks[0].modules() if getattr(part, "ub_name", None)]
    assert [part.ub_name for part in linears] == ["proj", "qkv", "fc1", "fc2"]
    with Decoding(training.chunks[0].module):
        assert not any(part.ub_overlap_ag_fprop or part.ub_overlap_rs_fprop for part in linears)
    assert all(part.ub_overlap_ag_fprop or part.ub_overlap_rs_fprop for part in linears)
    training.evaluate(empty_batches(overlapped, job))
    buffer = base.get_ub("qkv_fprop", False)
    with pytest.raises(RuntimeError, match=r"userbuffers: .* into"):
        buffer.copy_into_buffer(torch.empty(3, device="simulated"))
    weight, x = torch.empty(64, 256, device="simulated"), torch.empty_like(buffer.whole)
    with pytest.raises(RuntimeError, match="lies elsewhere"):
        te.cpp_extensions.general_gemm(weight, x, ub=buffer, ub_type=tex.CommOverlapType.AG)
    assert base.is_ub_initialized()
    multicast = mock.patch.object(tex, "device_supports_multicast", return_value=False)
    with multicast, pytest.raises(UserError, match="UB_SKIPMC=1"):
        training_step(overlapped, job).__enter__()
assert not base.is_ub_initialized()


# Weights in FP8 are bf16 in checkpoints, where each number of the optimizer's is once; it begins with what is loaded.
for recipe, kind in (("fp8_current", te.Float8Tensor), ("fp8_blockwise", te.Float8BlockwiseQTensor)):
    wide = ["model.intermediate_size=256", "training.sequence_length=128", "model.max_position_embeddings=128"]
    rounded = config(f"precision={recipe}", "fp8.params=true", "parallel.use_distributed_optimizer=true", *wide)
    with simulated_job(rounded, 1, 0) as job, training_step(rounded, job) as training:
        weights = [part for part in training.chunks[0].parameters() if isinstance(part, kind)]
        assert len(weights) == 4
        assert not any(hasattr(weight, "_high_precision_init_val") for weight in weights)
        state = model_state(training.chunks, job.runtime)
        shards = list(optimizer_state(training.optimizer, state, job.runtime, True)["optimizer0"]["shards"].values())
        loaded = load_preprocess(state)[0]
        assert not any(isinstance(shard.data, kind) for shard in nested_values(loaded))
        for name in {shard.key for shard in nested_values(loaded)}:
            own = [shard for shard in shards if shard.key == f"optimizer.state.fp32_param.{name}"]
            assert sum(shard.data.numel() for shard in own) == math.prod(own[0].global_shape), name
            assert len({shard.global_offset for shard in own}) == len(own), name
        named = dict(unwrap(training.chunks[0]).named_parameters())
        numbers = {
            name: torch.ones(part.shape, dtype=torch.bfloat16, device="simulated") for name, part in named.items()
        }
        earlier = job.recorder.launches["quantize"]
        load_model(training.chunks, {"model0": numbers})
        assert job.recorder.launches["quantize"] - earlier == len(weights)
        with mock.patch("vishwamai_mp.checkpoint.optimizer_shards.begin_with", side_effect=begin_with) as begun:
            restart_optimizer(training.optimizer, training.chunks, {"model0": numbers})
        (call,) = begun.call_args_list
        assert call.args[1] == {id(part): numbers[name] for name, part in named.items() if isinstance(part, kind)}
        training.train(empty_batches(rounded, job), 0, 1e-3, float("inf"))
        training.evaluate(empty_batches(rounded, job))
        launched = job.recorder.launches.copy()
        with torch.no_grad(), Decoding(training.chunks[0].module):  # in bf16, of three tokens
            up = training.chunks[0].module.decoder.layers[0].mlp.linear_fc1
            up(torch.ones(3, 1, 256, dtype=torch.bfloat16, device="simulated"))
        made = job.recorder.launches - launched
        assert made["dequantize"] == (recipe == "fp8_current")  # blocks are multiplied by torch
        assert not made["quantize"]


delayed = config("precision=fp8_delayed")
with simulated_job(delayed, 1, 0) as job, training_step(delayed, job) as training:
    before = scaling_of(training)  # as a checkpoint may have filled it
    training.train(empty_batches(delayed, job), 0, 1e-3, float("inf"))
    assert len(before) == 4 * 2 * 2
    assert all(now is then for now, then in zip(scaling_of(training), before, strict=True))
