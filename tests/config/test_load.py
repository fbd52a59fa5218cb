"""Reading configurations: recipes, presets, the guide's JSON, overrides, and what is refused with which words."""

import dataclasses
import json
import subprocess
import sys
from types import NoneType, UnionType
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from vishwamai_mp.config import ConfigError, PretrainConfig, load_config, preset_names, resolve, to_dict, to_yaml
from vishwamai_mp.config.schema import Blend, Split
from vishwamai_mp.config.yaml_text import read_yaml

_GUIDE = {
    "model_config": {
        "dim": 8192,
        "num_attention_heads": 64,
        "num_hidden_layers": 120,
        "vocab_size": 64000,
        "max_position_embeddings": 32768,
    }
}
# No lone surrogates: UTF-8 has none. No NUL: names of files have none.
_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
_WEIGHT = st.floats(0, 1e6)


def _message(source, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- sources


def test_an_empty_recipe_is_the_defaults(tmp_path):
    (tmp_path / "r.yaml").write_text("# nothing yet\nmodel:\n")
    assert load_config(tmp_path / "r.yaml") == load_config({}) == PretrainConfig()


def test_overrides_win_over_the_recipe(tmp_path):
    (tmp_path / "r.yaml").write_text("model: {hidden_size: 64}\nprecision: fp32\n")
    config = load_config(
        tmp_path / "r.yaml", ["model.hidden_size=128", "--training.max_steps=7", "optimizer.learning_rate=3e-4"]
    )
    assert (config.model.hidden_size, config.precision) == (128, "fp32")
    assert (config.training.max_steps, config.optimizer.learning_rate) == (7, 3e-4)


def test_overrides_reach_nested_sections():
    config = load_config({}, ["model.rope_scaling.rope_type=linear", "model.rope_scaling.factor=4"])
    assert config.model.rope_scaling is not None
    assert config.model.rope_scaling.factor == 4.0


def test_a_mapping_given_as_source_is_not_changed():
    source = {"model": {"dim": 64}}
    load_config(source, ["model.dim=128", "training.seed=3"])
    assert source == {"model": {"dim": 64}}


def test_the_guides_json_loads_as_is(tmp_path):
    (tmp_path / "guide.json").write_text(json.dumps(_GUIDE))
    model = resolve(load_config(tmp_path / "guide.json")).model
    assert (model.hidden_size, model.num_layers, model.num_attention_heads) == (8192, 120, 64)
    assert (model.vocab_size, model.max_position_embeddings) == (64000, 32768)
    assert (model.intermediate_size, model.num_key_value_heads, model.head_dim) == (22016, 64, 128)
    assert not model.tie_word_embeddings


def test_the_guides_names_work_in_overrides():
    assert load_config({}, ["model_config.dim=256", "model.num_hidden_layers=3"]) == load_config(
        {"model": {"hidden_size": 256, "num_layers": 3}}
    )


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_resolves(name):
    config = resolve(load_config(name))
    assert config.training.output_dir == f"runs/{name}"


def test_the_flagship_is_the_guides_model():
    flagship, guide = resolve(load_config("vishwamai-120l")).model, resolve(load_config(_GUIDE)).model
    assert dataclasses.replace(flagship, rope_theta=guide.rope_theta) == guide


def test_the_presets_are_those_announced():
    of_open_models = {"llama3-8b", "qwen3-8b", "gemma3-4b", "olmo2-7b"}
    assert set(preset_names()) == {"tiny", "125m", "1b", "7b", "30b", "vishwamai-120l"} | of_open_models


# --- what is refused


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_layer=3", "unknown key 'model.num_layer' in section 'model'; did you mean 'model.num_layers'?"),
        ("model.hidden-size=3", "unknown key 'model.hidden-size' in section 'model'; did you mean 'model.hidden_size'"),
        ("modle.num_layers=3", "unknown key 'modle'; did you mean 'model'?"),
        ("xyzzy=1", "unknown key 'xyzzy'; known: model, memory, "),
        ("checkpoint.xyzzy=1", "unknown key 'checkpoint.xyzzy' in section 'checkpoint'; known: save_every, "),
        ("model.rope_scaling={rope_type: linear, facto: 2}", "did you mean 'model.rope_scaling.factor'?"),
        ("model.rope_scaling={rope_type: linear}", "model.rope_scaling.factor is missing"),
        ("model.num_layers=true", "model.num_layers=true: use a number, not true or false"),
        ("optimizer.learning_rate=false", "optimizer.learning_rate=false: use a number"),
        ("memory.layers=[true]", "memory.layers.0=true: use a number"),
        ("model.num_layers=two", "model.num_layers=two: use a decimal number, such as 1000 or 3e-4"),
        ("model.num_layers=0x10", "model.num_layers=0x10: use a decimal number"),
        ("model.num_layers=1:30", "model.num_layers=1:30: use a decimal number"),
        ("model.num_layers=1,000", "model.num_layers=1,000: use a decimal number"),
        ("model.num_layers=1__0", "model.num_layers=1__0: use a decimal number"),
        ("model.num_layers=!!int 010", "the value is not valid YAML (could not determine a constructor for the tag"),
        ("optimizer.learning_rate=1e400", "optimizer.learning_rate=inf: input should be a finite number"),
        ("model.num_layers=2.5", "model.num_layers=2.5: input should be a valid integer"),
        ("model.num_layers=0", "model.num_layers=0: input should be greater than 0"),
        ("model.num_layers=", "the value is empty; write one, or model.num_layers=null for the default"),
        ("training.output_dir=", "the value is empty; write one"),
        ("model.num_layer=null", "unknown key 'model.num_layer' in section 'model'"),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate=.inf: use a decimal number"),
        ("optimizer.learning_rate=nan", "optimizer.learning_rate=nan: use a decimal number"),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay=-1: input should be greater than or equal to 0"),
        ("precision=fp64", "precision=fp64: input should be 'fp32', 'bf16'"),
        ("logging.report_to=[stone]", "logging.report_to.0=stone: input should be 'tensorboard' or 'wandb'"),
        ("model.tie_word_embeddings=maybe", "model.tie_word_embeddings=maybe: input should be a valid boolean"),
        ("training=3", "training=3: expected keys under it, such as training.sequence_length"),
        (
            "data.train=[{a: 3}]",
            "data.train=[{'a': '3'}]: use a prefix, or a list [weight, prefix, ",
        ),
        ("data.train=[]", "data.train=[]: use a prefix, or a list"),
        ("model.num_layers", "override 'model.num_layers': write section.key=value"),
        ("=3", "override '=3': write section.key=value"),
        ("model.=3", "override 'model.=3': write section.key=value"),
        ("model.num_layers=[1", "override 'model.num_layers=[1': the value is not valid YAML"),
        ("logging.report_to=wandb", "logging.report_to=wandb: it needs a list; write [wandb]"),
        ("optimizer.options=&a {x: *a}", "not valid YAML (an alias stands within what it stands for)"),
        ("training.output_dir=runs/l\udce4uf", r"training.output_dir=runs/l\udce4uf: is not UTF-8"),
        ('data.train=[1, "a\\0b"]', "data.train.1=a\\x00b: has a NUL character"),
    ],
)
def test_a_bad_override_is_named(override, message):
    assert message in _message({}, override)


