"""A program: builds small models of Transformer Engine's layers without a GPU and prints, as JSON, what they are.

usage: transformer_engine_build.py FOLDER < CASES > RESULTS

CASES is a JSON list of [world size, section.key=value ...]. FOLDER holds the package's Python files; what it compiles
is stood in for, so that models have values but cannot be run. This process is rank 0 of jobs whose peers are not there.
The same model of torch's layers is built beside each.
"""

import contextlib
import enum
import importlib.abc
import importlib.machinery
import json
import os
import sys
import tempfile
import types
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
_NOT_INSTALLED = ("transformer_engine_torch", "einops", "onnx", "onnxscript", "triton")


class _Stub(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Any module of the packages that are not installed, and anything in it."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname.partition(".")[0] in _NOT_INSTALLED:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Any:
        module = mock.MagicMock(name=spec.name)
        module.__path__, module.__version__ = [], "3.5.0"
        if spec.name == "transformer_engine_torch":  # it compares these with its own at import
            names = {"Byte": 0, "Int32": 2, "Float32": 4, "Float16": 5, "BFloat16": 6}
            names |= {"Float8E4M3": 7, "Float8E5M2": 8, "Float4E2M1": 10}
            module.DType = _enum({f"k{name}": value for name, value in names.items()})
            module.NVTE_Fused_Attn_Backend = _enum(
                {"NVTE_F16_arbitrary_seqlen": 1, "NVTE_FP8": 2, "NVTE_No_Backend": 3}
            )
            # These index the quantizers of a module: three forward and two backward for each product.
            forward = [f"GEMM{i}_{kind}" for i in (1, 2, 3) for kind in ("INPUT", "WEIGHT", "OUTPUT")]
            backward = [f"GRAD_{kind}{i}" for i in (1, 2, 3) for kind in ("OUTPUT", "INPUT")]
            module.FP8FwdTensors = _enum({name: index for index, name in enumerate(forward)})
            module.FP8BwdTensors = _enum({name: index for index, name in enumerate(backward)})
            module.get_cudnn_version = lambda: 92400
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """There is nothing to run."""


def _enum(members: dict[str, int]) -> Any:
    make: Any = enum.IntEnum  # by a call that the type checker does not try to follow
    return make("Stub", members)


def import_transformer_engine(folder: str) -> None:
    """Import the Python part of the package from `folder`."""
    import torch._dynamo
    import torch._inductor.standalone_compile
    import torch.utils.flop_counter  # noqa: F401  (these look for the real triton)

    # There is no compiled library to look for, and nothing is run that is worth compiling.
    os.environ |= {"NVTE_PROJECT_BUILDING": "1", "NVTE_FRAMEWORK": "none", "NVTE_TORCH_COMPILE": "0"}
    sys.path.insert(0, folder)
    sys.meta_path.append(_Stub())
    import transformer_engine.common

    transformer_engine.common.load_framework_extension = lambda _: None
    import transformer_engine.pytorch


def main() -> None:
    import_transformer_engine(sys.argv[1])
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    # megatron-core is adapted as it is imported: before a GPU is pretended.
    import vishwamai_mp.checkpoint.writer  # noqa: F401
    from vishwamai_mp.runtime import shutdown

    results = []
    for world_size, *overrides in json.load(sys.stdin):
        if world_size == 1:  # it can save and load
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        else:
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
        results.append(_built(world_size, overrides))
        shutdown()
    print(json.dumps(results))


def _built(world_size: int, overrides: list[str]) -> dict[str, Any]:
    from tests.model.builds import small_config
    from vishwamai_mp.config import ConfigError
    from vishwamai_mp.model import build_model
    from vishwamai_mp.runtime import initialize

    config = small_config(*overrides, world_size=world_size)
    runtime = initialize(config)
    (plain,) = build_model(config, runtime)
    with _as_if_on_a_gpu():
        try:
            (fused,) = build_model(config, runtime)
        except ConfigError as error:
            return {"refused": str(error)}
        found = _compared(fused, plain)
        if config.precision == "fp8_delayed" and world_size == 1:
            found |= _resumed(config, runtime, fused, plain, *build_model(config, runtime))
        return found


@contextlib.contextmanager
def _as_if_on_a_gpu() -> Iterator[None]:
    ours = [f"vishwamai_mp.model.{name}.use_transformer_engine" for name in ("specs", "transformer_config", "model")]
    from transformer_engine.pytorch.quantization import RecipeState

    patches: list[Any] = [mock.patch(name, return_value=True) for name in ours]
    patches.append(mock.patch.object(RecipeState, "create", partial(RecipeState.create, device="cpu")))
    patches += [
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("torch.cuda.current_device", return_value="cpu"),
        mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)),
        mock.patch("torch.cuda.get_device_properties", return_value=types.SimpleNamespace(major=9, minor=0)),
        mock.patch("torch.cuda.Stream"),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def _compared(fused: Any, plain: Any) -> dict[str, Any]:
    import torch

    theirs, here = fused.sharded_state_dict(), plain.sharded_state_dict()
    layer = fused.decoder.layers[0]
    attention, kernel = _attention(fused), {}
    if attention is not layer.self_attention.core_attention:
        kernel = {"kernel": [attention.cp_group, attention.attention_type]}
    return kernel | {
        "classes": sorted({type(m).__name__ for m in layer.modules() if type(m).__name__.startswith("TE")}),
        "final_norm": type(fused.decoder.final_layernorm).__module__.split(".")[0],
        "entries": [sorted(entry.key for entry in entries.values()) for entries in (theirs, here)],
        "equal": sum(torch.equal(_data(theirs[key]), _data(_under(here, theirs[key].key))) for key in theirs),
        "places": [sorted(_places(entries)) for entries in (theirs, here)],
        "fp8": [fused.config.fp8, fused.config.fp8_recipe, plain.config.fp8],
        "tracker_stays": _tracker_stays(fused),
        "marks": [sorted(_marks(model.sharded_state_dict())) for model in (fused, plain)],
        "gate": layer.mlp.activation_func.__name__,
        "scale": attention.softmax_scale,
        "window": attention.window_size,
        "rope_fusion": fused.config.apply_rope_fusion,
        "cp_comm_type": fused.config.cp_comm_type,
        "without_mask": [fused.attends_without_mask, plain.attends_without_mask],
    }


