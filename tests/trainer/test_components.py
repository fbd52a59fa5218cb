"""Components that stand alone: used as given by the pretrainer, at every layout, and taken out of it again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer.runs import VOCAB, pretrainer
from tests.workers import WorkerPool
from vishwamai_mp.cache_augmentation import CacheConfig, DifferentiableCacheAugmentation
from vishwamai_mp.checkpoint.sharded import unwrap
from vishwamai_mp.config import ConfigError, UserError
from vishwamai_mp.neural_memory import MemoryConfig, ReasoningMemoryTransformer
from vishwamai_mp.trainer import load_model
from vishwamai_mp.tree_of_thoughts import TreeConfig, TreeOfThoughts

_MEMORY = MemoryConfig(hidden_size=32, memory_size=32, num_memory_layers=2, head_dim=8, chunk_size=16, dropout=0.0)
_CACHE = CacheConfig(hidden_size=32, num_heads=4, segment_length=8, latents_per_segment=2, dropout=0.0)
CLASSES: dict[str, Any] = {
    "memory": (ReasoningMemoryTransformer, _MEMORY),
    "cache": (DifferentiableCacheAugmentation, _CACHE),
}


def module(name: str, seed: int = 0) -> Any:
    """One whose output matters: a fresh one is the identity."""
    cls, config = CLASSES[name]
    torch.manual_seed(seed)
    made = cls(config)
    torch.nn.init.normal_(made.output.weight, std=0.2)
    return made


def items(count: int = 24) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, VOCAB, (count, 33), generator=generator).tolist()


@pytest.mark.parametrize("name", CLASSES)
def test_alone_it_is_the_identity_at_first_and_every_parameter_learns(name):
    cls, config = CLASSES[name]
    fresh, hidden = cls(config), torch.randn(40, 3, 32)
    assert torch.equal(fresh(hidden)[0], hidden)
    out, _ = module(name)(hidden)
    assert out.shape == hidden.shape
    assert not torch.allclose(out, hidden, atol=1e-2)
    other = module(name)
    other(hidden)[0].square().sum().backward()
    assert [key for key, parameter in other.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("name", CLASSES)
def test_saved_and_loaded_it_is_the_same(tmp_path, name):
    cls, _ = CLASSES[name]
    saved, hidden = module(name).eval(), torch.randn(40, 3, 32)
    saved.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = cls.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(hidden)[0], saved(hidden)[0])
    assert getattr(loaded, f"{name}_config") == getattr(saved, f"{name}_config")


def test_folders_that_are_none(tmp_path):
    module("cache").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"config.json is not of this component: unknown key 'memory.num_heads'"):
        ReasoningMemoryTransformer.from_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"nowhere/config.json cannot be read"):
        ReasoningMemoryTransformer.from_pretrained("nowhere")
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-5])
    with pytest.raises(UserError, match="no whole safetensors file"):
        DifferentiableCacheAugmentation.from_pretrained(tmp_path)
    torch.manual_seed(0)
    small = DifferentiableCacheAugmentation(CacheConfig(hidden_size=16, num_heads=4))
    small.save_pretrained(tmp_path / "small")
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "small/model.safetensors").read_bytes())
    with pytest.raises(UserError, match="does not have the tensors that"):
        DifferentiableCacheAugmentation.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReasoningMemoryTransformer(MemoryConfig()), "memory.hidden_size is not set"),
        (lambda: ReasoningMemoryTransformer(MemoryConfig(hidden_size=32, memory_size=30)), "memory.memory_size=30"),
        (
            lambda: DifferentiableCacheAugmentation(CacheConfig(hidden_size=30, num_heads=8)),
            "cache.num_heads=8 does not",
        ),
        (lambda: DifferentiableCacheAugmentation(CacheConfig(hidden_size=32, dropout=2.0)), "cache.dropout=2.0"),
    ],
)
def test_configurations_that_cannot_work(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def starts_and_ends(folder: Path, layout: tuple[str, ...], batch: dict[str, int]) -> dict[str, Any]:
    """Trains with modules; losses, what layers began with, and the difference of a layer's output to the module's."""
    memory, cache = module("memory"), module("cache")
    ours = pretrainer(
        folder / "run",
        items(),
        overrides=("memory.layers=[0,1]", "cache.layers=[1]", *layout),
        max_steps=4,
        learning_rate=3e-3,
        memory_module=memory,
        cache_module=cache,
        use_neural_memory=True,
        use_cache_augmentation=True,
        **batch,
    )
    ours.evaluate() if ours.trainer.datasets.valid else ours._load()
    differences = [_difference(chunk, memory, cache) for chunk in ours.trainer.chunks]
    ours.train()
    ours.save_model(folder / "model")
    return {"losses": [record["lm_loss"] for record in ours.history], "difference": max(differences, default=0.0)}


def _difference(chunk: Any, memory: Any, cache: Any) -> float:
    """Largest between what a layer's component and the module make of the same hidden states; one process."""
    found, hidden = 0.0, torch.randn(32, 2, 32, generator=torch.Generator().manual_seed(1))
    for layer in unwrap(chunk).decoder.layers:
        for name, alone in (("memory", memory), ("cache", cache)):
            if hasattr(layer, name) and layer.memory.groups.tp.size() == 1:
                with torch.no_grad():
                    found = max(found, float((getattr(layer, name)(hidden)[0] - alone(hidden)[0]).abs().max()))
    return found


_LAYOUTS: dict[str, tuple[int, tuple[str, ...], dict[str, int]]] = {
    "one": (1, (), {"gradient_accumulation_steps": 2}),
    "DP2": (2, ("parallel.use_distributed_optimizer=true",), {}),
    "TP2": (2, ("parallel.tensor_model_parallel_size=2",), {"gradient_accumulation_steps": 2}),
}


