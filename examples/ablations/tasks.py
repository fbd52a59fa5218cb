"""Synthetic tasks that ask for memory, and the small training loop of the ablations.

Rows are made of key tokens, value tokens and noise. A binding is a key followed by a value; later the key is asked, and
the value is the label. Loss and accuracy count answers only, and the answer is beyond the reach of window attention.

Shapes: R rows, T tokens.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vishwamai_mp.config import PretrainConfig, load_config, resolve
from vishwamai_mp.model import VishwamAIModel, build_model
from vishwamai_mp.runtime import Runtime

KEYS, VALUES, NOISE = 32, 32, 16  # token ids: keys, then values, then noise
CHANCE = 1 / VALUES
ROWS = 16  # of a training step


@dataclass(frozen=True)
class Examples:
    """Rows of a task.

    Attributes:
        tokens: (R, T) int64.
        labels: (R, T); what is asked where `asked`.
        asked: (R, T) bool.
        documents: (R, T) document ids, or None.
    """

    tokens: Tensor
    labels: Tensor
    asked: Tensor
    documents: Tensor | None = None


Task = Callable[[int, torch.Generator], Examples]


def associative_recall(pairs: int = 8, gap: int = 32) -> Task:
    """Multi-query associative recall (arXiv 2312.04927): `pairs` bindings, `gap` tokens of noise, all keys asked."""

    def make(rows: int, generator: torch.Generator) -> Examples:
        keys, values = _keys(rows, pairs, generator), _values(rows, pairs, generator)
        order = _shuffled(rows, pairs, generator)
        return _ask(torch.cat((_interleave(keys, values), _noise(rows, gap, generator)), 1), keys, values, order)

    return make


def overwrite_recall(pairs: int = 4, gap: int = 32) -> Task:
    """As `associative_recall`, but every key is bound twice, to different values: the later one is asked."""

    def make(rows: int, generator: torch.Generator) -> Examples:
        keys, first = _keys(rows, pairs, generator), _values(rows, pairs, generator)
        shift = torch.randint(1, VALUES, first.shape, generator=generator)
        second = KEYS + (first - KEYS + shift) % VALUES
        again = _shuffled(rows, pairs, generator)
        bound = torch.cat((_interleave(keys, first), _interleave(keys.gather(1, again), second.gather(1, again))), 1)
        order = _shuffled(rows, pairs, generator)
        return _ask(torch.cat((bound, _noise(rows, gap, generator)), 1), keys, second, order)

    return make


def leak(pairs: int = 8, gap: int = 32) -> Task:
    """`associative_recall` where the bindings belong to another packed document than the questions: none may answer."""
    recall = associative_recall(pairs, gap)

    def make(rows: int, generator: torch.Generator) -> Examples:
        examples = recall(rows, generator)
        documents = torch.zeros_like(examples.tokens, dtype=torch.int32)
        documents[:, 2 * pairs :] = 1
        return Examples(examples.tokens, examples.labels, examples.asked, documents)

    return make


def passkey(length: int, digits: int = 4) -> Task:
    """`digits` bindings side by side at a random depth of `length` tokens of noise; all asked at the end."""

    def make(rows: int, generator: torch.Generator) -> Examples:
        keys, values = _keys(rows, digits, generator), _values(rows, digits, generator)
        hay = _noise(rows, length - 2 * digits, generator)
        room = hay.shape[1] - 2 * digits
        place = torch.randint(0, room // 2, (rows, 1), generator=generator) + torch.arange(2 * digits)
        hay.scatter_(1, place, _interleave(keys, values))
        return _ask(hay, keys, values, torch.arange(digits).expand(rows, -1))

    return make


def _keys(rows: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(rows, KEYS, generator=generator).argsort(1)[:, :count]


def _values(rows: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(KEYS, KEYS + VALUES, (rows, count), generator=generator)


def _noise(rows: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(KEYS + VALUES, KEYS + VALUES + NOISE, (rows, count), generator=generator)


def _shuffled(rows: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(rows, count, generator=generator).argsort(1)


def _interleave(first: Tensor, second: Tensor) -> Tensor:
    return torch.stack((first, second), -1).flatten(1)


def _ask(context: Tensor, keys: Tensor, values: Tensor, order: Tensor) -> Examples:
    """`context`, then each key followed by its value; what is asked is the token after the key."""
    questions = _interleave(keys.gather(1, order), values.gather(1, order))
    tokens = torch.cat((context, questions), 1)
    asked = torch.zeros_like(tokens, dtype=torch.bool)
    asked[:, context.shape[1] :: 2] = True
    return Examples(tokens, tokens.roll(-1, 1), asked)


SMALL: dict[str, Any] = {
    "model": {
        "hidden_size": 64,
        "num_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "vocab_size": KEYS + VALUES + NOISE,
        "max_position_embeddings": 4096,
        "sliding_window": 8,
        "initializer_range": 0.12,
    },
    "precision": "fp32",
    "training": {"threads": 1},
}


def configure(overrides: Sequence[str] = ()) -> PretrainConfig:
    """The small two-layer model that sees 8 tokens, changed by `section.key=value`."""
    return resolve(load_config(SMALL, overrides), 1)


def train(
    config: PretrainConfig,
    runtime: Runtime,
    task: Task,
    steps: int,
    seed: int,
    rows: int = ROWS,
    learning_rate: float = 3e-3,
    report: Callable[[int, float], None] | None = None,
) -> VishwamAIModel:
    """A model trained on fresh rows of `task` at every step: AdamW, warm-up over a tenth, then a cosine to zero.

    Args:
        config: of the model; `training.seed` does not matter, `seed` does.
        runtime: of this one process.
        report: called with the step and its loss.
    """
    from dataclasses import replace

    config = replace(config, training=replace(config.training, seed=seed))
    (model,) = build_model(config, runtime)
    model.train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate * _schedule(step, steps)
        examples = task(rows, generator)
        losses = model(examples.tokens, labels=examples.labels, document_ids=examples.documents)
        loss = losses[examples.asked].mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if report:
            report(step, loss.item())
    return model


def _schedule(step: int, steps: int) -> float:
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def accuracy(model: VishwamAIModel, task: Task, rows: int = 256, batch: int = 32, whole: bool = False) -> float:
    """The share of right answers (`whole`: of rows with all answers right) on `rows` that training does not see."""
    model.eval()
    generator = torch.Generator().manual_seed(987_654_321)
    right = []
    for _ in itertools.repeat(None, math.ceil(rows / batch)):
        examples = task(batch, generator)
        logits = model(examples.tokens, document_ids=examples.documents).transpose(0, 1)
        hits = (logits[..., : KEYS + VALUES + NOISE].argmax(-1) == examples.labels)[examples.asked].view(batch, -1)
        right.append(hits.all(1).float() if whole else hits.float().mean(1))
    return torch.cat(right).mean().item()
