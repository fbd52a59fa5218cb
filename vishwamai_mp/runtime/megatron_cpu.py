"""Lets megatron-core run where there is no CUDA: on CPUs over torch.distributed's gloo, and on the simulated device.

megatron-core names the device `"cuda"` or `torch.cuda.current_device()` in the middle of its large functions, where
neither a subclass nor a patched function reaches. `install()` adds an import hook that rewrites those idioms in the
syntax tree of each `megatron.core` module while it is imported: what they name then is `runtime.device()`, asked when
the line runs. Nothing outside megatron-core changes, and where CUDA exists nothing is rewritten.

The hook also lets the distributed optimizer save and load the state of torch's AdamW, on any device.
"""

import ast
import importlib.abc
import importlib.machinery
import logging
import sys
import types
from typing import Any

import torch

from vishwamai_mp.runtime.device import device, is_accelerator
from vishwamai_mp.runtime.importing import kept
from vishwamai_mp.runtime.rewriting import RewritingLoader
from vishwamai_mp.runtime.turning import turning_in_place

_RANDOM = "megatron.core.tensor_parallel.random"
_JIT = "megatron.core.jit"
_ROTARY = "megatron.core.models.common.embeddings.rope_utils"
_DISTRIBUTED_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer"
IN_PLACE_OF_CUDA = "_vishwamai_device"  # what `torch.cuda` is called in a rewritten module


