"""A program: what memory and cache launch, forward and backward, on the simulated accelerator; in one process.

usage: component_launches.py    prints JSON: by case [forward, backward]

Of the component alone: norm, projections, dropout, sum and measures included, in bf16, over 2,048 tokens. A second
pass is counted, to which the measures of the first are added.
"""

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import vishwamai_mp.runtime  # noqa: F401  (before megatron.core)
from vishwamai_mp.config import load_config, resolve
from vishwamai_mp.model import build_model, initialization
from vishwamai_mp.runtime.device import device
from vishwamai_mp.runtime.simulated import simulated_job

_TOKENS, _WIDTH = 2048, 256
_CHOSEN: dict[str, Any] = {"retrieve_segments": 8}
# By name: the section, its keys, and whether there are documents.
_CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "memory of one level": ("memory", {"num_memory_layers": 1}, False),
    "memory of three levels, documents": ("memory", {"num_memory_layers": 3}, True),
    "cache": ("cache", _CHOSEN, False),
    "cache, documents": ("cache", _CHOSEN, True),
    "cache read whole": ("cache", {}, False),
}


def counted(section: str, settings: dict[str, Any], documents: bool) -> list[int]:
    model = {"hidden_size": _WIDTH, "num_layers": 1, "num_attention_heads": 4, "max_position_embeddings": _TOKENS}
    training = {"sequence_length": _TOKENS, "micro_batch_size": 1, "global_batch_size": 1}
    sections = {"model": model | {"vocab_size": 64}, "training": training, "precision": "bf16"}
    config = resolve(load_config({**sections, section: {"enabled": True, "layers": [0], **settings}}), 1)
    with simulated_job(config, 1, 0) as job:
        with mock.patch.object(initialization, "_fill"):
            (chunk,) = build_model(config, job.runtime)
        component = getattr(chunk.decoder.layers[0], section)
        component.train()
        hidden = torch.empty(_TOKENS, 1, _WIDTH, dtype=torch.bfloat16, device=device(), requires_grad=True)
        ids = torch.empty(1, _TOKENS, dtype=torch.int64, device=device()) if documents else None
        leaves = [hidden, *component.parameters()]
        found: list[int] = []
        for _ in range(2):
            found.clear()
            job.recorder.restart()
            out, _ = component(hidden, ids)
            found.append(sum(job.recorder.launches.values()))
            torch.autograd.grad(out, leaves, torch.empty_like(out))
            found.append(sum(job.recorder.launches.values()) - found[0])
    return found


if __name__ == "__main__":
    print(json.dumps({name: counted(*case) for name, case in _CASES.items()}))
