"""Training steps of Transformer Engine's layers on the simulated accelerator, where its own Python runs on a double."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.test_simulated import CACHE, LORA, MEMORY, PACKED, RECOMPUTE, VALUES
from vishwamai_mp.config import load_config
from vishwamai_mp.runtime.fused_layers import python_folder

_HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(
    python_folder() is None, reason="Transformer Engine's Python is not where runtime/fused_layers.py says"
)

# Widths that every recipe takes, a block of 128 among them, on each of two ranks.
_WIDE = [
    "model.num_layers=2",
    "model.hidden_size=256",
    "model.intermediate_size=256",
    "model.num_key_value_heads=8",
    "training.sequence_length=128",
    "model.max_position_embeddings=128",
    "training.global_batch_size=4",
]
_LONG = ["training.sequence_length=1024", "model.max_position_embeddings=1024"]
_TENSOR = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
_STAGES = ["parallel.pipeline_model_parallel_size=2"]
_CHUNKS = [*_STAGES, "parallel.virtual_pipeline_model_parallel_size=2", "model.num_layers=4"]
_CONTEXT = ["parallel.context_parallel_size=2"]
_REPLICAS = ["parallel.use_distributed_optimizer=true"]
_MLP = ["training.recompute=selective", "training.recompute_modules=[mlp]"]
_FUSED = ["parallel.fuse_grad_accumulation=true", "parallel.reduce_grads_in=bf16"]
_HOST = ["optimizer.moments_in=bf16", "optimizer.moments_on_host=true"]
_WEIGHTS = ["precision=fp8_current", "fp8.params=true"]
_OVERLAP = [*_TENSOR, "parallel.overlap_tensor_parallel=true"]
# Tiles of 128 numbers in pieces of matrices that are gathered or cut on two ranks.
_TILES = ["model.hidden_size=512", "training.sequence_length=256", "model.max_position_embeddings=256"]
_YARN = ["model.rope_scaling={rope_type: yarn, factor: 4, original_max_position_embeddings: 32}"]
_DROPOUT = ["model.hidden_dropout=0.1", "model.attention_dropout=0.1"]

# Name: ranks, rank, settings. Each kind of layer, layout and precision is in several.
_STEPS: dict[str, tuple[int, int, list[str]]] = {
    "one process, bf16": (1, 0, ["precision=bf16"]),
    "one process, fused": (1, 0, [_FUSED[0], "precision=bf16"]),
    "one process, bf16 gradients": (1, 0, [_FUSED[1], "precision=bf16"]),
    "one process, fp32": (1, 0, ["precision=fp32"]),
    **{
        f"all weights of attention, {name}": (1, 0, ["precision=fp32", *_LONG, *settings])
        for name, settings in {
            "grouped": [],
            "dropout": ["model.attention_dropout=0.1", "model.num_key_value_heads=2"],
            "packed": PACKED,
            "packed, dropout": [*PACKED, "model.attention_dropout=0.1"],
            "recomputed": ["training.recompute=selective"],
            "recomputed with the MLP": ["training.recompute=selective", "training.recompute_modules=[core_attn,mlp]"],
            "recomputed with the layer": RECOMPUTE,
        }.items()
    },
    "one process, bf16 moments": (1, 0, ["optimizer.moments_in=bf16", "precision=bf16"]),
    "one process, activations on the host, fused": (1, 0, [*_FUSED, "training.offload_layers=1", "precision=bf16"]),
    "tensor, memory, cache and values, activations on the host": (
        2,
        1,
        [*_TENSOR, *MEMORY, *CACHE, *VALUES, "training.offload_layers=1", "precision=fp16"],
    ),
    "chunks, packed, adapters, activations on the host": (
        2,
        0,
        [*_CHUNKS, *PACKED, *LORA, "model.num_layers=8", "training.offload_layers=1", "precision=bf16"],
    ),
    "tensor, packed, cache, deterministic": (
        2,
        0,
        [*_TENSOR, *PACKED, *CACHE, "training.deterministic=true", "precision=bf16"],
    ),
    "replicas, bf16 moments on the host, delayed": (2, 0, [*_REPLICAS, *_HOST, "precision=fp8_delayed"]),
    "sharded, moments on the host": (2, 1, ["parallel.fully_sharded=true", _HOST[1], "precision=bf16"]),
    "tensor, fp16": (2, 1, [*_TENSOR, "precision=fp16"]),
    "tensor, delayed": (2, 0, [*_TENSOR, "precision=fp8_delayed"]),
    "tensor, current": (2, 1, [*_TENSOR, "precision=fp8_current"]),
    "tensor, blockwise": (2, 0, [*_TENSOR, "precision=fp8_blockwise"]),
    "tensor, mx": (2, 1, [*_TENSOR, "precision=fp8_mx"]),
    "tensor, nvfp4": (2, 0, [*_TENSOR, "precision=nvfp4"]),
    "tensor, delayed, overlapped": (2, 0, [*_OVERLAP, "precision=fp8_delayed"]),
    "tensor, tiles, mx": (2, 1, [*_TENSOR, *_TILES, "precision=fp8_mx"]),
    "tensor, tiles, mx, overlapped": (2, 1, [*_OVERLAP, *_TILES, "precision=fp8_mx"]),
    "tensor, adapters, recomputed": (2, 1, [*_TENSOR, *LORA, *RECOMPUTE, "precision=bf16"]),
    "tensor, adapters, recomputed, overlapped": (2, 1, [*_OVERLAP, *LORA, *RECOMPUTE, "precision=bf16"]),
    "chunks, memory, cache, adapters, nvfp4 at the end": (
        2,
        1,
        [*_CHUNKS, *MEMORY, *CACHE, *LORA, *RECOMPUTE, "precision=nvfp4", "fp8.bf16_layers_at_start=1"],
    ),
    "context, replicas, narrow, nvfp4": (
        4,
        3,
        [*_CONTEXT, *_REPLICAS, "model.hidden_size=192", "model.intermediate_size=96", "precision=nvfp4"],
    ),
    "tensor, memory, cache and values, delayed": (
        2,
        1,
        [*_TENSOR, *MEMORY, *CACHE, *VALUES, "memory.chunk_size=64", "precision=fp8_delayed"],
    ),
    "tensor, memory, cache and values, delayed, overlapped": (
        2,
        1,
        [*_OVERLAP, *MEMORY, *CACHE, *VALUES, "memory.chunk_size=64", "precision=fp8_delayed"],
    ),
    "chunks, tensor, packed, fp8 in the middle, fused, overlapped": (
        4,
        1,
        [*_CHUNKS, *_OVERLAP, *_REPLICAS, *PACKED, *_FUSED, "precision=fp8_current", "fp8.bf16_layers_at_start=1"],
    ),
    "packed, yarn, memory that goes on, bf16": (
        1,
        0,
        [*PACKED, *MEMORY, *_YARN, "memory.carry_state=true", "data.consecutive=true", "precision=bf16"],
    ),
    "first stage, packed, bf16": (2, 0, [*_STAGES, *PACKED, "precision=bf16"]),
    "last stage, packed, values, delayed": (2, 1, [*_STAGES, *PACKED, *VALUES, "precision=fp8_delayed"]),
    "chunks, fp8 in the middle": (2, 0, [*_CHUNKS, "precision=fp8_current", "fp8.bf16_layers_at_start=1"]),
    "chunks, adapters, fp16": (2, 1, [*_CHUNKS, *LORA, "precision=fp16"]),
    "context, cache, bf16": (2, 1, [*_CONTEXT, *CACHE, "precision=bf16"]),
    "context, delayed": (2, 0, [*_CONTEXT, "precision=fp8_delayed"]),
    "context, window, mx": (2, 0, [*_CONTEXT, "model.sliding_window=16", "precision=fp8_mx"]),
    "context, packed, window, memory, cache and values, delayed": (
        2,
        1,
        [*_CONTEXT, *PACKED, *MEMORY, *CACHE, *VALUES, "model.sliding_window=16", "precision=fp8_delayed"],
    ),
    "context, stages, tensor, packed, adapters, recomputed, mx": (
        8,
        3,
        [*_CONTEXT, *_STAGES, *_TENSOR, *PACKED, *LORA, *RECOMPUTE, "precision=fp8_mx"],
    ),
    "context, replicas, packed, cache, nvfp4": (4, 2, [*_CONTEXT, *_REPLICAS, *PACKED, *CACHE, "precision=nvfp4"]),
    "context, packed, attention recomputed, current": (
        2,
        0,
        [*_CONTEXT, *PACKED, "training.recompute=selective", "precision=fp8_current"],
    ),
    "context, packed, cache, activations on the host, deterministic": (
        2,
        0,
        [*_CONTEXT, *PACKED, *CACHE, "training.offload_layers=1", "training.deterministic=true", "precision=bf16"],
    ),
    "replicas, packed, cache, blockwise": (2, 1, [*_REPLICAS, *PACKED, *CACHE, "precision=fp8_blockwise"]),
    "replicas, adapters, recomputed, delayed": (2, 0, [*_REPLICAS, *LORA, *RECOMPUTE, "precision=fp8_delayed"]),
    "replicas, memory, cache, one layer recomputed, blockwise": (
        2,
        0,
        [*_REPLICAS, *MEMORY, *CACHE, *RECOMPUTE, "training.recompute_layers=1", "precision=fp8_blockwise"],
    ),
    "chunks, MLPs recomputed, delayed": (2, 0, [*_CHUNKS, *_MLP, "precision=fp8_delayed"]),
    "tensor, bf16 gradients fused, memory and cache, delayed": (
        4,
        1,
        [*_TENSOR, *_REPLICAS, *_FUSED, *MEMORY, *CACHE, "memory.chunk_size=64", "precision=fp8_delayed"],
    ),
    "chunks, bf16 gradients fused, adapters": (2, 1, [*_CHUNKS, *_FUSED, *LORA, "precision=bf16"]),
    "replicas, adapters, mx": (2, 0, [*_REPLICAS, *LORA, "precision=fp8_mx"]),
    "replicas, dropout, recomputed, current": (
        2,
        1,
        [*_REPLICAS, *_DROPOUT, *RECOMPUTE, "precision=fp8_current"],
    ),
    "replicas, current": (2, 1, [*_REPLICAS, "precision=fp8_current"]),
    "replicas, current, weights in FP8": (2, 1, [*_REPLICAS, *_WEIGHTS]),
    "replicas, blockwise": (2, 1, [*_REPLICAS, "precision=fp8_blockwise"]),
    "replicas, blockwise, weights in FP8": (2, 1, [*_REPLICAS, "precision=fp8_blockwise", _WEIGHTS[1]]),
    "chunks, tensor, memory, cache, fused, blockwise, weights in FP8": (
        4,
        1,
        [*_CHUNKS, *_REPLICAS, *_TENSOR, *_FUSED, *MEMORY, *CACHE, "precision=fp8_blockwise", _WEIGHTS[1]],
    ),
    "chunks, tensor, memory, cache, bf16 moments, weights in FP8, overlapped": (
        4,
        1,
        [*_CHUNKS, *_REPLICAS, *_OVERLAP, *_FUSED, *_WEIGHTS, *MEMORY, *CACHE, "optimizer.moments_in=bf16"],
    ),
    "sharded, bf16": (2, 1, ["parallel.fully_sharded=true", "precision=bf16"]),
}


_RECIPES = sorted((_HERE.parents[1] / "examples/recipes").glob("*.yaml"))


def recipe_case(path: Path) -> list[Any]:
    """A rank of the last stage but one, or the only; of all layers one a stage, of a step one round of micro-batches.

    Widths, lengths and groups are the recipe's; more layers would be the same again, and take minutes.
    """
    gpus = int(path.stem.rsplit("-on-", 1)[1])
    config = load_config(path)
    parallel, stages = config.parallel, config.parallel.pipeline_model_parallel_size
    replicas = gpus // (parallel.tensor_model_parallel_size * parallel.context_parallel_size * stages)
    batch = replicas * stages * config.training.micro_batch_size
    shallow = [f"model.num_layers={stages}", "parallel.virtual_pipeline_model_parallel_size=null"]
    rank = gpus - gpus // stages - 1 if stages > 1 else gpus - 1
    return [gpus, rank, "simulated", [*shallow, f"training.global_batch_size={batch}"], str(path)]


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    """What each step told; all in one process."""
    cases = [[*place, "simulated", [*_WIDE, *settings]] for *place, settings in _STEPS.values()]
    cases += map(recipe_case, _RECIPES)
    command = [sys.executable, str(_HERE / "simulated_steps.py"), "--transformer-engine"]
    run = subprocess.run(command, input=json.dumps(cases), text=True, capture_output=True)
    assert run.returncode == 0, run.stderr
    names = [*_STEPS, *(path.stem for path in _RECIPES)]
    return dict(zip(names, json.loads(run.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("name", _STEPS)
def test_a_step_runs_and_waits_once(found, name):
    step = found[name]
    assert "error" not in step, step["error"]
    assert step["updated"]
    assert step["layers"] == "Transformer Engine"
    assert not step["notes"]
    assert list(step["host_waits"].values()) == [1], step["host_waits"]
    # The frequencies of positions, a tensor of nothing that memory is given back with, NVFP4's Hadamard matrix:
    # once in a model's life.
    once: tuple[str, ...] = ("rotary", "pytorch/utils", "pytorch/tensor/nvfp4_tensor")
    once += ("compact_adamw", "host_copies") if "on the host" in name else ()  # in each step, and nothing waits
    assert all(any(part in place for part in once) for place in step["host_copies"]), step["host_copies"]
    assert sum(step["at_peak"].values()) == step["peak_bytes"]
    # cuBLAS's on a Hopper or later; three more for products that run beside one another.
    assert step["at_peak"]["workspaces"] == (4 if "overlapped" in name else 1) * (32 * 2**20 + 1024)


@pytest.mark.parametrize("name", [path.stem for path in _RECIPES])
def test_a_rank_of_each_recipe_trains(found, name):
    step = found[name]
    assert "error" not in step, step["error"]
    assert step["updated"]
    assert sum(step["at_peak"].values()) == step["peak_bytes"]


def test_fp8_launches_quantizers_for_the_same_products(found):
    steps = {name: found[f"tensor, {name}"] for name in ("fp16", "delayed", "current", "blockwise", "mx", "nvfp4")}
    steps["nvfp4"]["flops"] -= 2 * 16**3  # the Hadamard matrix gets its signs, once
    assert len({step["flops"] for step in steps.values()}) == 1
    assert all(steps[name]["launches"] > steps["fp16"]["launches"] for name in steps if name != "fp16")


def test_fused_accumulation_launches_no_sums_of_weights_gradients(found):
    """In two layers and two micro-batches: one for each of four weights. And sums in bf16 take half the memory."""
    plain, fused, halved = (found[f"one process, {name}"] for name in ("bf16", "fused", "bf16 gradients"))
    assert plain["launches"] - fused["launches"] >= 2 * 2 * 4
    assert fused["flops"] == plain["flops"]
    assert halved["at_peak"]["gradients"] == plain["at_peak"]["gradients"] / 2


def _exchanged(step: dict[str, Any]) -> dict[tuple[str, str], int]:
    """Bytes by operation and group. Scales of blocks, which travel with their codes, count as one collective or two."""
    return {(one["operation"], one["group"]): one["bytes"] for one in step["collectives"]}


@pytest.mark.parametrize("name", [name for name in _STEPS if name.endswith(", overlapped")])
def test_overlapped_exchanges_are_the_same(found, name):
    """And so are products. What is gathered or summed lies in twelve buffers of all tokens of a micro-batch."""
    overlapped, plain = found[name], found.get(name.removesuffix(", overlapped"))
    settings = _STEPS[name][2]
    tokens, width = (256, 512) if set(_TILES) <= set(settings) else (128, 256)
    gathered = 2 if "precision=bf16" in settings else 1
    # Two sequences are in a micro-batch.
    assert overlapped["at_peak"]["exchange buffers"] == 2 * tokens * width * (8 * gathered + 4 * 2)
    if plain is not None:
        assert _exchanged(overlapped) == _exchanged(plain)
        assert overlapped["flops"] == plain["flops"]


def test_parts_of_documents_have_keys_gathered_and_their_gradients_scattered(found):
    """Keys and values, 256 wide, of two rows of 128 tokens, in two layers and micro-batches; recomputed, once more."""
    step = found["context, packed, attention recomputed, current"]
    exchanged = {key: size for key, size in _exchanged(step).items() if key[1] == "context_parallel"}
    scattered = 2 * 2 * 2 * (2 * 128 * 256) * 2
    assert exchanged == {
        ("all_gather", "context_parallel"): 2 * scattered,
        ("reduce_scatter", "context_parallel"): scattered,
    }


@pytest.mark.parametrize("recipe", ["current", "blockwise"])
def test_weights_in_fp8_are_rounded_once_a_step(found, recipe):
    """Two layers of 7 × 256 × 256 weights: 1 byte each of what replicas gather, and no copies of 2 bytes beside."""
    plain, rounded = (found[f"replicas, {recipe}{more}"] for more in ("", ", weights in FP8"))
    weights = 2 * 7 * 256 * 256
    gathered = ("all_gather", "data_parallel_group_with_cp")
    assert _exchanged(plain)[gathered] - _exchanged(rounded)[gathered] == pytest.approx(weights, rel=0.01)
    assert plain["at_peak"]["activations"] - rounded["at_peak"]["activations"] == pytest.approx(2 * weights, rel=0.2)
    assert plain["at_peak"]["parameters"] == pytest.approx(rounded["at_peak"]["parameters"], rel=0.01)
    assert rounded["flops"] == plain["flops"]


@pytest.mark.parametrize("name", [name for name in _STEPS if name.startswith("all weights of attention")])
def test_attention_in_fp32_keeps_what_is_planned(found, name):
    """Weights of all pairs are most of it. Its products are what is planned too, two more of each backward."""
    step = found[name]
    assert step["flops"] == step["predicted_flops"]
    assert step["peak_bytes"] == pytest.approx(step["predicted_bytes"], rel=0.01)


def test_moments_in_bf16_take_half_and_no_more_kernels(found):
    plain, narrow = found["one process, bf16"], found["one process, bf16 moments"]
    main = 2 * plain["at_peak"]["parameters"]  # fp32 copies of bf16 weights
    assert narrow["at_peak"]["optimizer"] - main == pytest.approx((plain["at_peak"]["optimizer"] - main) / 2, rel=0.01)
    assert narrow["launches"] == plain["launches"]


def test_the_rules_of_the_double():
    run = subprocess.run(
        [sys.executable, str(_HERE / "transformer_engine_rules.py")], text=True, capture_output=True, check=False
    )
    assert run.returncode == 0, run.stderr
