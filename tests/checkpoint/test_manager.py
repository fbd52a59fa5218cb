"""Save and load: exact in the same layout, equal in others, whole or not at all."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint import jobs
from tests.workers import WorkerPool
from vishwamai_mp.checkpoint import find_checkpoint
from vishwamai_mp.checkpoint.manifest import record_of
from vishwamai_mp.config import UserError

DP2 = {"use_distributed_optimizer": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {"use_distributed_optimizer": False}),
    "dp2": (2, DP2),
    "tp2": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "vpp2": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    "cp2": (2, {"context_parallel_size": 2}),
    "tp2 pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "fsdp2": (2, {"fully_sharded": True}),
    "fsdp4": (4, {"fully_sharded": True}),
}


@pytest.fixture(scope="module")
def saved(workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the small model, not to be changed."""
    root = tmp_path_factory.mktemp("saved")
    workers.run(jobs.train_and_save, 1, root, jobs.config(), 1)
    return root / "step_00000001"


def assert_equal(left: Path, right: Path) -> None:
    """The same tensors, bit by bit."""
    a, b = jobs.tensors_of(left), jobs.tensors_of(right)
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


@pytest.mark.parametrize(
    ("layout", "precision", "async_save"),
    [
        ("one", "fp32", False),
        ("one", "bf16", False),
        ("dp2", "fp32", False),
        ("dp2", "bf16", True),
        ("dp2", "fp16", False),
        ("tp2", "fp32", True),
        ("pp2", "bf16", False),
        ("vpp2", "fp32", False),
        ("fsdp2", "fp32", True),
        ("fsdp2", "bf16", False),
    ],
)
def test_resume_in_the_same_layout_is_exact(
    workers: WorkerPool, tmp_path: Path, layout: str, precision: str, async_save: bool
) -> None:
    world, parallel = LAYOUTS[layout]
    config = jobs.with_checkpoint(jobs.config(precision, **parallel), async_save=async_save)
    workers.run(jobs.train_and_save, world, tmp_path / "whole", config, 2, 2)
    resumed = workers.run(
        jobs.resume_and_save, world, tmp_path / "whole/step_00000002", tmp_path / "resumed", config, 2
    )
    assert_equal(tmp_path / "whole/step_00000004", tmp_path / "resumed/step_00000004")
    assert all(state == resumed[0] for state in resumed)
    whole, again = (
        json.loads((tmp_path / run / "step_00000004/trainer.json").read_text()) for run in ("whole", "resumed")
    )
    assert whole == again
    assert whole["optimizer"][0]["step"] == 4


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("one", "tp2"),  # the padded vocabulary grows
        ("tp2", "one"),  # and shrinks
        ("one", "dp2"),  # a plain optimizer's state into a distributed one
        ("dp2", "one"),
        ("vpp2", "tp2"),
        ("tp2", "vpp2"),
        ("pp2", "cp2"),
        ("fsdp2", "tp2 pp2"),
        ("tp2 pp2", "fsdp4"),
    ],
)
def test_resume_in_another_layout_is_equal(workers: WorkerPool, tmp_path: Path, source: str, target: str) -> None:
    world, parallel = LAYOUTS[source]
    workers.run(jobs.train_and_save, world, tmp_path / "whole", jobs.config(**parallel), 2, 1)
    world, parallel = LAYOUTS[target]
    other = jobs.config(**parallel)
    workers.run(jobs.resume_and_save, world, tmp_path / "whole/step_00000002", tmp_path / "moved", other, 1)
    assert_equal(tmp_path / "whole/step_00000003", tmp_path / "moved/step_00000003")


def test_tied_embeddings_move_between_stages_and_back(workers: WorkerPool, tmp_path: Path) -> None:
    tied = replace(jobs.MODEL, tie_word_embeddings=True)
    one, stages = jobs.config(model=tied), jobs.config("bf16", tied, pipeline_model_parallel_size=2)
    one = replace(one, precision="bf16")
    workers.run(jobs.train_and_save, 1, tmp_path / "whole", one, 2, 1)
    workers.run(jobs.resume_and_save, 2, tmp_path / "whole/step_00000002", tmp_path / "moved", stages, 1)
    assert_equal(tmp_path / "whole/step_00000003", tmp_path / "moved/step_00000003")


def test_a_distributed_optimizer_of_several_padded_buckets_is_saved_unshifted(
    workers: WorkerPool, tmp_path: Path
) -> None:
    buckets = workers.run(jobs.train_and_save_in_buckets, 2, tmp_path / "many", jobs.config(), 2, 500)
    workers.run(jobs.train_and_save, 1, tmp_path / "one", jobs.config(use_distributed_optimizer=False), 2)
    assert buckets[0] > 3
    assert_equal(tmp_path / "many/step_00000002", tmp_path / "one/step_00000002")


