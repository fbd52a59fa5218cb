"""Names of the user's own parts: which are found, which are refused, and when their code runs."""

import sys
import textwrap
from pathlib import Path

import pytest
import torch

from vishwamai_mp.config import ConfigError, UserError, load_config, resolve, to_yaml
from vishwamai_mp.config.extensions import check_extensions, extensions_of, find_extension, refuse_unrepeated

OWN = {
    "model.attention": "parts:Attention",
    "data.source": "parts.rows:rows",
    "optimizer.name": "parts:Lion",
    "schedule.decay": "parts:rate",
    "training.loss": "parts:loss",
    "training.callbacks": "[parts:A,parts:B]",
}
OVERRIDES = [f"{key}={value}" for key, value in OWN.items()]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_parts.py").write_text(
        textwrap.dedent(
            """
            import torch
            class Mine(torch.optim.SGD): ...
            def two(config, step): return 0.0
            value = 1
            """
        )
    )
    (tmp_path / "own_broken.py").write_text("import a_module_that_is_nowhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    return "own_parts"


def test_every_key_takes_one_and_importing_is_left_to_who_needs_it() -> None:
    config = resolve(load_config("tiny", OVERRIDES), 1)
    assert extensions_of(config) == [*OVERRIDES[:-1], "training.callbacks=parts:A", "training.callbacks=parts:B"]
    assert "parts" not in sys.modules
    assert load_config({}) == load_config({}, ["optimizer.name=adamw"])
    assert extensions_of(load_config("tiny")) == []


def test_options_keep_their_types_through_a_recipe(tmp_path: Path) -> None:
    options = "optimizer.options={betas: [0.9, 0.98], nesterov: true, steps: 3, kind: a}"
    config = load_config({}, [options, "optimizer.name=a:b"])
    assert config.optimizer.options == {"betas": [0.9, 0.98], "nesterov": True, "steps": 3, "kind": "a"}
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize("key", OWN)
@pytest.mark.parametrize("name", ["nothing", "a.b", "a:", ":b", "a b:c", "../a:b", "a:b.c"])
def test_a_name_of_neither_form_is_refused(key: str, name: str) -> None:
    value = f"['{name}']" if key == "training.callbacks" else name
    with pytest.raises(ConfigError, match=r"package\.module:Name"):
        load_config({}, [f"{key}={value}"])


def test_what_is_found_is_of_the_kind_that_is_asked_for(module: str) -> None:
    assert issubclass(find_extension("optimizer.name", f"{module}:Mine", torch.optim.Optimizer), torch.optim.SGD)
    assert find_extension("schedule.decay", f"{module}:two", 2)(None, 0) == 0.0


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("nowhere.at_all:X", 2, "there is no module nowhere; install it"),
        ("own_parts.more:X", 2, "there is no module own_parts.more"),
        ("own_parts:Other", torch.optim.Optimizer, "own_parts has no Other; it is in .*own_parts.py"),
        ("own_parts:two", torch.optim.Optimizer, "derive it from torch.optim.optimizer.Optimizer; it is a function"),
        ("own_parts:value", 2, "a function that takes 2 arguments; it is no class or function"),
        ("own_parts:Mine", 2, "a function that takes 2 arguments; it is a class"),
        ("own_parts:two", 3, "a function that takes 3 arguments"),
    ],
)
def test_what_cannot_be_used_is_refused_in_a_line(module: str, name: str, kind: type | int, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^some.key={name}: .*{message}") as refused:
        find_extension("some.key", name, kind)
    assert "\n" not in str(refused.value)


def test_a_fault_in_the_users_module_keeps_its_traceback(module: str) -> None:
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_nowhere"):
        find_extension("some.key", "own_broken:X", 2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.options={momentum: 1}"], "optimizer.options"),
        (["optimizer.name=a:b", "optimizer.beta1=0.8"], "optimizer.beta1 has no effect"),
        (["optimizer.name=a:b", "parallel.fully_sharded=true"], "set parallel.fully_sharded=false"),
        (["optimizer.name=a:b"], "set parallel.use_distributed_optimizer=false"),
        (["training.loss=a:b", "tree.enabled=true"], "tree.value_signal"),
    ],
)
def test_combinations_that_cannot_be_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(load_config("tiny", overrides), 2)


def test_what_was_found_in_a_folder_has_to_be_repeated() -> None:
    config = load_config({}, OVERRIDES)
    refuse_unrepeated(config, OVERRIDES, "run")
    refuse_unrepeated(load_config({}), [], "run")
    with pytest.raises(UserError, match=r"^run names code of its own.* trust training\.loss=parts:loss, say so again"):
        refuse_unrepeated(config, [part for part in OVERRIDES if "loss" not in part], "run")
    with pytest.raises(UserError, match="parts:B"):
        refuse_unrepeated(config, [*OVERRIDES[:-1], "training.callbacks=[parts:A]"], "run")


@pytest.mark.parametrize(
    ("saved", "now", "weights_only", "message"),
    [
        (["training.loss=a:b"], [], False, "with training.loss=a:b; name it again, or start another run"),
        (["training.loss=a:b"], ["training.loss=a:c"], False, "name it again"),
        (["training.loss=a:b"], [], True, None),
        (["model.attention=a:b"], [], True, "with model.attention=a:b; name it again$"),
        ([], ["model.attention=a:b"], True, "without model.attention=a:b; leave it out$"),
        ([], ["optimizer.name=a:b"], False, "without optimizer.name=a:b; leave it out, or start another run"),
        ([], ["optimizer.name=a:b"], True, None),
        ([], ["training.loss=a:b", "training.callbacks=[a:c]"], False, None),
        (["optimizer.name=a:b"], ["optimizer.name=a:b"], False, None),
    ],
)
def test_a_run_goes_on_with_what_it_was_saved_with(
    saved: list[str], now: list[str], weights_only: bool, message: str | None
) -> None:
    config = load_config({}, now)
    if message is None:
        check_extensions("step_1", saved, config, weights_only)
        return
    with pytest.raises(UserError, match=message):
        check_extensions("step_1", saved, config, weights_only)
