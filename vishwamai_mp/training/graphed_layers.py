"""Which layers are captured as CUDA graphs (`training.cuda_graphs`)."""

from collections.abc import Sequence
from typing import Any

from vishwamai_mp.config import PretrainConfig
from vishwamai_mp.config.check_cuda_graphs import layers_outside_graphs
from vishwamai_mp.runtime.layer_graphs import LayerGraphs


def graph_layers(config: PretrainConfig, chunks: Sequence[Any]) -> list[LayerGraphs]:
    """Graphs of layers, if they are asked for.

    Args:
        config: resolved.
        chunks: of this rank, as `wrap_data_parallel` has them.
    """
    return graphs_of(chunks) if config.training.cuda_graphs else []


def graphs_of(chunks: Sequence[Any]) -> list[LayerGraphs]:
    """Of the layers without memory and cache: those hold state, and the host decides in them."""
    found = []
    for chunk in chunks:
        layers = chunk.module.decoder.layers
        plain = [not layer.component_names for layer in layers]
        if any(plain):
            found.append(LayerGraphs(chunk, layers, plain))
    return found


def note_on_graphs(config: PretrainConfig) -> str | None:
    """A line on layers that are launched kernel by kernel though graphs are asked for; None: there are none."""
    outside = layers_outside_graphs(config) if config.training.cuda_graphs else []
    if not outside:
        return None
    return f"training.cuda_graphs leaves out layers with memory or cache: {', '.join(map(str, outside))}"