def test_no_process_gathers_the_optimizer(workers: WorkerPool, tmp_path: Path) -> None:
    """Of the two moments and the main weights, each of two replicas keeps half, and needs no more to save or load."""
    model = replace(jobs.MODEL, hidden_size=128, intermediate_size=256)
    config = jobs.config("bf16", model, use_distributed_optimizer=True)
    for found in workers.run(jobs.save_and_load_recorded, 2, tmp_path, config):
        print(found)
        for memory, exchanged in (found["save"], found["load"]):
            assert memory < found["state"]
            assert exchanged < found["state"] / 4  # the weights, which replicas read a share of each


def test_a_job_that_has_not_stepped_yet_resumes(workers: WorkerPool, tmp_path: Path) -> None:
    config = jobs.config(use_distributed_optimizer=False)
    workers.run(jobs.train_and_save, 1, tmp_path / "whole", config, 0, 2)
    workers.run(jobs.resume_and_save, 1, tmp_path / "whole/step_00000000", tmp_path / "resumed", config, 2)
    assert_equal(tmp_path / "whole/step_00000002", tmp_path / "resumed/step_00000002")


def test_an_fp32_checkpoint_becomes_main_parameters_of_a_bf16_run(workers: WorkerPool, tmp_path: Path) -> None:
    workers.run(jobs.train_and_save, 1, tmp_path / "fp32", jobs.config(), 2)
    workers.run(jobs.resume_and_save, 1, tmp_path / "fp32/step_00000002", tmp_path / "bf16", jobs.config("bf16"), 0)
    fp32 = jobs.tensors_of(tmp_path / "fp32/step_00000002")
    bf16 = jobs.tensors_of(tmp_path / "bf16/step_00000002")
    weight = "decoder.layers.2.mlp.linear_fc2.weight"
    assert torch.equal(fp32[weight], bf16[f"optimizer.state.fp32_param.{weight}"])
    assert torch.equal(fp32[weight].bfloat16(), bf16[weight])


@pytest.mark.parametrize(("source", "target"), [("fsdp2", "tp2 pp2"), ("tp2 pp2", "fsdp4"), ("fsdp4", "dp2")])
def test_main_parameters_of_bf16_move_to_another_layout(
    workers: WorkerPool, tmp_path: Path, source: str, target: str
) -> None:
    world, parallel = LAYOUTS[source]
    workers.run(jobs.train_and_save, world, tmp_path / "whole", jobs.config("bf16", **parallel), 2)
    world, parallel = LAYOUTS[target]
    path = tmp_path / "whole/step_00000002"
    workers.run(jobs.resume_and_save, world, path, tmp_path / "moved", jobs.config("bf16", **parallel), 0)
    assert_equal(path, tmp_path / "moved/step_00000002")
    assert "optimizer.state.fp32_param.output_layer.weight" in jobs.tensors_of(path)


def test_weights_only_starts_the_optimizer_afresh(workers: WorkerPool, tmp_path: Path) -> None:
    workers.run(jobs.train_and_save, 1, tmp_path / "whole", jobs.config("bf16"), 2)
    path = tmp_path / "whole/step_00000002"
    workers.run(jobs.load_weights_and_save, 1, path, tmp_path / "fresh", jobs.config("bf16"))
    old, fresh = jobs.tensors_of(path), jobs.tensors_of(tmp_path / "fresh/step_00000002")
    weight = "output_layer.weight"
    assert torch.equal(old[weight], fresh[weight])
    assert torch.equal(old[weight].float(), fresh[f"optimizer.state.fp32_param.{weight}"])
    assert old[f"optimizer.state.exp_avg.{weight}"].abs().max() > 0
    assert fresh[f"optimizer.state.exp_avg.{weight}"].abs().max() == 0


def test_weights_only_fills_a_fully_sharded_model(workers: WorkerPool, tmp_path: Path) -> None:
    workers.run(jobs.train_and_save, 1, tmp_path / "whole", jobs.config("bf16"), 2)
    path, fully_sharded = tmp_path / "whole/step_00000002", jobs.config("bf16", fully_sharded=True)
    for world, name in ((1, "one"), (2, "split")):
        workers.run(jobs.load_weights_and_save, world, path, tmp_path / name, fully_sharded)
    assert_equal(tmp_path / "one/step_00000002", tmp_path / "split/step_00000002")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 48}, r"model.hidden_size=48 but the checkpoint has 24"),
        ({"num_layers": 2}, r"model.num_layers=2 but the checkpoint has 4"),
        ({"vocab_size": 302}, r"model.vocab_size=302 but the checkpoint has 301"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    workers: WorkerPool, tmp_path: Path, saved: Path, change: dict[str, Any], message: str
) -> None:
    other = jobs.config(model=replace(jobs.MODEL, **change), tensor_model_parallel_size=2)
    with pytest.raises(UserError, match=message):
        workers.run(jobs.resume_and_save, 2, saved, tmp_path / "other", other, 0)


