"""What goes when the cache is full: for each head the segments of least importance × use.

Shapes: G rows × heads (local), n segments of L latents.
"""

import torch
from torch import Tensor


def worth(bias_GNL: Tensor, access_GN: Tensor) -> Tensor:
    """Mean importance σ of a segment's latents × (1 + the weight that all queries so far gave them). (G, n).

    The 1 is for the write: what is new is not worthless before it could be read. Of segments that are none (log σ of
    −∞) the worth is −1.
    """
    value = bias_GNL.exp().mean(-1) * (1 + access_GN)
    return torch.where(bias_GNL[..., 0] == -torch.inf, -1, value)


def survivors(worth_GN: Tensor, count: int) -> Tensor:
    """The `count` segments of most worth, in the order in which they were written. (G, count)."""
    return worth_GN.topk(count, dim=1).indices.sort(1).values


def take(tensor: Tensor, index_GM: Tensor) -> Tensor:
    """Places of each group: (G, n, …) → (G, m, …)."""
    return tensor[torch.arange(index_GM.shape[0], device=index_GM.device)[:, None], index_GM]
