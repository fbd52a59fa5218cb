"""Every layout trains the same model from the same seed: losses and gradient norms against one process."""

import shutil

import pytest
from torch import Tensor

from tests.training.layouts import train
from tests.workers import WorkerPool
from vishwamai_mp.config import ConfigError

_TENSOR = "parallel.tensor_model_parallel_size="
_PIPELINE = "parallel.pipeline_model_parallel_size="
_CHUNKS = "parallel.virtual_pipeline_model_parallel_size="
_CONTEXT = "parallel.context_parallel_size="
_SEQUENCE = "parallel.sequence_parallel=true"
_SHARDED_OPTIMIZER = "parallel.use_distributed_optimizer=true"
_FULLY_SHARDED = "parallel.fully_sharded=true"

# name: (processes, layout)
LAYOUTS = {
    "DP1 sharded optimizer": (1, [_SHARDED_OPTIMIZER]),
    "DP2": (2, []),
    "DP2 sharded optimizer, overlap": (2, [_SHARDED_OPTIMIZER]),
    "TP2": (2, [_TENSOR + "2"]),
    "TP2 SP": (2, [_TENSOR + "2", _SEQUENCE]),
    "PP2": (2, [_PIPELINE + "2"]),
    "PP2x2": (2, [_PIPELINE + "2", _CHUNKS + "2"]),
    "PP4": (4, [_PIPELINE + "4"]),
    "CP2": (2, [_CONTEXT + "2"]),
    "TP2 PP2": (4, [_TENSOR + "2", _PIPELINE + "2"]),
    "TP2 CP2": (4, [_TENSOR + "2", _CONTEXT + "2"]),
    "TP2 SP DP2 sharded optimizer": (4, [_TENSOR + "2", _SEQUENCE, _SHARDED_OPTIMIZER]),
    "FSDP2": (2, [_FULLY_SHARDED]),
    "FSDP4": (4, [_FULLY_SHARDED]),
}
UNEVEN = {
    "PP2 3+1": (2, [_PIPELINE + "2", "parallel.num_layers_in_first_pipeline_stage=3"]),
    "PP2 1+3": (2, [_PIPELINE + "2", "parallel.num_layers_in_last_pipeline_stage=3"]),
}
# name: settings under which layouts must agree too
VARIANTS = {
    "biases, norms of queries and keys, two rotary bases": [
        *("model.attention_bias=true", "model.qk_norm=head"),
        *("model.sliding_window=7", "model.layer_pattern=SF", "model.window_rope_theta=100"),
        "model.rotary_pattern=RRN",
    ],
    "half of each head turned, by yarn where there is no window": [
        *("model.sliding_window=7", "model.layer_pattern=SF", "model.window_rope_theta=100"),
        "model.rotary_fraction=0.5",
        "model.rope_scaling={rope_type: yarn, factor: 4, original_max_position_embeddings: 8}",
    ],
    "norms behind, of all heads together, windows of some layers": [
        *("model.norm_position=post", "model.qk_norm=full", "model.sliding_window=7", "model.layer_pattern=SF"),
    ],
    "multipliers, soft caps, gated GELU, zero-centered norms": [
        *("model.attention_softcap=0.5", "model.logit_softcap=3"),
        *("model.embedding_multiplier=5", "model.attention_multiplier=1", "model.activation=geglu"),
        *("model.residual_multiplier=0.5", "model.logit_multiplier=2"),
        *("model.norm_zero_centered=true", "model.qk_norm=full"),
    ],
    "tied": ["model.tie_word_embeddings=true"],
    "packed": ["data.reset_attention_mask=true", "data.reset_position_ids=true", "data.eod_mask_loss=true"],
    "window": ["model.sliding_window=7"],
}
# Two micro-batches a step in one process, not four: as much as the order of their gradients' sum needs.
FEW = "training.global_batch_size=4"
FOR_VARIANTS = ("TP2 SP", "PP2x2", "CP2", "FSDP2")  # one for each way of cutting the model
Curve = list[tuple[float, float]]


def curve(
    workers: WorkerPool, processes: int, overrides: list[str], steps: int = 4, within: float | None = None
) -> Curve:
    """The training curve, after a check that all ranks saw the same one; `within` so many seconds, or the pool's."""
    curves = workers.run_within(within or workers.timeout, train, processes, overrides, steps)
    assert all(other == curves[0] for other in curves)
    return curves[0]


