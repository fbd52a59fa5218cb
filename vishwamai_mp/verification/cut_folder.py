"""The first layers of a Hugging Face folder as a folder of its own, for models that memory cannot hold whole."""

import json
from pathlib import Path
from typing import Any

from vishwamai_mp.conversion import model_config, safetensors_files
from vishwamai_mp.conversion.families import Family
from vishwamai_mp.conversion.safetensors_files import Entry, Planned

_BLOCK_BYTES = 16 << 20
_NOT_OF_LAYERS = {"architectures", "bos_token_id", "eos_token_id", "pad_token_id"}


def write_first_layers(folder: Path, family: type[Family], layers: int, output: Path) -> None:
    """Write `config.json` and one file of weights; embedding, final norm and output layer stay.

    Args:
        folder: checked by `open_folder`.
        family: its.
        layers: fewer than it has.
        output: a new folder.
    """
    config = model_config.read_config(folder)
    whole = config["num_hidden_layers"]
    shortened = {key: _shortened(key, value, whole, layers) for key, value in config.items()}
    entries = [entry for name, entry in safetensors_files.read_folder(folder).items() if _layer(name, family) < layers]
    output.mkdir(parents=True)
    (output / "config.json").write_text(
        json.dumps({**shortened, "num_hidden_layers": layers}, indent=2), encoding="utf-8"
    )
    with (output / safetensors_files.SINGLE).open("wb") as file:
        file.write(safetensors_files.header_of([Planned(entry.name, entry.tag, entry.shape) for entry in entries]))
        for entry in entries:
            _copy(entry, file)


def _shortened(key: str, value: Any, whole: int, layers: int) -> Any:
    """A list that says something of each layer, of the first ones alone; any other value itself."""
    is_of_layers = isinstance(value, list) and len(value) == whole and key not in _NOT_OF_LAYERS
    return value[:layers] if is_of_layers else value


def _layer(name: str, family: type[Family]) -> int:
    """The number of the layer that a tensor belongs to; −1: none."""
    prefix = family.weights.layer.partition("{}")[0]
    number = name.removeprefix(prefix).partition(".")[0]
    return int(number) if name.startswith(prefix) and number.isdecimal() else -1


def _copy(entry: Entry, file: Any) -> None:
    with entry.path.open("rb") as source:
        source.seek(entry.start)
        for start in range(0, entry.size, _BLOCK_BYTES):
            file.write(source.read(min(_BLOCK_BYTES, entry.size - start)))
