"""`training.loss=examples.extensions.focal_loss:focal_loss`: what is known already weighs less (arXiv 1708.02002).

It stands on the loss that it replaces, which knows vocabulary-parallel logits, and so does nothing about layouts.
"""

import torch.distributed as dist
from torch import Tensor

from vishwamai_mp.model.loss import vocab_parallel_cross_entropy

GAMMA = 1.0


def focal_loss(logits_TBV: Tensor, targets_TB: Tensor, vocab_size: int, group: dist.ProcessGroup) -> Tensor:
    """(1 − p)^γ · −log p of each token, p being what the model gives to the target: (T, B), fp32.

    Args:
        logits_TBV: this rank's part of the vocabulary.
        targets_TB: token ids.
        vocab_size: real tokens, without padding.
        group: the ranks that hold the other parts.
    """
    surprise = vocab_parallel_cross_entropy(logits_TBV, targets_TB, vocab_size, group)
    return (-(-surprise).expm1()).pow(GAMMA) * surprise
