"""From the façade's arguments to a resolved configuration and its data."""

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vishwamai_mp.config import ConfigError, PretrainConfig, load_config, resolve, to_dict
from vishwamai_mp.data.datasets import Datasets
from vishwamai_mp.data.given import given_datasets, is_stream, run_datasets
from vishwamai_mp.data.tokenizer import Tokenizer
from vishwamai_mp.runtime import Runtime
from vishwamai_mp.training.arguments import TrainingArguments


def module_sections(modules: Mapping[str, Any], args: TrainingArguments, config: PretrainConfig) -> dict[str, Any]:
    """Whole sections of the configuration: those of the modules that were handed over."""
    switches = {
        "memory": ("use_neural_memory", args.use_neural_memory),
        "tree": ("use_tree_of_thoughts", args.use_tree_of_thoughts),
        "cache": ("use_cache_augmentation", args.use_cache_augmentation),
    }
    found: dict[str, Any] = {}
    for name, module in modules.items():
        if module is None:
            continue
        switch, wanted = switches[name]
        if wanted is False:
            raise ConfigError(f"{switch}=False but a {name}_module is given; leave one of them out")
        own = module.config if name == "tree" else getattr(module, f"{name}_config")
        found[name] = asdict(own) | {"enabled": True}
        if name != "tree" and own.layers is None:
            found[name]["layers"] = getattr(config, name).layers
    return found


def changed(config: PretrainConfig, changes: Mapping[str, Any]) -> PretrainConfig:
    """`config` with values under dotted keys, checked like a recipe's."""
    tree = to_dict(config)
    for key, value in changes.items():
        *sections, last = key.split(".")
        inner = tree[sections[0]] if sections else tree
        inner[last] = value
    return load_config(tree)


def is_prefix(dataset: Any) -> bool:
    return isinstance(dataset, str | Path)


def data_settings(train: Any, valid: Any) -> dict[str, Any]:
    """Keys for datasets that are files; for others no files."""
    files = train is None or is_prefix(train)
    if valid is not None and files != is_prefix(valid):
        raise ConfigError(
            f"train_dataset={type(train).__name__} and eval_dataset={type(valid).__name__}: give .bin/.idx prefixes for"
            " both, or datasets for both"
        )
    if not files:
        return {"data.train": None, "data.valid": None}
    given = {"data.train": train, "data.valid": valid}
    return {key: [str(prefix)] for key, prefix in given.items() if prefix is not None}


def with_steps(
    args: TrainingArguments,
    config: PretrainConfig,
    runtime: Runtime,
    tokenizer: Tokenizer | None,
    train: Any,
    valid: Any,
) -> tuple[PretrainConfig, Datasets]:
    """The resolved configuration of the run, and its data, which say how many steps an epoch has."""

    def resolved(changes: Mapping[str, Any]) -> PretrainConfig:
        return resolve(changed(config, changes), runtime.world_size)

    files = train is None or is_prefix(train)
    stream = not files and is_stream(train)
    first = resolved(replace(args, max_steps=1).step_settings(None if stream else 1))
    datasets = run_datasets(first, tokenizer, runtime) if files else given_datasets(first, train, valid, tokenizer)

    def steps(samples: Any) -> int:
        return math.ceil(samples.samples_per_epoch / config.training.global_batch_size)

    changes = args.step_settings(None if stream else steps(datasets.train))
    if datasets.valid is not None:
        changes["training.evaluate_batches"] = steps(datasets.valid)  # all of them
    return resolved(changes), datasets
