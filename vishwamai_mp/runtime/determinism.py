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
_set_here: set[str] = set()


def set_determinism(wanted: bool) -> None:
    """Before the first kernel and communicator: from now on only kernels that repeat, or all again.

    What the user has set of the environment stays.

    Raises:
        ConfigError: that says the opposite.
    """
    torch.use_deterministic_algorithms(wanted)
    # Nothing here reads what was not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if not (wanted and is_accelerator(device())):
        for name in _set_here:
            os.environ.pop(name, None)
        _set_here.clear()
        return
    said = os.environ.get("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    if said != "0":
        raise ConfigError(
            f"training.deterministic=true with NVTE_ALLOW_NONDETERMINISTIC_ALGO={said} in the environment, which says"
            " the opposite; unset it"
        )
    _set_here.update(_ENVIRONMENT.keys() - os.environ.keys())
    os.environ.update({name: _ENVIRONMENT[name] for name in _set_here})
