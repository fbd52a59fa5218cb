"""A trace of some steps on some ranks, and which operators took the time."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch.profiler import profile, record_function

from vishwamai_mp.config.files import write_whole, written_whole
from vishwamai_mp.runtime.profiling import has_memory_history, profiler_activities
from vishwamai_mp.training.callbacks.base import Callback, Order

if TYPE_CHECKING:
    from vishwamai_mp.training.loop import Trainer

PROFILE_FOLDER = "profile"
_LARGEST_TRACE = 256 * 2**20  # bytes, compressed
_SHOWN_OPERATORS = 15
_MARK = "step "


def profile_name(first: int, last: int, rank: int) -> str:
    """How the files of a profile begin."""
    return f"steps_{first:08d}-{last:08d}_rank{rank}"


class Profiler(Callback):
    """`profile/steps_00000011-00000013_rank0.json.gz`, a Chrome trace, and a `.txt` with its top operators.

    The trace opens in https://ui.perfetto.dev and in chrome://tracing. The first of all callbacks, so that a trace ends
    before others evaluate and save.

    Args:
        first, last: steps, from 1, both included.
        ranks: that are profiled.
        memory: on a CPU, count what each operator allocates.
    """

    order = Order.WATCH

    def __init__(self, first: int, last: int, ranks: Sequence[int], memory: bool) -> None:
        self.first, self.last, self.ranks = first, last, ranks
        self.memory = memory and not has_memory_history()
        self.profile: profile | None = None
        self.begun = 0
        self.mark: Any = None

    def on_train_begin(self, trainer: "Trainer") -> None:
        if trainer.state.step >= self.last:
            trainer.say(f"logging.profile_steps: the run is past step {self.last}; nothing is profiled")

    def on_step_begin(self, trainer: "Trainer") -> None:
        step = trainer.state.step + 1
        if not self.first <= step <= self.last or trainer.runtime.rank not in self.ranks:
            return
        if self.profile is None:
            self.begun = step
            self.profile = profile(activities=profiler_activities(), profile_memory=self.memory)
            self.profile.start()
        self.mark = record_function(f"{_MARK}{step}")
        self.mark.__enter__()

    def on_step_end(self, trainer: "Trainer", record: dict[str, float]) -> None:
        if self.profile is None:
            return
        self.mark.__exit__(None, None, None)
        if trainer.state.step == self.last:
            self._finish(trainer)

    def on_train_end(self, trainer: "Trainer") -> None:
        if self.profile is not None:  # stopped early: what there is
            self._finish(trainer)

    def _finish(self, trainer: "Trainer") -> None:
        assert self.profile is not None
        finished, self.profile = self.profile, None
        finished.stop()
        first, last, rank = self.begun, trainer.state.step, trainer.runtime.rank
        folder = trainer.folder / PROFILE_FOLDER
        folder.mkdir(exist_ok=True)
        path = folder / f"{profile_name(first, last, rank)}.json.gz"
        steps = f"step {first}" if first == last else f"steps {first} to {last}"
        table = f"{steps}, rank {rank}: {operator_table(finished.key_averages(), self.memory)}"
        write_whole(path.with_name(f"{profile_name(first, last, rank)}.txt"), table)
        with written_whole(path, ending=".json.gz") as aside:  # torch chooses the format by the name's ending
            finished.export_chrome_trace(str(aside))
            if (size := aside.stat().st_size) > _LARGEST_TRACE:
                aside.unlink()
                trace = f"the trace of {size / 2**20:,.0f} MiB is too large and not kept; profile fewer steps"
            else:
                trace = f"{path}: {size / 2**20:.1f} MiB"
        trainer.say(table + trace)


def operator_table(averages: Sequence[Any], memory: bool) -> str:
    """The operators that took most of the time, their own without what they call; with `memory`, those that allocated
    most, less what they freed, too.

    Args:
        averages: torch's `key_averages()`. What passed within our marks of steps passed between operators.
    """
    on_device = any(item.self_device_time_total for item in averages)
    times: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    allocated: Counter[str] = Counter()
    for item in averages:
        name = "(between operators)" if item.key.startswith(_MARK) else item.key
        times[name] += item.self_device_time_total if on_device else item.self_cpu_time_total
        calls[name] += item.count
        allocated[name] += item.self_cpu_memory_usage
    whole = sum(times.values()) or 1.0
    text = f"{whole / 1000:,.1f} ms in {'kernels' if on_device else 'operators'}\n"
    rows = [(name, calls[name], f"{time / 1000:,.2f} ms", f"{time / whole:.1%}") for name, time in _top(times)]
    text += _render(rows)
    if memory:
        text += "allocated, less freed:\n"
        text += _render([(name, calls[name], f"{size / 2**20:,.1f} MiB", "") for name, size in _top(allocated)])
    return text


def _top(counted: Counter[str]) -> list[tuple[str, int]]:
    return [(name, amount) for name, amount in counted.most_common(_SHOWN_OPERATORS) if amount > 0]


def _render(rows: Sequence[tuple[str, int, str, str]]) -> str:
    lines = []
    for name, calls, amount, share in rows:
        short = name if len(name) <= 50 else name[:49] + "…"
        lines.append(f"  {short:50} {calls:9,} ×{amount:>14} {share:>6}".rstrip() + "\n")
    return "".join(lines)
