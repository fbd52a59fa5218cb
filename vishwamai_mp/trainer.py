"""The training guide's names over the training core: `load_model`, `TrainingArguments`, `VishwamAIPretrainer`.

    model = load_model("tiny")
    arguments = TrainingArguments(output_dir="runs/first", max_steps=100, use_neural_memory=True)
    VishwamAIPretrainer(model=model, args=arguments, train_dataset="corpus_text_document").train()

It translates to a resolved configuration and runs `training.loop.Trainer`: what `vishwamai_mp.pretrain` does with the
same settings, it does bit for bit. In a script that torchrun starts, every process makes the same calls.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vishwamai_mp.runtime  # noqa: F401  (before megatron.core)

# isort: split
from torch import Tensor

from vishwamai_mp.cache_augmentation import DifferentiableCacheAugmentation
from vishwamai_mp.checkpoint import CheckpointManager, find_checkpoint, locate
from vishwamai_mp.checkpoint.component_folders import write_components
from vishwamai_mp.checkpoint.sharded import unwrap
from vishwamai_mp.checkpoint.store import candidates, name_of
from vishwamai_mp.config import (
    CacheConfig,
    ConfigError,
    MemoryConfig,
    PretrainConfig,
    TreeConfig,
    UserError,
    data_parallel_size,
    resolve,
)
from vishwamai_mp.data.tokenizer import Tokenizer
from vishwamai_mp.inference import Engine
from vishwamai_mp.model.initialization import copy_components
from vishwamai_mp.neural_memory import ReasoningMemoryTransformer
from vishwamai_mp.observability.environment import write_run_description
from vishwamai_mp.opening.loaded_model import LoadedModel, check_runs_alone, load_model
from vishwamai_mp.runtime import device, is_accelerator, standing_session
from vishwamai_mp.runtime.distributed import world_size
from vishwamai_mp.runtime.out_of_memory import advice_when_out_of_memory
from vishwamai_mp.training.arguments import TrainingArguments
from vishwamai_mp.training.assembly import changed, data_settings, module_sections, with_steps
from vishwamai_mp.training.callbacks import Callback, usual_callbacks
from vishwamai_mp.training.loop import Trainer
from vishwamai_mp.tree_of_thoughts import TreeOfThoughts
from vishwamai_mp.tree_of_thoughts.endings import with_step_token

__all__ = [
    "CacheConfig",
    "LoadedModel",
    "MemoryConfig",
    "TrainOutput",
    "TrainingArguments",
    "TreeConfig",
    "VishwamAIPretrainer",
    "load_model",
]


@dataclass(frozen=True)
class TrainOutput:
    """What `train` comes to: steps done in all, the mean loss (nats per token) of this call's, and the last record."""

    global_step: int
    training_loss: float
    metrics: dict[str, float]


