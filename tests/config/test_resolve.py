"""Derived values and refused layouts: every message names the key, the value and the mend."""

import dataclasses
import re

import pytest

from vishwamai_mp.config import (
    ConfigError,
    data_parallel_size,
    layers_per_stage,
    load_config,
    micro_batches_per_step,
    padded_vocab_size,
    preset_names,
    resolve,
    to_dict,
)

_PIPELINE = "parallel.pipeline_model_parallel_size"
_VIRTUAL = "parallel.virtual_pipeline_model_parallel_size"
_FIRST = "parallel.num_layers_in_first_pipeline_stage"
_LAST = "parallel.num_layers_in_last_pipeline_stage"
_TENSOR = "parallel.tensor_model_parallel_size"
_OVERLAP = "parallel.overlap_tensor_parallel=true"
_GRAPHS = "training.cuda_graphs=true"
_SPLIT = [f"{_TENSOR}=2", "parallel.sequence_parallel=true"]
_ROPE = "model.rope_scaling={rope_type: llama3, factor: 8, low_freq_factor: 4, high_freq_factor: 4}"


def _config(*overrides):
    return load_config({}, overrides)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ["memory.enabled=true", "memory.memory_size=2048", "memory.head_dim=96"],
            ["memory.memory_size=2048", "memory.head_dim=96"],
        ),
        (["memory.enabled=true", "memory.layers=[8]"], ["memory.layers=[8]", "model.num_layers=8", "0 to 7"]),
        (
            ["memory.enabled=true", "memory.memory_size=384", f"{_TENSOR}=2"],
            ["memory.memory_size=384 makes 3 heads", f"{_TENSOR}=2", "a multiple of 256"],
        ),
        (["cache.enabled=true", "cache.num_heads=7"], ["cache.num_heads=7", "model.hidden_size=512"]),
        (["cache.enabled=true", "cache.num_heads=2", f"{_TENSOR}=4"], ["cache.num_heads=2", f"{_TENSOR}=4"]),
        (["cache.enabled=true", "cache.max_cache_length=12"], ["cache.max_cache_length=12", "use a multiple"]),
        (["tree.pruning_threshold=2"], ["tree.pruning_threshold=2.0", "0 to 1"]),
        (["precision=fp8_mx", "training.sequence_length=500"], ["sequence_length=500", "precision=fp8_mx", "bf16"]),
        (["model.hidden_size=100"], ["model.hidden_size=100", "model.num_attention_heads=8", "set model.head_dim"]),
        (["model.num_key_value_heads=3"], ["model.num_key_value_heads=3", "use a divisor of 8"]),
        (["model.num_key_value_heads=16"], ["model.num_key_value_heads=16", "use a divisor of 8"]),
        (["parallel.reduce_grads_in=bf16", "precision=fp32"], ["reduce_grads_in=bf16 with precision=fp32", "fp32"]),
        (["parallel.reduce_grads_in=bf16", "precision=fp16"], ["reduce_grads_in=bf16 with precision=fp16", "digits"]),
        (
            ["parallel.fuse_grad_accumulation=true", "parallel.fully_sharded=true"],
            ["parallel.fuse_grad_accumulation=true with parallel.fully_sharded=true", "set one of them"],
        ),
        (
            ["fp8.params=true", "precision=fp8_delayed"],
            [
                "fp8.params=true with precision=fp8_delayed: reading a checkpoint",
                "precision=fp8_current or fp8_blockwise",
            ],
        ),
        (["fp8.params=true", "precision=fp8_mx"], ["fp8.params=true with precision=fp8_mx: the copies of a weight"]),
        (["fp8.params=true", "precision=nvfp4"], ["fp8.params=true with precision=nvfp4: only weights in FP8 stay so"]),
        (
            ["fp8.params=true", "precision=fp8_current", "parallel.use_distributed_optimizer=false"],
            ["fp8.params=true with parallel.use_distributed_optimizer=false", "set parallel.use_distributed_optimizer"],
        ),
        (
            ["fp8.params=true", "precision=fp8_current", "lora.enabled=true"],
            ["fp8.params=true with lora.enabled=true: frozen weights stay in bf16", "set fp8.params=false"],
        ),
        (["fp8.params=true", "precision=bf16"], ["fp8.params=True has no effect at precision=bf16"]),
        ([_OVERLAP], [f"{_OVERLAP} has no effect at tensor_model_parallel_size=1", "set it to false"]),
        (
            [_OVERLAP, "parallel.tensor_model_parallel_size=2"],
            [f"{_OVERLAP} with parallel.sequence_parallel=false", "set parallel.sequence_parallel=true"],
        ),
        (
            [_OVERLAP, *_SPLIT, "precision=fp16"],
            [f"{_OVERLAP} with precision=fp16: its sums are bf16", "use bf16"],
        ),
        (
            [_OVERLAP, *_SPLIT, "precision=fp8_blockwise"],
            [f"{_OVERLAP} with precision=fp8_blockwise: its buffers know no scales of blocks", "fp8_current"],
        ),
        (
            [_OVERLAP, *_SPLIT, "precision=bf16", "training.deterministic=true"],
            [f"{_OVERLAP} with training.deterministic=true", "set one of them to false"],
        ),
        (
            [_OVERLAP, *_SPLIT, "precision=bf16", "model.hidden_size=544", "model.num_attention_heads=4"],
            [f"{_OVERLAP} with model.hidden_size=544: outputs are cut into 4 strips of whole 16s", "multiple of 64"],
        ),
        (
            [_OVERLAP, *_SPLIT, "precision=fp8_mx", "training.sequence_length=128", "training.micro_batch_size=1"],
            [f"{_OVERLAP} with precision=fp8_mx: 64 tokens of a micro-batch on a rank: not a multiple of 128"],
        ),
        (
            ["training.offload_layers=1", "training.recompute=full"],
            ["training.offload_layers=1 with training.recompute=full", "set training.recompute=none"],
        ),
        (
            ["training.offload_layers=1", "precision=fp8_current"],
            ["training.offload_layers=1 with precision=fp8_current", "use bf16"],
        ),
        (
            ["training.offload_layers=1", "parallel.fully_sharded=true"],
            ["training.offload_layers=1 with parallel.fully_sharded=true", "set parallel.fully_sharded=false"],
        ),
        (["training.offload_layers=8"], ["training.offload_layers=8", "of the 8 layers of a chunk", "use fewer"]),
        *(
            (
                [_GRAPHS, setting],
                [f"{_GRAPHS} with {told or setting}: ", f"; {mend}", ", or set training.cuda_graphs=false"],
            )
            for setting, told, mend in (
                ("precision=fp8_delayed", "", "set precision=bf16"),
                ("precision=nvfp4", "", "set precision=bf16"),
                ("data.reset_attention_mask=true", "", "set data.reset_attention_mask=false"),
                ("data.prepared_rows=true", "data.reset_attention_mask=true", "set data.reset_attention_mask=false"),
                ("data.reset_position_ids=true", "", "set data.reset_position_ids=false"),
                ("model.attention_dropout=0.1", "", "set model.attention_dropout=0"),
                ("model.hidden_dropout=0.1", "", "set model.hidden_dropout=0"),
                ("training.recompute=selective", "", "set training.recompute=none"),
                ("training.offload_layers=1", "", "leave it out"),
                ("parallel.fully_sharded=true", "", "set parallel.fully_sharded=false"),
                ("lora.enabled=true", "", "set lora.enabled=false"),
                ("training.freeze=[embedding]", "", "leave it out"),
            )
        ),
        (
            [_GRAPHS, _OVERLAP, *_SPLIT],
            [f"{_GRAPHS} with {_OVERLAP}: its buffers", "set parallel.overlap_tensor_parallel=false, or set"],
        ),
        (
            [_GRAPHS, "model.num_layers=1", "memory.enabled=true", "memory.layers=[0]"],
            [f"{_GRAPHS} has no effect: every layer has memory or cache", "set it to false"],
        ),
        (
            ["training.recompute_layers=2"],
            ["training.recompute_layers=2 has no effect at training.recompute=none", "set training.recompute=full"],
        ),
        (
            ["training.recompute=full", "training.recompute_modules=[mlp]"],
            ["training.recompute_modules=[mlp]", "set training.recompute=selective"],
        ),
        (["training.recompute=selective", "training.recompute_modules=[]"], ["recompute_modules=[]", "core_attn, mlp"]),
        (
            ["training.recompute=full", "training.recompute_layers=2", f"{_PIPELINE}=2", f"{_VIRTUAL}=2"],
            ["training.recompute_layers=2", "a chunk of a pipeline stage has no more than 2 layers"],
        ),
        (["model.head_dim=3"], ["model.head_dim=3", "use an even width"]),
        (["model.attention_dropout=1"], ["model.attention_dropout=1.0", "from 0 to below 1"]),
        (
            ["model.window_rope_theta=7"],
            ["model.window_rope_theta=7.0", "set model.rope_theta, or model.layer_pattern"],
        ),
        (["model.rotary_pattern=N"], ["model.rotary_pattern=N", "both of them, such as RRRN"]),
        (["model.rotary_pattern=RNX"], ["model.rotary_pattern=RNX", "up to model.num_layers=8 letters"]),
        (
            [
                *("model.layer_pattern=SF", "model.sliding_window=9", "model.window_rope_theta=7"),
                "model.rotary_pattern=RN",
            ],
            ["model.window_rope_theta=7.0", "model.rotary_pattern=RN", "turned are of one kind"],
        ),
        (
            ["model.attention_softcap=50", "model.attention_dropout=0.1"],
            ["model.attention_softcap=50.0", "set model.attention_dropout=0"],
        ),
        (["model.hidden_dropout=1.5"], ["model.hidden_dropout=1.5", "from 0 to below 1"]),
        ([_ROPE], ["low_freq_factor=4.0", "high_freq_factor=4.0", "lower it"]),
        ([f"{_TENSOR}=3"], ["model.num_attention_heads=8", f"{_TENSOR}=3", "divides 8"]),
        ([f"{_TENSOR}=4", "model.num_key_value_heads=2"], ["model.num_key_value_heads=2", f"{_TENSOR}=4", "divides 2"]),
        ([f"{_TENSOR}=2", "model.intermediate_size=7"], ["model.intermediate_size=7", f"{_TENSOR}=2"]),
        (["parallel.sequence_parallel=true"], ["sequence_parallel=true has no effect", "set it to false"]),
        (
            ["parallel.context_parallel_size=2", "training.sequence_length=510"],
            ["training.sequence_length=510", "2 × context_parallel_size 2 = 4", "use 512"],
        ),
        (
            [f"{_TENSOR}=2", "parallel.sequence_parallel=true", "training.sequence_length=511"],
            ["training.sequence_length=511", "tensor_model_parallel_size 2 = 2", "use 512"],
        ),
        ([f"{_VIRTUAL}=2"], [f"{_VIRTUAL} has no effect", "leave it out"]),
        ([f"{_FIRST}=2"], [f"{_FIRST} has no effect", "leave it out"]),
        ([f"{_LAST}=2"], [f"{_LAST} has no effect", "leave it out"]),
        ([f"{_PIPELINE}=2", f"{_VIRTUAL}=1"], [f"{_VIRTUAL}=1 has no effect", "use 2 or more"]),
        ([f"{_PIPELINE}=3"], ["model.num_layers=8", f"{_PIPELINE}=3", "change the number of stages"]),
        ([f"{_PIPELINE}=16"], ["model.num_layers=8", f"{_PIPELINE}=16"]),
        ([f"{_PIPELINE}=2", f"{_FIRST}=9"], ["model.num_layers=8", "9 layers first"]),
        ([f"{_PIPELINE}=2", f"{_FIRST}=8"], ["model.num_layers=8", "8 layers first and even last"]),
        ([f"{_PIPELINE}=2", f"{_FIRST}=3", f"{_LAST}=4"], ["3 layers first and 4 last"]),
        ([f"{_PIPELINE}=2", f"{_VIRTUAL}=3"], ["a pipeline stage of 4 layers", f"{_VIRTUAL}=3", "divisor of 4"]),
        (
            ["training.sequence_length=4096"],
            ["training.sequence_length=4096", "model.max_position_embeddings=2048", "raise the latter"],
        ),
        (
            ["schedule.warmup_steps=100"],
            ["schedule.warmup_steps=100", "schedule.decay_steps=100", "shorten the warm-up"],
        ),
        (
            ["schedule.decay=wsd", "schedule.warmup_steps=20", "schedule.wsd_decay_steps=81"],
            ["schedule.wsd_decay_steps=81", "80 steps", "shorten it"],
        ),
        (["optimizer.min_learning_rate=1"], ["optimizer.min_learning_rate=1.0", "learning_rate=0.0003", "lower"]),
        (["optimizer.beta1=1"], ["optimizer.beta1=1.0", "below 1"]),
        (["optimizer.beta2=2"], ["optimizer.beta2=2.0", "below 1"]),
    ],
)
def test_an_impossible_setting_is_named(overrides, parts):
    with pytest.raises(ConfigError) as caught:
        resolve(_config(*overrides))
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("width", "memory", "heads"),
    [
        (32, (64, 16), 2),
        (128, (64, 16), 8),
        (512, (128, 32), 8),
        (768, (256, 32), 8),
        (4096, (1024, 128), 8),
        (6656, (2048, 128), 8),
        (8192, (2048, 128), 8),
        (100, (64, 16), 4),
        (30, (64, 16), 1),
    ],
)
def test_sizes_of_components_follow_from_the_models_width(width, memory, heads):
    recipe = {"model": {"hidden_size": width, "num_attention_heads": 1, "head_dim": 16}}
    on = ["memory.enabled=true", "cache.enabled=true"]
    config = resolve(load_config(recipe, on))
    assert (config.memory.memory_size, config.memory.head_dim) == memory
    assert config.cache.num_heads == heads
    assert resolve(config) == config
    # What is said stays; the rest fits it.
    narrow = resolve(load_config(recipe, [*on, "memory.head_dim=8"])).memory
    assert (narrow.memory_size, narrow.head_dim) == (32 * -(-width // 128), 8)
    said = resolve(load_config(recipe, [*on, "memory.memory_size=192"])).memory
    assert (said.memory_size, said.head_dim) == (192, 64)
    assert resolve(load_config(recipe, [*on, "memory.memory_size=2048"])).memory.head_dim == 128


@pytest.mark.parametrize("name", preset_names())
def test_components_fit_every_preset_as_it_is_laid_out(name):
    resolve(load_config(name, ["memory.enabled=true", "cache.enabled=true", "tree.enabled=true"]))


@pytest.mark.parametrize(
    "settings",
    [
        {"parallel": {"virtual_pipeline_model_parallel_size": 2}},
        {"parallel": {"num_layers_in_first_pipeline_stage": 2}},
        {"memory": {"enabled": True, "hidden_size": 64}},
        {"cache": {"enabled": True, "layers": []}},
        {"data": {"prefetch_factor": 2}},
        {"fp8": {"amax_history_length": 4}},
        {"fp8": {"bf16_layers_at_end": 1}},
        {"logging": {"profile_ranks": [1]}},
        {"memory": {"enabled": True, "loss_weight": 1, "num_memory_layers": 1}},
    ],
)
def test_what_a_message_says_undoes_a_recipe(settings):
    with pytest.raises(ConfigError) as caught:
        resolve(load_config(settings))
    [undo] = re.findall(r"\((\S+=null) undoes", str(caught.value))
    resolve(load_config(settings, [undo]))


@pytest.mark.parametrize(("steps", "warmup"), [(4, 0), (20, 2), (19, 1), (21, 20), (400, 20)])
def test_a_run_shorter_than_its_recipes_warmup_warms_up_for_a_tenth(steps, warmup):
    notes: list[str] = []
    config = resolve(load_config("tiny", [f"training.max_steps={steps}"], notes))
    assert config.schedule.warmup_steps == warmup
    lowered = f"schedule.warmup_steps=20 of the recipe does not fit training.max_steps={steps}: lowered to {warmup};"
    assert [note.startswith(lowered) for note in notes] == [True] * (warmup < 20)


def test_a_recipes_final_decay_is_shortened_too():
    notes: list[str] = []
    recipe = {"schedule": {"decay": "wsd", "warmup_steps": 30, "wsd_decay_steps": 50}, "training": {"max_steps": 100}}
    schedule = resolve(load_config(recipe, ["training.max_steps=25"], notes)).schedule
    assert (schedule.warmup_steps, schedule.wsd_decay_steps, len(notes)) == (2, 2, 2)


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ({}, ["training.max_steps=4", "schedule.warmup_steps=4"]),
        ({}, ["training={max_steps: 4}", "schedule={warmup_steps: 4}"]),
        ({"training": {"max_steps": 4}, "schedule": {"warmup_steps": 4}}, []),
        ({"training": {"max_steps": 4}}, ["schedule.warmup_steps=4"]),
        ({"schedule": {"warmup_steps": 4, "decay_steps": 4}}, ["training.max_steps=3"]),
    ],
)
def test_a_warmup_that_was_chosen_for_the_run_is_not_shortened(recipe, overrides):
    with pytest.raises(ConfigError, match=r"schedule.warmup_steps=4 leaves nothing"):
        resolve(load_config(recipe, overrides))


