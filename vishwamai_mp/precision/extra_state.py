"""What Transformer Engine's layers remember between steps, as plain tensors in checkpoints.

They would hand over a pickle, `_extra_state`, and unpickle whatever a checkpoint holds under that name. Here delayed
scaling's histories and scales are stored under the names and in the form of the emulation (`delayed.py`), so that a run
goes on with them on a GPU and on a CPU; and no layer takes a pickle.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vishwamai_mp.config import UserError
from vishwamai_mp.config.resolve_fp8 import SCALING_STATE

# Each direction's quantizers: input, weight and output; gradients of output and input. Of the last of each nothing is
# rounded, and nothing kept; the others are `delayed.ROLES` in order.
_KEPT = (("scaling_fwd", slice(0, 2)), ("scaling_bwd", slice(0, 1)))


def refuse_pickles(model: nn.Module) -> None:
    """Let no layer pickle its state, as Transformer Engine's would, or unpickle what it is given."""
    for name, part in model.named_modules():
        if type(part).set_extra_state is not nn.Module.set_extra_state:
            part.get_extra_state = _no_extra_state
            part.set_extra_state = partial(_refuse, name)


def _no_extra_state() -> None:
    """There is none."""


def _refuse(name: str, state: Any) -> None:
    if state is not None and not (isinstance(state, Tensor) and state.numel() == 0):
        raise UserError(
            f"{name}._extra_state: Transformer Engine's pickled state is not read, for a pickle can run code; leave it"
            " out, and scaling factors form anew"
        )


def keep_scaling(linears: Sequence[Any], recipe: Any) -> None:
    """Give linear layers of Transformer Engine the state of delayed scaling, and put it into their state dicts.

    Args:
        linears: that compute in FP8.
        recipe: Transformer Engine's `DelayedScaling`.
    """
    for linear in linears:
        linear.fp8_meta |= {"recipe": recipe, "num_gemms": 1}
        linear.init_fp8_meta_tensors(recipe)
        linear.register_state_dict_post_hook(_put)
        linear.register_load_state_dict_pre_hook(_take)


def _put(linear: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    kept = [(linear.fp8_meta[direction], columns) for direction, columns in _KEPT]
    history = torch.cat([state.amax_history[:, columns] for state, columns in kept], 1)
    scale = torch.cat([state.scale[columns] for state, columns in kept])
    state |= {prefix + name: tensor for name, tensor in zip(SCALING_STATE, (history, scale), strict=True)}


@torch.no_grad()
def _take(linear: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    history, scale = (state.pop(prefix + name, None) for name in SCALING_STATE)
    if history is None or scale is None:
        return  # of another precision; they form anew
    start = 0
    for direction, columns in _KEPT:
        own, stop = linear.fp8_meta[direction], start + columns.stop
        own.amax_history[:, columns] = history[:, start:stop]
        own.scale[columns] = scale[start:stop]
        start = stop
