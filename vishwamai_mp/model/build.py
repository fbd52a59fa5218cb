"""Builds this rank's part of the model."""

from vishwamai_mp.config import PretrainConfig
from vishwamai_mp.model.initialization import initialize_parameters
from vishwamai_mp.model.model import VishwamAIModel
from vishwamai_mp.runtime import Runtime


def build_model(config: PretrainConfig, runtime: Runtime, initialize: bool = True) -> list[VishwamAIModel]:
    """The chunks of this rank's pipeline stage (one, or as many as the interleaved schedule asks for).

    Args:
        config: resolved.
        runtime: process groups and device.
        initialize: False leaves parameters undefined, for a checkpoint to fill or for a build on the meta device.
    """
    chunks = config.parallel.virtual_pipeline_model_parallel_size
    models = []
    for chunk in range(chunks) if chunks else [None]:
        model = VishwamAIModel(config, runtime.groups, chunk)
        if initialize:
            initialize_parameters(model, config.model, config.training.seed)
            if model.sharding:
                model.sharding.round_parameters(model)
        models.append(model)
    return models
