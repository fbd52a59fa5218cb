"""Conversations packed into rows have the losses and gradients that each has in a row of its own."""

import json
import math
from pathlib import Path

import pytest
import torch

from tests.training.layouts import SMALL
from vishwamai_mp.config import load_config, resolve
from vishwamai_mp.data.batches import train_stream
from vishwamai_mp.data.datasets import TokenSamples, build_datasets
from vishwamai_mp.data.prepare import prepare
from vishwamai_mp.data.tokenizer import Tokenizer
from vishwamai_mp.data.tokenizer_training import train_tokenizer
from vishwamai_mp.model import build_model
from vishwamai_mp.runtime import initialize, shutdown

LENGTH = 96
TALKS = [{"question": f"{i} + {j}?", "answer": f"It is {i + j}. " * (1 + i % 4)} for i in range(9) for j in range(4)]
MODEL = [
    "model.vocab_size=390",
    "model.num_layers=2",
    "model.max_position_embeddings=96",
    "memory={enabled: true, memory_size: 32, head_dim: 8, chunk_size: 16, layers: [0], dropout: 0.0}",
    "cache={enabled: true, num_heads: 4, segment_length: 8, latents_per_segment: 2, layers: [1], dropout: 0.0}",
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A folder with `packed` and `alone`, and the tokenizer."""
    folder = tmp_path_factory.mktemp("rows")
    texts = [f"### User:\n{talk['question']}\n\n### Assistant:\n{talk['answer']}" for talk in TALKS]
    tokenizer = train_tokenizer(texts, 390, folder / "small").path
    (folder / "talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in TALKS))
    for name in ("packed", "alone"):
        packing = name == "packed"
        prepare([folder / "talks.jsonl"], tokenizer, folder / name, sequence_length=LENGTH, packing=packing)
    return folder


def losses(folder: Path, name: str, apart: bool = True) -> tuple[float, dict[str, float], int]:
    """In one worker: loss of each conversation by its text, norm of the mean loss's gradient, and rows.

    Args:
        apart: False: conversations of a row see each other.
    """
    data = [f"data.train={folder / name}", "data.prepared_rows=true", f"training.sequence_length={LENGTH}"]
    own = ["training.micro_batch_size=1", "training.global_batch_size=1", "data.split=100,0,0"]
    config = resolve(load_config(SMALL, [*MODEL, *data, *own]), 1)
    tokenizer = Tokenizer(folder / "small.model")
    runtime = initialize(config)
    (model,) = build_model(config, runtime)
    generator = torch.Generator().manual_seed(0)
    for key, parameter in model.named_parameters():
        if key.endswith(".output.weight"):  # components begin as the identity, which would hide them
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    datasets = build_datasets(config, tokenizer, runtime)
    found: dict[str, float] = {}
    total, count = torch.zeros((), dtype=torch.float64), 0.0
    assert isinstance(datasets.train, TokenSamples)
    rows = datasets.train.samples_per_epoch
    stream = train_stream(config, datasets, runtime)
    for _ in range(rows):
        batch = next(stream)
        documents = batch.document_ids
        assert documents is not None
        seen = documents if apart else documents.clamp(max=1)
        out = model(batch.tokens, batch.position_ids, batch.labels, seen).double()  # sums are not what is compared
        total = total + (out * batch.loss_mask).sum()
        count += float(batch.loss_mask.sum())
        for number in documents.unique().tolist():
            inside = documents == number
            text = tokenizer.decode(batch.tokens[inside].tolist())
            if float(batch.loss_mask[inside].sum()):
                found[text] = float((out * batch.loss_mask)[inside].sum() / batch.loss_mask[inside].sum())
    mean = total / count
    mean.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))
    shutdown(keep_world=True)
    return norm, {**found, "mean": float(mean)}, rows


def test_packed_losses_are_those_of_conversations_alone(workers, prepared):
    """With memory and cache, whose chunks and segments fall elsewhere in each row."""
    ((norm, packed, rows),) = workers.run(losses, 1, prepared, "packed")
    ((norm_alone, alone, rows_alone),) = workers.run(losses, 1, prepared, "alone")
    assert rows < rows_alone / 2
    assert rows_alone == len(TALKS) == len(alone) - 1
    assert packed.keys() == alone.keys()
    differences = {text: abs(packed[text] - alone[text]) for text in packed}
    print(f"mean {packed['mean']:.6f} differs by {differences['mean']:.1e}, others by {max(differences.values()):.1e}")
    assert differences["mean"] < 1e-6
    assert max(differences.values()) < 2e-6
    assert abs(norm - norm_alone) < 1e-5 * norm


def test_conversations_that_see_each_other_have_other_losses(workers, prepared):
    """Or else the test above would hold for any packing."""
    ((_, packed, _),) = workers.run(losses, 1, prepared, "packed")
    ((_, mixed, _),) = workers.run(losses, 1, prepared, "packed", apart=False)
    assert abs(packed["mean"] - mixed["mean"]) > 1e-3