def test_a_number_that_no_float_holds_is_refused():
    with pytest.raises(ConfigError, match=r"^model\.head_dim=1000[0…]*: has more than 64 bits"):
        load_config({"model": {"head_dim": 10**400}}, [])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("r.yaml", "model: [", "not valid yaml"),
        ("r.json", "{", "not valid json"),
        ("r.yaml", "- a\n", "expected sections such as 'model:', found list"),
        ("r.yaml", "model: 3", "model=3: expected keys under it, such as model.hidden_size"),
        ("r.yaml", "model: {dim: 3, hidden_size: 4}", "model.dim and model.hidden_size are the same key"),
        ("r.yaml", "{model: {}, model_config: {}}", "model and model_config are the same key"),
        ("r.yaml", "1: 2", "unknown key '1'"),
        ("r.yaml", "null: 2", "keys should be strings"),
        ("r.yaml", "model: {dim: 3, dim: 4}", "the key dim stands twice"),
        ("r.json", '{"model": {"dim": 3, "dim": 4}}', "the key 'dim' stands twice"),
        ("r.json", '{"training": {"output_dir": 123}}', "training.output_dir=123: input should be a valid string"),
        ("r.yaml", "training: {output_dir: null}", "training.output_dir=null: it needs a text; put quotes around"),
        ("r.yaml", "training: {output_dir:}", "training.output_dir=null: it needs a text"),
        ("r.yaml", "training: {output_dir: [a]}", "training.output_dir=['a']: input should be a valid string"),
        ("r.yaml", "training: {max_steps: 1:30}", "training.max_steps=1:30: use a decimal number"),
        ("r.yaml", "training: {max_steps: ~}", "training.max_steps=null: it needs a value; take the key out"),
        (
            "r.yaml",
            "training.max_steps: 3",
            "unknown key 'training.max_steps'; a recipe has max_steps: under training:",
        ),
        ("r.yaml", 'training: {output_dir: "a\\0b"}', "training.output_dir=a\\x00b: has a NUL character"),
        ("r.json", '{"logging": {"project": "\\ud800"}}', "logging.project=\\ud800: is not UTF-8"),
        ("r\n.yaml", "- a\n", "--config r\\n.yaml: expected sections"),
        ("r.yaml", "training: {max_steps: !!int 010}", "not valid yaml (could not determine a constructor for the tag"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    assert message in _message(tmp_path / name).replace(f"{tmp_path}/", "")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    assert "cannot be read (No such file or directory)" in _message(tmp_path / "missing.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"precision: \xff")
    assert "is not UTF-8 (invalid start byte at byte 11)" in _message(tmp_path / "latin.yaml")
    assert "neither a .yaml/.json file nor a preset (125m, 1b, " in _message("huge")
    assert "neither a .yaml/.json file nor a preset" in _message("../presets/tiny")


def test_aliases_that_make_gigabytes_of_a_few_lines_are_refused():
    lists = ", ".join(f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]" for i in range(9))
    assert "make more than 100000 values of it" in _message({}, f"optimizer.options={{a: &a [x], {lists}}}")
    assert load_config({}, ["optimizer.options={a: &a [x], b: [*a, *a]}"]).optimizer.options["b"] == [["x"], ["x"]]


def test_a_byte_order_mark_is_no_part_of_a_recipe(tmp_path):
    for name, text in (("r.yaml", "training: {seed: 3}"), ("r.json", '{"training": {"seed": 3}}')):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert load_config(tmp_path / name).training.seed == 3


@pytest.mark.parametrize("key", ["training.output_dir", "data.train", "data.tokenizer", "checkpoint.load"])
def test_a_home_folder_is_not_made_here(key):
    with pytest.raises(ConfigError, match=f"{key}=~/runs: ~ is taken to the letter here; write the whole path"):
        resolve(load_config("tiny", [f"{key}=~/runs"]))
    resolve(load_config("tiny", [f"{key}=./~/runs"]))


@pytest.mark.parametrize("key", ["training.output_dir", "data.tokenizer", "checkpoint.load", "tree.prompts"])
def test_an_empty_path_in_a_recipe_is_not_the_folder_a_program_runs_in(key: str) -> None:
    section, name = key.split(".")
    with pytest.raises(ConfigError, match=f"{key} is empty; write a path, or take the key out"):
        resolve(load_config({section: {name: ""}}))


# --- properties


def _values(hint):
    """A strategy for all values that a field of this type may have."""
    if hint == Blend:
        blend = st.lists(st.tuples(_WEIGHT, _TEXT), min_size=1, max_size=3)
        return st.none() | _TEXT | blend.map(lambda pairs: [item for pair in pairs for item in pair])
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint, include_extras=True)
        return st.builds(hint, **{item.name: _values(hints[item.name]) for item in dataclasses.fields(hint)})
    if hint == Split:
        return _TEXT
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is UnionType or type(None) in arguments:
        return st.one_of([_values(item) for item in arguments])
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is list:
        return st.lists(_values(arguments[0]), max_size=3)
    if origin is Annotated:
        positive = "gt=" in repr(arguments[1]).lower()
        if arguments[0] is str:
            return st.just("package.module:Name")
        if get_origin(arguments[0]) is dict:
            return st.dictionaries(_TEXT, st.booleans() | st.integers(-(2**40), 2**40), max_size=2)
        if arguments[0] is int:
            return st.integers(1 if positive else 0, 2**40)
        return st.floats(0, exclude_min=positive, allow_infinity=False)
    return {NoneType: st.none(), bool: st.booleans(), str: _TEXT}[hint]


# Not shrunk: a whole configuration takes minutes to shrink, and the differing field is shown anyway.
@settings(max_examples=60, deadline=None, phases=(Phase.explicit, Phase.generate))
@example(load_config({}, ["data.tokenizer=\x85x"]))
@given(_values(PretrainConfig))
def test_yaml_round_trip(config):
    again = load_config(read_yaml(to_yaml(config)))
    assert again == config
    assert to_dict(again) == to_dict(config)


_TEXT_FIELDS = ("training.output_dir", "data.tokenizer", "data.train", "tree.stop", "logging.project")
_TRAPS = (
    "run #2",
    "a: b",
    "2026-11-25",
    "010",
    "1e5",
    "1:30",
    "off",
    "~",
    "'x'",
    '"',
    "{a",
    "- a",
    "%s{}",
    "*a",
    "a=b",
)


@settings(deadline=None)
@given(st.sampled_from(_TEXT_FIELDS), _TEXT.filter(str.strip) | st.sampled_from(_TRAPS))
def test_a_text_comes_back_to_the_letter(key, text):
    section, name = key.split(".")
    if key == "data.train" and text.lstrip().startswith("["):  # a list
        return
    if text.strip() == "null" and key.startswith("data."):  # the default
        return
    config = load_config("tiny", [f"{key}={text}"])
    assert getattr(getattr(config, section), name) == text
    again = load_config(read_yaml(to_yaml(config)))
    assert getattr(getattr(again, section), name) == text


@pytest.mark.parametrize("text", ["123", "010", "1e5", "1:30", "2026-01-01", "off", "yes", "0x10", "1_000", ".5"])
def test_a_recipes_text_is_what_is_written(tmp_path, text):
    (tmp_path / "r.yaml").write_text(
        f"training: {{output_dir: {text}}}\ndata: {{tokenizer: {text}, train: [{text}, a b, 0.5, '{text}']}}"
    )
    config = load_config(tmp_path / "r.yaml")
    assert (config.training.output_dir, config.data.tokenizer) == (text, text)
    assert isinstance(config.data.train, list)
    assert [str(item) for item in config.data.train[1:]] == ["a b", "0.5", text]


@pytest.mark.parametrize("in_recipe", [False, True])
@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("training.max_steps", "010", 10),
        ("training.max_steps", "1e3", 1000),
        ("training.max_steps", "1_000", 1000),
        ("training.max_steps", "1000.0", 1000),
        ("training.seed", "9007199254740993", 9007199254740993),
        ("optimizer.learning_rate", "1e-4", 1e-4),
        ("optimizer.learning_rate", "2.e-5", 2e-5),
        ("optimizer.learning_rate", ".5", 0.5),
        ("optimizer.epsilon", "+1E-8", 1e-8),
        ("memory.layers", "[01, 2]", [1, 2]),
        ("memory.layers", "null", None),
        ("memory.enabled", "on", True),
        ("memory.enabled", "no", False),
        ("data.split", "100", "100"),
        ("data.split", "[98, 2, 0]", "98,2,0"),
        ("data.split", "'98, 2, 0'", "98, 2, 0"),
        ("data.train", "[0.7, books, 0.3, 1e3]", [0.7, "books", 0.3, "1e3"]),
        ("data.train", "[books, my code]", ["books", "my code"]),
        ("data.train", "0.7 books 0.3 code", "0.7 books 0.3 code"),
        ("training.recompute", "none", "none"),
    ],
)
def test_a_value_is_read_as_its_key_needs_it(tmp_path, in_recipe, key, text, value):
    section, name = key.split(".")
    (tmp_path / "r.yaml").write_text(f"{section}:\n  {name}: {text}\n")
    config = load_config(tmp_path / "r.yaml") if in_recipe else load_config({}, [f"{key}={text}"])
    found = getattr(getattr(config, section), name)
    assert found == value
    assert type(found) is type(value)


def test_null_undoes_what_a_recipe_says():
    undone = [
        f"{key}={null}"
        for null, key in (
            *(("null", "training.evaluate_every"), ("~", "training.max_steps")),
            *((" Null\t", "schedule"), ("NULL", "logging.log_every")),
        )
    ]
    config, default = load_config("tiny", undone), PretrainConfig()
    assert (config.training.evaluate_every, config.training.max_steps) == (None, default.training.max_steps)
    assert (config.schedule, config.logging) == (default.schedule, default.logging)
    assert load_config("tiny", ["training.output_dir=null"]).training.output_dir == "null"  # a folder's name


def test_a_merged_mapping_is_no_repeated_key():
    text = "x: {y: &m {<<: &b {a: 1}, a: 2}}\nz: {<<: *m}\n"
    assert read_yaml(text) == {"x": {"y": {"a": "2"}}, "z": {"a": "2"}}


def test_the_yaml_is_read_back_from_a_file(tmp_path):
    config = resolve(load_config("tiny", ["data.train=[0.3, 'ü b', 0.7, '1e3']", "training.output_dir=null"]))
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load_config(tmp_path / "config.yaml") == config


def test_config_imports_no_torch():
    code = "import vishwamai_mp.config, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
