"""Families by name: which one a model is exported as, and one of the user's own."""

import json
from pathlib import Path

import pytest

from tests.conversion import models
from tests.conversion.test_third_party import assert_same_model, tensors_of_folder, write_folder
from tests.programs import run_forked
from tests.workers import WorkerPool
from vishwamai_mp.config import ConfigError, UserError
from vishwamai_mp.conversion.families import family_holding, family_named
from vishwamai_mp.conversion.folder import open_folder
from vishwamai_mp.conversion.from_hf import import_folder
from vishwamai_mp.conversion.mapping import WeightNames, plain_mapping
from vishwamai_mp.conversion.source import open_source
from vishwamai_mp.conversion.to_hf import ExportOptions, export_folder
from vishwamai_mp.conversion.verify import compare

_TOOL = Path(__file__).parents[2] / "tools/convert_checkpoint.py"
SEED_OSS = "examples.extensions.seed_oss:SeedOss"


def test_a_model_is_exported_as_the_first_family_that_holds_it() -> None:
    def chosen(*overrides: str) -> str:
        return family_holding(models.configure(list(overrides), 1).model).architecture

    assert chosen() == "LlamaForCausalLM"
    assert chosen("model.sliding_window=8") == "MistralForCausalLM"
    assert chosen("model.attention_bias=true") == "Qwen2ForCausalLM"
    assert chosen("model.qk_norm=head") == "Qwen3ForCausalLM"
    assert chosen("model.rotary_fraction=0.5") == "Phi3ForCausalLM"
    assert family_holding(models.configure([], 1).model, components=True).model_type == "vishwamai"


def test_the_user_may_name_another_that_holds_it() -> None:
    plain = models.configure([], 1).model
    assert family_holding(plain, family_named("MistralForCausalLM")).model_type == "mistral"
    with pytest.raises(UserError, match=r"Qwen3ForCausalLM cannot hold model\.qk_norm=none"):
        family_holding(plain, family_named("Qwen3ForCausalLM"))
    with pytest.raises(UserError, match="--family Qwen: use one of LlamaForCausalLM"):
        family_named("Qwen")
    with pytest.raises(ConfigError, match=r"derive it from vishwamai_mp\.conversion\.families\.family\.Family"):
        family_named("examples.extensions.lion:Lion")


def test_parts_of_one_name_are_one_tensor() -> None:
    """2 groups of 2 heads of 2 rows, q q k v | q q k v here; there all queries, all keys, all values."""
    fused = "self_attn.qkv_proj"
    names = WeightNames(queries=fused, keys=fused, values=fused, gate="mlp.gate_up_proj", up="mlp.gate_up_proj")
    small = ["model.hidden_size=8", "model.num_attention_heads=4", "model.num_key_value_heads=2"]
    config = models.configure([*small, "model.intermediate_size=5", "model.attention_bias=true"], 1)
    table = {mapped.name: mapped for mapped in plain_mapping(config.model, names)}
    for ending, width in (("weight", (8,)), ("bias", ())):
        (part,) = table[f"decoder.layers.0.self_attention.linear_qkv.{ending}"].parts
        assert part.name == f"model.layers.0.{fused}.{ending}"
        assert part.shape == (16, *width)
        assert part.rows == ((0, 4), (8, 12), (4, 6), (12, 14), (6, 8), (14, 16))
    (part,) = table["decoder.layers.0.mlp.linear_fc1.weight"].parts
    assert (part.name, part.shape, part.rows) == ("model.layers.0.mlp.gate_up_proj.weight", (10, 8), ((0, 5), (5, 10)))


@pytest.mark.parametrize("bias", [True, False])
def test_a_family_of_the_users_own_goes_in_and_out(workers: WorkerPool, tmp_path: Path, bias: bool) -> None:
    own, hf, run, again = family_named(SEED_OSS), *(tmp_path / name for name in ("hf", "run", "again"))
    write_folder(hf, "SeedOss", num_key_value_heads=2, head_dim=20, attention_bias=bias)
    with pytest.raises(UserError, match="SeedOssForCausalLM, cannot be converted"):
        models.import_(hf, run)
    import_folder(open_folder(hf, own=own), run, None)
    assert models.step_config(run).model.attention_bias is bias
    assert_same_model(workers, run, hf)
    source = open_source(run, own)
    export_folder(source, again, ExportOptions())
    models.assert_equal(tensors_of_folder(hf), tensors_of_folder(again))
    assert json.loads((again / "config.json").read_text())["architectures"] == ["SeedOssForCausalLM"]
    assert compare(source, again, [], 4).is_equal


def test_the_tool_takes_a_family_by_name(tmp_path: Path) -> None:
    write_folder(tmp_path / "hf", "Mistral", num_hidden_layers=1, num_key_value_heads=2, sliding_window=None)

    def convert(direction: str, load: str, output: str, *more: str) -> tuple[int, str]:
        options = ["--load", str(tmp_path / load), "--output", str(tmp_path / output), *more]
        done = run_forked([_TOOL, direction, *options])
        return done.returncode, done.stderr

    status, said = convert("from-hf", "hf", "run", "--family", SEED_OSS)
    assert status == 1
    assert "MistralForCausalLM is not the SeedOssForCausalLM that --family names" in said
    assert convert("from-hf", "hf", "run")[0] == 0
    assert convert("to-hf", "run", "out", "--family", "MistralForCausalLM")[0] == 0
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == ["MistralForCausalLM"]


def test_norms_of_all_heads_are_whole_in_checkpoints(workers: WorkerPool, tmp_path: Path) -> None:
    switches = ["model.norm_position=post", "model.qk_norm=full"]
    workers.run(models.save_run, 1, tmp_path / "one", switches)
    workers.run(models.save_run, 2, tmp_path / "two", [*switches, "parallel.tensor_model_parallel_size=2"])
    models.assert_equal(*(models.tensors_of(tmp_path / run) for run in ("one", "two")))
    models.export(tmp_path / "two", tmp_path / "hf")
    (result,) = workers.run(models.compare_both, 1, tmp_path / "one", tmp_path / "hf", [], 8)
    assert result.is_equal, result.describe()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.layer_pattern=SF"], "without model.sliding_window"),
        (["model.layer_pattern=SSX", "model.sliding_window=8"], "write S for each layer with the window"),
        (["model.layer_pattern=SS", "model.sliding_window=8"], "leave"),
    ],
)
def test_patterns_that_say_nothing_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        models.configure(overrides, 1)


def test_scaling_of_layers_with_a_window_alone_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "hf", "Olmo3", num_hidden_layers=4)
    path = tmp_path / "hf/config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"]["sliding_attention"] |= {"rope_type": "linear", "factor": 2.0}
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="rotary scaling 'linear' of layers with a window is not supported"):
        open_folder(tmp_path / "hf")