@pytest.mark.parametrize(
    ("overrides", "world", "parts"),
    [
        (
            [f"{_TENSOR}=2", f"{_PIPELINE}=2"],
            6,
            ["6 processes", "tensor 2 × pipeline 2 × context 1 = 4", "multiple of 4"],
        ),
        (["training.global_batch_size=10"], 4, ["training.global_batch_size=10", "data parallel size 4 = 4", "use 12"]),
        (
            [f"{_PIPELINE}=2", f"{_VIRTUAL}=2", "training.global_batch_size=3"],
            2,
            ["3 micro-batches per step", "parallel.pipeline_model_parallel_size=2", "training.global_batch_size"],
        ),
    ],
)
def test_a_world_that_does_not_fit_is_named(overrides, world, parts):
    config = _config(*overrides)
    resolve(config)  # without a world there is nothing to refuse
    with pytest.raises(ConfigError) as caught:
        resolve(config, world)
    for part in parts:
        assert part in str(caught.value)


def test_resolve_is_pure_and_idempotent():
    config = _config("model.hidden_size=1024")
    before = to_dict(config)
    resolved = resolve(config)
    assert to_dict(config) == before
    assert resolved is not config
    assert resolve(resolved) == resolved
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolved.model.hidden_size = 3  # type: ignore[misc]