def install() -> None:
    """Add the import hook. Must run before the first import of `megatron.core`."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    assert "megatron.core" not in sys.modules, "import vishwamai_mp.runtime before megatron.core"
    sys.meta_path.insert(0, _Finder())


class _Stream(torch.cpu.Stream):
    """torch.cpu's, which can also be given the event to record, as CUDA's can."""

    def record_event(self, event: Any = None) -> Any:
        return event


class InPlaceOfCuda(types.ModuleType):
    """What `torch.cuda` means inside megatron-core: torch.cpu, completed with what megatron-core needs besides.

    Random numbers are the host's. The simulated accelerator draws none: there is no state to keep.
    """

    Stream: type[Any] = _Stream

    @property
    def device_type(self) -> str:
        return device().type

    @staticmethod
    def current_device() -> torch.device:
        return device()

    @staticmethod
    def tensor_type(name: str) -> str:
        """What `tensor.type()` says on this device: `torch.FloatTensor`, `torch.cuda.FloatTensor`."""
        where = device().type
        return f"torch.{name}" if where == "cpu" else f"torch.{where}.{name}"

    @staticmethod
    def manual_seed(seed: int) -> None:
        torch.manual_seed(seed)

    @staticmethod
    def get_rng_state(*_: Any, **__: Any) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8) if is_accelerator(device()) else torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
        if is_accelerator(device()):
            torch.get_device_module(device().type).set_rng_state(state)
        else:
            torch.set_rng_state(state)

    @staticmethod
    def empty_cache() -> None:
        """There is no caching allocator to empty."""

    @property
    def random(self) -> "InPlaceOfCuda":
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu if hasattr(torch.cpu, name) else torch.cuda, name)


_in_place_of_cuda = InPlaceOfCuda(IN_PLACE_OF_CUDA)


def _ours(expression: str) -> ast.expr:
    return ast.parse(f"{IN_PLACE_OF_CUDA}.{expression}", mode="eval").body


class ToThisDevice(ast.NodeTransformer):
    """Rewrites the CUDA idioms that megatron-core uses."""

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        """`"torch.cuda.FloatTensor"` becomes what the device calls it."""
        if isinstance(node.value, str) and node.value.startswith("torch.cuda.") and node.value.endswith("Tensor"):
            return ast.copy_location(_ours(f"tensor_type({node.value.rpartition('.')[2]!r})"), node)
        return node

    def visit_keyword(self, node: ast.keyword) -> ast.AST:
        """`device="cuda"` becomes the device; `pin_memory=True` becomes `pin_memory=False`."""
        self.generic_visit(node)
        if isinstance(node.value, ast.Constant):
            if (node.arg, node.value.value) == ("device", "cuda"):
                node.value = ast.copy_location(_ours("current_device()"), node.value)
            elif (node.arg, node.value.value) == ("pin_memory", True):
                node.value.value = False
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        """`torch.cuda` becomes our stand-in."""
        self.generic_visit(node)
        if node.attr == "cuda" and isinstance(node.value, ast.Name) and node.value.id == "torch":
            return ast.copy_location(ast.Name(IN_PLACE_OF_CUDA, node.ctx), node)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """`tensor.cuda(…)` becomes `tensor.to(…)`; `torch.autocast("cuda")` and `x.to("cuda")` name the device."""
        self.generic_visit(node)
        node.args = [
            ast.copy_location(_ours("device_type"), argument)
            if isinstance(argument, ast.Constant) and argument.value == "cuda"
            else argument
            for argument in node.args
        ]
        if isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
            to = ast.Attribute(node.func.value, "to", ast.Load())
            return ast.copy_location(ast.Call(to, [_ours("current_device()")], []), node)
        return node


class _Loader(RewritingLoader):
    transformer = ToThisDevice

    def rewrites(self, source: bytes) -> bool:
        return not torch.cuda.is_available() and (b"cuda" in source or b"pin_memory" in source)

    def exec_module(self, module: types.ModuleType) -> None:
        setattr(module, IN_PLACE_OF_CUDA, _in_place_of_cuda)
        with kept():
            super().exec_module(module)
        if module.__name__ == _DISTRIBUTED_OPTIMIZER:
            _repair_distributed_optimizer(module.DistributedOptimizer)
        if torch.cuda.is_available():
            return
        if module.__name__ == _RANDOM:
            # The states that its tracker swaps are the CPU generator's.
            module._get_cuda_rng_state = _in_place_of_cuda.get_rng_state  # type: ignore[attr-defined]
            module._set_cuda_rng_state = _in_place_of_cuda.set_rng_state  # type: ignore[attr-defined]
            logging.getLogger(_RANDOM).setLevel(logging.ERROR)  # it would warn at each use that the CPU's state moved
        elif module.__name__ == _JIT:
            module.disable_jit_fuser()  # seconds at import and first use, no gain here
        elif module.__name__ == _ROTARY:
            original = module._apply_rotary_pos_emb_bshd
            module._apply_rotary_pos_emb_bshd = turning_in_place(original)  # type: ignore[attr-defined]


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != "megatron.core" and not fullname.startswith("megatron.core."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = _Loader(fullname, spec.loader.path)
        return spec


def _repair_distributed_optimizer(cls: type) -> None:
    """Let megatron-core's distributed optimizer save and load the state of torch's AdamW, wherever that is its partner.

    Its usual partners, Transformer Engine's and apex's Adam, keep the step in the parameter group; torch's keeps a step
    tensor beside the moments of each parameter. So (1) `state_dict()` asserts a step where torch's, before its first
    step, has no state; (2) a loaded state lacks "step"; (3) the moments are copied in place into leaf views; (4)
    `load_state_dict()` gives all parameters one shared step tensor, which torch then counts up once per parameter;
    (5) a stale local step overwrites the loaded one; (6) a replica that keeps no row of what is trained, because nearly
    all is frozen, has no step to assert.
    """
    state_dict, set_states = cls.state_dict, cls._set_main_param_and_optimizer_states  # type: ignore[attr-defined]

    def state_dict_with_state(self: Any) -> Any:
        if not isinstance(self.optimizer, torch.optim.Adam):  # of which torch's AdamW is one
            return state_dict(self)
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                if not self.optimizer.state[param]:
                    moments = {key: torch.zeros_like(param, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
                    # The fused kernel counts steps where the parameters are.
                    where = param.device if group.get("fused") or group.get("capturable") else torch.device("cpu")
                    self.optimizer.state[param].update(moments, step=torch.zeros((), device=where))
        states: Any = self.optimizer.state
        if states:
            return state_dict(self)
        states["nothing"] = {"step": torch.tensor(0.0)}
        try:
            return state_dict(self)
        finally:
            del states["nothing"]

    @torch.no_grad()
    def set_states_with_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        if not isinstance(self.optimizer, torch.optim.Adam):
            set_states(self, model_param, tensors)
            return
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        state["step"] = state["step"].clone()
        set_states(self, model_param, {**tensors, "step": state["step"]})

    cls.state_dict = state_dict_with_state  # type: ignore[attr-defined]
    cls._set_main_param_and_optimizer_states = set_states_with_step  # type: ignore[attr-defined]
