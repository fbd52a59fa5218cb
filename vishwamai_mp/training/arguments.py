"""`TrainingArguments`: a run's settings by Hugging Face's names and meanings, and what they are as configuration keys.

A setting with a default is said by the arguments; where it is None, the model's configuration says it, as it says all
that has no name here (layout, sequence length, layers of the components, ...).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from vishwamai_mp.config import ConfigError, PretrainConfig
from vishwamai_mp.config.check_cuda_graphs import check_cuda_graphs
from vishwamai_mp.config.wording import counted

_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant"}
_STRATEGIES = ("no", "steps", "epoch")
_FULL_SHARD = ("full_shard", True)
_LAYER_CLASS = "VishwamAILayer"


@dataclass
class TrainingArguments:
    """How `VishwamAIPretrainer` trains.

    Steps are optimizer steps. A number of steps below 1 (`warmup_steps`, `logging_steps`, `eval_steps`, `save_steps`)
    is a share of them all.
    """

    output_dir: str = "trainer_output"
    num_train_epochs: float = 3.0
    max_steps: int = -1  # above 0: these many, whatever num_train_epochs says
    per_device_train_batch_size: int = 8  # sequences per replica and pass
    gradient_accumulation_steps: int = 1  # passes per step
    learning_rate: float = 5e-5
    weight_decay: float = 0.0
    warmup_steps: float = 0  # from a rate of 0
    lr_scheduler_type: str = "linear"  # or cosine, constant, constant_with_warmup
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    use_neural_memory: bool | None = None
    use_tree_of_thoughts: bool | None = None  # the value head and its loss
    use_cache_augmentation: bool | None = None
    memory_loss_weight: float | None = None
    cache_loss_weight: float | None = None
    tree_loss_weight: float | None = None
    fp16: bool | None = None
    bf16: bool | None = None
    fp8: bool | None = None  # in the configuration's recipe; fp8_delayed if it has none
    gradient_checkpointing: bool | None = None  # whole layers are computed again in the backward pass
    fsdp: str | bool | None = None  # full_shard
    fsdp_transformer_layer_cls_to_wrap: str | None = None  # VishwamAILayer
    dataloader_num_workers: int = 0  # per process
    dataloader_prefetch_factor: int | None = None  # micro-batches
    report_to: str | Sequence[str] | None = None  # tensorboard, wandb, none, all
    logging_steps: float = 500
    eval_strategy: str = "no"  # or steps, epoch
    eval_steps: float | None = None  # logging_steps
    save_strategy: str = "steps"  # or epoch, no
    save_steps: float = 500
    save_total_limit: int | None = None
    load_best_model_at_end: bool = False  # by validation loss
    early_stopping_patience: int | None = None  # evaluations
    cuda_graphs: bool = False
    seed: int = 42
    resume_from_checkpoint: str | bool | None = None  # None, True: the newest in output_dir, if there is one

    def __post_init__(self) -> None:
        for key in ("lr_scheduler_type", "eval_strategy", "save_strategy"):
            value = getattr(self, key)
            setattr(self, key, value.value if isinstance(value, Enum) else value)  # transformers' own are accepted
        _one_of("lr_scheduler_type", self.lr_scheduler_type, tuple(_SCHEDULES))
        _one_of("eval_strategy", self.eval_strategy, _STRATEGIES)
        _one_of("save_strategy", self.save_strategy, _STRATEGIES)
        for key in ("num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps"):
            if not getattr(self, key) > 0:
                raise ConfigError(f"{key}={getattr(self, key)}: use a number above 0")
        if self.fsdp and self.fsdp not in _FULL_SHARD:
            raise ConfigError(f"fsdp={self.fsdp!r}: use 'full_shard', or leave it out")
        if self.fsdp_transformer_layer_cls_to_wrap not in (None, _LAYER_CLASS):
            raise ConfigError(
                f"fsdp_transformer_layer_cls_to_wrap={self.fsdp_transformer_layer_cls_to_wrap!r}: the layers of this"
                f" model are {_LAYER_CLASS!r}; use that, or leave it out"
            )
        if sum(bool(getattr(self, key)) for key in ("fp16", "bf16", "fp8")) > 1:
            raise ConfigError("of fp16, bf16 and fp8 only one can be true; choose one")
        for key in ("load_best_model_at_end", "early_stopping_patience"):
            if getattr(self, key) and self.eval_strategy == "no":
                raise ConfigError(
                    f"{key}={getattr(self, key)} needs evaluations; set eval_strategy to 'steps' or 'epoch'"
                )

    def settings(self, config: PretrainConfig, replicas: int) -> dict[str, Any]:
        """Configuration keys (dotted) and their values, but for those that depend on the number of steps.

        Args:
            config: the model's, not resolved.
            replicas: of the model in this job.
        """
        found = {
            "training.output_dir": str(self.output_dir),
            "training.micro_batch_size": self.per_device_train_batch_size,
            "training.global_batch_size": self.per_device_train_batch_size
            * self.gradient_accumulation_steps
            * replicas,
            "training.seed": self.seed,
            "training.early_stopping_patience": self.early_stopping_patience,
            "optimizer.learning_rate": self.learning_rate,
            "optimizer.min_learning_rate": 0.0,
            "optimizer.weight_decay": self.weight_decay,
            "optimizer.beta1": self.adam_beta1,
            "optimizer.beta2": self.adam_beta2,
            "optimizer.epsilon": self.adam_epsilon,
            "optimizer.clip_grad_norm": self.max_grad_norm,
            "schedule.decay": _SCHEDULES[self.lr_scheduler_type],
            "schedule.warmup_from_zero": True,
            "data.num_workers": self.dataloader_num_workers,
            "data.prefetch_factor": self.dataloader_prefetch_factor if self.dataloader_num_workers else None,
            "checkpoint.keep_last": self.save_total_limit,
            "checkpoint.load_best": self.load_best_model_at_end,
        }
        said = {
            "memory.enabled": self.use_neural_memory,
            "tree.enabled": self.use_tree_of_thoughts,
            "cache.enabled": self.use_cache_augmentation,
            "memory.loss_weight": self.memory_loss_weight,
            "tree.value_loss_weight": self.tree_loss_weight,
            "precision": self._precision(config.precision),
            "training.recompute": None
            if self.gradient_checkpointing is None
            else ("full" if self.gradient_checkpointing else "none"),
            "parallel.fully_sharded": True if self.fsdp else None,
            "logging.report_to": _writers(self.report_to),
        }
        return found | {key: value for key, value in said.items() if value is not None}

    def step_settings(self, steps_per_epoch: int | None) -> dict[str, Any]:
        """The keys that depend on the number of steps.

        Args:
            steps_per_epoch: None: not known, as of an iterable dataset.

        Raises:
            ConfigError: it is needed and not known.
        """
        steps = self.total_steps(steps_per_epoch)
        warmup = self.warmup(steps)
        return {
            "training.max_steps": steps,
            "schedule.warmup_steps": warmup,
            "schedule.decay_steps": max(steps, warmup + 1),  # a warm-up may be longer than the run
            "logging.log_every": _share(self.logging_steps, steps),
            "training.evaluate_every": _interval(
                "eval_strategy", self.eval_strategy, self.eval_steps or self.logging_steps, steps, steps_per_epoch
            ),
            "checkpoint.save_every": _interval(
                "save_strategy", self.save_strategy, self.save_steps, steps, steps_per_epoch
            ),
        }

    def total_steps(self, steps_per_epoch: int | None) -> int:
        """Optimizer steps of the run; an epoch's last may see fewer items than the others."""
        if self.max_steps is not None and self.max_steps > 0:
            return self.max_steps
        if steps_per_epoch is None:
            raise ConfigError("train_dataset has no length, so num_train_epochs says no number of steps; set max_steps")
        return math.ceil(self.num_train_epochs * steps_per_epoch)

    def warmup(self, steps: int) -> int:
        """Steps of warm-up in a run of `steps`."""
        if self.lr_scheduler_type == "constant":
            return 0
        return int(self.warmup_steps) if self.warmup_steps >= 1 else math.ceil(steps * self.warmup_steps)

    def notes(self, config: PretrainConfig, on_gpu: bool) -> list[str]:
        """A line for each setting that does not act in this run.

        Args:
            config: resolved, of the run.
            on_gpu: whether it computes on one.
        """
        steps, warmup = config.training.max_steps, config.schedule.warmup_steps
        beside = {
            "memory_loss_weight": (self.memory_loss_weight, config.memory.enabled, "neural memory"),
            "tree_loss_weight": (self.tree_loss_weight, config.tree.enabled, "value head"),
        }
        told = [
            (
                self.cuda_graphs and not config.training.cuda_graphs,
                f"cuda_graphs=True has no effect: {_against_graphs(config) if on_gpu else 'there is no GPU here'}",
            ),
            (
                self.dataloader_prefetch_factor and not self.dataloader_num_workers,
                f"dataloader_prefetch_factor={self.dataloader_prefetch_factor} has no effect at"
                " dataloader_num_workers=0",
            ),
            (
                self.lr_scheduler_type == "constant" and self.warmup_steps,
                f"warmup_steps={self.warmup_steps} has no effect at lr_scheduler_type='constant';"
                " 'constant_with_warmup' has a warm-up",
            ),
            (
                warmup >= steps,
                f"warmup_steps={warmup} in a run of {counted(steps, 'step')}: the learning rate stays below its peak",
            ),
            (self.save_strategy == "no", "save_strategy='no': the last step is saved all the same"),
            (
                self.cache_loss_weight is not None,
                f"cache_loss_weight={self.cache_loss_weight} has no effect: the cache has no loss of its own, it learns"
                " from the language model's",
            ),
            *(
                (weight is not None and not enabled, f"{key}={weight} has no effect: the model has no {what}")
                for key, (weight, enabled, what) in beside.items()
            ),
        ]
        return [note for applies, note in told if applies]

    def takes_graphs(self, config: PretrainConfig, on_gpu: bool) -> bool:
        """Whether a resolved configuration shall have CUDA graphs: they are asked for, or its own recipe's, and
        nothing else that is asked for stands against them."""
        return config.training.cuda_graphs or (self.cuda_graphs and on_gpu and not _against_graphs(config))

    def _precision(self, configured: str) -> str | None:
        if self.fp8:
            return configured if configured.startswith("fp8_") else "fp8_delayed"
        if self.bf16 or self.fp16:
            return "bf16" if self.bf16 else "fp16"
        refused = {"fp16": self.fp16, "bf16": self.bf16, "fp8": self.fp8}
        return "fp32" if refused.get(configured.partition("_")[0]) is False else None


def _one_of(key: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{key}={value!r}: use one of {', '.join(known)}")


def _share(value: float, steps: int) -> int:
    """A number of steps, given as such or as a share of all."""
    return math.ceil(value * steps) if value < 1 else int(value)


def _interval(key: str, strategy: str, value: float, steps: int, steps_per_epoch: int | None) -> int | None:
    if strategy == "no":
        return None
    if strategy == "steps":
        return _share(value, steps)
    if steps_per_epoch is None:
        raise ConfigError(f"{key}='epoch': train_dataset has no length; use 'steps'")
    return steps_per_epoch


def _writers(report_to: str | Sequence[str] | None) -> list[str] | None:
    if report_to is None or report_to == "none":
        return None if report_to is None else []
    if report_to == "all":
        return ["tensorboard", "wandb"]
    return [report_to] if isinstance(report_to, str) else [name for name in report_to if name != "none"]


def _against_graphs(config: PretrainConfig) -> str:
    """Why a configuration cannot have CUDA graphs; "" where it can."""
    try:
        check_cuda_graphs(replace(config, training=replace(config.training, cuda_graphs=True)))
    except ConfigError as error:
        return str(error)
    return ""
