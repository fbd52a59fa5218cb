"""The GPU's model without a GPU: built of Transformer Engine's layers, it holds the parameters of the CPU's.

Needs the package's Python files outside this environment, which would break with them: they refuse to be imported
without the compiled ones, and megatron-core imports what it finds.

    pip install --no-deps --target FOLDER transformer-engine==2.20.2
    TRANSFORMER_ENGINE_FOLDER=FOLDER pytest tests/model/test_transformer_engine.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

_FOLDER = os.environ.get("TRANSFORMER_ENGINE_FOLDER", "")
_PROGRAM = Path(__file__).with_name("transformer_engine_build.py")

pytestmark = pytest.mark.skipif(
    not _FOLDER, reason="TRANSFORMER_ENGINE_FOLDER does not say where transformer-engine's Python files are"
)


def built(world_size: int, *overrides: str) -> dict[str, Any]:
    command = [sys.executable, str(_PROGRAM), _FOLDER, str(world_size), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_holds_the_same_parameters_under_the_same_names(precision):
    """Names, shapes, marks and initial values, so checkpoints and seeds mean the same on both."""
    layout = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
    model = built(2, f"precision={precision}", *layout)
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
_TP8_PP2 = ["parallel.tensor_model_parallel_size=8", "parallel.pipeline_model_parallel_size=2"]


@pytest.mark.parametrize(("world_size", "layout"), [(1, []), (16, [*_TP8_PP2, "parallel.sequence_parallel=true"])])
@pytest.mark.parametrize("precision", ["bf16", "fp8_delayed", "fp8_current"])
def test_with_memory_and_cache_its_tensors_lie_where_the_cpus_do(precision, world_size, layout):
    """Names, whole shapes and offsets; beside them, only the CPU's has the state of delayed scaling."""
    model = built(world_size, f"precision={precision}", *_COMPONENTS, *layout)
    theirs, ours = model["places"]
    assert theirs == [place for place in ours if not place[0].endswith(("fp8_amax_history", "fp8_scale"))]
    assert (len(theirs) < len(ours)) == (precision == "fp8_delayed")
    kinds = {place[0].split(".")[3] for place in theirs if place[0].startswith("decoder.layers")}
    assert {"memory", "self_attention", "mlp"} <= kinds
    assert world_size > 1 or "cache" in kinds  # the second stage has it
    formats = {"bf16": None, "fp8_delayed": "hybrid", "fp8_current": "hybrid"}
    assert [model["fp8"][0], model["fp8"][2]] == [formats[precision], None]


def test_windows_and_context_parallelism_are_its_own():
    model = built(2, "model.sliding_window=7", "parallel.context_parallel_size=2")
    assert model["window"] == [6, 0]
    assert model["cp_comm_type"] == "all_gather"
    assert built(1)["window"] == [-1, 0]


def test_documents():
    """Packed documents turn each from its start in the fused kernel; rows with positions of their own do not fit it."""
    assert built(1, "data.reset_attention_mask=true", "data.reset_position_ids=true")["rope_fusion"]
    assert not built(1, "data.reset_position_ids=true")["rope_fusion"]
    refused = built(2, "data.reset_attention_mask=true", "parallel.context_parallel_size=2")["refused"]
    assert "data.reset_attention_mask=true with parallel.context_parallel_size=2" in refused
