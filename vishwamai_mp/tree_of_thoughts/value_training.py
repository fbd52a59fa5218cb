"""The value head fitted to verdicts on rollouts, on hidden states as they are.

Shapes: N judged tokens of the rollouts, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from vishwamai_mp.config import UserError
from vishwamai_mp.inference import Engine
from vishwamai_mp.inference.blocks import KvSequence
from vishwamai_mp.tree_of_thoughts.rollouts import Rollout

_BATCH = 64  # rollouts read at once


@dataclass(frozen=True)
class ValueReport:
    """Of the rollouts that were held out: cross-entropy in nats, mean value − share solved, and the share of pairs of
    a solved and an unsolved token whose values are in the right order (0.5 is chance)."""

    loss: float
    calibration: float
    auc: float


def fit_value_head(
    engine: Engine, rollouts: Sequence[Rollout], held_out: float = 0.2, weight_decay: float = 1e-3
) -> ValueReport:
    """Fit w and b by binary cross-entropy on verdicts; the layers below stay as they are.

    Where hidden states do not tell how texts will turn out, train the layers on `rollout_rows` as well
    (`tree.value_signal=verdicts tree.value_gradient=true`).

    The loss is convex, so it is minimised to the end (L-BFGS). All ranks of a replica call this and get the report.

    Args:
        engine: of a model with a value head.
        rollouts: the last `held_out` share of them is for the report.
        weight_decay: factor of ‖w‖²/2, where hidden states are scaled to unit variance.

    Raises:
        UserError: no value head, or all verdicts are the same.
    """
    if not engine.config.tree.enabled:
        raise UserError("the model has no value head; build it with tree.enabled=true")
    verdicts = [float(solved) for rollout in rollouts for solved in rollout.verdicts.values()]
    if len(set(verdicts)) < 2:
        raise UserError("all rollouts have the same verdict; there is nothing to learn from them")
    first_held_out = round(len(rollouts) * (1 - held_out))
    hidden = _read(engine, rollouts)
    labels = torch.tensor(verdicts, device=engine.runtime.device)
    split = sum(len(rollout.verdicts) for rollout in rollouts[:first_held_out])
    report = torch.zeros(3, dtype=torch.float64, device=engine.runtime.device)
    head = engine.model.value_head
    if hidden is not None and head is not None:
        weight, bias = _logistic_regression(hidden[:split], labels[:split], weight_decay)
        with torch.no_grad():
            head.weight.copy_(weight)
            head.bias.copy_(bias)
        report = _report(hidden[split:] @ weight + bias, labels[split:])
    group = engine.runtime.groups.pp
    if group.size() > 1:
        last = torch.distributed.get_global_rank(group, group.size() - 1)
        torch.distributed.broadcast(report, last, group=group)
    return ValueReport(*report.tolist())


def _read(engine: Engine, rollouts: Sequence[Rollout]) -> Tensor | None:
    """Hidden states of all judged tokens, (N, D) fp32; None where this is not the last stage."""
    parts = []
    for start in range(0, len(rollouts), _BATCH):
        batch = rollouts[start : start + _BATCH]
        sequences = [KvSequence() for _ in batch]
        work = [(s, r.tokens) for s, r in zip(sequences, batch, strict=True)]
        output = engine.run(work, every_token=True, logits=False)
        for sequence in sequences:
            engine.release(sequence)
        if output.hidden is not None:
            firsts = accumulate((len(rollout.tokens) for rollout in batch), initial=0)
            rows = [first + place for first, rollout in zip(firsts, batch, strict=False) for place in rollout.verdicts]
            parts.append(output.hidden[rows].float())
    return torch.cat(parts).clone() if parts else None  # a clone made here is an ordinary tensor


def _logistic_regression(hidden_ND: Tensor, labels_N: Tensor, weight_decay: float) -> tuple[Tensor, Tensor]:
    scale = hidden_ND.std(0).clamp_min(1e-6)
    scaled = hidden_ND / scale
    weight = torch.zeros(hidden_ND.shape[1], device=hidden_ND.device, requires_grad=True)
    bias = torch.zeros(1, device=hidden_ND.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(scaled @ weight + bias, labels_N)
        value = value + weight_decay / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return (weight / scale).detach(), bias.detach()


def _report(logits: Tensor, labels: Tensor) -> Tensor:
    loss = F.binary_cross_entropy_with_logits(logits, labels)
    solved, unsolved = logits[labels == 1], logits[labels == 0]
    ordered = (solved[:, None] > unsolved).double() + 0.5 * (solved[:, None] == unsolved)
    return torch.stack((loss.double(), (logits.sigmoid() - labels).mean().double(), ordered.mean()))