@pytest.fixture(scope="module")
def one_process(workers):
    """Curves of one process, by settings and steps, each computed once."""
    known: dict[tuple[tuple[str, ...], int], Curve] = {}

    def get(*overrides: str, steps: int = 4) -> Curve:
        if (overrides, steps) not in known:
            known[overrides, steps] = curve(workers, 1, list(overrides), steps)
        return known[overrides, steps]

    return get


def assert_equal(ours: Curve, theirs: Curve, loss: float = 1e-6, norm: float = 1e-5) -> None:
    assert max(abs(a[0] - b[0]) for a, b in zip(ours, theirs, strict=True)) < loss
    assert max(abs(a[1] - b[1]) for a, b in zip(ours, theirs, strict=True)) < norm


def test_the_model_learns(workers):
    """What follows would be empty if nothing changed over the steps."""
    losses = [loss for loss, _ in curve(workers, 1, [], steps=10)]
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("name", LAYOUTS | UNEVEN)
def test_fp32_layout_equals_one_process(workers, one_process, name):
    processes, layout = (LAYOUTS | UNEVEN)[name]
    assert_equal(curve(workers, processes, layout, steps=10), one_process(steps=10))


@pytest.mark.skipif(shutil.which("g++") is None, reason="training.compile needs a C++ compiler")
@pytest.mark.parametrize("name", ["DP1 sharded optimizer", "TP2 SP"])
def test_compiled_steps_are_the_same(workers, one_process, name):
    """With components, whole layers computed again, gated GELU and rotary positions of half of each head."""
    settings = [*_ALL, "memory.dropout=0", "cache.dropout=0", "training.recompute=full"]
    settings += ["model.activation=geglu", "model.rotary_fraction=0.5"]
    processes, layout = LAYOUTS[name]
    # The C++ compiler may take minutes the first time, where several tests share a slow machine's cores.
    compiled = curve(workers, processes, [*layout, *settings, "training.compile=true"], within=600)
    assert_equal(compiled, one_process(*settings), loss=2e-6)
    assert compiled != curve(workers, processes, [*layout, *settings])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", FOR_VARIANTS)
def test_layouts_agree_in_variants(workers, one_process, name, variant):
    processes, layout = LAYOUTS[name]
    settings = [FEW, *VARIANTS[variant]]
    assert_equal(curve(workers, processes, [*layout, *settings]), one_process(*settings))
    assert one_process(*settings) != one_process(FEW)


# Weights of an ordinary size for once: bf16's rounding grows with the activations.
_ALL = [
    *("memory.enabled=true", "cache.enabled=true", "cache.segment_length=8", "cache.latents_per_segment=2"),
    *("tree.enabled=true", "tree.step_token=3"),
]
_NARROW = "optimizer.moments_in=bf16"
_BF16 = ["precision=bf16", "model.initializer_range=0.04", "training.sequence_length=64"]


@pytest.mark.parametrize("name", ["DP2 sharded optimizer, overlap", "TP2 SP", "PP2", "CP2", "FSDP2"])
def test_bf16_layout_equals_one_process(workers, one_process, name):
    """Within 5e-4: a bf16 activation is rounded at other places when its sum is split."""
    processes, layout = LAYOUTS[name]
    ours, theirs = curve(workers, processes, [*layout, *_BF16]), one_process(*_BF16)
    assert_equal(ours, theirs, loss=5e-4, norm=1e-3)
    assert theirs != one_process(*_BF16[1:])


@pytest.mark.parametrize("name", ["DP2", "DP2 sharded optimizer, overlap", "PP2x2", "FSDP2"])
def test_gradients_may_be_summed_in_bf16(workers, one_process, name):
    """Eight bits of each sum are less than what bf16 layers round themselves."""
    processes, layout = LAYOUTS[name]
    ours, theirs = curve(workers, processes, [*layout, *_BF16, "parallel.reduce_grads_in=bf16"]), one_process(*_BF16)
    assert_equal(ours, theirs, loss=2e-3, norm=1e-2)
    assert ours != curve(workers, processes, [*layout, *_BF16])


