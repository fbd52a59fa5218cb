"""What a tree of thoughts is outside a model: its configuration and the value head's parameters, in a folder."""

from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from vishwamai_mp.components.standalone import read_section, read_weights, write_component
from vishwamai_mp.config import TreeConfig, UserError


class KeepsValues:
    """Values of hidden states, saving and loading, for `TreeOfThoughts`.

    Attributes:
        values: `weight` (D,) and `bias` (1,) to begin with; None: zeros. A model that searches has a head of its own.
    """

    config: TreeConfig
    values: dict[str, Tensor] | None = None

    @torch.no_grad()
    def __call__(self, hidden: Tensor) -> Tensor:
        """Values of hidden states (…, D), fp32 (…): a probability, one half before anything is learnt."""
        head = self._head() or {"weight": hidden.new_zeros(hidden.shape[-1]), "bias": hidden.new_zeros(1)}
        weight, bias = (head[name].float().to(hidden.device) for name in ("weight", "bias"))
        return (hidden.float() @ weight + bias).sigmoid()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json`, and the value head's parameters where there are some, to `model.safetensors`.

        Raises:
            UserError: the folder cannot be written.
        """
        write_component(folder, self.config, self._head() or {})

    @classmethod
    def from_pretrained(cls, folder: str | Path, model: Any, **options: Any) -> Self:
        """What `save_pretrained` wrote, around a model.

        Args:
            folder: it.
            model: as the constructor takes it, `options` too.

        Raises:
            UserError: the folder has none, or is damaged.
        """
        tree = cls(model, read_section(folder, "tree"), **options)  # type: ignore[call-arg]
        weights = read_weights(folder)
        if weights and weights.keys() != {"weight", "bias"}:
            raise UserError(f"{folder} has {', '.join(weights)}, not the weight and bias of a value head")
        tree.values = weights or None
        return tree

    def _head(self) -> dict[str, Tensor] | None:
        engine = getattr(self, "engine", None)
        head = engine.model.value_head if engine else None
        return dict(head.named_parameters()) if head is not None else self.values
