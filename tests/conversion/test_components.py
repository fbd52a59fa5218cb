"""Models with memories, caches and a value head: the folder's own code computes what ours computes."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conversion import models
from tests.workers import WorkerPool
from vishwamai_mp.config import UserError
from vishwamai_mp.conversion.components import AUTO_MAP
from vishwamai_mp.conversion.folder import open_folder
from vishwamai_mp.conversion.from_hf import import_folder

BOTH = [models.MEMORY, models.CACHE]
VARIANTS: dict[str, tuple[int, list[str]]] = {
    "both and a value head, TP2 PP2 VPP2": (4, [*BOTH, "tree.enabled=true", *models.TP2_PP2_VPP2]),
    "memory of one level without momentum": (
        1,
        [models.MEMORY, "memory.num_memory_layers=1", "memory.momentum=false", "model.sliding_window=24"],
    ),
    "cache first, tied": (
        1,
        [*BOTH, "cache.before_memory=true", "model.tie_word_embeddings=true"],
    ),
}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest, workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `run`, and `hf` exported from it."""
    world_size, overrides = VARIANTS[request.param]
    folder = tmp_path_factory.mktemp("components")
    workers.run(models.save_run, world_size, folder / "run", overrides)
    models.export(folder / "run", folder / "hf", max_shard_size=100_000)
    return folder


@pytest.fixture(scope="module")
def both(workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first variant on one process."""
    folder = tmp_path_factory.mktemp("both")
    workers.run(models.save_run, 1, folder / "run", BOTH)
    models.export(folder / "run", folder / "hf")
    return folder


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()


def test_there_and_back_is_bitwise_equal(variant: Path, tmp_path: Path) -> None:
    models.import_(variant / "hf", tmp_path / "back")
    models.assert_equal(models.tensors_of(variant / "run"), models.tensors_of(tmp_path / "back"))


def test_logits_and_greedy_tokens_are_the_same_past_many_segments(workers: WorkerPool, variant: Path) -> None:
    (result,) = workers.run(models.compare_both, 1, variant / "run", variant / "hf", [], 128)
    assert result.is_equal, result.describe()
    assert result.difference < 1e-5


def test_components_matter(both: Path) -> None:
    """Else the other tests would pass without them."""
    model = load(both / "hf")
    rows = torch.tensor(models.random_rows(2, 100, 250))
    with torch.no_grad():
        logits = model(rows).logits
        for layer in model.model.layers:
            for name in layer.component_names:
                getattr(layer, name).output.weight.zero_()
        assert (model(rows).logits - logits).abs().max() > 1e-2


def test_the_cache_drops_the_same_segments(workers: WorkerPool, tmp_path: Path) -> None:
    """Token by token, with room for 4 segments of 16 tokens."""
    workers.run(models.save_run, 1, tmp_path / "run", [models.CACHE, "cache.max_cache_length=8"])
    models.export(tmp_path / "run", tmp_path / "hf")
    hidden = torch.randn(200, 2, 32, generator=torch.Generator().manual_seed(0))
    (ours,) = workers.run(decode_layer_one, 1, tmp_path / "run", hidden)
    cache = load(tmp_path / "hf").model.layers[1].cache
    states: Any = None
    theirs = []
    with torch.no_grad():
        for token in hidden:
            out, states = cache(token[:, None], None, states)
            theirs.append(out[:, 0])
    assert states[0].segments == 4
    torch.testing.assert_close(ours, torch.stack(theirs), atol=1e-5, rtol=0)


def decode_layer_one(run: Path, hidden: torch.Tensor) -> torch.Tensor:
    """In one worker: what our cache of layer 1 puts out, token by token."""
    with models.loaded(run) as model:
        cache, state, out = model.decoder.layers[1].cache, None, []
        for token in hidden:
            read, state = cache(token[None], None, state)
            out.append(read[0].clone())
    return torch.stack(out)


def padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts aligned to the right, and their mask."""
    longest = max(map(len, prompts))
    rows = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(rows), torch.tensor(mask)


def test_left_padding_changes_nothing(both: Path) -> None:
    model = load(both / "hf")
    prompts = [models.random_rows(1, length, 250, seed=length)[0] for length in (70, 3, 33, 48)]
    rows, mask = padded(prompts)
    with torch.no_grad():
        together = model(rows, attention_mask=mask).logits
        for row, prompt in enumerate(prompts):
            alone = model(torch.tensor([prompt])).logits[0]
            torch.testing.assert_close(together[row, -len(prompt) :], alone, atol=1e-5, rtol=0)
        tokens = model.generate(rows, attention_mask=mask, max_new_tokens=80, do_sample=False, pad_token_id=0)
        for row, prompt in enumerate(prompts):
            ids = torch.tensor([prompt])
            options = {"max_new_tokens": 80, "do_sample": False, "pad_token_id": 0}
            alone = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0]
            assert torch.equal(tokens[row, rows.shape[1] :], alone[len(prompt) :])


