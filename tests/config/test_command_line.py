"""Command lines of options and settings, the configuration that they print, and its JSON schema."""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
import yaml

from vishwamai_mp import pretrain
from vishwamai_mp.config import ConfigError, PretrainConfig, load_config, resolve
from vishwamai_mp.config import schema as schema_room
from vishwamai_mp.config.command_line import parse_command_line
from vishwamai_mp.config.schema.json_schema import field_comments, json_schema


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", required=True)
    parser.add_argument("overrides", nargs="*")
    return parser


@pytest.mark.parametrize(
    ("given", "mend"),
    [
        (["--training.max_steps", "3"], "write training.max_steps=3"),
        (["--training.max_steps=3"], "write training.max_steps=3"),
        (["model.dim=64", "--training.max-steps", "3", "precision=fp32"], "write training.max_steps=3"),
        (["--max-steps", "3"], "write training.max_steps=3"),
        (["--memory.enabled"], "write memory.enabled=..."),
        (["--memory.enabled", "training.seed=3"], "write memory.enabled=..."),
        (["--precision=fp32"], "write precision=fp32"),
        (["--dropout", "0"], "settings are written section.key=value; see --help"),  # of which section?
        (["--colour", "red"], "settings are written section.key=value; see --help"),
    ],
)
def test_a_setting_in_an_options_clothes_is_named(given, mend):
    with pytest.raises(ConfigError) as caught:
        parse_command_line(_parser(), ["--config", "tiny", *given])
    assert re.fullmatch(rf"unknown option '--[^']+'; {re.escape(mend)}", str(caught.value))


def test_options_and_settings_come_in_any_order():
    options = parse_command_line(_parser(), ["a.b=1", "--config", "tiny", "c.d=-2"])
    assert options == argparse.Namespace(config="tiny", overrides=["a.b=1", "c.d=-2"])


def test_help_names_every_section(capsys):
    with pytest.raises(SystemExit):
        pretrain.main(["--help"])
    text = capsys.readouterr().out
    for item in dataclasses.fields(PretrainConfig):
        assert re.search(rf"^  {item.name} +\S", text, re.MULTILINE)
    assert "python -m vishwamai_mp.config.schema" in text


def test_the_configuration_is_printed_without_torch():
    code = (
        "import sys; from vishwamai_mp import pretrain; pretrain.main(sys.argv[1:]); assert 'torch' not in sys.modules"
    )
    asked = ["--config", "tiny", "training.max_steps=4", "training.output_dir=run #2", "memory.enabled=true"]
    command = [sys.executable, "-c", code, *asked, "--print-config"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.startswith("# schedule.warmup_steps=20 of the recipe does not fit training.max_steps=4")
    printed = yaml.safe_load(done.stdout)
    assert load_config(printed) == resolve(load_config("tiny", asked[2:]))
    assert (printed["training"]["output_dir"], printed["memory"]["memory_size"]) == ("run #2", 64)


def test_a_layout_is_printed_without_its_processes(capsys):
    assert pretrain.main(["--config", "vishwamai-120l", "--print-config"]) == 0
    assert "tensor_model_parallel_size: 8" in capsys.readouterr().out


def test_the_schema_describes_every_section_and_key():
    command = [sys.executable, "-m", "vishwamai_mp.config.schema"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    read, write = os.pipe()
    os.close(read)
    unread = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)  # piped into `head`
    os.close(write)
    assert (unread.returncode, unread.stderr) == (141, "")
    found = json.loads(done.stdout)
    assert found == json_schema()
    assert found["additionalProperties"] is False
    assert found["properties"].keys() == {item.name for item in dataclasses.fields(PretrainConfig)}
    training = found["$defs"]["TrainingConfig"]
    assert training["properties"]["sequence_length"] == {
        "default": 512,
        "description": "tokens",
        "exclusiveMinimum": 0,
        "title": "Sequence Length",
        "type": "integer",
    }
    assert training["description"] == schema_room.TrainingConfig.__doc__


def test_comments_are_found_where_a_line_has_one():
    comments = field_comments()
    assert comments["DataConfig"]["split"] == "train, valid, test shares of `train`"
    assert "train" not in comments["DataConfig"]
