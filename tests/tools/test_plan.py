"""tools/plan.py as its users run it, in this process: it needs no torch and takes a moment."""

import importlib.util
import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from vishwamai_mp.config import load_config, resolve
from vishwamai_mp.config.errors import UserError
from vishwamai_mp.observability.plan_page import schedule
from vishwamai_mp.planning.footprint import job_footprint

_RECIPES = Path(__file__).resolve().parents[2] / "examples" / "recipes"
_TOOL = Path(__file__).resolve().parents[2] / "tools" / "plan.py"
_spec = importlib.util.spec_from_file_location("plan_tool", _TOOL)
assert _spec
assert _spec.loader
tool = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tool)


@pytest.fixture
def plan(monkeypatch, capsys):
    """Runs the tool; returns what it printed."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["plan.py", *arguments])
        tool.main()
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    ("preset", "gpus"), [("125m", 1), ("7b", 8), ("30b", 64), ("vishwamai-120l", 1024), ("vishwamai-120l", 4096)]
)
def test_the_best_layout_is_one_that_trains_and_fits(plan, tmp_path, preset, gpus):
    written = tmp_path / "recipe.yaml"
    found = json.loads(plan("--config", preset, "--gpus", str(gpus), "--json", "--write-config", str(written)))
    best = found["best"]
    config = resolve(load_config(written), gpus)
    assert best["bytes_per_gpu"] == job_footprint(config, gpus).total < found["usable_bytes_per_gpu"]
    assert best["parallel"]["tensor_model_parallel_size"] == config.parallel.tensor_model_parallel_size
    assert best["training"]["micro_batch_size"] == config.training.micro_batch_size
    assert config.training.global_batch_size == load_config(preset).training.global_batch_size
    assert 0.2 < best["mfu"] < 0.6
    assert sum(best["time"].values()) == pytest.approx(best["step_seconds"])
    rates = [layout["tokens_per_second_per_gpu"] for layout in found["layouts"]]
    assert rates == sorted(rates, reverse=True)
    assert best["tokens_per_second_per_gpu"] == rates[0]
    assert all(rejected["reason"] for rejected in found["rejected"])


def test_in_words(plan):
    text = plan("--config", "vishwamai-120l", "--gpus", "1024", "--explain", "--tokens", "1e12", "tree.enabled=true")
    for expected in ("1 T tokens", "pipeline bubble", "optimizer", "a tree search", "the host's memory of a save"):
        assert expected in text


def test_the_page_has_every_part_and_no_address(plan, tmp_path):
    page = tmp_path / "plan.html"
    plan("--config", "vishwamai-120l", "--gpus", "1024", "--html", str(page), "training.output_dir=<b>mine</b>")
    text = page.read_text()
    for heading in ("Memory of each stage", "A step's time", "pipeline's timeline", "Throughput over GPUs", "Rejected"):
        assert heading in text.replace("&#39;", "'")
    assert text.count("data-tip") > 50
    assert "http" not in text
    with pytest.raises(UserError):
        plan("--config", "vishwamai-120l", "--gpus", "8", "--html", str(page))
    assert "Nothing fits. The smallest layout lacks" in page.read_text()


def test_the_timeline_is_one_forward_one_backward():
    """As long as arXiv 2104.04473, section 2.2, says: (m + p − 1) forward and backward passes; no two at once."""
    boxes, end = schedule(4, 8)
    assert end == 3 * (8 + 4 - 1)
    for stage in range(4):
        own = sorted((start, length) for at, _, start, length in boxes if at == stage)
        assert len(own) == 16
        assert all(a + length <= b for (a, length), (b, _) in pairwise(own))


@pytest.mark.parametrize("path", sorted(_RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_what_the_planner_writes(plan, tmp_path, path):
    preset, gpus = path.stem.rsplit("-on-", 1)
    written = tmp_path / "recipe.yaml"
    plan("--config", preset, "--gpus", gpus, "--write-config", str(written))
    assert path.read_text() == written.read_text()
    resolve(load_config(path), int(gpus))


def test_what_fits_nowhere_is_told_what_it_lacks(plan, capsys):
    with pytest.raises(UserError, match="7b does not fit on 1 × RTX 4090"):
        plan("--config", "7b", "--gpus", "1", "--gpu", "rtx4090")
    told = capsys.readouterr().out
    assert "more than there is" in told
    assert "the nearest that fits: " in told
    with pytest.raises(UserError, match=r"no layout of 7b is possible on 7 GPUs: .*use 518"):
        plan("--config", "7b", "--gpus", "7", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["best"] is None
    assert "use 518" in found["rejected"][0]["reason"]
    assert found["nearest_that_fits"]["gpus"] == 8
    with pytest.raises(UserError, match="does not fit"):
        plan("--config", "125m", "--gpus", "1", "model.num_layers=20011", "model.hidden_size=12000")  # a prime number
    assert "no power of two up to 131,072 GPUs holds it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h10"], "did you mean h100"),
        (["--gpus", "0"], "--gpus, --top and --tokens must be positive"),
        (["--stack", "megatrom"], "did you mean megatron"),
        (["--gpu", "v100-32"], "use precision=fp16"),
        (["--gpu", "a100-80", "precision=fp8_current"], "has no FP8"),
        (["--gpu", "h200", "precision=nvfp4"], "has no FP4"),
        (["model.hidden_size=7"], "multiple of model.num_attention_heads"),
    ],
)
def test_a_mistake_is_a_line(plan, arguments, message):
    with pytest.raises(UserError, match=message):
        plan("--config", "7b", "--gpus", "8", *arguments)


def test_fp32_is_planned_as_gpus_compute_it(plan):
    """Half the rate in tensor cores, attention that keeps its weights, and none over context parallel ranks."""
    rates, long = {}, ["training.sequence_length=8192", "model.max_position_embeddings=8192"]
    for precision in ("bf16", "fp32"):
        arguments = ("--config", "1b", "--gpus", "8", "--top", "999", "--json", f"precision={precision}", *long)
        found = json.loads(plan(*arguments))
        rates[precision] = found["best"]["tokens_per_second_per_gpu"]
        contexts = {layout["parallel"]["context_parallel_size"] for layout in found["layouts"]}
        assert (contexts == {1}) == (precision == "fp32")
    assert rates["fp32"] < rates["bf16"] / 2.5


def test_what_no_gpu_kernel_does_is_not_planned(plan, capsys):
    with pytest.raises(UserError, match=r"no layout .* attention has no soft cap"):
        plan("--config", "1b", "--gpus", "8", "model.attention_softcap=30")
    assert "no layout is possible" in capsys.readouterr().out
