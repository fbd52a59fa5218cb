"""Lets megatron-core run where there is no CUDA, on torch.distributed's gloo backend.

megatron-core names the device `"cuda"` or `torch.cuda.current_device()` in the middle of its large functions, where
neither a subclass nor a patched function reaches. `install()` adds an import hook that rewrites those idioms to their
CPU counterparts in the syntax tree of each `megatron.core` module while it is imported. Nothing outside megatron-core
changes, nothing is paid per step, and where CUDA exists nothing happens at all.
"""

import ast
import importlib.abc
import importlib.machinery
import logging
import sys
import types
from typing import Any

import torch

_RANDOM = "megatron.core.tensor_parallel.random"
_JIT = "megatron.core.jit"
_DISTRIBUTED_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer"
_NAME = "_vishwamai_cpu"  # what `torch.cuda` is called in a rewritten module


def install() -> None:
    """Add the import hook. Must run before the first import of `megatron.core`; does nothing where CUDA exists."""
    if torch.cuda.is_available() or any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    assert "megatron.core" not in sys.modules, "import vishwamai_mp.runtime before megatron.core"
    sys.meta_path.insert(0, _Finder())


class _CpuInPlaceOfCuda(types.ModuleType):
    """What `torch.cuda` means inside megatron-core: torch.cpu, completed with what megatron-core needs besides."""

    manual_seed = staticmethod(torch.manual_seed)

    @staticmethod
    def get_rng_state(*_: Any, **__: Any) -> torch.Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
        torch.set_rng_state(state)

    @staticmethod
    def empty_cache() -> None:
        """There is no caching allocator to empty."""

    @property
    def random(self) -> "_CpuInPlaceOfCuda":
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu if hasattr(torch.cpu, name) else torch.cuda, name)


_cpu = _CpuInPlaceOfCuda(_NAME)


class _ToCpu(ast.NodeTransformer):
    """Rewrites the CUDA idioms that megatron-core uses."""

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        """`"torch.cuda.FloatTensor"` becomes `"torch.FloatTensor"`."""
        if isinstance(node.value, str) and node.value.startswith("torch.cuda.") and node.value.endswith("Tensor"):
            node.value = node.value.replace("cuda.", "")
        return node

    def visit_keyword(self, node: ast.keyword) -> ast.AST:
        """`device="cuda"` becomes `device="cpu"`; `pin_memory=True` becomes `pin_memory=False`."""
        self.generic_visit(node)
        if isinstance(node.value, ast.Constant):
            if (node.arg, node.value.value) == ("device", "cuda"):
                node.value.value = "cpu"
            elif (node.arg, node.value.value) == ("pin_memory", True):
                node.value.value = False
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        """`torch.cuda` becomes our stand-in."""
        self.generic_visit(node)
        if node.attr == "cuda" and isinstance(node.value, ast.Name) and node.value.id == "torch":
            return ast.copy_location(ast.Name(_NAME, node.ctx), node)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """`tensor.cuda(…)` becomes `tensor`; `torch.autocast("cuda")` and `x.to("cuda")` name the CPU."""
        self.generic_visit(node)
        for argument in node.args:
            if isinstance(argument, ast.Constant) and argument.value == "cuda":
                argument.value = "cpu"
        return node.func.value if isinstance(node.func, ast.Attribute) and node.func.attr == "cuda" else node


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> types.CodeType | None:
        path = self.get_filename(fullname)
        source = self.get_data(path)
        if b"cuda" not in source and b"pin_memory" not in source:
            return super().get_code(fullname)
        return compile(_ToCpu().visit(ast.parse(source, path)), path, "exec", dont_inherit=True)

    def exec_module(self, module: types.ModuleType) -> None:
        setattr(module, _NAME, _cpu)
        super().exec_module(module)
        if module.__name__ == _RANDOM:
            # The states that its tracker swaps are the CPU generator's.
            module._get_cuda_rng_state = _cpu.get_rng_state  # type: ignore[attr-defined]
            module._set_cuda_rng_state = _cpu.set_rng_state  # type: ignore[attr-defined]
            logging.getLogger(_RANDOM).setLevel(logging.ERROR)  # it would warn at each use that the CPU's state moved
        elif module.__name__ == _JIT:
            module.disable_jit_fuser()  # seconds at import and first use, no gain here
        elif module.__name__ == _DISTRIBUTED_OPTIMIZER:
            _repair_distributed_optimizer(module.DistributedOptimizer)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != "megatron.core" and not fullname.startswith("megatron.core."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = _Loader(fullname, spec.loader.path)
        return spec


def _repair_distributed_optimizer(cls: type) -> None:
    """Let megatron-core's distributed optimizer save and load the state of torch's AdamW.

    Its own partners, Transformer Engine's and apex's Adam, keep the step in the parameter group; torch's keeps a step
    tensor beside the moments of each parameter. So (1) `state_dict()` asserts a step where torch's, before its first
    step, has no state; (2) a loaded state lacks "step"; (3) the moments are copied in place into leaf views; (4)
    `load_state_dict()` gives all parameters one shared step tensor, which torch then counts up once per parameter;
    (5) a stale local step overwrites the loaded one; (6) a replica that keeps no row of what is trained, because nearly
    all is frozen, has no step to assert.
    """
    state_dict, set_states = cls.state_dict, cls._set_main_param_and_optimizer_states  # type: ignore[attr-defined]

    def state_dict_with_state(self: Any) -> Any:
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                if not self.optimizer.state[param]:
                    moments = {key: torch.zeros_like(param, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
                    self.optimizer.state[param].update(moments, step=torch.tensor(0.0))
        if self.optimizer.state:
            return state_dict(self)
        self.optimizer.state["nothing"] = {"step": torch.tensor(0.0)}
        try:
            return state_dict(self)
        finally:
            del self.optimizer.state["nothing"]

    @torch.no_grad()
    def set_states_with_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        state["step"] = state["step"].clone()
        set_states(self, model_param, {**tensors, "step": state["step"]})

    cls.state_dict = state_dict_with_state  # type: ignore[attr-defined]
    cls._set_main_param_and_optimizer_states = set_states_with_step  # type: ignore[attr-defined]