def _tracker_stays(model: Any) -> bool:
    """Whether the tracker of random numbers that attention was built with is the one that a step seeds.

    Under sequence parallelism it has none: the whole layer runs inside megatron-core's.
    """
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from vishwamai_mp.runtime import seed_step

    seed_step(7, 3, model.pg_collection)
    expected = None if model.config.sequence_parallel else get_cuda_rng_tracker()
    return _attention(model).rng_states_tracker is expected


def _attention(model: Any) -> Any:
    """Transformer Engine's, of the first layer."""
    attention = model.decoder.layers[0].self_attention.core_attention
    return getattr(attention, "kernel", attention)


def _resumed(config: Any, runtime: Any, fused: Any, plain: Any, fresh: Any) -> dict[str, Any]:
    """What delayed scaling remembers of a run that goes on: on another GPU, then on a CPU, then on a GPU again."""
    import torch

    from vishwamai_mp.checkpoint import CheckpointManager
    from vishwamai_mp.config import UserError

    linears = [
        [part for part in model.modules() if "scaling_fwd" in vars(part).get("fp8_meta", {})]
        for model in (fused, fresh)
    ]
    for linear in linears[0]:
        for direction in ("scaling_fwd", "scaling_bwd"):
            linear.fp8_meta[direction].scale[:-1].uniform_()  # but of what is not rounded
            linear.fp8_meta[direction].amax_history[:, :-1].uniform_()
    known = [_scaling(linear) for linear in linears[0]]
    equal = []
    with tempfile.TemporaryDirectory() as folder:
        manager = CheckpointManager(Path(folder), config, runtime)
        for step, (source, target) in enumerate(((fused, fresh), (fused, plain), (plain, fresh))):
            manager.save(step, [source], None, {})
            for linear in linears[1]:
                linear.reset_fp8_meta_tensors()
            manager.load(Path(folder) / f"step_{step:08d}", [target])
            if target is fresh:
                equal.append(all(map(torch.equal, known, map(_scaling, linears[1]))))
    try:
        linears[0][0].load_state_dict({"_extra_state": torch.ones(9, dtype=torch.uint8)}, strict=False)
    except UserError as error:
        return {"resumed": equal, "linears": len(known), "pickle": str(error)}
    raise AssertionError("a pickle was taken")


def _scaling(linear: Any) -> Any:
    import torch

    states = [linear.fp8_meta[direction] for direction in ("scaling_fwd", "scaling_bwd")]
    return torch.cat([tensor.flatten() for state in states for tensor in (state.scale, state.amax_history)]).clone()


def _under(entries: dict[str, Any], key: str) -> Any:
    return next(entry for entry in entries.values() if entry.key == key)


def _data(entry: Any) -> Any:
    return entry.data.detach()


def _places(entries: dict[str, Any]) -> list[list[Any]]:
    """Of each tensor, or part of a fused one, its name, the whole's shape and where this rank's shard lies in it."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    shards = [
        shard
        for entry in entries.values()
        for shard in (nested_values(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry])
    ]
    return [[shard.key, list(shard.global_shape), list(shard.global_offset)] for shard in shards]


def _marks(entries: dict[str, Any]) -> list[list[Any]]:
    """Of each parameter, what gradient norms and sequence parallelism go by."""
    return [
        [
            entry.key,
            list(entry.data.shape),
            str(entry.data.dtype),
            bool(getattr(entry.data, "tensor_model_parallel", False)),
            bool(getattr(entry.data, "sequence_parallel", False)),
        ]
        for entry in entries.values()
    ]


if __name__ == "__main__":
    main()