class VishwamAIPretrainer:
    """Trains a model as `args` say.

    Args:
        model: from `load_model`. After it is trained, it stands for the trained model.
        args: settings; the rest is the model's configuration.
        train_dataset: a `.bin/.idx` prefix; or a dataset with items of token ids or texts (`data.items`), map-style or
            iterable; None: the configuration's `data.train`.
        eval_dataset: of the same kind, not an iterable; None: the configuration's, where `train_dataset` is a prefix.
        memory_module: its configuration becomes the model's, its weights those that every layer with a memory begins
            with. It stays as it is: `save_model` writes the trained ones.
        tree_module: likewise, its value head. It searches the model in training from then on.
        cache_module: likewise.
        callbacks: run after evaluation and before metrics are written.

    Attributes:
        config: resolved.
        trainer: the core's.
        history: the record of each step.
    """

    def __init__(
        self,
        model: LoadedModel,
        args: TrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        memory_module: ReasoningMemoryTransformer | None = None,
        tree_module: TreeOfThoughts | None = None,
        cache_module: DifferentiableCacheAugmentation | None = None,
        callbacks: Sequence[Callback] | None = None,
    ) -> None:
        self.model, self.args = model, args or TrainingArguments()
        self.history: list[dict[str, float]] = []
        callbacks = callbacks or ()
        _check_callbacks(callbacks)
        modules = {"memory": memory_module, "tree": tree_module, "cache": cache_module}
        asked = self._configure(train_dataset, eval_dataset, modules)
        runtime = standing_session(asked)
        tokenizer = Tokenizer(asked.data.tokenizer) if asked.data.tokenizer else None
        self.config, datasets = with_steps(self.args, asked, runtime, tokenizer, train_dataset, eval_dataset)
        self.config = with_step_token(self.config, tokenizer)
        own = [_StartComponents(_weights(modules)), *callbacks, _History(self.history)]
        with advice_when_out_of_memory(self.config):
            self.trainer = Trainer(self.config, runtime, datasets, usual_callbacks(self.config, tokenizer, own))
        own_notes = self.args.notes(self.config, is_accelerator(runtime.device))
        for note in [*datasets.epochs(self.config.training), *datasets.notes, *own_notes]:
            self.trainer.say(note)
        self._components, self._resumed = own[0], False
        model.stand_for(self._engine)

    def _engine(self) -> Engine:
        check_runs_alone(self.config)
        return Engine(self.config, self.trainer.runtime, unwrap(self.trainer.chunks[0]))

    def train(self) -> TrainOutput:
        """Train from the newest checkpoint in `output_dir`, or from the start, to the end."""
        done = len(self.history)
        state = self.trainer.train()
        self._resumed = True
        records = self.history[done:]
        mean = sum(record["lm_loss"] for record in records) / len(records) if records else math.nan
        return TrainOutput(state.step, mean, dict(records[-1]) if records else {})

    def evaluate(self) -> dict[str, float]:
        """`eval_loss` (nats per token) and `eval_perplexity` over the validation data."""
        if self.trainer.datasets.valid is None:
            raise ConfigError("there is no validation data; give an eval_dataset")
        self._load()
        loss = self.trainer.evaluate()
        return {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0)), "step": self.trainer.state.step}

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Save the weights, their configuration and tokenizer: a folder that `load_model` and the tools read.

        Each component is written again beside them, as `memory_layer_3` for one: its `from_pretrained` reads that.

        Args:
            output_dir: of its own; None: `model/` in `args.output_dir`.

        Raises:
            UserError: the folder has another model.
        """
        self._load()
        trainer = self.trainer
        folder = Path(output_dir) if output_dir is not None else trainer.folder / "model"
        root, name = folder / "checkpoints", name_of(trainer.state.step)
        if any(path.name != name for path, _ in candidates(root)) or folder.resolve() == trainer.folder.resolve():
            raise UserError(f"save_model: {root} is a run's or has another model; name another folder, or remove it")
        CheckpointManager(root, self.config, trainer.runtime).save(trainer.state.step, trainer.chunks, None, {})
        if trainer.runtime.reports:
            write_run_description(folder, self.config, trainer.runtime)
            write_components(root / name, self.config, folder)

    def _load(self) -> None:
        """Before training: the weights that it would begin with."""
        if not self._resumed:
            self.trainer.resume()
            self._components.on_train_begin(self.trainer)
            self._resumed = True

    def _configure(self, train: Any, valid: Any, modules: Mapping[str, Any]) -> PretrainConfig:
        """The configuration, but for what depends on the number of steps; not resolved, but checked."""
        base = self.model.config
        replicas = data_parallel_size(base, world_size())
        changes = module_sections(modules, self.args, base)
        changes |= self.args.settings(base, replicas) | data_settings(train, valid) | self._start()
        config = changed(base, changes)
        short = {"schedule.warmup_steps": 0, "schedule.decay_steps": None, "training.max_steps": 1}
        if self.args.eval_strategy != "no":
            short["training.evaluate_every"] = 1
        checked = resolve(changed(config, short), world_size())
        return changed(config, {"training.cuda_graphs": self.args.takes_graphs(checked, is_accelerator(device()))})

    def _start(self) -> dict[str, Any]:
        """Which weights it begins with."""
        resume, weights = self.args.resume_from_checkpoint, self.model.weights
        folder = Path(self.args.output_dir) / "checkpoints"
        if resume is False and folder.is_dir() and any(folder.iterdir()):
            raise ConfigError(
                f"resume_from_checkpoint=False but {folder} has checkpoints; name another output_dir, or remove them"
            )
        if isinstance(resume, str | Path):
            found, newest = locate(Path(resume).resolve()).path, find_checkpoint(folder.resolve(), False).path
            if newest not in (None, found):
                raise ConfigError(
                    f"resume_from_checkpoint={resume} but {folder} has {newest.name}, from which a run there goes on;"
                    " name another output_dir"
                )
            return {"checkpoint.load": str(found), "checkpoint.load_optimizer": True}
        return {"checkpoint.load": None if weights is None else str(weights), "checkpoint.load_optimizer": False}


class _StartComponents(Callback):
    """Gives the components of a run that begins the weights of the modules that were handed over."""

    def __init__(self, weights: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.weights = weights

    def on_train_begin(self, trainer: Trainer) -> None:
        if self.weights and trainer.state.step == 0:
            for chunk in trainer.chunks:
                copy_components(unwrap(chunk), self.weights)
            trainer.optimizer.reload_model_params()


class _History(Callback):
    """Keeps the record of each step."""

    def __init__(self, records: list[dict[str, float]]) -> None:
        self.records = records

    def on_step_end(self, trainer: Trainer, record: dict[str, float]) -> None:
        self.records.append({"step": trainer.state.step} | record)


def _check_callbacks(callbacks: Sequence[Any]) -> None:
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise ConfigError(
                f"callbacks: {type(callback).__name__} is no vishwamai_mp.training.callbacks.Callback; derive yours"
                " from it (early stopping is TrainingArguments(early_stopping_patience=...))"
            )


def _weights(modules: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """What the modules begin with, by the names that `copy_components` knows."""
    found = {name: modules[name].weights() for name in ("memory", "cache") if modules[name] is not None}
    tree = modules["tree"]
    return found | ({"value_head": tree.values} if tree is not None and tree.values else {})