def test_a_module_is_used_as_given_and_comes_out_trained(workers: WorkerPool, tmp_path):
    results = {
        name: workers.run(starts_and_ends, processes, tmp_path / name, layout, batch)[0]
        for name, (processes, layout, batch) in _LAYOUTS.items()
    }
    losses = results["one"]["losses"]
    assert results["one"]["difference"] < 1e-6
    for name, result in results.items():
        assert result["losses"] == pytest.approx(losses, abs=1e-6), name
        folder = tmp_path / name / "model"
        found = sorted(path.parent.name for path in folder.glob("*/model.safetensors"))
        assert found == ["cache_layer_1", "memory_layer_0", "memory_layer_1"]
        for place in found:
            kind = place.partition("_")[0]
            mine = CLASSES[kind][0].from_pretrained(folder / place)
            reference = CLASSES[kind][0].from_pretrained(tmp_path / "one/model" / place)
            assert not torch.equal(mine.output.weight, module(kind).output.weight), "it has learnt"
            for (key, a), (_, b) in zip(mine.named_parameters(), reference.named_parameters(), strict=True):
                torch.testing.assert_close(a, b, atol=2e-5, rtol=0, msg=f"{name} {place} {key}")
    [plain] = workers.run(plain_losses, 1, tmp_path / "plain")
    assert plain[0] != pytest.approx(losses[0], abs=1e-3), "or the modules would not matter"


def plain_losses(folder: Path) -> list[float]:
    ours = pretrainer(folder, items(), max_steps=1, gradient_accumulation_steps=2)
    ours.train()
    return [record["lm_loss"] for record in ours.history]


def enabled(folder: Path, options: dict[str, Any]) -> Any:
    """Which layers carry what, or what is said instead."""
    try:
        ours = pretrainer(folder, items(), max_steps=1, **options)
    except UserError as error:
        return str(error)
    config = ours.config
    return [(name, section.layers) for name, section in _sections(config) if section.enabled], config.tree.enabled


def _sections(config: Any) -> list[tuple[str, Any]]:
    return [("memory", config.memory), ("cache", config.cache)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"use_neural_memory": True, "overrides": ("memory.memory_size=128",)}, ([("memory", [0])], False)),
        ({"use_cache_augmentation": True, "overrides": ("cache.segment_length=8",)}, ([("cache", [1])], False)),
        ({"use_tree_of_thoughts": True}, ([], True)),
        (
            {"overrides": ("memory.enabled=true", "memory.memory_size=128"), "use_neural_memory": False},
            ([], False),
        ),
        (
            {"overrides": ("memory.enabled=true", "memory.memory_size=128")},
            ([("memory", [0])], False),
        ),
    ],
)
def test_components_without_modules(workers: WorkerPool, tmp_path, options, expected):
    assert workers.run(enabled, 1, tmp_path, options) == [expected]


def other_width(folder: Path, name: str) -> str:
    from dataclasses import replace

    cls, config = CLASSES[name]
    made = cls(replace(config, hidden_size=64))
    return enabled(folder, {f"{name}_module": made})


def switched_off(folder: Path, _: str) -> str:
    return enabled(folder, {"memory_module": module("memory"), "use_neural_memory": False})


@pytest.mark.parametrize(
    ("attempt", "name", "message"),
    [
        (other_width, "memory", "memory.hidden_size=64 is not model.hidden_size=32"),
        (other_width, "cache", "cache.hidden_size=64 is not model.hidden_size=32"),
        (switched_off, "", "use_neural_memory=False but a memory_module is given; leave one of them out"),
    ],
)
def test_modules_that_do_not_fit_are_refused_by_name(workers: WorkerPool, tmp_path, attempt, name, message):
    [said] = workers.run(attempt, 1, tmp_path, name)
    assert said.startswith(message)


def searches(folder: Path) -> dict[str, Any]:
    model = load_model_of_tests()
    tree = TreeOfThoughts(model, TreeConfig(beam_width=2, max_depth=2, max_thought_tokens=4, stop="x"))
    hidden = torch.randn(5, 2, 32)
    before = tree(hidden)
    ours = pretrainer(folder, items(), model=model, tree_module=tree, max_steps=3, learning_rate=1e-2)
    ours.train()
    [result] = tree.search([[1, 2, 3]])
    ours.save_model(folder / "saved")
    loaded = TreeOfThoughts.from_pretrained(folder / "saved/tree", load_model(folder / "saved"))
    [again] = loaded.search([[1, 2, 3]])
    return {
        "before": before,
        "after": tree(hidden),
        "loaded": loaded(hidden),
        "config": (tree.config.beam_width, loaded.config.beam_width, ours.config.tree.enabled),
        "tokens": [[node.tokens for node in found.nodes] for found in (result, again)],
        "records": ours.history,
    }


def load_model_of_tests() -> Any:
    from tests.trainer.runs import RECIPE

    return load_model(RECIPE)


def test_a_tree_searches_the_model_that_it_was_made_with_once_it_is_trained(workers: WorkerPool, tmp_path):
    [found] = workers.run(searches, 1, tmp_path)
    values: dict[str, Tensor] = found
    assert torch.equal(values["before"], torch.full((5, 2), 0.5))
    assert not torch.allclose(values["after"], values["before"], atol=1e-4)
    assert torch.equal(values["loaded"], values["after"])
    assert found["config"] == (2, 2, True)
    assert found["tokens"][0] == found["tokens"][1]
    assert len(found["tokens"][0]) > 3
    assert all("value_loss" in record for record in found["records"])
