"""OLMo 3: an OLMo 2, three of whose four layers attend within a window."""

from vishwamai_mp.conversion.families.family import Family
from vishwamai_mp.conversion.families.olmo2 import Olmo2


class Olmo3(Family):
    """See the module."""

    architecture = "Olmo3ForCausalLM"
    model_type = "olmo3"
    title = "OLMo 3"
    has = Olmo2.has
    defaults = {**Olmo2.defaults, "sliding_window": 4096}
    default_pattern = "SSSF"
    rotary_by_type = dict.fromkeys(("full_attention", "sliding_attention"), ("rope_theta", 500000.0))
    written = Olmo2.written
    weights = Olmo2.weights
