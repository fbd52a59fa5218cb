"""Model families: one file each says how a family's folders name what our configuration and checkpoints name."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vishwamai_mp.config import ModelConfig, UserError
from vishwamai_mp.config.extensions import find_extension, is_own
from vishwamai_mp.conversion.families.family import Family, Key
from vishwamai_mp.conversion.families.gemma2 import Gemma2
from vishwamai_mp.conversion.families.gemma3 import Gemma3
from vishwamai_mp.conversion.families.granite import Granite
from vishwamai_mp.conversion.families.llama import Llama
from vishwamai_mp.conversion.families.mistral import Mistral
from vishwamai_mp.conversion.families.olmo2 import Olmo2
from vishwamai_mp.conversion.families.olmo3 import Olmo3
from vishwamai_mp.conversion.families.phi3 import Phi3
from vishwamai_mp.conversion.families.qwen2 import Qwen2
from vishwamai_mp.conversion.families.qwen3 import Qwen3
from vishwamai_mp.conversion.families.smollm3 import SmolLM3
from vishwamai_mp.conversion.families.with_components import WithComponents
from vishwamai_mp.conversion.mapping import WeightNames
from vishwamai_mp.conversion.value_kinds import check_kinds

__all__ = ["Family", "Key", "WeightNames", "family_holding", "family_named", "family_of", "model_types"]

# A model is exported as the first of these that can hold it.
_FAMILIES: tuple[type[Family], ...] = (
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
    Phi3,
    Olmo2,
    Olmo3,
    Gemma2,
    Gemma3,
    Granite,
    SmolLM3,
)
_IMPORTED: tuple[type[Family], ...] = (*_FAMILIES, WithComponents)
# Why models of these architectures cannot be converted.
_NO_ROOM_FOR = {
    "GemmaForCausalLM": "gated GELU and zero-centered norms without norms of outputs",
    "Gemma3ForConditionalGeneration": "images beside its text",
    "MixtralForCausalLM": "mixture of experts",
    "CohereForCausalLM": "parallel attention and MLP",
    "OlmoForCausalLM": "norms without weights",
    "StableLmForCausalLM": "LayerNorm and partial rotary embeddings",
}


def family_of(config: Mapping[str, Any], path: Path, own: type[Family] | None = None) -> type[Family]:
    """The family of a folder's `config.json`.

    Args:
        config: what is in it.
        path: of it, for messages.
        own: a family of the user's, by which the folder is to be read.

    Raises:
        UserError: none is named, or one that cannot be converted; the nearest known is named then.
    """
    check_kinds(config, {"architectures": (list,)}, path)
    named = config.get("architectures")
    if not named:
        raise UserError(f"{path} names no architecture; expected {' or '.join(model_types())}")
    if own is not None:
        if own.architecture != named[0]:
            raise UserError(f"{path}: {named[0]} is not the {own.architecture} that --family names")
        return own
    if found := {family.architecture: family for family in _IMPORTED}.get(named[0]):
        return found
    why = f", which has {_NO_ROOM_FOR[named[0]]}" if named[0] in _NO_ROOM_FOR else ""
    short = {architecture.partition("For")[0]: architecture for architecture in model_types()}
    near = difflib.get_close_matches(named[0].partition("For")[0], list(short), n=1, cutoff=0.7)
    nearest = f" (nearest: {short[near[0]]})" if near else ""
    titles = ", ".join(family.title for family in _FAMILIES)
    raise UserError(
        f"{path}: {named[0]}{why}, cannot be converted{nearest}; {titles} can, and families of your own (--family)"
    )


def family_named(name: str) -> type[Family]:
    """A family by its architecture, or the user's own by `package.module:Name`, which is imported.

    Raises:
        UserError: there is none of that name.
    """
    if is_own(name):
        return find_extension("--family", name, Family)
    if found := {family.architecture: family for family in _FAMILIES}.get(name):
        return found
    architectures = ", ".join(family.architecture for family in _FAMILIES)
    raise UserError(f"--family {name}: use one of {architectures}, or name your own as package.module:Name")


def family_holding(model: ModelConfig, wanted: type[Family] | None = None, components: bool = False) -> type[Family]:
    """The family that a model is exported as.

    Args:
        model: resolved.
        wanted: by the user; None: the first that can hold it.
        components: whether it has a memory, cache or value head.

    Raises:
        UserError: it cannot, or none can.
    """
    if components:
        if lacking := WithComponents.lacks(model):
            raise UserError(
                f"{', '.join(lacking)} with a memory, cache or value head: the exported model's code has none; export a"
                " model without components"
            )
        return WithComponents
    if wanted is not None:
        if lacking := wanted.lacks(model):
            raise UserError(f"{wanted.architecture} cannot hold {', '.join(lacking)}; leave --family out")
        return wanted
    lacks = {family: family.lacks(model) for family in _FAMILIES}
    nearest = min(_FAMILIES, key=lambda family: len(lacks[family]))
    if not lacks[nearest]:
        return nearest
    features = [item.partition("=")[0] for item in lacks[Llama]]
    raise UserError(
        f"{' and '.join(features)}{' together' if len(features) > 1 else ''}: transformers has no such model; the"
        f" nearest is {nearest.architecture}, which cannot hold {', '.join(lacks[nearest])}"
    )


def model_types() -> dict[str, str]:
    """Of each architecture that is known here."""
    return {family.architecture: family.model_type for family in _IMPORTED}
