"""The value head: how well will the text go on from here? d + 1 parameters on the last stage.

Shapes: B batch, T tokens of the sequence, Q tokens of this context parallel rank, S = Q, or this tensor parallel rank's
share of them under sequence parallelism, D width.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from vishwamai_mp.config import TreeConfig
from vishwamai_mp.runtime.measures import Measures
from vishwamai_mp.runtime.zigzag import local_positions

_PAIRED = 1024  # marked tokens of a micro-batch, at most, whose pairs `value_auc` compares


class ValueHead(MegatronModule):
    """σ(w · h + b), in fp32.

    The loss is the binary cross-entropy to a target, which `tree.value_signal` names:

    - `likelihood`, for pretraining: where a document or a reasoning step begins, exp(−mean cross-entropy of the next
      `tree.max_thought_tokens` tokens), the probability per token, which lies between 0 and 1.
    - `verdicts`, for fine-tuning: where the data say whether the text up to a token leads to a solution, 1 or 0.

    Args:
        tree: resolved.
        megatron: megatron-core's configuration.
        groups: process groups.
    """

    def __init__(self, tree: TreeConfig, megatron: TransformerConfig, groups: ProcessGroupCollection) -> None:
        super().__init__(config=megatron)
        self.tree, self.groups = tree, groups
        self.weight = torch.nn.Parameter(torch.zeros(megatron.hidden_size, dtype=megatron.params_dtype))
        self.bias = torch.nn.Parameter(torch.zeros(1, dtype=megatron.params_dtype))
        for parameter in (self.weight, self.bias):  # each rank sees a part of the sequence then
            parameter.sequence_parallel = megatron.sequence_parallel  # type: ignore[attr-defined]
        # Cross-entropy per marked token; mean value − mean target; share of pairs of marked tokens (the first
        # `_PAIRED` of a rank's micro-batch) in the right order.
        self.measures = Measures("value_loss", "value_cross_entropy", "value_calibration", "value_auc")

    def forward(self, hidden: Tensor) -> Tensor:
        """Values of hidden states (…, D): fp32 (…)."""
        return self._logits(hidden).sigmoid()

    def add_loss(
        self,
        losses_BQ: Tensor,
        hidden_SBD: Tensor,
        tokens_BT: Tensor,
        documents_BT: Tensor | None,
        verdicts_BT: Tensor | None = None,
    ) -> Tensor:
        """`losses_BQ` with the value loss attached to its gradient. For training steps only: it counts measures.

        Args:
            losses_BQ: cross-entropy of each token's successor.
            hidden_SBD: what the logits come from.
            tokens_BT: ids.
            documents_BT: document ids, or None.
            verdicts_BT: 1, 0, or NaN where none is known; for the signal `verdicts`.
        """
        length = tokens_BT.shape[1]
        if self.tree.value_signal == "verdicts":
            assert verdicts_BT is not None, "config.resolve asks for rows that have them"
            marked, targets = ~verdicts_BT.isnan(), verdicts_BT.nan_to_num()
        else:
            targets = self._likelihood(losses_BQ.detach(), documents_BT, length)
            marked = marked_tokens(tokens_BT, documents_BT, self.tree.step_token)
        mine = self._positions(length, hidden_SBD.shape[0], tokens_BT.device)
        marked, targets = marked[:, mine], targets[:, mine]
        hidden = hidden_SBD if self.tree.value_gradient else hidden_SBD.detach()
        logits = self._logits(hidden).transpose(0, 1)
        entropy = (F.binary_cross_entropy_with_logits(logits, targets, reduction="none") * marked).sum()
        self._measure(logits.detach().sigmoid(), targets, marked, entropy)
        return self.measures.attach_loss(losses_BQ, self.tree.value_loss_weight * entropy)

    def _logits(self, hidden: Tensor) -> Tensor:
        return hidden.float() @ self.weight.float() + self.bias.float()

    def _positions(self, length: int, count: int, device: torch.device) -> Tensor:
        """Places in the sequence of this rank's hidden states, (S,)."""
        cp, tp = self.groups.cp, self.groups.tp
        local = local_positions(length, cp.rank(), cp.size(), device)
        return local[tp.rank() * count :][:count] if self.config.sequence_parallel else local

    def _likelihood(self, losses_BQ: Tensor, documents_BT: Tensor | None, length: int) -> Tensor:
        """(B, T)."""
        cp = self.groups.cp
        losses = losses_BQ
        if cp.size() > 1:
            parts = [torch.empty_like(losses_BQ) for _ in range(cp.size())]
            dist.all_gather(parts, losses_BQ.contiguous(), group=cp)
            order = torch.cat([local_positions(length, rank, cp.size(), losses_BQ.device) for rank in range(cp.size())])
            losses = torch.empty(losses_BQ.shape[0], length, device=losses_BQ.device)
            losses[:, order] = torch.cat(parts, 1)
        return probability_per_token(losses, documents_BT, self.tree.max_thought_tokens)

    def _measure(self, values: Tensor, targets: Tensor, marked: Tensor, entropy: Tensor) -> None:
        """`marked` tells which of (B, S) count. Under tensor parallelism without sequence parallelism, every rank adds
        the same, which leaves a mean as it is."""
        count = marked.sum()
        self.measures.add("value_loss", self.tree.value_loss_weight * entropy, marked.numel())
        self.measures.add("value_cross_entropy", entropy, count)
        self.measures.add("value_calibration", ((values - targets) * marked).sum(), count)
        # Which tokens those are only the device knows: as many as there can be, the marked ones first.
        first = marked.flatten().logical_not().argsort(stable=True)[:_PAIRED]
        value, target, counts = (x.flatten()[first] for x in (values, targets, marked))
        above = (target[:, None] > target) & counts[:, None] & counts
        ordered = (value[:, None] > value).float() + 0.5 * (value[:, None] == value)
        self.measures.add("value_auc", (ordered * above).sum(), above.sum())


def marked_tokens(tokens_BT: Tensor, documents_BT: Tensor | None, step_token: int | None) -> Tensor:
    """Where values are learnt: first tokens of rows and documents, and step tokens. bool (B, T)."""
    marked = torch.zeros_like(tokens_BT, dtype=torch.bool) if step_token is None else tokens_BT == step_token
    marked[:, 0] = True
    if documents_BT is not None:
        marked[:, 1:] |= documents_BT[:, 1:] != documents_BT[:, :-1]
    return marked


def probability_per_token(losses_BT: Tensor, documents_BT: Tensor | None, horizon: int) -> Tensor:
    """exp(−mean of the losses from each token on: `horizon` of them, or up to its document's end). (B, T)"""
    rows, length = losses_BT.shape
    places = torch.arange(length, device=losses_BT.device)
    end = torch.full((rows, length), length, device=losses_BT.device)
    if documents_BT is not None:
        begins = torch.where(documents_BT[:, 1:] != documents_BT[:, :-1], places[1:], length)
        end[:, :-1] = begins.flip(1).cummin(1)[0].flip(1)
    end = torch.minimum(end, places + horizon)
    sums = F.pad(losses_BT.double().cumsum(1), (1, 0))
    means = (sums.gather(1, end) - sums[:, :-1]) / (end - places)
    return (-means).exp().float()
