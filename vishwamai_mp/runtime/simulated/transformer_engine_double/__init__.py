"""A double of what Transformer Engine compiles: its own Python runs on it, forward and backward.

Each function of `transformer_engine_torch` that our layers reach gives tensors of the shapes, types and device that the
real one gives, and is one kernel to whoever counts, with the FLOPs of its products. A function that is not doubled
raises an error that names it. Not counted are the workspaces that cuDNN and the norms ask for while they run; cuBLAS's
is Transformer Engine's own tensor, and is.

Its Python is found as `runtime.fused_layers` says. Shapes and arguments are those of version 2.20.
"""

import sys
from pathlib import Path

from vishwamai_mp.runtime import fused_layers


def install() -> bool:
    """Put the double in place for the rest of this process, which from then on can only simulate.

    Must run before the first import of `megatron.core`, which looks for Transformer Engine at import.

    Returns:
        whether Transformer Engine's Python is there; without it nothing happens.
    """
    folder = fused_layers.python_folder()
    if folder is None:
        return False
    if not fused_layers.is_doubled():
        _install(folder)
    return True


def _install(folder: Path) -> None:
    assert "megatron.core" not in sys.modules, "the double of Transformer Engine comes before megatron.core"
    from vishwamai_mp.runtime.simulated.registration import register
    from vishwamai_mp.runtime.simulated.transformer_engine_double.extension import extension
    from vishwamai_mp.runtime.simulated.transformer_engine_double.imports import import_python

    register()
    sys.path.insert(0, str(folder))
    import_python(extension())
    fused_layers.use_double()