def test_a_checkpoint_without_optimizer_says_so(workers: WorkerPool, tmp_path: Path) -> None:
    workers.run(jobs.save_weights, 1, tmp_path, jobs.config())
    with pytest.raises(UserError, match=r"no optimizer state.*load_optimizer=false"):
        workers.run(jobs.resume_and_save, 1, tmp_path / "step_00000000", tmp_path / "other", jobs.config(), 0)


def test_retention_keeps_the_last_and_the_milestones(workers: WorkerPool, tmp_path: Path) -> None:
    config = jobs.with_checkpoint(jobs.config(), keep_last=2, keep_every=3)
    workers.run(jobs.save_every_step, 1, tmp_path, config, 7)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "latest",
        "step_00000003",
        "step_00000006",
        "step_00000007",
    ]


def test_nobody_waits_while_the_first_rank_publishes_and_deletes(workers: WorkerPool, tmp_path: Path) -> None:
    config = jobs.with_checkpoint(jobs.config(use_distributed_optimizer=True), keep_last=1, async_save=True)
    publishing, deleting, after = workers.run(jobs.save_while_the_first_rank_is_slow, 2, tmp_path, config)[0]
    assert publishing == ["step_00000001"]
    assert len(deleting) == 2
    assert after == deleting[1:]


def test_a_save_that_all_wait_for_does_not_wait_for_deletions(workers: WorkerPool, tmp_path: Path) -> None:
    config = jobs.with_checkpoint(jobs.config(), keep_last=1, async_save=False)
    at_return, after = workers.run_within(60, jobs.save_while_deleting_is_slow, 2, tmp_path, config)[0]
    assert at_return == ["step_00000001", "step_00000002"]
    assert after == at_return[1:]


def test_the_final_save_is_written_before_returning_and_once(workers: WorkerPool, tmp_path: Path) -> None:
    config = jobs.with_checkpoint(jobs.config(), async_save=True)
    assert workers.run(jobs.save_twice_with_final, 2, tmp_path, config) == [(True, True)] * 2


def test_megatron_cores_own_saving_still_works_afterwards(workers: WorkerPool, tmp_path: Path) -> None:
    workers.run(jobs.save_and_let_the_core_save, 1, tmp_path / "ours", tmp_path / "core", jobs.config())
    assert (tmp_path / "core/.metadata").exists()


def test_latest_skips_what_is_broken_on_all_ranks(workers: WorkerPool, tmp_path: Path) -> None:
    workers.run(jobs.save_every_step, 2, tmp_path, jobs.config(), 3)
    damaged = next((tmp_path / "step_00000003").glob("*.distcp"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    (tmp_path / "step_00000002/.metadata").unlink()
    found = workers.run(jobs.latest, 2, tmp_path, jobs.config())
    assert found[0] == found[1] == find_checkpoint(tmp_path)
    assert found[0].step == 1
    assert found[0].skipped == [
        f"step_00000003 skipped: {damaged.name} is damaged (its checksum differs)",
        "step_00000002 skipped: .metadata is missing",
    ]


def test_code_in_a_checkpoint_is_refused_before_any_rank_reads_it(
    workers: WorkerPool, tmp_path: Path, saved: Path
) -> None:
    path = Path(shutil.copytree(saved, tmp_path / "step_00000001"))
    (path / ".metadata").write_bytes(b"cposix\nmkdir\n(Vowned\ntR.")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][".metadata"] = asdict(record_of(path / ".metadata"))
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"refused: not plain checkpoint metadata \(it asks for posix.mkdir\)"):
        workers.run(jobs.resume_and_save, 2, path, tmp_path / "other", jobs.config(), 0)
    assert not Path("owned").exists()


def test_tensors_that_the_model_has_no_place_for_are_refused(workers: WorkerPool, tmp_path: Path, saved: Path) -> None:
    """A component of a later version, say. Silently left out, the model would compute something else."""
    path = Path(shutil.copytree(saved, tmp_path / "step_00000001"))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["tensors"]["decoder.layers.1.compass.output.weight"] = {"shape": [24, 24], "dtype": "float32"}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"has 1 tensor that this model has no place for, decoder\.layers\.1\.compass"):
        workers.run(jobs.resume_and_save, 2, path, tmp_path / "other", jobs.config(), 0)


def test_a_damaged_checkpoint_that_the_user_names_is_refused(workers: WorkerPool, tmp_path: Path, saved: Path) -> None:
    path = Path(shutil.copytree(saved, tmp_path / "step_00000001"))
    content = (path / "trainer.json").read_bytes()
    (path / "trainer.json").write_bytes(content.replace(b"3.14", b"3.41"))
    with pytest.raises(UserError, match=r"trainer.json is damaged \(its checksum differs\)"):
        workers.run(jobs.resume_and_save, 2, path, tmp_path / "other", jobs.config(), 0)
