"""Can this machine's GPUs be trusted with a training run? Trains small models in every layout and says what disagrees.

bash launch/gpu_acceptance.sh --work-dir acceptance                 about ten minutes; exit status 0: it can be trusted
bash launch/gpu_acceptance.sh --work-dir acceptance --simulate 8    the same plan on the simulated accelerator, no GPU

It has not met a GPU yet.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from vishwamai_mp.config import PretrainConfig, UserError, load_config, resolve, run_program
from vishwamai_mp.config.files import write_whole
from vishwamai_mp.config.wording import counted
from vishwamai_mp.data.indexed import IndexedWriter, token_dtype
from vishwamai_mp.observability.page import page, render, write_page
from vishwamai_mp.planning.footprint_advice import rank_memory
from vishwamai_mp.planning.hardware import known_gpu
from vishwamai_mp.planning.stacks import find_stack
from vishwamai_mp.planning.step_time import Machine, step_time, tokens_per_second_per_gpu

_HERE = Path(__file__).resolve().parents[2]
_STEPS, _SAVED = 6, 3
_LOSS = 5e-3  # by which losses of two layouts may differ in bf16, as a share
_RESUMED = 1e-3  # by which those of a resumed run may: GPUs add up in no fixed order
_SPEED, _MEMORY = 0.5, 1.15  # of what is predicted: at least so fast, at most so much
_SECONDS = 240  # that a trial may take; a GPU that hangs must not hold the rest up
# Transformer Engine's quantizers against the emulation, and the components' kernels against torch's operators.
_TESTS = {
    "FP8 operands": "tests/precision/test_gpu.py",
    "memory kernels": "tests/neural_memory/test_kernels_on_gpu.py",
    "cache kernels": "tests/cache_augmentation/test_reading_on_gpu.py",
}
_RECIPE: dict[str, Any] = {
    "model": {
        "hidden_size": 512,
        "num_layers": 4,
        "num_attention_heads": 8,
        "intermediate_size": 1536,
        "vocab_size": 8192,
        "max_position_embeddings": 2048,
    },
    "precision": "bf16",
    "optimizer": {"learning_rate": 1e-3},
    "schedule": {"warmup_steps": 2},
    "training": {"sequence_length": 512, "micro_batch_size": 2, "global_batch_size": 16, "max_steps": _STEPS},
    "logging": {"log_every": 1, "report_to": []},
    "data": {"split": "100,0,0"},
}
_LARGE = (
    "model.hidden_size=2048",
    "model.num_layers=8",
    "model.num_attention_heads=16",
    "model.intermediate_size=5632",
    "training.sequence_length=2048",
    "training.max_steps=20",
)
_STYLE = """
table { border-collapse: collapse; }
th, td { text-align: left; padding: 5px 14px; border-bottom: 1px solid var(--line); }
.passed { color: var(--best); } .failed { color: var(--wrong); } td.state { white-space: nowrap; font-weight: 600; }
"""


@dataclass(frozen=True)
class Trial:
    """A training run: what it is called, on how many GPUs, and what it sets beside the recipe."""

    name: str
    gpus: int
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What came of a check: "passed", "failed" or "does not apply", in a line, and in numbers."""

    check: str
    state: str
    says: str
    figures: dict[str, Any] = field(default_factory=dict)


