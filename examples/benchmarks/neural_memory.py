"""The neural memory's cost beside titans-pytorch's NeuralMemory and megatron-core's gated delta rule.

    pip install --no-deps --target /tmp/titans titans-pytorch==0.5.5 einops einx tensordict assoc-scan frozendict \\
        axial-positional-embedding rotary-embedding-torch x-transformers hyper-connections torch-einops-utils \\
        pyvers orjson cloudpickle loguru
    python examples/benchmarks/neural_memory.py --titans /tmp/titans            # 2 minutes, one thread
    python examples/benchmarks/neural_memory.py --titans /tmp/titans --lengths  # and the cost from 1k to 32k tokens

Forward and backward at width 256, sequence 1024, batch 2, one thread. The arms take turns, and the least CPU time of
each counts. Peak memory is that of a process of its own per arm, above what it used before its first pass. Two kinds
of arms: whole modules from hidden states to hidden states (ours with one and three levels of one head of 256, as
titans-pytorch's), and rules alone from given queries, keys, values and gates (at equal heads).
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from turns import say_ratio

WIDTH, LENGTH, BATCH = 256, 1024, 2
MODULES = ("titans-pytorch", "ours, 1 level", "ours, 3 levels")
RULES = tuple(f"{name}, {heads} heads" for heads in (1, 2, 4) for name in ("megatron-core rule", "our rule"))
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
_RESULTS = Path(__file__).resolve().parent / "results"


def titans_module() -> Callable[[], None]:
    import torch
    from titans_pytorch import NeuralMemory

    memory = NeuralMemory(dim=WIDTH, chunk_size=64, heads=1)
    x = torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True)

    def step() -> None:
        out, _ = memory(x)
        out.sum().backward()

    return step


def our_module(levels: int, length: int = LENGTH, batch: int = BATCH) -> Callable[[], None]:
    import torch

    import vishwamai_mp.runtime  # noqa: F401  (before megatron.core)

    # isort: split
    from vishwamai_mp.config import load_config, resolve
    from vishwamai_mp.model import build_model
    from vishwamai_mp.runtime import initialize

    recipe = {
        "model": {"hidden_size": WIDTH, "num_layers": 1, "num_attention_heads": 4, "max_position_embeddings": length},
        "memory": {
            "enabled": True,
            "memory_size": WIDTH,
            "head_dim": WIDTH,
            "num_memory_layers": levels,
            "layers": [0],
            "dropout": 0.0,
        },
        "precision": "fp32",
        "training": {"sequence_length": length, "threads": 1},
    }
    config = resolve(load_config(recipe), 1)
    (model,) = build_model(config, initialize(config))
    memory = model.decoder.layers[0].memory
    torch.nn.init.normal_(memory.output.weight, std=0.02)  # as after training, not zero
    x = torch.randn(length, batch, WIDTH, requires_grad=True)

    def step() -> None:
        out, _ = memory(x)
        out.sum().backward()

    return step


def _rule_inputs(heads: int, batch_first: bool) -> list:
    import torch

    shape = (BATCH, LENGTH, heads) if batch_first else (LENGTH, BATCH, heads)
    q, k, v = (torch.nn.functional.normalize(torch.randn(*shape, WIDTH // heads), dim=-1) for _ in range(3))
    gates = [torch.rand(shape).log() * 0.1, torch.rand(shape).log(), torch.rand(shape)]
    return [x.requires_grad_() for x in (q, k, v, *gates)]


def megatron_rule(heads: int) -> Callable[[], None]:
    import vishwamai_mp.runtime  # noqa: F401  (before megatron.core)

    # isort: split
    from megatron.core.ssm.gated_delta_net import torch_chunk_gated_delta_rule

    q, k, v, forget, _, rate = _rule_inputs(heads, batch_first=True)

    def step() -> None:
        out, _ = torch_chunk_gated_delta_rule(q, k, v, g=forget, beta=rate)  # unit queries and keys are given
        out.sum().backward()

    return step


def our_rule(heads: int) -> Callable[[], None]:
    from vishwamai_mp.neural_memory.delta_rule import momentum_delta_rule

    q, k, v, forget, momentum, rate = _rule_inputs(heads, batch_first=False)

    def step() -> None:
        (out,), _, _ = momentum_delta_rule([q], k, v, forget, momentum, rate)
        out.sum().backward()

    return step


def make(arm: str) -> Callable[[], None]:
    """One forward and backward pass of an arm."""
    if arm == "titans-pytorch":
        return titans_module()
    if arm.startswith("ours, length"):
        return our_module(1, int(arm.split()[-1]), batch=1)
    if arm.startswith("ours"):
        return our_module(int(arm.split()[1]))
    name, heads = arm.split(", ")
    return (our_rule if name == "our rule" else megatron_rule)(int(heads.split()[0]))


def serve(arm: str) -> None:
    """The child process of an arm: prints its peak memory, then the CPU seconds of a pass for every line it is sent."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    step = make(arm)
    before, watch = _resident(), _Watch()
    step()
    print(json.dumps({"peak_mib": watch.stop() - before}), flush=True)
    for _ in sys.stdin:
        start = time.process_time()
        step()
        print(json.dumps({"cpu_seconds": time.process_time() - start}), flush=True)


