"""Fresh memories and caches for an imported model: the values that a training run with this seed would begin with."""

from pathlib import Path
from typing import Any

import vishwamai_mp.runtime  # noqa: F401  (before megatron.core)

# isort: split
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from safetensors.torch import save_file

from vishwamai_mp.config import PretrainConfig
from vishwamai_mp.config.files import written_whole
from vishwamai_mp.conversion.safetensors_files import Entry, read_header
from vishwamai_mp.model.initialization import initialize_parameters
from vishwamai_mp.model.specs import layer_spec, spec_provider
from vishwamai_mp.model.transformer_config import transformer_config
from vishwamai_mp.precision import PrecisionPolicy
from vishwamai_mp.runtime import distributed_session


def write_components(config: PretrainConfig, output: Path) -> dict[str, Entry]:
    """Make the components of all layers, one at a time, and write each to a safetensors file.

    Their output projections are zero, so the model computes what it computed without them.

    Args:
        config: resolved; its precision is that of the tensors.
        output: a folder for the files; files that are there already are kept.

    Returns:
        the tensors under Hugging Face's names.
    """
    output.mkdir(parents=True, exist_ok=True)
    entries: dict[str, Entry] = {}
    classes = spec_provider(PrecisionPolicy.of_run(config))
    with distributed_session(config) as runtime:
        for layer in range(config.model.num_layers):
            for name, make in layer_spec(classes, config, layer).params["components"].items():
                path = output / f"{layer}.{name}.safetensors"
                if not path.exists():
                    component = make(transformer_config(config), runtime.groups, layer + 1)
                    _write(_Placed(component, f"decoder.layers.{layer}.{name}."), config, path)
                entries |= read_header(path)
    return entries


class _Placed:
    """A component that knows its name in the whole model, as far as initialisation asks."""

    def __init__(self, component: Any, prefix: str) -> None:
        self._component, self._prefix = component, prefix

    def sharded_state_dict(self) -> dict[str, Any]:
        return self._component.sharded_state_dict(self._prefix)


def _write(component: _Placed, config: PretrainConfig, path: Path) -> None:
    initialize_parameters(component, config.model, config.training.seed)  # type: ignore[arg-type]
    tensors = {
        "model" + shard.key.removeprefix("decoder"): shard.data.detach()
        for shard in component.sharded_state_dict().values()
        if isinstance(shard, ShardedTensor)
    }
    with written_whole(path) as aside:
        save_file(tensors, aside)
