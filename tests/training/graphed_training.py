"""Training steps whose layers are graphs, on a CPU: the graphs are those of `graphs_by_repeating`."""

from unittest import mock

from tests.runtime.graphs_by_repeating import Repeating
from tests.training import layouts
from vishwamai_mp.runtime import layer_graphs
from vishwamai_mp.training import graphed_layers, step


def train(overrides: list[str], steps: int = 4) -> tuple[list[tuple[float, float]], set[tuple[int, int]], int]:
    """What `layouts.train` tells; how often each graph was replayed, forward and backward; and how many there were."""
    made: list[layer_graphs.LayerGraphs] = []

    def graph_layers(_: object, chunks: list) -> list[layer_graphs.LayerGraphs]:
        made.extend(graphed_layers.graphs_of(chunks))
        return made

    with (
        mock.patch.object(step, "graph_layers", graph_layers),
        mock.patch.object(layer_graphs.torch, "get_device_module", return_value=Repeating),
    ):
        curve = layouts.train(overrides, steps)
    captured = [one for graphs in made for layer in graphs.layers for one in layer.captured]
    return curve, {(one.forward.replays, one.backward.replays) for one in captured}, len(captured)
