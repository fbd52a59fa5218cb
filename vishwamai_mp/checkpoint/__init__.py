"""Sharded checkpoints: saved whole or not at all, loaded into any layout.

`CheckpointManager` saves and loads inside a job. What only looks at folders (`find_checkpoint`, `locate`,
`read_manifest`, `check_files`) needs neither torch nor a process group.
"""

from typing import TYPE_CHECKING, Any

from vishwamai_mp.checkpoint.manifest import Manifest, check_files, read_manifest
from vishwamai_mp.checkpoint.store import Found, find_checkpoint, locate

if TYPE_CHECKING:
    from vishwamai_mp.checkpoint.manager import CheckpointManager

__all__ = ["CheckpointManager", "Found", "Manifest", "check_files", "find_checkpoint", "locate", "read_manifest"]


def __getattr__(name: str) -> Any:
    """Import the manager, and with it megatron-core, when first asked for: `inspect_checkpoint` starts without."""
    if name != "CheckpointManager":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vishwamai_mp.checkpoint.manager import CheckpointManager

    return CheckpointManager