def layouts(gpus: int) -> list[Trial]:
    """Runs that must show the same losses; the first is on one GPU."""
    graphs = "training.cuda_graphs=true"
    found = [Trial("one GPU", 1), Trial("CUDA graphs", 1, (graphs,))]
    width = max(width for width in (1, 2, 4, 8) if width <= gpus)
    parallel = "parallel."
    if width >= 2:
        tensor = f"{parallel}tensor_model_parallel_size="
        found += [
            Trial("tensor", width, (f"{tensor}{width}", f"{parallel}sequence_parallel=true")),
            Trial("pipeline", 2, (f"{parallel}pipeline_model_parallel_size=2",)),
            Trial("context", 2, (f"{parallel}context_parallel_size=2",)),
            Trial("replicas", width, (f"{parallel}use_distributed_optimizer=true", "training.micro_batch_size=1")),
            Trial("fully sharded", width, (f"{parallel}fully_sharded=true", "training.micro_batch_size=1")),
        ]
    if width >= 4:
        stages = (f"{parallel}pipeline_model_parallel_size=2", f"{parallel}virtual_pipeline_model_parallel_size=2")
        settings = (f"{tensor}2", *stages)
        found += [
            Trial("tensor and pipeline, CUDA graphs", 4, (*settings, graphs)),
            Trial("tensor and pipeline", 4, settings),
        ]
    return found


def component_trials(gpus: int) -> list[Trial]:
    """Runs with memory and cache that must show the same losses; the first is on one GPU."""
    components = ("memory.enabled=true", "memory.layers=[1]", "cache.enabled=true", "cache.layers=[2]")
    settings = ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true")
    found = [Trial("memory and cache", 1, components), Trial("memory and cache, tensor", 2, (*components, *settings))]
    return [trial for trial in found if trial.gpus <= gpus]


def speed_trials(gpus: int) -> list[Trial]:
    """Runs whose speed and memory are compared with what is predicted: on all GPUs, as replicas."""
    large = (*_LARGE, f"training.global_batch_size={4 * gpus}")
    return [Trial(f"{name}, {gpus} GPUs", gpus, (*large, f"precision={name}")) for name in ("bf16", "fp8_current")]


def compare_losses(trial: str, losses: Sequence[float], expected: Sequence[float], share: float) -> Verdict:
    """Whether a run shows the losses of another."""
    if len(losses) != len(expected) or not losses:
        return Verdict(trial, "failed", f"logged: {counted(len(losses), 'step')}, not {len(expected)}")
    largest = max(abs(a - b) / abs(b) if a == a else float("inf") for a, b in zip(losses, expected, strict=True))
    figures = {"losses": list(losses), "largest_difference": largest}
    says = f"losses differ by {largest:.2g} at most ({share:.2g} allowed)"
    return Verdict(trial, "passed" if largest <= share else "failed", says, figures)


def compare_speed(trial: str, record: dict[str, float], config: PretrainConfig, gpus: int, gpu_name: str) -> Verdict:
    """Whether a run was about as fast, and took about as much memory, as planning predicts."""
    planned = rank_memory(config, gpus, on_gpu=True).total / 2**30
    figures: dict[str, Any] = {"memory_gib": record["memory_gib"], "planned_memory_gib": planned}
    figures["tokens_per_second"] = record["tokens_per_second"]
    says = f"{record['memory_gib']:.1f} GiB of {planned:.1f} predicted"
    wrong = record["memory_gib"] > _MEMORY * planned + 1  # and what libraries keep
    gpu = known_gpu(gpu_name)
    if gpu is None:
        return Verdict(trial, "failed" if wrong else "passed", f"{says}; {gpu_name} is not known to planning", figures)
    time = step_time(config, gpus, Machine(gpu, find_stack("megatron")))
    rate = figures["planned_tokens_per_second"] = tokens_per_second_per_gpu(config, gpus, time) * gpus
    says += f"; {record['tokens_per_second']:,.0f} tokens/s of {rate:,.0f} predicted"
    wrong |= record["tokens_per_second"] < _SPEED * rate
    return Verdict(trial, "failed" if wrong else "passed", says, figures)


