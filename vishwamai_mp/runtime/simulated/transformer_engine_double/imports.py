"""Imports Transformer Engine's own Python for the simulated accelerator, as the adapter imports megatron-core.

What it names "cuda" becomes the simulated device. Of packages that it imports and that are not here (triton, einops,
onnxscript), names can be imported and decorate; whoever calls one later gets an error that says which.
"""

import ast
import functools
import importlib.abc
import importlib.machinery
import os
import sys
import types
from typing import Any

from vishwamai_mp.runtime.megatron_cpu import IN_PLACE_OF_CUDA, ToThisDevice
from vishwamai_mp.runtime.rewriting import RewritingLoader
from vishwamai_mp.runtime.simulated.registration import NAME
from vishwamai_mp.runtime.simulated.transformer_engine_double.gpu import GPU
from vishwamai_mp.runtime.simulated.transformer_engine_double.quantizing import pad_columnwise_scale_inv

_ABSENT = ("triton", "einops", "onnxscript", "onnx")


class ToTheGpu(ToThisDevice, ast.NodeTransformer):
    """As in megatron-core, and the idioms that only Transformer Engine uses."""

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        """`"cuda"` becomes the simulated device's name, in defaults of parameters and comparisons too."""
        return ast.copy_location(ast.Constant(NAME), node) if node.value == "cuda" else node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        """`tensor.is_cuda` becomes a question to the GPU; `torch.version.cuda` its answer."""
        if node.attr == "is_cuda":
            return self._asked("is_here", node.value, node)
        if ast.unparse(node) == "torch.version.cuda":
            return ast.copy_location(ast.Attribute(ast.Name(IN_PLACE_OF_CUDA, ast.Load()), "version", node.ctx), node)
        return super().visit_Attribute(node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | list[ast.AST]:
        """`from torch.cuda import name` becomes `name = ` what the GPU calls so."""
        if node.module != "torch.cuda":
            return node
        names = [ast.Name(alias.asname or alias.name, ast.Store()) for alias in node.names]
        values = [ast.Attribute(ast.Name(IN_PLACE_OF_CUDA, ast.Load()), alias.name, ast.Load()) for alias in node.names]
        assigned = [ast.Assign([name], value) for name, value in zip(names, values, strict=True)]
        return [ast.copy_location(statement, node) for statement in assigned]

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """`type(tensor)`, `tensor.data_ptr()` and operators of a part of a tensor become questions to the GPU."""
        if isinstance(node.func, ast.Name) and node.func.id == "type" and len(node.args) == 1:
            return self._asked("kind", node.args[0], node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "data_ptr" and not node.args:
            return self._asked("address", node.func.value, node)
        name = ast.unparse(node.func)
        if name.endswith(".__torch_dispatch__") and name != "super().__torch_dispatch__":
            return self._asked("operate", node.args[0], node, *node.args[2:])
        return super().visit_Call(node)

    def _asked(self, question: str, subject: ast.expr, node: ast.expr, *others: ast.expr) -> ast.expr:
        gpu = ast.Attribute(ast.Name(IN_PLACE_OF_CUDA, ast.Load()), question, ast.Load())
        return ast.copy_location(ast.Call(gpu, [self.visit(one) for one in (subject, *others)], []), node)


class _Loader(RewritingLoader):
    transformer = ToTheGpu

    def exec_module(self, module: types.ModuleType) -> None:
        setattr(module, IN_PLACE_OF_CUDA, GPU)
        super().exec_module(module)
        if module.__name__ == "transformer_engine.common":
            module.load_framework_extension = lambda _: None  # type: ignore[attr-defined]  # ours is loaded
        elif module.__name__ == "transformer_engine.pytorch.cpp_extensions":  # it passes on whatever is compiled
            module.__getattr__ = sys.modules["transformer_engine_torch"].__getattr__  # type: ignore[method-assign]
        elif module.__name__ == "transformer_engine.pytorch.tensor.nvfp4_tensor":
            # It makes bits of the Hadamard matrix's signs, once, on the host; here tensors have no values to read.
            module.get_sign_from_vector = lambda signs: (1 << signs.numel()) - 1  # type: ignore[attr-defined]
        elif module.__name__ == "transformer_engine.pytorch.triton.pad":  # a kernel of triton's
            module.pad_columnwise_scale_inv = pad_columnwise_scale_inv  # type: ignore[attr-defined]


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname.partition(".")[0] != "transformer_engine":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = _Loader(fullname, spec.loader.path)
        return spec


class Absent:
    """A name of what is not here. While modules are imported it can be called, as a decorator is.

    Args:
        name: in full.
    """

    importing = False

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> "Absent":
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{self._name}.{name}")

    def __call__(self, *arguments: Any, **_: Any) -> "Absent":
        if not Absent.importing:
            raise NotImplementedError(f"{self._name} is no part of the simulation of Transformer Engine")
        names = [getattr(argument, "__qualname__", None) for argument in arguments]
        return Absent(names[0] or self._name if names else self._name)

    def __getitem__(self, _: Any) -> Any:
        raise NotImplementedError(f"{self._name} is no part of the simulation of Transformer Engine")

    def __or__(self, other: Any) -> "Absent":  # in annotations
        return self

    __ror__ = __or__


class _AbsentModule(types.ModuleType):
    __version__ = "3.5.0"  # triton's, which is compared

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{self.__name__}.{name}")


class _AbsentFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Last in the search: packages that are there are found before."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if not Absent.importing or fullname.partition(".")[0] not in _ABSENT:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = _AbsentModule(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """There is nothing to run."""


def import_python(extension: types.ModuleType) -> None:
    """Import the package, with `extension` for what it compiles."""
    import torch._dynamo
    import torch._inductor.standalone_compile
    import torch.utils.flop_counter  # noqa: F401  (these look for the real triton)

    sys.modules["transformer_engine_torch"] = extension
    sys.meta_path.insert(0, _Finder())
    sys.meta_path.append(_AbsentFinder())
    # Its own word for a machine on which it is not to look for compiled libraries.
    settings = {"NVTE_PROJECT_BUILDING": "1", "NVTE_FRAMEWORK": "pytorch", "NVTE_TORCH_COMPILE": "0"}
    before = {name: os.environ.get(name) for name in settings}
    os.environ |= settings
    Absent.importing = True
    try:
        import transformer_engine.pytorch  # noqa: F401
    finally:
        Absent.importing = False
        for name in [name for name, module in sys.modules.items() if isinstance(module, _AbsentModule)]:
            del sys.modules[name]  # megatron-core looks for them too
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def forget() -> None:
    """Empty what the package keeps between calls: tensors of a job that is over, and what its GPU could."""
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    FP8GlobalStateManager.reset()
    for module in [m for name, m in sys.modules.items() if name.startswith("transformer_engine.")]:
        for name, value in list(vars(module).items()):
            if isinstance(value, functools._lru_cache_wrapper):
                value.cache_clear()
            elif isinstance(value, dict) and name.startswith("_") and name.endswith(("_cache", "_wgrads", "_STATES")):
                value.clear()
            elif name.startswith("_") and name.endswith("_SUPPORT"):
                setattr(module, name, None)
