"""`TrainingArguments`: which configuration keys they are, what they refuse, and what they say has no effect."""

from dataclasses import replace
from typing import Any

import pytest

from vishwamai_mp.config import ConfigError, PretrainConfig, load_config, resolve
from vishwamai_mp.training.arguments import TrainingArguments
from vishwamai_mp.training.assembly import changed

_RECIPE: dict[str, Any] = {
    "model": {"hidden_size": 32, "num_attention_heads": 4, "num_layers": 2, "vocab_size": 250},
    "memory": {"memory_size": 128, "num_memory_layers": 2},
    "training": {"sequence_length": 64, "recompute": "selective"},
    "logging": {"report_to": ["tensorboard"]},
    "precision": "bf16",
}


def applied(base: dict[str, Any] | None = None, replicas: int = 1, **options: Any) -> PretrainConfig:
    config = load_config(_RECIPE | (base or {}))
    arguments = TrainingArguments(**options)
    return resolve(changed(config, arguments.settings(config, replicas) | arguments.step_settings(10)))


def value(config: PretrainConfig, key: str) -> Any:
    found: Any = config
    for part in key.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"output_dir": "here", "seed": 5}, {"training.output_dir": "here", "training.seed": 5}),
        (
            {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4},
            {"training.micro_batch_size": 3, "training.global_batch_size": 12},
        ),
        ({"learning_rate": 1e-3}, {"optimizer.learning_rate": 1e-3, "optimizer.min_learning_rate": 0.0}),
        ({"weight_decay": 0.2, "adam_beta2": 0.95}, {"optimizer.weight_decay": 0.2, "optimizer.beta2": 0.95}),
        ({"max_grad_norm": 0.5, "adam_epsilon": 1e-6}, {"optimizer.clip_grad_norm": 0.5, "optimizer.epsilon": 1e-6}),
        ({"use_neural_memory": True, "memory_loss_weight": 0.3}, {"memory.enabled": True, "memory.loss_weight": 0.3}),
        ({"use_cache_augmentation": True}, {"cache.enabled": True, "memory.enabled": False}),
        (
            {"use_tree_of_thoughts": True, "tree_loss_weight": 0.2},
            {"tree.enabled": True, "tree.value_loss_weight": 0.2},
        ),
        ({}, {"precision": "bf16", "training.recompute": "selective", "logging.report_to": ["tensorboard"]}),
        ({"fp16": True, "gradient_checkpointing": True}, {"precision": "fp16", "training.recompute": "full"}),
        ({"bf16": False, "gradient_checkpointing": False}, {"precision": "fp32", "training.recompute": "none"}),
        ({"fp8": True}, {"precision": "fp8_delayed"}),
        (
            {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 4},
            {"data.num_workers": 2, "data.prefetch_factor": 4},
        ),
        ({"dataloader_prefetch_factor": 4}, {"data.prefetch_factor": None}),
        ({"report_to": "none"}, {"logging.report_to": []}),
        ({"report_to": ["tensorboard", "wandb"]}, {"logging.report_to": ["tensorboard", "wandb"]}),
        ({"report_to": "wandb"}, {"logging.report_to": ["wandb"]}),
        (
            {"fsdp": "full_shard", "fsdp_transformer_layer_cls_to_wrap": "VishwamAILayer"},
            {"parallel.fully_sharded": True},
        ),
        ({"save_total_limit": 2}, {"checkpoint.keep_last": 2, "checkpoint.save_every": 500}),
        (
            {"eval_strategy": "epoch", "load_best_model_at_end": True, "early_stopping_patience": 3},
            {
                "training.evaluate_every": 10,
                "checkpoint.load_best": True,
                "training.early_stopping_patience": 3,
            },
        ),
        ({"save_strategy": "epoch", "num_train_epochs": 2}, {"checkpoint.save_every": 10, "training.max_steps": 20}),
    ],
)
def test_each_is_a_configuration_key(options, expected):
    config = applied(**options)
    assert {key: value(config, key) for key in expected} == expected