def test_derived_values():
    config = resolve(_config("model.hidden_size=1024", "training.max_steps=50", "optimizer.learning_rate=0.01"))
    assert (config.model.num_key_value_heads, config.model.head_dim) == (8, 128)
    assert config.model.intermediate_size == 2816  # 8/3 · 1024 = 2730.67, rounded up to a multiple of 256
    assert config.optimizer.min_learning_rate == pytest.approx(0.001)
    assert (config.schedule.decay_steps, config.schedule.wsd_decay_steps) == (50, 5)


def test_what_is_said_is_kept():
    said = [
        "model.num_key_value_heads=2",
        "model.head_dim=32",
        "model.intermediate_size=1000",
        "optimizer.min_learning_rate=0",
        "schedule.decay_steps=70",
        "schedule.wsd_decay_steps=9",
    ]
    config = resolve(_config(*said))
    assert (config.model.num_key_value_heads, config.model.head_dim, config.model.intermediate_size) == (2, 32, 1000)
    assert (config.optimizer.min_learning_rate, config.schedule.decay_steps) == (0, 70)
    assert config.schedule.wsd_decay_steps == 9


@pytest.mark.parametrize(
    ("vocabulary", "tensor", "rows"), [(64000, 1, 64000), (64000, 8, 64512), (8193, 2, 8448), (1, 4, 512)]
)
def test_padded_vocabulary(vocabulary, tensor, rows):
    assert padded_vocab_size(_config(f"model.vocab_size={vocabulary}", f"{_TENSOR}={tensor}")) == rows


@pytest.mark.parametrize(
    ("layers", "stages", "first", "last", "counts"),
    [
        (8, 1, None, None, [8]),
        (8, 4, None, None, [2, 2, 2, 2]),
        (8, 3, 2, None, [2, 3, 3]),
        (8, 3, None, 4, [2, 2, 4]),
        (8, 2, 3, 5, [3, 5]),
        (120, 16, 4, 4, [4, *[8] * 14, 4]),
    ],
)
def test_layers_per_stage(layers, stages, first, last, counts):
    overrides = [f"model.num_layers={layers}", f"{_PIPELINE}={stages}"]
    overrides += [f"{_FIRST}={first}"] * (first is not None) + [f"{_LAST}={last}"] * (last is not None)
    assert layers_per_stage(_config(*overrides)) == counts


def test_replicas_and_micro_batches():
    config = _config(f"{_TENSOR}=2", "training.global_batch_size=24", "training.micro_batch_size=2")
    assert data_parallel_size(config, 8) == 4
    assert micro_batches_per_step(config, 8) == 3
