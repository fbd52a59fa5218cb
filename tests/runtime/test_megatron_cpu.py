"""The rewriting that lets megatron-core run without CUDA: each idiom, and nothing else."""

import ast
import importlib
import importlib.util
import sys
import types

import pytest
import torch

from vishwamai_mp.runtime import megatron_cpu, rewriting

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the adapter does nothing where CUDA exists")


def rewritten(source: str) -> str:
    return ast.unparse(rewriting.rewritten(source, "<test>", megatron_cpu.ToThisDevice()))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("torch.zeros(3, device='cuda')", "torch.zeros(3, device=_vishwamai_device.current_device())"),
        (
            "torch.zeros(3, device=torch.cuda.current_device())",
            "torch.zeros(3, device=_vishwamai_device.current_device())",
        ),
        ("torch.zeros(3, pin_memory=True)", "torch.zeros(3, pin_memory=False)"),
        ("loss.cuda(non_blocking=True)", "loss.to(_vishwamai_device.current_device())"),
        ("torch.autocast('cuda')", "torch.autocast(_vishwamai_device.device_type)"),
        ("loss.cuda().float()", "loss.to(_vishwamai_device.current_device()).float()"),
        ("kind == 'torch.cuda.FloatTensor'", "kind == _vishwamai_device.tensor_type('FloatTensor')"),
        ("with torch.cuda.stream(s):\n    pass", "with _vishwamai_device.stream(s):\n    pass"),
    ],
)
def test_an_idiom_is_rewritten(source, expected):
    assert rewritten(source) == expected


@pytest.mark.parametrize(
    "source",
    [
        "torch.zeros(3, device='cpu')",
        "torch.zeros(3, device=device)",
        "torch.zeros(3, pin_memory=False)",
        "config.cuda_graph = True",
        "other.cuda.synchronize()",
        "name = 'cuda'",
        "text = 'needs torch.cuda.nvtx'",
    ],
)
def test_what_is_no_idiom_stays(source):
    assert rewritten(source) == source


def test_rewritten_code_runs_on_the_cpu():
    code = compile(
        rewritten("y = torch.ones(2, device=torch.cuda.current_device()).cuda() + 1"),
        "<test>",
        "exec",
    )
    space = {"torch": torch, "_vishwamai_device": megatron_cpu._in_place_of_cuda}
    exec(code, space)
    assert space["y"].tolist() == [2.0, 2.0]
    assert space["y"].device.type == "cpu"


def test_megatron_core_came_through_the_hook():
    module = importlib.import_module("megatron.core.tensor_parallel.layers")
    assert isinstance(module.__loader__, megatron_cpu._Loader)
    assert module._vishwamai_device is megatron_cpu._in_place_of_cuda


def test_nothing_outside_megatron_core_changes(tmp_path, monkeypatch):
    (tmp_path / "bystander.py").write_text("def f(x):\n    return x.cuda(device='cuda')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    bystander = importlib.import_module("bystander")
    assert "cuda" in bystander.f.__code__.co_names
    finder = megatron_cpu._Finder()
    assert finder.find_spec("torch.cuda") is None
    assert finder.find_spec("transformers") is None
    assert isinstance(torch.cuda, types.ModuleType)
    assert torch.cuda.__name__ == "torch.cuda"


def test_where_cuda_exists_nothing_is_rewritten_but_the_optimizer_is_repaired(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    path = tmp_path / "distrib_optimizer.py"
    path.write_text(
        "class DistributedOptimizer:\n    state_dict = _set_main_param_and_optimizer_states = None\n\n"
        "def f(x):\n    return x.cuda()\n"
    )
    loader = megatron_cpu._Loader(megatron_cpu._DISTRIBUTED_OPTIMIZER, str(path))
    module = types.ModuleType(megatron_cpu._DISTRIBUTED_OPTIMIZER)
    loader.exec_module(module)
    assert "cuda" in module.f.__code__.co_names
    assert callable(module.DistributedOptimizer.state_dict)


def test_another_partner_of_the_distributed_optimizer_is_left_alone():
    class Theirs:
        optimizer = object()  # Transformer Engine's, which has no torch state to fill

        def state_dict(self):
            return "theirs"

        def _set_main_param_and_optimizer_states(self, param, tensors):
            self.set = tensors

    megatron_cpu._repair_distributed_optimizer(Theirs)
    theirs = Theirs()
    assert theirs.state_dict() == "theirs"
    theirs._set_main_param_and_optimizer_states(None, {"exp_avg": 1})
    assert theirs.set == {"exp_avg": 1}


def test_installing_twice_adds_one_hook():
    megatron_cpu.install()
    assert sum(isinstance(finder, megatron_cpu._Finder) for finder in sys.meta_path) == 1


def test_the_stand_in_answers_for_torch_cuda():
    cpu = megatron_cpu._in_place_of_cuda
    cpu.manual_seed(5)
    first = torch.rand(3)
    state = cpu.get_rng_state()
    second = torch.rand(3)
    cpu.set_rng_state(state, "cuda:0")
    assert torch.equal(torch.rand(3), second)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), first)
    cpu.empty_cache()
    cpu.synchronize()
    assert cpu.device_count() == torch.cpu.device_count()
    assert cpu.random.get_rng_state().dtype == torch.uint8
    assert cpu.get_device_properties is torch.cuda.get_device_properties  # what torch.cpu lacks is torch.cuda's own
