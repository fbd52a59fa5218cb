"""Repeats of a run that agree bit by bit (`training.deterministic`): what torch, cuBLAS, cuDNN and NCCL are told."""

import os

import torch

from vishwamai_mp.config import ConfigError
from vishwamai_mp.runtime.device import device, is_accelerator

# Read by Transformer Engine as attention is built, by cuBLAS and NCCL at their first use. NVLS sums in the switch, in
# the order in which ranks happen to arrive.
_ENVIRONMENT = {
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NCCL_ALGO": "^NVLS",
}
_set_here: set[str] = set()  # of these, and `_TORCH`
_TORCH = "torch"  # its deterministic kernels


def set_determinism(wanted: bool) -> None:
    """Before the first kernel and communicator: from now on only kernels that repeat; or what was set so is taken back.

    What the user has set, of torch or of the environment, stays.

    Raises:
        ConfigError: that says the opposite.
    """
    if not wanted:
        _take_back()
        return
    if not torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(True)
        # Nothing here reads what was not written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        _set_here.add(_TORCH)
    if not is_accelerator(device()):
        return
    said = os.environ.get("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    if said != "0":
        raise ConfigError(
            f"training.deterministic=true with NVTE_ALLOW_NONDETERMINISTIC_ALGO={said} in the environment, which says"
            " the opposite; unset it"
        )
    missing = _ENVIRONMENT.keys() - os.environ.keys()
    os.environ.update({name: _ENVIRONMENT[name] for name in missing})
    _set_here.update(missing)


def _take_back() -> None:
    if _TORCH in _set_here:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    for name in _set_here - {_TORCH}:
        os.environ.pop(name, None)
    _set_here.clear()