def test_generating_with_the_cache_is_generating_without(both: Path) -> None:
    model = load(both / "hf")
    ids = torch.tensor(models.random_rows(2, 20, 250))
    options: dict[str, Any] = {"max_new_tokens": 60, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    with torch.no_grad():
        quick = model.generate(ids, attention_mask=mask, use_cache=True, **options)
        assert torch.equal(quick, model.generate(ids, attention_mask=mask, use_cache=False, **options))
        beams = model.generate(ids, attention_mask=mask, num_beams=3, use_cache=True, **options)
        slow = model.generate(ids, attention_mask=mask, num_beams=3, use_cache=False, **options)
    assert torch.equal(beams, slow)


def test_a_text_in_pieces_is_the_text(both: Path) -> None:
    from transformers import DynamicCache

    model, past = load(both / "hf"), DynamicCache()
    ids = torch.tensor(models.random_rows(2, 90, 250))
    with torch.no_grad():
        whole = model(ids).logits
        pieces = [model(piece, past_key_values=past, use_cache=True).logits for piece in ids.split([1, 40, 7, 42], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-5, rtol=0)
    with pytest.raises(NotImplementedError, match="cannot take tokens back"):
        past.crop(10)


def test_gradient_checkpointing_gives_the_same_gradients(both: Path) -> None:
    ids = torch.tensor(models.random_rows(2, 50, 250))
    gradients = []
    for checkpointing in (False, True):
        model = load(both / "hf").train()
        for module in model.modules():
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-7, rtol=1e-5)


def test_saved_by_transformers_it_is_loaded_and_imported_again(both: Path, tmp_path: Path) -> None:
    model = load(both / "hf")
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    models.assert_equal(model.state_dict(), again.state_dict())
    models.import_(tmp_path / "saved", tmp_path / "run")
    models.assert_equal(models.tensors_of(both / "run"), models.tensors_of(tmp_path / "run"))


def test_a_fresh_one_is_the_plain_model(both: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(both / "hf", trust_remote_code=True)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True).eval()
    ids = torch.tensor(models.random_rows(1, 50, 250))
    with torch.no_grad():
        logits = model(ids).logits
        for layer in model.model.layers:
            layer.component_names = []
        assert torch.equal(model(ids).logits, logits)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("modeling_vishwamai.py", {}, "modeling_vishwamai.py is not the code of this version"),
        ("other.py", {}, "other.py is not the code of this version"),
        ("custom_generate/generate.py", {}, "generate.py is not the code of this version"),
        ("other.py", {"auto_map": {"AutoModelForCausalLM": "other.Model"}}, "names foreign code, which is not run"),
        (
            "README.md",
            {"auto_map": {**AUTO_MAP, "AutoModelForCausalLM": f"someone/else--{AUTO_MAP['AutoModelForCausalLM']}"}},
            "names foreign code, which is not run",
        ),
        ("README.md", {"auto_map": {**AUTO_MAP, "AutoTokenizer": ["other.Tokenizer", None]}}, "names foreign code"),
        ("README.md", {"auto_map": None}, "names foreign code"),
        ("README.md", {"model_type": "llama"}, "model_type=llama of a VishwamaiForCausalLM; expected vishwamai"),
        ("README.md", {"architectures": ["LlamaForCausalLM"]}, "model_type=vishwamai of a LlamaForCausalLM"),
        ("README.md", {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "names foreign code"),
        ("adapter_config.json", {}, "has adapters of PEFT beside its model"),
    ],
)
def test_foreign_code_is_not_run(both: Path, tmp_path: Path, file: str, change: dict[str, Any], message: str) -> None:
    shutil.copytree(both / "hf", tmp_path / "hf")
    (tmp_path / "hf" / file).parent.mkdir(exist_ok=True)
    (tmp_path / "hf" / file).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    path = tmp_path / "hf/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=re.escape(message)):
        models.compare_both(both / "run", tmp_path / "hf", [], 4)
    assert not (tmp_path / "ran").exists()