def test_batches_are_per_replica_and_a_recipe_says_which_fp8():
    assert applied(replicas=4, per_device_train_batch_size=2).training.global_batch_size == 8
    assert applied({"precision": "fp8_mx"}, fp8=True).precision == "fp8_mx"
    assert applied({"precision": "fp8_mx"}).precision == "fp8_mx"
    assert applied({"precision": "fp8_mx"}, fp8=False).precision == "fp32"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_scheduler_type": "polynomial"}, "lr_scheduler_type='polynomial': use one of linear, cosine"),
        ({"eval_strategy": "daily"}, "eval_strategy='daily': use one of no, steps, epoch"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0: use a number above 0"),
        ({"fsdp": "shard_grad_op"}, "fsdp='shard_grad_op': use 'full_shard'"),
        ({"fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}, "'VishwamAILayer'"),
        ({"fp16": True, "bf16": True}, "of fp16, bf16 and fp8 only one"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end=True needs evaluations; set eval_strategy"),
        ({"early_stopping_patience": 2}, "early_stopping_patience=2 needs evaluations"),
        ({"learning_rate": -1.0}, "optimizer.learning_rate=-1.0"),
    ],
)
def test_what_cannot_be_is_one_line(options, message):
    with pytest.raises(ConfigError) as error:
        applied(**options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"cuda_graphs": True}, "cuda_graphs=True has no effect: there is no GPU here"),
        ({"dataloader_prefetch_factor": 3}, "dataloader_prefetch_factor=3 has no effect at dataloader_num_workers=0"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 5}, "warmup_steps=5 has no effect at lr_scheduler_type"),
        ({"warmup_steps": 1000}, "warmup_steps=1000 in a run of 30 steps: the learning rate stays below its peak"),
        ({"save_strategy": "no"}, "save_strategy='no': the last step is saved all the same"),
        ({"cache_loss_weight": 0.1}, "cache_loss_weight=0.1 has no effect: the cache has no loss of its own"),
        ({"memory_loss_weight": 0.1}, "memory_loss_weight=0.1 has no effect: the model has no neural memory"),
        ({"tree_loss_weight": 0.1}, "tree_loss_weight=0.1 has no effect: the model has no value head"),
    ],
)
def test_what_does_not_act_says_so(options, part):
    arguments = TrainingArguments(**options)
    [note] = arguments.notes(applied(**options), on_gpu=False)
    assert part in note
    assert "\n" not in note


def test_what_acts_says_nothing():
    options: dict[str, Any] = {
        "dataloader_num_workers": 1,
        "dataloader_prefetch_factor": 2,
        "warmup_steps": 5,
        "use_neural_memory": True,
        "memory_loss_weight": 0.1,
    }
    assert TrainingArguments(**options).notes(applied(**options), on_gpu=False) == []


def test_graphs_are_a_gpus_and_of_what_can_have_them():
    arguments, plain = TrainingArguments(cuda_graphs=True), applied(gradient_checkpointing=False)
    assert arguments.takes_graphs(plain, on_gpu=True)
    assert not arguments.takes_graphs(plain, on_gpu=False)
    assert not TrainingArguments().takes_graphs(plain, on_gpu=True)
    graphed = replace(plain, training=replace(plain.training, cuda_graphs=True))
    assert arguments.notes(graphed, on_gpu=True) == []
    recomputed = applied(gradient_checkpointing=True)
    assert not arguments.takes_graphs(recomputed, on_gpu=True)
    [note] = arguments.notes(recomputed, on_gpu=True)
    assert note.startswith("cuda_graphs=True has no effect: training.cuda_graphs=true with training.recompute=full: ")


def test_transformers_own_names_of_choices_are_taken():
    from transformers import SchedulerType
    from transformers.trainer_utils import IntervalStrategy

    arguments = TrainingArguments(lr_scheduler_type=SchedulerType.COSINE, eval_strategy=IntervalStrategy.EPOCH)
    assert (arguments.lr_scheduler_type, arguments.eval_strategy) == ("cosine", "epoch")
    assert replace(arguments, max_steps=3).total_steps(None) == 3
