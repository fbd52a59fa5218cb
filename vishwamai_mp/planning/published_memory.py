"""Memory at the peak of a published run of another program, from what that program is known to keep."""

from vishwamai_mp.config import PretrainConfig, data_parallel_size, micro_batches_per_step, padded_vocab_size
from vishwamai_mp.planning.activations import (
    key_width,
    micro_batches_underway,
    number_bytes,
    query_width,
    stage_layers,
    tokens_of_micro_batch,
)
from vishwamai_mp.planning.parameters import embedding_parameters, layer_parameters
from vishwamai_mp.planning.stacks import Kept
from vishwamai_mp.planning.states import GRADIENT, MAIN, MOMENTS, stage_parameters


def peak_bytes(config: PretrainConfig, world_size: int, kept: Kept) -> float:
    """Of the rank that needs most.

    Args:
        config: resolved.
        world_size: GPUs.
        kept: of the program.
    """
    last = config.parallel.pipeline_model_parallel_size - 1
    stages = {0, 1, last} & set(range(last + 1))
    return max(_stage_bytes(config, world_size, stage, kept) for stage in stages)


def _stage_bytes(config: PretrainConfig, world_size: int, stage: int, kept: Kept) -> float:
    sharded = config.parallel.fully_sharded
    states = (_sharded_states if sharded else _replicated_states)(config, world_size, stage, kept)
    layer, again = _layer(config, kept)
    tokens, tensor = tokens_of_micro_batch(config), config.parallel.tensor_model_parallel_size
    # Under sequence parallelism the inputs of a layer's, or the last, products are gathered while they are used.
    gathered = 2 * tokens * config.model.hidden_size * number_bytes(config) if tensor > 1 else 0.0
    last = stage == config.parallel.pipeline_model_parallel_size - 1
    head = kept.logit * tokens * padded_vocab_size(config) / tensor if last else 0.0
    underway = micro_batches_underway(config, stage, micro_batches_per_step(config, world_size))
    activations = underway * stage_layers(config)[stage] * layer + max(again, head) + gathered
    return kept.reserved * (states + activations) + kept.libraries


def _replicated_states(config: PretrainConfig, world_size: int, stage: int, kept: Kept) -> float:
    """Weights and gradients on every replica; the optimizer's state divided where ZeRO 1 does so."""
    replicas = data_parallel_size(config, world_size)
    owners = replicas * config.parallel.context_parallel_size if config.parallel.use_distributed_optimizer else 1
    each = number_bytes(config) + GRADIENT + (kept.gradient if replicas > 1 else 0.0) + (MAIN + MOMENTS) / owners
    return each * stage_parameters(config, stage)


def _sharded_states(config: PretrainConfig, world_size: int, stage: int, kept: Kept) -> float:
    """FSDP over data and context parallel ranks together, and what is whole while it is used.

    In a pipeline a stage's weights stay whole, and its gradients are summed whole, from the first micro-batch to the
    last; otherwise the embedding and the output layer are whole, with one layer.
    """
    parallel, parameters = config.parallel, stage_parameters(config, stage)
    shards = data_parallel_size(config, world_size) * parallel.context_parallel_size
    own, size = (MAIN + GRADIENT + MOMENTS) * parameters / shards, number_bytes(config)
    if shards == 1:
        return own
    if parallel.pipeline_model_parallel_size > 1:
        return own + (size + GRADIENT) * parameters
    layer = layer_parameters(config.model) / parallel.tensor_model_parallel_size
    root = embedding_parameters(config.model, padded_vocab_size(config)) / parallel.tensor_model_parallel_size
    return own + root * size + max(layer * (3 * size + GRADIENT), root * (size + GRADIENT))


def _layer(config: PretrainConfig, kept: Kept) -> tuple[float, float]:
    """Bytes of a micro-batch that a layer keeps, and those that recomputation makes again.

    `selective` is every other matrix product's output, with the layer's input and attention's output.
    """
    model, tensor = config.model, config.parallel.tensor_model_parallel_size
    assert model.intermediate_size is not None
    number = tokens_of_micro_batch(config) * number_bytes(config) / tensor
    every = number * (kept.residual * model.hidden_size + kept.mlp * model.intermediate_size)
    match config.training.recompute:
        case "none":
            return every, 0.0
        case "full":
            return number * model.hidden_size, every
        case _:
            queries = query_width(config)
            products = queries + 2 * key_width(config) + 2 * model.hidden_size + 2 * model.intermediate_size
            return number * (model.hidden_size + queries + products / 2), every - number * products / 2
