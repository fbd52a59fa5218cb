"""Memory of parameters, gradients and optimizer state of one rank. A test holds these formulae against built models."""

from vishwamai_mp.config import PretrainConfig, data_parallel_size, padded_vocab_size
from vishwamai_mp.planning.activations import number_bytes, stage_layers
from vishwamai_mp.planning.parameters import embedding_parameters, layer_parameters, total_parameters

# Bytes per parameter: gradients are summed in fp32; fp32 copies of 16-bit parameters; AdamW's two.
GRADIENT, MAIN, MOMENTS = 4, 4, 8


def stage_states(config: PretrainConfig, stage: int, world_size: int) -> float:
    """Bytes that one rank of a pipeline stage holds all the time.

    Replicas share the optimizer's state (`parallel.use_distributed_optimizer`), or all (`parallel.fully_sharded`).

    Args:
        config: resolved.
        stage: from 0.
        world_size: processes.
    """
    parameters, replicas = stage_parameters(config, stage), data_parallel_size(config, world_size)
    if config.parallel.fully_sharded and replicas > 1:
        return parameters * (MAIN + GRADIENT + MOMENTS) / replicas
    kept = number_bytes(config) + GRADIENT
    shared = MOMENTS + (0 if config.precision == "fp32" else MAIN)
    return parameters * (kept + shared / (replicas if config.parallel.use_distributed_optimizer else 1))


def gathered_parameters(config: PretrainConfig, world_size: int) -> float:
    """Bytes that a fully sharded rank needs besides: parameters while they are used, gradients while they are summed.

    Embedding and output layer are there during the whole pass, with one layer and the next. Summing a layer's gradients
    takes them in their type and in fp32.
    """
    if not config.parallel.fully_sharded or data_parallel_size(config, world_size) == 1:
        return 0.0
    size, layer = number_bytes(config), layer_parameters(config.model)
    root = embedding_parameters(config.model, padded_vocab_size(config)) + config.model.hidden_size
    return root * size + max(layer * (3 * size + GRADIENT), root * (size + GRADIENT))


def stage_parameters(config: PretrainConfig, stage: int) -> float:
    """Parameters of one rank of a pipeline stage; components count as spread evenly over the layers."""
    model, parallel, rows = config.model, config.parallel, padded_vocab_size(config)
    tables = embedding_parameters(model, rows)
    in_layers = total_parameters(config, rows) - tables - model.hidden_size
    layers, last = stage_layers(config), parallel.pipeline_model_parallel_size - 1
    mine = in_layers * layers[stage] / model.num_layers
    table = rows * model.hidden_size
    if last == 0:
        mine += tables
    elif stage in (0, last):  # tied tables lie on both
        mine += table
    return mine / parallel.tensor_model_parallel_size + (model.hidden_size if stage == last else 0)
