"""Our own architecture: a Mistral whose layers may carry memories and caches; code beside its weights computes it."""

from vishwamai_mp.conversion.components import ARCHITECTURE, KEYS, MODEL_TYPE
from vishwamai_mp.conversion.families.mistral import Mistral


class WithComponents(Mistral):
    """See the module. `conversion.components` says the rest: what its layers carry, and the code."""

    architecture = ARCHITECTURE
    model_type = MODEL_TYPE
    title = "VishwamAI"
    neutral = frozenset(KEYS)