class Acceptance:
    """Runs the plan in a folder of its own.

    Args:
        folder: for data, runs and their logs.
        gpus: of this machine.
    """

    def __init__(self, folder: Path, gpus: int) -> None:
        self.folder, self.gpus, self.recipe = folder, gpus, folder / "recipe.yaml"
        folder.mkdir(parents=True, exist_ok=True)
        data = str(folder / "tokens")
        write_whole(self.recipe, yaml.safe_dump(_RECIPE | {"data": {**_RECIPE["data"], "train": [data]}}))
        rows = _RECIPE["model"]["vocab_size"]
        # Runs of tokens that follow each other, so that there is something to learn.
        starts = np.random.default_rng(0).integers(rows, size=2**13)
        tokens = (starts[:, None] + np.arange(256)).ravel() % rows
        with IndexedWriter(data, token_dtype(rows)) as writer:
            writer.add(tokens.astype(token_dtype(rows)).tobytes(), np.full(2**13, 256))
            writer.publish()

    def config(self, trial: Trial) -> PretrainConfig:
        """Resolved."""
        return resolve(load_config(str(self.recipe), [*trial.settings]), trial.gpus)

    def judged(self) -> list[Verdict]:
        """All checks, on the GPUs."""
        verdicts = [self._tested(check, tests) for check, tests in _TESTS.items()]
        for trials in (layouts(self.gpus), component_trials(self.gpus)):
            curves = [[record["lm_loss"] for record in self._train(trial)] for trial in trials]
            for trial, losses in zip(trials, curves, strict=True):
                verdicts.append(compare_losses(f"layout: {trial.name}", losses, curves[0], _LOSS))
        verdicts.append(self._resumed(layouts(self.gpus)[-1]))
        for trial in speed_trials(self.gpus):
            records = self._train(trial)
            name = f"speed: {trial.name}"
            if records and "memory_gib" in records[-1]:
                gpu = _ask_torch("torch.cuda.get_device_name()")
                verdicts.append(compare_speed(name, records[-1], self.config(trial), trial.gpus, gpu))
            else:
                verdicts.append(Verdict(name, "failed", f"no step was measured; see {self._log(trial)}"))
        return verdicts

    def simulated(self) -> list[Verdict]:
        """The plan's training runs by a GPU's rules, a step of rank 0 each; what needs values does not apply."""
        from vishwamai_mp.runtime.simulated import transformer_engine_double

        doubled = transformer_engine_double.install()
        from vishwamai_mp.training.dry_run import dry_run  # after the double

        verdicts = [Verdict(check, "does not apply", "a simulation has no values") for check in _TESTS]
        agreeing = [*layouts(self.gpus), *component_trials(self.gpus)]
        for kind, trials in (("layout", agreeing), ("speed", speed_trials(self.gpus))):
            for trial in trials:
                found = dry_run(self.config(trial), trial.gpus, 0)
                sound = found.updated and sum(found.host_waits.values()) == 1
                says = f"a step of rank 0 runs; the host waits {counted(sum(found.host_waits.values()), 'time')}"
                figures = {"peak_bytes": found.peak_bytes, "predicted_bytes": found.predicted_bytes}
                state = "passed" if sound else "failed"
                verdicts.append(Verdict(f"{kind}: {trial.name}", state, says, {**figures, "double": doubled}))
        verdicts.append(Verdict("save and resume", "does not apply", "a simulation has no values"))
        return verdicts

    def _tested(self, check: str, tests: str) -> Verdict:
        """By tests of this checkout that need a GPU."""
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(_HERE / tests)]
        run = subprocess.run(command, cwd=_HERE, capture_output=True, text=True)
        write_whole(self.folder / f"{check.replace(' ', '-')}.log", run.stdout + run.stderr)
        lines = run.stdout.splitlines()
        says = lines[-1].strip("= ") if lines else "pytest did not run"
        passed = run.returncode == 0 and "passed" in says
        return Verdict(check, "passed" if passed else "failed", says)

    def _resumed(self, trial: Trial) -> Verdict:
        """A run that goes on from a checkpoint in the middle, against the same run undisturbed."""
        whole = Trial("undisturbed", trial.gpus, (*trial.settings, f"checkpoint.save_every={_SAVED}"))
        expected = [record["lm_loss"] for record in self._train(whole)]
        again = Trial("resumed", whole.gpus, whole.settings)
        if not (self._run_folder(whole) / "checkpoints" / f"step_{_SAVED:08d}").is_dir():
            return Verdict("save and resume", "failed", f"nothing was saved; see {self._log(whole)}")
        shutil.rmtree(self._run_folder(again), ignore_errors=True)
        shutil.copytree(self._run_folder(whole), self._run_folder(again))
        shutil.rmtree(self._run_folder(again) / "checkpoints" / f"step_{_STEPS:08d}")
        (self._run_folder(again) / "metrics.jsonl").unlink()
        losses = [record["lm_loss"] for record in self._train(again, fresh=False)]
        return compare_losses("save and resume", losses, expected[_SAVED:], _RESUMED)

    def _train(self, trial: Trial, fresh: bool = True) -> list[dict[str, float]]:
        """What each step logged; less where the run failed."""
        folder = self._run_folder(trial)
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
        command = ["bash", str(_HERE / "launch" / "torchrun_single_node.sh"), "--config", str(self.recipe)]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(self.gpus)))).split(",")
        environment = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": ",".join(visible[: trial.gpus]),
            "NPROC": str(trial.gpus),
            "LOG_DIR": str(folder.with_suffix(".logs")),
            "PYTHON": sys.executable,
        }
        with self._log(trial).open("w") as log:
            arguments = [*command, *trial.settings, f"training.output_dir={folder}"]
            try:
                subprocess.run(arguments, env=environment, stdout=log, stderr=log, timeout=_SECONDS, check=False)
            except subprocess.TimeoutExpired:
                log.write(f"\nended after {_SECONDS} s\n")
        metrics = folder / "metrics.jsonl"
        return [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []

    def _run_folder(self, trial: Trial) -> Path:
        return self.folder / trial.name.replace(" ", "-").replace(",", "")

    def _log(self, trial: Trial) -> Path:
        return self._run_folder(trial).with_suffix(".log")


def write_results(folder: Path, verdicts: list[Verdict], gpus: int, simulated: bool) -> bool:
    """`acceptance.json` and `acceptance.html`; whether nothing failed."""
    sound = all(verdict.state != "failed" for verdict in verdicts)
    found = {
        "trust": sound and not simulated,
        "simulated": simulated,
        "gpus": gpus,
        "verdicts": [asdict(verdict) for verdict in verdicts],
    }
    write_whole(folder / "acceptance.json", json.dumps(found, indent=1) + "\n")
    title = f"{gpus} GPUs: " + ("simulated" if simulated else "to be trusted" if sound else "not to be trusted")
    body = render("acceptance.html", title=title, simulated=simulated, verdicts=verdicts)
    write_page(folder / "acceptance.html", page(title, body, _STYLE, ""), "--work-dir")
    return sound


def _ask_torch(expression: str) -> str:
    """In a process of its own: this one must not hold a GPU."""
    command = [sys.executable, "-W", "ignore", "-c", f"import torch; print({expression})"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    """Run the plan, write what came of it, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="gpu_acceptance.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work-dir", type=Path, required=True, help="folder for data, runs, logs and the results")
    parser.add_argument("--simulate", type=int, metavar="N", help="run the plan for N GPUs without any")
    options = parser.parse_args()
    if options.simulate is not None and options.simulate < 1:
        raise UserError(f"--simulate {options.simulate}: use a number of GPUs from 1 on")
    gpus = options.simulate or int(_ask_torch("torch.cuda.device_count() if torch.cuda.is_available() else 0"))
    if not gpus:
        raise UserError("torch sees no GPU here; --simulate 8 runs the plan without one")
    acceptance = Acceptance(options.work_dir.absolute(), gpus)
    verdicts = acceptance.simulated() if options.simulate else acceptance.judged()
    sound = write_results(acceptance.folder, verdicts, gpus, bool(options.simulate))
    for verdict in verdicts:
        print(f"{verdict.state:15} {verdict.check}: {verdict.says}")
    print(f"{acceptance.folder}/acceptance.html")
    return 0 if sound else 1


if __name__ == "__main__":
    run_program(main)
