"""What the user asks for: frozen dataclasses, presets, loading, validation. Imports no torch."""

from vishwamai_mp.config.errors import ConfigError, UserError, run_program
from vishwamai_mp.config.finetuning import frozen_parts
from vishwamai_mp.config.load import load_config, preset_names, to_dict, to_yaml
from vishwamai_mp.config.resolve import (
    data_parallel_size,
    layers_per_stage,
    micro_batches_per_step,
    model_parallel_ranks,
    padded_vocab_size,
    resolve,
)
from vishwamai_mp.config.schema import (
    CacheConfig,
    CheckpointConfig,
    DataConfig,
    Fp8Config,
    LoggingConfig,
    LoraConfig,
    MemoryConfig,
    ModelConfig,
    NcclConfig,
    OptimizerConfig,
    ParallelConfig,
    PretrainConfig,
    RopeScaling,
    ScheduleConfig,
    TrainingConfig,
    TreeConfig,
)

__all__ = [
    "CacheConfig",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "Fp8Config",
    "LoggingConfig",
    "LoraConfig",
    "MemoryConfig",
    "ModelConfig",
    "NcclConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PretrainConfig",
    "RopeScaling",
    "ScheduleConfig",
    "TrainingConfig",
    "TreeConfig",
    "UserError",
    "data_parallel_size",
    "frozen_parts",
    "layers_per_stage",
    "load_config",
    "micro_batches_per_step",
    "model_parallel_ranks",
    "padded_vocab_size",
    "preset_names",
    "resolve",
    "run_program",
    "to_dict",
    "to_yaml",
]
