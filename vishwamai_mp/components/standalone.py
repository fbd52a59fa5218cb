"""A component outside a model: in one process without process groups, and in a folder of its own.

A folder has `config.json`, the component's section of the configuration, and `model.safetensors`, its parameters under
the names that they have in a layer.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from vishwamai_mp.components.head_sharded import Linears
from vishwamai_mp.config import (
    CacheConfig,
    ConfigError,
    MemoryConfig,
    ModelConfig,
    UserError,
    load_config,
    resolve,
)
from vishwamai_mp.config.files import write_whole
from vishwamai_mp.config.json_text import parse_json

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_Section = TypeVar("_Section", MemoryConfig, CacheConfig)


class _Alone:
    """A process group of this process only."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


class _Linear(nn.Linear):
    """With the constructor and the result of megatron-core's parallel linear layers, and a model's initial values."""

    def __init__(self, inputs: int, outputs: int, *, config: TransformerConfig, **_: Any) -> None:
        super().__init__(inputs, outputs, bias=False, dtype=config.params_dtype)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=ModelConfig().initializer_range)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(x), None


class _Norm(nn.RMSNorm):
    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)


def alone(section: str, config: _Section) -> tuple[_Section, TransformerConfig, ProcessGroupCollection, Linears]:
    """What a component is built from where no model gives it: its configuration, checked, and one process around it.

    Args:
        section: the configuration's name in a model's.
        config: which layers carry it is left to a model.

    Raises:
        ConfigError: `hidden_size` is missing, or the values cannot work.
    """
    checked = _checked(section, config)
    assert checked.hidden_size is not None
    megatron = TransformerConfig(
        num_layers=1,
        hidden_size=checked.hidden_size,
        num_attention_heads=1,
        layernorm_epsilon=ModelConfig().rms_norm_eps,
        perform_initialization=False,
        use_cpu_initialization=True,
    )
    one: Any = _Alone()
    groups = ProcessGroupCollection(tp=one, cp=one, dp_cp=one)
    return checked, megatron, groups, Linears(_Linear, _Linear, _Norm)


def _checked(section: str, config: _Section) -> _Section:
    if config.hidden_size is None:
        raise ConfigError(
            f"{section}.hidden_size is not set; outside a model nothing else says how wide hidden states are: set it"
        )
    length = getattr(config, "segment_length", 1)
    model = {"hidden_size": config.hidden_size, "num_attention_heads": 1, "head_dim": 2}
    around = {
        "model": model | {"max_position_embeddings": length},
        "training": {"sequence_length": length},
        section: asdict(replace(config, enabled=True, carry_state=False, layers=None)),
    }
    checked = getattr(resolve(load_config(around)), section)
    return replace(checked, carry_state=config.carry_state, layers=config.layers)


class Standalone:
    """Saving and loading, for the classes of components.

    A class is built from a section of the configuration, keeps it as `<section>_config`, and says which it is.
    """

    section: ClassVar[str]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the component to a folder.

        Raises:
            UserError: it is split over ranks, or the folder cannot be written.
        """
        if self.groups.tp.size() > 1:  # type: ignore[attr-defined]
            raise UserError("this component is split over tensor parallel ranks; save the model that it is part of")
        write_component(folder, getattr(self, f"{self.section}_config"), self.weights())

    def weights(self) -> dict[str, Tensor]:
        """Its parameters by name."""
        return dict(self.named_parameters())  # type: ignore[attr-defined]

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """The component that `save_pretrained` wrote, or that a pretrainer's `save_model` took out of a model.

        Raises:
            UserError: the folder has none, another one, or is damaged.
        """
        component, weights = cls(read_section(folder, cls.section)), read_weights(folder)  # type: ignore[call-arg]
        if _shapes(weights) != _shapes(component.weights()):
            raise UserError(f"{folder}/{WEIGHTS} does not have the tensors that {CONFIG} says; copy the folder again")
        component.load_state_dict(weights, strict=False)  # type: ignore[attr-defined]
        return component


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def write_component(folder: str | Path, config: Any, weights: dict[str, Tensor]) -> None:
    """Write a component's folder; each file appears only when it is whole.

    Raises:
        UserError: it cannot be written.
    """
    folder = Path(folder)
    contents = {
        WEIGHTS: save({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}),
        CONFIG: json.dumps(asdict(config), indent=2).encode() + b"\n",
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            write_whole(folder / name, content)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}); name another folder") from None


def read_section(folder: str | Path, section: str) -> Any:
    """The configuration in a component's folder.

    Raises:
        UserError: there is none, or not of this component.
    """
    path = Path(folder) / CONFIG
    try:
        return getattr(load_config({section: parse_json(path.read_text(encoding="utf-8"))}), section)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); name a folder of save_pretrained") from None
    except ConfigError as error:
        raise UserError(f"{path} is not of this component: {error}") from None
    except ValueError:
        raise UserError(f"{path} is no JSON; copy the folder again") from None


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """The parameters in a component's folder.

    Raises:
        UserError: there are none, or the file is damaged.
    """
    path = Path(folder) / WEIGHTS
    try:
        return load(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except SafetensorError:
        raise UserError(f"{path} is no whole safetensors file; copy it again") from None
