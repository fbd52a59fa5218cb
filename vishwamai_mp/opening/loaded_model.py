"""A model by its configuration or its run, for programs that train or search: the guide's `load_model`."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vishwamai_mp.checkpoint import CheckpointManager
from vishwamai_mp.config import PretrainConfig, UserError, load_config, resolve
from vishwamai_mp.data.tokenizer import Tokenizer
from vishwamai_mp.inference import Engine
from vishwamai_mp.model import build_model
from vishwamai_mp.opening.run import find_run
from vishwamai_mp.runtime import standing_session
from vishwamai_mp.runtime.distributed import world_size


class LoadedModel:
    """A model before it is laid out: its configuration, and the checkpoint that its weights come from.

    Its parameters are made where they are needed, on the ranks that hold them: by a `VishwamAIPretrainer`, whose model
    it then stands for, or by `engine`.

    Attributes:
        config: as loaded, not resolved.
        weights: the checkpoint; None: fresh ones.
    """

    def __init__(self, config: PretrainConfig, weights: Path | None = None) -> None:
        self.config, self.weights = config, weights
        self._make_engine: Callable[[], Engine] = self._load
        self._engine: Engine | None = None

    def engine(self) -> Engine:
        """Runs the model: what searches and generation are built on. All ranks call it together."""
        if self._engine is None:
            self._engine = self._make_engine()
        return self._engine

    def tokenizer(self) -> Tokenizer | None:
        """The one that the configuration names."""
        return Tokenizer(self.config.data.tokenizer) if self.config.data.tokenizer else None

    def stand_for(self, make_engine: Callable[[], Engine]) -> None:
        """Be a model that is laid out already, as one in training is: `engine` calls this once from here on."""
        self._make_engine, self._engine = make_engine, None

    def _load(self) -> Engine:
        config = resolve(self.config, world_size())
        check_runs_alone(config)
        runtime = standing_session(config)
        models = build_model(config, runtime, initialize=self.weights is None)
        if self.weights is not None:
            CheckpointManager(self.weights.parent, config, runtime).load(self.weights, models)
        return Engine(config, runtime, models[0])


def check_runs_alone(config: PretrainConfig) -> None:
    if config.parallel.virtual_pipeline_model_parallel_size or config.parallel.fully_sharded:
        key = "fully_sharded" if config.parallel.fully_sharded else "virtual_pipeline_model_parallel_size"
        raise UserError(
            f"parallel.{key} is for training; to search or generate, save_model() and load_model() with another layout"
        )


def load_model(config_path: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> LoadedModel:
    """A model by its configuration, or by a run.

    Args:
        config_path: a preset's name, a YAML recipe, the guide's JSON (fresh weights), or a run folder, its
            `checkpoints/` or one checkpoint (its weights and its run's configuration).
        overrides: `section.key=value` strings.

    Raises:
        UserError: none of these, or one that cannot be used.
    """
    if isinstance(config_path, Mapping) or not Path(config_path).is_dir():
        return LoadedModel(load_config(config_path, overrides))
    run = find_run(config_path)
    return LoadedModel(run.trained(overrides), run.checkpoint)
