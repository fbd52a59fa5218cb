"""Times the arms of a benchmark in turns."""

import statistics
import time
from collections.abc import Callable, Mapping


def alternate(arms: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each arm's step; two unmeasured rounds first. Who comes after whom changes every round."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for number in range(rounds + 2):
        for name in names if number % 2 else reversed(names):
            start = time.perf_counter()
            arms[name]()
            if number >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def say_ratio(what: str, value: float) -> None:
    """Print a ratio as a line for people, which `all.py` collects too."""
    print(f"ratio  {what}  {value:.4g}", flush=True)