def test_a_plain_folder_may_bring_no_code_either(workers: WorkerPool, tmp_path: Path) -> None:
    workers.run(models.save_run, 1, tmp_path / "run", [])
    models.export(tmp_path / "run", tmp_path / "hf")
    (tmp_path / "hf/generate.py").write_text("")
    with pytest.raises(UserError, match=r"generate\.py is not the code of this version"):
        models.compare_both(tmp_path / "run", tmp_path / "hf", [], 4)


def test_the_value_head_answers(workers: WorkerPool, tmp_path: Path) -> None:
    workers.run(models.save_run, 1, tmp_path / "run", ["tree.enabled=true"])
    models.export(tmp_path / "run", tmp_path / "hf")
    rows = models.random_rows(2, 30, 250)
    (ours,) = workers.run(our_values, 1, tmp_path / "run", rows)
    with torch.no_grad():
        theirs = load(tmp_path / "hf").values(torch.tensor(rows))
    assert ours.std() > 1e-3
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def our_values(run: Path, rows: list[list[int]]) -> torch.Tensor:
    """In one worker: values (B, T) of a run's model."""
    hidden = []
    with models.loaded(run) as model:
        model.decoder.register_forward_hook(lambda module, inputs, output: hidden.append(output))
        model(torch.tensor(rows))
        return model.value_head(hidden[0]).t().clone()


def test_components_added_to_a_plain_model_change_nothing_and_are_those_of_a_fresh_run(
    workers: WorkerPool, tmp_path: Path
) -> None:
    workers.run(models.save_run, 1, tmp_path / "plain", [])
    models.export(tmp_path / "plain", tmp_path / "hf")
    workers.run(add_components, 1, tmp_path / "hf", tmp_path / "more")
    rows = models.random_rows(1, 100, 250)
    (before,) = workers.run(models.our_logits, 1, tmp_path / "plain", rows)
    (after,) = workers.run(models.our_logits, 1, tmp_path / "more", rows)
    assert torch.equal(before, after)
    assert not (tmp_path / "more/added").exists()

    workers.run(save_untouched, 2, tmp_path / "fresh", [*BOTH, "parallel.tensor_model_parallel_size=2"])
    more, fresh = models.tensors_of(tmp_path / "more"), models.tensors_of(tmp_path / "fresh")
    added = [name for name in more if ".memory." in name or ".cache." in name]
    assert len(added) == 2 * 7 + 2 * 7
    models.assert_equal({name: more[name] for name in added}, {name: fresh[name] for name in added})


def add_components(hf: Path, run: Path) -> None:
    import_folder(open_folder(hf, BOTH), run, None)


def save_untouched(run: Path, overrides: list[str]) -> None:
    models.save_run(run, overrides, disturbed=False)


@pytest.mark.parametrize(
    ("addition", "message"),
    [
        ("model.num_layers=2", "only memory.* and cache.* can be added"),
        ("memory.heads=2", "unknown key 'memory.heads'"),
        ("cache.num_heads=3", None),
        ("memory.enabled=true", "has a memory already"),
    ],
)
def test_what_cannot_be_added(both: Path, workers: WorkerPool, tmp_path: Path, addition: str, message: str) -> None:
    workers.run(models.save_run, 1, tmp_path / "plain", [])
    models.export(tmp_path / "plain", tmp_path / "hf")
    folder = both / "hf" if message == "has a memory already" else tmp_path / "hf"
    additions = [addition, "cache.enabled=true"] if addition.startswith("cache") else [addition]
    with pytest.raises(UserError, match=re.escape(message or "cache.num_heads=3 does not divide")):
        open_folder(folder, additions)
