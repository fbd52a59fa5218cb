"""Memory of a rank under fully sharded data parallelism: which of five moments of a step needs most."""

from vishwamai_mp.config import PretrainConfig, data_parallel_size, micro_batches_per_step, padded_vocab_size
from vishwamai_mp.planning.activations import StageActivations, number_bytes, recomputed_layers
from vishwamai_mp.planning.parameters import embedding_parameters, layer_parameters
from vishwamai_mp.planning.states import GRADIENT, MAIN, gradient_bytes, moments_on_device, stage_parameters


def shares_parameters(config: PretrainConfig, world_size: int) -> bool:
    """Whether there are other replicas to share parameters with, and they do."""
    return config.parallel.fully_sharded and data_parallel_size(config, world_size) > 1


def fully_sharded_parts(config: PretrainConfig, world_size: int, activations: StageActivations) -> dict[str, float]:
    """Bytes by purpose at the moment that needs most, as `footprint.Footprint` names them.

    Own shares of weights and moments are always there; those of gradients from the first micro-batch's backward pass
    on. Embedding, output layer and last norm are whole from the first to the last moment of a pass, in the type that
    computes; so are one layer while it runs, and the next that is fetched meanwhile. Gradients are summed in fp32.

    Args:
        config: resolved; only data parallel.
        world_size: processes.
        activations: of the only stage.
    """
    replicas, size = data_parallel_size(config, world_size), number_bytes(config)
    layer = layer_parameters(config.model)
    root = embedding_parameters(config.model, padded_vocab_size(config)) + config.model.hidden_size
    table = padded_vocab_size(config) * config.model.hidden_size
    share = stage_parameters(config, 0) / replicas
    before = share if micro_batches_per_step(config, world_size) > 1 else 0.0  # summed in earlier micro-batches
    layers = config.model.num_layers
    recomputed = recomputed_layers(config, layers) or layers
    sent = gradient_bytes(config)
    one_layer = size * (root + table + 3 * layer) + sent * layer
    left = activations.kept - activations.passed
    moments = [
        # The logits' gradient, with the last layer fetched.
        (before, size * (root + layer), activations.kept + activations.head),
        # The last layer's backward pass, with the output layer's gradient waiting for the embedding's; of its own
        # gradients half, at the most, are there with what its MLP needs.
        (before, one_layer - size * layer, activations.kept + activations.again),
        # Where some layers are recomputed, that of the last of them.
        (max(before, (layers - recomputed) * layer / replicas), one_layer, left + activations.remade),
        # The second layer's, when gradients have come for what went: recomputed layers keep less than those take.
        (
            max(before, max(layers - 2, 0) * layer / replicas),
            one_layer,
            min(2 / recomputed, 1) * left + activations.remade,
        ),
        # The gradients of embedding and output layer are summed: in their type, and in what they are sent in.
        (share, (2 * size + sent) * root, 0.0),
    ]
    summed, gathered, kept = max(moments, key=lambda moment: GRADIENT * moment[0] + moment[1] + moment[2])
    return {
        "weights": MAIN * share,
        "gradients": GRADIENT * summed,
        "optimizer": moments_on_device(config) * share,
        "gathered weights": gathered,
        "activations": kept,
    }
