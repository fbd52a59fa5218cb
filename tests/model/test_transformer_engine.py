"""The GPU's model without a GPU: built of Transformer Engine's layers, it holds the parameters of the CPU's.

Needs the package's Python files where `vishwamai_mp/runtime/fused_layers.py` looks for them, as tests/run.sh puts them.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vishwamai_mp.runtime.fused_layers import python_folder

_FOLDER = python_folder()
_PROGRAM = Path(__file__).with_name("transformer_engine_build.py")

pytestmark = pytest.mark.skipif(
    _FOLDER is None, reason="Transformer Engine's Python is not where runtime/fused_layers.py says"
)


_TP2 = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
_COMPONENTS = [
    "model.hidden_size=128",
    "model.num_key_value_heads=8",
    "model.intermediate_size=256",
    "memory.enabled=true",
    "memory.memory_size=128",
    "memory.head_dim=16",
    "cache.enabled=true",
    "cache.num_heads=8",
    "cache.segment_length=8",
]
_TP8_PP2 = [
    "parallel.tensor_model_parallel_size=8",
    "parallel.pipeline_model_parallel_size=2",
    "parallel.sequence_parallel=true",
]
_CONTEXT = "parallel.context_parallel_size=2"
_DOCUMENTS = "data.reset_attention_mask=true"
_CASES: dict[Any, list[Any]] = {
    **{precision: [2, f"precision={precision}", *_TP2] for precision in ("fp32", "bf16")},
    **{
        (precision, size): [size, f"precision={precision}", *_COMPONENTS, *layout]
        for precision in ("bf16", "fp8_delayed", "fp8_current")
        for size, layout in ((1, []), (16, _TP8_PP2))
    },
    "plain": [1],
    "norms behind": [2, *_TP2, "model.norm_position=post", "model.qk_norm=full"],
    "norms on both sides": [
        2,
        *_TP2,
        "model.norm_position=sandwich",
        "model.sliding_window=7",
        "model.layer_pattern=SF",
        "model.window_rope_theta=100",
        "model.rotary_pattern=RRN",
        "model.attention_multiplier=2",
        "model.residual_multiplier=0.2",
        "model.logit_multiplier=0.2",
        "model.activation=geglu",
        "model.norm_zero_centered=true",
    ],
    "capped scores": [1, "model.attention_softcap=5"],
    "window": [2, "model.sliding_window=7", _CONTEXT, "precision=bf16"],
    "fp32 in context parallelism": [2, _CONTEXT, "precision=fp32"],
    "documents": [1, _DOCUMENTS, "data.reset_position_ids=true"],
    "own positions": [1, "data.reset_position_ids=true"],
    "documents in context parallelism": [
        *(2, _DOCUMENTS, _CONTEXT, "model.sliding_window=7", "precision=bf16"),
        *_COMPONENTS,
    ],
    "documents, dropout and context parallelism": [
        *(2, _DOCUMENTS, _CONTEXT, "model.attention_dropout=0.1", "precision=bf16"),
    ],
}


@pytest.fixture(scope="module")
def built() -> dict[Any, dict[str, Any]]:
    """What was built of each case; all in one process, for the packages take seconds to import."""
    command = [sys.executable, str(_PROGRAM), str(_FOLDER)]
    cases = json.dumps(list(_CASES.values()))
    done = subprocess.run(command, input=cases, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(_CASES, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_holds_the_same_parameters_under_the_same_names(built, precision):
    """Names, shapes, marks and initial values, so checkpoints and seeds mean the same on both."""
    model = built[precision]
    assert model["classes"] == ["TEDotProductAttention", "TELayerNormColumnParallelLinear", "TERowParallelLinear"]
    assert model["final_norm"] == "transformer_engine"
    theirs, ours = model["entries"]
    assert theirs == ours
    assert model["equal"] == len(ours) == 3 + 6 * 4
    theirs, ours = model["marks"]
    assert theirs == ours
    assert sum(mark[-1] for mark in ours) == 2 * 4 + 1  # the norms see a part of the sequence each
    assert model["without_mask"] == [True, False]
    assert model["rope_fusion"]


@pytest.mark.parametrize("case", ["norms behind", "norms on both sides"])
def test_norms_stand_where_the_cpus_do(built, case):
    theirs, ours = built[case]["entries"]
    assert theirs == ours
    assert built[case]["equal"] == len(ours) == 3 + 8 * 4
    theirs, ours = built[case]["marks"]
    assert theirs == ours


@pytest.mark.parametrize("world_size", [1, 16])
@pytest.mark.parametrize("precision", ["bf16", "fp8_delayed", "fp8_current"])
def test_with_memory_and_cache_its_tensors_lie_where_the_cpus_do(built, precision, world_size):
    """Names, whole shapes and offsets, the state of delayed scaling included."""
    model = built[precision, world_size]
    theirs, ours = model["places"]
    assert theirs == ours
    scales = [place for place in theirs if place[0].endswith("fp8_scale")]
    assert bool(scales) == (precision == "fp8_delayed")
    kinds = {place[0].split(".")[3] for place in theirs if place[0].startswith("decoder.layers")}
    assert {"memory", "self_attention", "mlp"} <= kinds
    assert world_size > 1 or "cache" in kinds  # the second stage has it
    formats = {"bf16": None, "fp8_delayed": "hybrid", "fp8_current": "hybrid"}
    assert [model["fp8"][0], model["fp8"][2]] == [formats[precision], None]


def test_delayed_scaling_goes_on_with_the_same_scales_on_any_machine(built):
    """From a GPU to a GPU, and by way of a CPU; what Transformer Engine would pickle is neither written nor read."""
    model = built["fp8_delayed", 1]
    assert model["linears"] > 4 * 4  # those of components too
    assert model["resumed"] == [True, True]
    assert "_extra_state: Transformer Engine's pickled state is not read" in model["pickle"]


def test_attention_keeps_the_generators_that_a_step_seeds(built):
    assert all(model["tracker_stays"] for model in built.values() if "tracker_stays" in model)


def test_windows_and_context_parallelism_are_its_own(built):
    assert built["window"]["window"] == [6, 0]
    assert built["window"]["cp_comm_type"] == "all_gather"
    assert built["plain"]["window"] == [-1, 0]


def test_scores_are_multiplied_as_the_model_says(built):
    assert [built[case]["scale"] for case in ("norms on both sides", "plain")] == [2.0, 0.5]


def test_capped_scores_are_refused(built):
    assert (
        "model.attention_softcap=5.0: Transformer Engine's attention has no soft cap"
        in built["capped scores"]["refused"]
    )


def test_attention_of_context_parallel_ranks_in_fp32_is_refused(built):
    """Transformer Engine would find no kernel for it in the first step."""
    refused = built["fp32 in context parallelism"]["refused"]
    assert refused.startswith("precision=fp32 with parallel.context_parallel_size=2: ")
    assert "set precision=bf16 or parallel.context_parallel_size=1" in refused


def test_gates_are_of_the_models_kind(built):
    assert [built[case]["gate"] for case in ("norms on both sides", "plain")] == ["gelu", "silu"]


def test_documents(built):
    """Packed documents turn each from its start in the fused kernel; rows with positions of their own do not fit it."""
    assert built["documents"]["rope_fusion"]
    assert not built["own positions"]["rope_fusion"]


def test_parts_of_documents(built):
    """Its own context parallelism is off, and windows count back from the last key."""
    case = built["documents in context parallelism"]
    assert case["kernel"] == [None, "cross"]
    assert case["window"] == [6, 0]
    assert case["rope_fusion"]
    assert case["tracker_stays"]
    theirs, ours = case["entries"]
    assert theirs == ours
    assert "kernel" not in built["window"]
    refused = built["documents, dropout and context parallelism"]["refused"]
    assert "model.attention_dropout=0.1 with data.reset_attention_mask=true" in refused