@pytest.mark.parametrize("name", ["DP2", "DP2 sharded optimizer, overlap", "PP2x2", "FSDP2"])
def test_moments_may_be_kept_in_bf16(workers, one_process, name):
    """Rounding is of each number alone: all layouts do the same, and nearly what fp32 does."""
    processes, layout = LAYOUTS[name]
    ours, narrow = curve(workers, processes, [*layout, _NARROW]), one_process(_NARROW)
    assert_equal(ours, narrow, loss=1e-5, norm=1e-4)
    assert_equal(ours, one_process(), loss=2e-3, norm=1e-1)
    assert narrow != one_process()


@pytest.mark.parametrize("name", ["TP2 SP", "CP2"])
def test_on_cpus_all_is_deterministic_as_it_is(workers, name):
    """Nothing that is trained with refuses to be so. Told or not, a run repeats its bits."""
    processes, layout = LAYOUTS[name]
    settings = [*layout, *_ALL, FEW]
    told, untold = (
        [curve(workers, processes, [*settings, *more], steps=2) for _ in range(2)]
        for more in (["training.deterministic=true"], [])
    )
    assert told[0] == told[1]
    assert untold[0] == untold[1]
    assert_equal(told[0], untold[0])


@pytest.mark.parametrize("name", ["one process", "PP2x2", "TP2 SP"])
def test_offloaded_activations_come_back_as_they_were(workers, name):
    """With the host in the place of the accelerator as well."""
    processes, layout = LAYOUTS.get(name, (1, []))
    settings = [*layout, *_ALL, *_DROPOUT, "model.num_layers=8"]
    plain = curve(workers, processes, settings, steps=2)
    offloaded = workers.run(train_offloaded, processes, [*settings, "training.offload_layers=1"])
    assert all(found == (plain, found[1]) for found in offloaded)
    assert all(copies > 20 for _, copies in offloaded)


def train_offloaded(overrides: list[str]) -> tuple[Curve, int]:
    """Runs in a worker: the curve of two steps, and how many tensors came back from the host."""
    from unittest import mock

    from vishwamai_mp.model import offloading
    from vishwamai_mp.training import device_checks

    come, count = offloading.HostCopies.to_device, []

    def counted(copies: offloading.HostCopies, host: Tensor) -> Tensor:
        count.append(1)
        return come(copies, host)

    with (
        mock.patch.object(offloading, "is_accelerator", return_value=True),
        mock.patch.object(device_checks, "is_accelerator", return_value=True),
        mock.patch.object(offloading, "_SMALLEST", 1),
        mock.patch.object(offloading.HostCopies, "to_device", counted),
    ):
        return train(overrides, steps=2), len(count)


_FOR_GPUS = {
    "parallel.fuse_grad_accumulation=true": "only Transformer Engine's layers on GPUs do so; set it to false",
    "optimizer.moments_on_host=true": "on CPUs they lie nowhere else; set it to false",
    "training.cuda_graphs=true": "only GPUs are launched by graphs; set it to false",
    "training.offload_layers=1": "on CPUs activations lie nowhere else; leave it out",
    "parallel.nccl={dp_cp: {max_ctas: 8}}": "CPUs communicate by gloo; leave it out",
}


@pytest.mark.parametrize("setting", _FOR_GPUS)
def test_a_cpu_refuses_what_is_for_gpus(workers, setting):
    with pytest.raises(ConfigError, match=_FOR_GPUS[setting]):
        curve(workers, 1, [setting], steps=1)


_PARTS = ["training.recompute=selective", "training.recompute_modules=[core_attn,mlp]"]
_DROPOUT = ["model.attention_dropout=0.1", "model.hidden_dropout=0.1"]


@pytest.mark.parametrize("name", ["one process", "TP2 SP", "PP2", "PP2x2", "CP2", "TP2 CP2", "FSDP2"])
def test_recompute_changes_nothing(workers, name):
    """Under dropout, in each kind of layout: recomputed activations see the masks that the first pass saw."""
    processes, layout = LAYOUTS.get(name, (1, []))
    settings = [*layout, *_DROPOUT, FEW]
    plain = curve(workers, processes, settings, steps=2)
    kinds = [["training.recompute=full"], _PARTS]
    if name in ("one process", "TP2 SP", "PP2", "FSDP2"):  # with two layers or more on each stage
        kinds.append(["training.recompute=full", "training.recompute_layers=1"])
    for kind in kinds:
        again = curve(workers, processes, [*settings, *kind], steps=2)
        assert_equal(again, plain)


def test_dropout_acts(workers, one_process):
    assert curve(workers, 1, _DROPOUT) != one_process()
