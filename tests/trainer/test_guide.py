"""The guide's code blocks (`guide.md`) execute with nothing changed but the package's name."""

import contextlib
import io
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests.workers import WorkerPool
from vishwamai_mp.config import load_config, resolve
from vishwamai_mp.data.tokenizer_training import train_tokenizer

_GUIDE = Path(__file__).with_name("guide.md")
_VOCAB = 380
_SIZES: dict[str, Any] = {
    "model_config": {
        "dim": 32,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "vocab_size": _VOCAB,
        "max_position_embeddings": 256,
    },
    "training": {"sequence_length": 64, "threads": 1},
    "memory_config": {"memory_size": 32, "num_memory_layers": 2, "head_dim": 8},
    "tree_config": {"beam_width": 2, "max_depth": 2, "max_thought_tokens": 4},
    "cache_config": {"num_heads": 4, "segment_length": 16},
    "precision": "fp32",
    "logging": {"hardware_peak_tflops": 1},
    "data": {"tokenizer": "tokenizer.model"},
}


def blocks(language: str) -> list[str]:
    """The code of that language, in order, for this package."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", _GUIDE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [re.sub(r"\bvishwamai\b", "vishwamai_mp", block) for block in found]


def run_guide(folder: Path) -> dict[str, Any]:
    """Execute the blocks one after another; what came of them."""
    os.chdir(folder)
    names: dict[str, Any] = {}
    with contextlib.redirect_stderr(io.StringIO()) as said:
        for number, block in enumerate(blocks("python")):
            exec(compile(block, f"block {number} of the guide", "exec"), names)
    return {
        "said": said.getvalue(),
        "steps": [names[run].trainer.state.step for run in ("trainer", "finetuner", "fast", "sharded")],
        "losses": [record["lm_loss"] for record in names["trainer"].history],
        "rates": [record["learning_rate"] for record in names["trainer"].history],
        "measures": sorted(names["trainer"].history[0]),
        "scores": names["scores"],
        "trained": sorted(names["trained"]),
        "answers": [len(answer.nodes) for answer in names["answers"]],
        "precisions": [names[run].config.precision for run in ("trainer", "fast")],
        "recompute": names["fast"].config.training.recompute,
        "values": tuple(names["values"].shape),
    }


def test_there_are_blocks_and_only_the_name_is_changed():
    python = blocks("python")
    assert len(python) >= 8
    for name in (
        "load_model",
        "VishwamAIPretrainer",
        "ReasoningMemoryTransformer",
        "TreeOfThoughts",
        "save_pretrained",
    ):
        assert any(name in block for block in python)
    assert "vishwamai_mp" not in _GUIDE.read_text(encoding="utf-8")


def test_the_guides_configuration_is_the_large_model():
    [block] = blocks("json")
    model = resolve(load_config(json.loads(block))).model
    assert (model.hidden_size, model.num_layers, model.intermediate_size) == (8192, 120, 22016)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_guide_runs(workers: WorkerPool, tmp_path, processes):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/model.json").write_text(json.dumps(_SIZES))
    texts = [f"the quick brown fox number {number} jumps over the lazy dog again and again" for number in range(40)]
    train_tokenizer(texts * 4, _VOCAB, tmp_path / "tokenizer")
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    results = workers.run(run_guide, processes, tmp_path)
    found = results[0]
    assert all(result["losses"] == found["losses"] for result in results)
    # 32 texts in batches of 8 · 4 per process, three times; then in batches of 8 per process, twice; then two steps.
    assert found["steps"] == [3, 8 // processes, 2, 2]
    assert found["rates"] == pytest.approx([1.2e-4 * step / 1000 for step in range(len(found["rates"]))])
    assert {"memory_mix_loss", "cache_entropy", "value_loss"} <= set(found["measures"])
    # The first steps of a warm-up of 1,000 hardly move the model, so validation finds it as the first step did.
    assert found["scores"]["eval_loss"] == pytest.approx(found["losses"][0], abs=0.02)
    assert found["scores"]["eval_loss"] != found["losses"][0]
    assert found["scores"]["eval_perplexity"] == pytest.approx(math.exp(found["scores"]["eval_loss"]))
    assert found["trained"] == ["memory_layer_0"]
    assert found["answers"][0] > 4
    assert found["values"] == (128, 2)
    assert found["precisions"] == ["fp32", "bf16"]
    assert found["recompute"] == "full"
    for note in ("warmup_steps=1000 in a run of", "cuda_graphs=True has no effect: there is no GPU here"):
        assert note in found["said"]
    assert (tmp_path / "output/checkpoints/latest").is_file()
    assert (tmp_path / "finetuned/model/config.yaml").is_file()
    assert list((tmp_path / "fast/tensorboard").iterdir())
