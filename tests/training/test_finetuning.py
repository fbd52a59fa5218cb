"""Adapters and frozen parts: what is trained, that it is the same at every layout, and that it resumes exactly."""

import pytest

from tests.synthetic import tiny_corpus
from tests.training.layouts import SMALL
from tests.training.runs import VOCAB, hashes, train
from tests.training.test_layouts import assert_equal, curve
from vishwamai_mp.config import ConfigError, load_config, resolve

_LORA = ["lora.enabled=true", "lora.rank=4", "optimizer.learning_rate=0.003"]
_PIPELINE = ["parallel.pipeline_model_parallel_size=2"]
_TENSOR = ["parallel.tensor_model_parallel_size=2"]
_SEQUENCE = [*_TENSOR, "parallel.sequence_parallel=true"]
_SHARDED_OPTIMIZER = ["parallel.use_distributed_optimizer=true"]
_MEMORY = "memory={enabled: true, memory_size: 32, head_dim: 8, chunk_size: 16, layers: [1], dropout: 0.0}"
# name: (processes, layout)
LAYOUTS = {
    "TP2": (2, _TENSOR),
    "TP2 SP, recomputed": (2, [*_SEQUENCE, "training.recompute=full"]),
    "PP2x2": (2, [*_PIPELINE, "parallel.virtual_pipeline_model_parallel_size=2"]),
    "DP2 sharded optimizer": (2, _SHARDED_OPTIMIZER),
    "CP2": (2, ["parallel.context_parallel_size=2"]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_adapters_train_alike_at_every_layout(workers, one_process, name):
    processes, layout = LAYOUTS[name]
    assert_equal(curve(workers, processes, [*layout, *_LORA], steps=5), one_process(*_LORA))


@pytest.fixture(scope="module")
def one_process(workers):
    known = {}

    def get(*settings):
        if settings not in known:
            known[settings] = curve(workers, 1, list(settings), steps=5)
        return known[settings]

    return get


def test_adapters_learn_from_the_base_model(workers, one_process):
    plain, ours = one_process("optimizer.learning_rate=0.003"), one_process(*_LORA)
    assert ours[0][0] == plain[0][0]  # B is zero
    assert ours[-1][0] < ours[0][0] - 0.05


def test_dropout_before_adapters_is_recomputed_alike(workers):
    settings = [*_TENSOR, *_LORA, "lora.dropout=0.2"]
    plain = curve(workers, 2, settings, steps=3)
    assert_equal(curve(workers, 2, [*settings, "training.recompute=full"], steps=3), plain)
    assert plain != curve(workers, 2, [*_TENSOR, *_LORA], steps=3)


def test_the_first_adapters_of_a_recomputed_mlp_have_gradients(workers, one_process):
    """Nothing before them has: recomputation must go back through them all the same."""
    settings = [*_LORA, "lora.targets=[linear_fc1]"]
    again = ["training.recompute=selective", "training.recompute_modules=[mlp]"]
    assert_equal(one_process(*settings, *again), one_process(*settings))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tiny_corpus(tmp_path_factory.mktemp("corpus"), VOCAB, 8000, seed=1)


def note_tensors(trainer, notes):
    notes.append(hashes(trainer))


# name: (processes, settings). Of the two stages the first has nothing to train.
FROZEN = {
    "memory alone": (1, []),
    "PP2 recomputed, bf16": (2, [*_PIPELINE, "precision=bf16", "training.recompute=full"]),
    "DP2 sharded optimizer": (2, _SHARDED_OPTIMIZER),
}


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_parameters_stay_bit_for_bit_and_have_no_optimizer_state(workers, corpus, tmp_path, name):
    """Ended after 4 of 6 steps without a warning, resumed from step 3: the same as without an interruption."""
    processes, layout = FROZEN[name]
    settings = [*layout, _MEMORY, "training.freeze=[base]", "training.max_steps=6", "checkpoint.save_every=3"]
    whole = workers.run(train, processes, tmp_path / "a", corpus, settings, prepare=note_tensors)
    for outcome in whole:
        before, after = outcome.notes[0], outcome.tensors
        of_model = [key for key in before if key.startswith("chunk")]
        trained = {key for key in of_model if ".memory." in key}
        changed = {key for key in of_model if before[key] != after[key]}
        assert changed <= trained
        assert bool(changed) == bool(trained)
        # Of a small parameter, one replica of the sharded optimizer may have all.
        assert len([key for key in after if key.endswith("exp_avg")]) <= len(trained)
    assert any(".memory." in key for outcome in whole for key in outcome.tensors)
    first = workers.run(train, processes, tmp_path / "b", corpus, settings, crash_after=4)
    second = workers.run(train, processes, tmp_path / "b", corpus, settings)
    assert "resumed from step_00000003" in second[0].said
    for expected, before_, after_ in zip(whole, first, second, strict=True):
        assert before_.losses + after_.losses[1:] == expected.losses
        assert after_.tensors == expected.tensors


def test_adapters_start_on_a_plain_checkpoint_and_resume_exactly(workers, corpus, tmp_path):
    """Under tensor and sequence parallelism, with dropout; the base is trained on one process before."""
    workers.run(train, 1, tmp_path / "base", corpus, ["training.max_steps=2"])
    start = [f"checkpoint.load={tmp_path}/base/checkpoints/step_00000002", "checkpoint.load_optimizer=false"]
    settings = [*start, *_LORA, "lora.dropout=0.1", *_SEQUENCE, "training.max_steps=6", "checkpoint.save_every=3"]
    whole = workers.run(train, 2, tmp_path / "a", corpus, settings)
    first = workers.run(train, 2, tmp_path / "b", corpus, settings, crash_after=4)
    second = workers.run(train, 2, tmp_path / "b", corpus, settings)
    assert "resumed from step_00000003" in second[0].said
    for expected, before, after in zip(whole, first, second, strict=True):
        assert before.losses + after.losses[1:] == expected.losses
        assert after.tensors == expected.tensors
        adapters = [key for key in after.tensors if "_adapter." in key]
        assert len([key for key in after.tensors if key.endswith("exp_avg")]) == len(adapters) == 2 * 4 * 2
    (continued,) = workers.run(train, 1, tmp_path / "c", corpus, [*start, "training.max_steps=1"])
    assert abs(whole[0].losses[0] - continued.losses[0]) < 1e-6  # fresh adapters change nothing


@pytest.mark.parametrize("layout", [_SEQUENCE, ["parallel.fully_sharded=true"]], ids=["TP2 SP", "FSDP"])
def test_a_value_head_starts_on_a_checkpoint_without_one(workers, corpus, tmp_path, layout):
    workers.run(train, 1, tmp_path / "base", corpus, ["training.max_steps=2"])
    start = [f"checkpoint.load={tmp_path}/base/checkpoints/step_00000002", "checkpoint.load_optimizer=false"]
    more = [*start, *layout, "training.max_steps=2", "checkpoint.save_every=1"]
    plain = workers.run(train, 2, tmp_path / "plain", corpus, more)
    valued = workers.run(train, 2, tmp_path / "valued", corpus, [*more, "tree.enabled=true"])
    for without, with_head in zip(plain, valued, strict=True):
        assert with_head.losses[0] == pytest.approx(without.losses[0], abs=1e-6)
        assert any("value_head" in key for key in with_head.tensors)
    again = workers.run(train, 2, tmp_path / "valued", corpus, [*more, "tree.enabled=true", "training.max_steps=3"])
    assert "resumed from step_00000002" in again[0].said


def test_a_run_is_not_resumed_with_a_value_head_that_it_lacks(workers, corpus, tmp_path):
    workers.run(train, 1, tmp_path, corpus, ["training.max_steps=2"])
    with pytest.raises(Exception, match=r"has no value head .*checkpoint\.load_optimizer=false, else set tree"):
        workers.run(train, 1, tmp_path, corpus, ["training.max_steps=3", "tree.enabled=true"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.freeze=[base]"], "leaves nothing to train"),
        (["training.freeze=[memory]"], r"there is no memory at memory\.enabled=false"),
        (["training.freeze=[value_head]"], r"tree\.enabled=false"),
        (["training.freeze=[base, base]", _MEMORY], "name each part once"),
        (["training.freeze=[heads]"], r"training\.freeze.*=heads"),
        (["lora.enabled=true", "lora.targets=[]"], r"lora\.targets=\[\]"),
        (["lora.enabled=true", "lora.dropout=1.0"], r"lora\.dropout=1\.0"),
        (["lora.enabled=true", "parallel.fully_sharded=true"], r"set\s+parallel\.fully_sharded=false"),
    ],
)
def test_settings_that_cannot_work(overrides, message):
    with pytest.raises(ConfigError, match=message):
        resolve(load_config(SMALL, overrides))
