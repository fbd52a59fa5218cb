"""Builds this rank's part of the model."""

from contextlib import AbstractContextManager, nullcontext

import torch

from vishwamai_mp.config import PretrainConfig
from vishwamai_mp.model.initialization import initialize_parameters
from vishwamai_mp.model.model import VishwamAIModel
from vishwamai_mp.runtime import Runtime, is_accelerator


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
        with _place(runtime):
            model = VishwamAIModel(config, runtime.groups, chunk)
        if initialize:
            initialize_parameters(model, config.model, config.training.seed)
            if model.sharding:
                model.sharding.round_parameters(model)
        models.append(model)
    return models


def _place(runtime: Runtime) -> AbstractContextManager:
    """Where modules make their tensors: on the device, unless the caller names another, as in a build on "meta"."""
    named = torch.get_default_device().type != "cpu"
    return runtime.device if is_accelerator(runtime.device) and not named else nullcontext()