def _resident() -> float:
    """MiB of this process."""
    fields = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in fields if line.startswith("VmRSS")) / 1024


class _Watch:
    """Samples the process's memory: the system's own peak includes what importing used."""

    def __init__(self) -> None:
        self._peak, self._on = 0.0, True
        self._thread = threading.Thread(target=self._run, daemon=True)  # an error ends the process all the same
        self._thread.start()

    def _run(self) -> None:
        while self._on:
            self._peak = max(self._peak, _resident())
            time.sleep(0.001)

    def stop(self) -> float:
        self._on = False
        self._thread.join()
        return self._peak


class Child:
    """An arm in a process of its own."""

    def __init__(self, arm: str, titans: Path | None) -> None:
        import os

        path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(titans) if titans else None]))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        command = [sys.executable, "-W", "ignore", __file__, "--serve", arm]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.arm = arm
        self.seconds: list[float] = []
        self.peak = self._answer()["peak_mib"]

    def _answer(self) -> dict[str, float]:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"the process of {self.arm!r} ended with {self.process.wait()}")

    def run(self) -> None:
        assert self.process.stdin
        self.process.stdin.write("again\n")
        self.process.stdin.flush()
        self.seconds.append(self._answer()["cpu_seconds"])

    def close(self) -> None:
        self.process.communicate()


def measure(arms: Sequence[str], passes: int, titans: Path | None) -> dict[str, dict[str, float]]:
    """Least CPU seconds of a pass, and peak MiB, of each arm; the arms take turns."""
    children = {arm: Child(arm, titans) for arm in arms}
    for _ in range(passes):
        for child in children.values():
            child.run()
    for child in children.values():
        child.close()
    return {arm: {"cpu_seconds": min(child.seconds), "peak_mib": child.peak} for arm, child in children.items()}


def plot(lengths: dict[str, dict[str, float]], path: Path) -> None:
    """CPU seconds and peak memory over the length, with lines of slope 1."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    tokens = [int(arm.split()[-1]) for arm in lengths]
    for axis, key in zip(axes, ("cpu_seconds", "peak_mib"), strict=True):
        values = [figures[key] for figures in lengths.values()]
        axis.loglog(tokens, values, "o-", base=2, label="ours, 1 level, batch 1")
        axis.loglog(tokens, [values[0] * t / tokens[0] for t in tokens], ":", base=2, label="linear")
        axis.set_xlabel("tokens")
        axis.set_title(key.replace("_", " "))
        axis.legend()
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--titans", type=Path, help="folder that titans-pytorch was installed into; without: left out")
    parser.add_argument("--passes", type=int, default=7, help="of each arm")
    parser.add_argument("--lengths", action="store_true", help="also the cost over the length, as a plot")
    parser.add_argument("--output", type=Path, default=_RESULTS, help="folder for neural_memory.json and .png")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve(options.serve)
        return 0
    options.output.mkdir(parents=True, exist_ok=True)
    modules = MODULES if options.titans else MODULES[1:]
    found = measure(modules, options.passes, options.titans) | measure(RULES, options.passes, options.titans)
    reference = {arm: modules[0] if arm in modules else arm.replace("our rule", "megatron-core rule") for arm in found}
    for arm, figures in found.items():
        beside = found[reference[arm]]
        print(
            f"{arm:28} {figures['cpu_seconds']:7.3f} CPU-s  {figures['peak_mib']:7.0f} MiB   beside"
            f" {reference[arm]}: {beside['cpu_seconds'] / figures['cpu_seconds']:5.2f} × less CPU,"
            f" {beside['peak_mib'] / figures['peak_mib']:5.2f} × less memory"
        )
        if beside is not figures:
            say_ratio(f"CPU time, {reference[arm]} / {arm}", beside["cpu_seconds"] / figures["cpu_seconds"])
    if options.lengths:
        lengths: dict[str, dict[str, float]] = {}
        for length in LENGTHS:  # one at a time: the longest need the memory for themselves
            lengths |= measure([f"ours, length {length}"], 2, None)
            print(f"{length:6} tokens", lengths[f"ours, length {length}"], flush=True)
        found |= lengths
        plot(lengths, options.output / "neural_memory.png")
    (options.output / "neural_memory.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
