"""Granite 3 without experts: a Llama with multipliers of its embedding, scores, residual stream and logits."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from vishwamai_mp.config import ModelConfig, UserError
from vishwamai_mp.conversion.families.family import Family, Key
from vishwamai_mp.conversion.value_kinds import NUMBER, check_kinds


def _one_if_unsaid(multiplier: float | None) -> float:
    return 1.0 if multiplier is None else multiplier


def _reciprocal(multiplier: float | None) -> float:
    """To 15 digits, so that what was read is written again."""
    return float(f"{1 / _one_if_unsaid(multiplier):.15g}")


class Granite(Family):
    """See the module. `config.json` says what logits are divided by."""

    architecture = "GraniteForCausalLM"
    model_type = "granite"
    title = "Granite 3"
    keys: ClassVar[tuple[Key, ...]] = (
        *(Key(name, name, write=_one_if_unsaid) for name in ("embedding_multiplier", "residual_multiplier")),
        Key("attention_multiplier", "attention_multiplier"),
        Key("logits_scaling", "logit_multiplier", lambda scaling: 1 / scaling, _reciprocal),
    )
    defaults = {key.theirs: 1.0 for key in keys}
    written = {"attention_bias": False, "mlp_bias": False}

    @classmethod
    def read(cls, config: Mapping[str, Any], path: Path) -> dict[str, Any]:
        """As all families; refuses what cannot be divided by."""
        check_kinds(config, {"logits_scaling": NUMBER}, path)
        if (scaling := config.get("logits_scaling", 1)) is None or scaling <= 0:
            raise UserError(f"{path}: logits_scaling={scaling} is no number above 0")
        return super().read(config, path)

    @classmethod
    def write(cls, model: ModelConfig) -> dict[str, Any]:
        """Scores are always multiplied by a number that `config.json` says."""
        assert model.head_dim is not None
        return {**super().write(model), "attention_multiplier": model.attention_multiplier or model.head_dim**-0.5}
