"""Which charts a report has: one for each family of metrics, or for each member of it where runs are compared."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from vishwamai_mp.observability.run_folder import Curve, Run


@dataclass(frozen=True)
class Family:
    """Metrics that belong into one chart.

    Attributes:
        pattern: of their keys, as a regular expression.
        label: of a member; `{}` is what the pattern's group matched.
        noisy: smoothed on wish.
        unless: left out where all values equal this.
    """

    title: str
    pattern: str
    label: str = "{}"
    noisy: bool = True
    unless: float | None = None


@dataclass(frozen=True)
class Item:
    """A curve, the run it is of, and how it is marked."""

    run: str
    label: str
    colour: int
    curve: Curve


@dataclass(frozen=True)
class Panel:
    """One chart."""

    title: str
    noisy: bool
    curves: list[Item]


@dataclass(frozen=True)
class _Section:
    title: str
    families: list[Family]
    note: str = ""


_SECTIONS = [
    _Section(
        "Loss",
        [
            Family("Loss, nats per token", "(?:lm|(validation))_loss"),
            Family("Auxiliary losses, weighted", "(?!lm_|validation_)(.+)_loss"),
        ],
    ),
    _Section(
        "Optimisation",
        [
            Family("Learning rate", "learning_rate", noisy=False),
            Family("Gradient norm before clipping", "grad_norm"),
            Family("Skipped steps so far", "skipped_steps", noisy=False, unless=0.0),
        ],
    ),
    _Section(
        "Speed and memory",
        [
            Family("Tokens per second", "tokens_per_second"),
            Family("MFU, share of the hardware's peak", "mfu"),
            Family("Peak memory of the fullest process, GiB", "memory_gib", noisy=False),
        ],
    ),
    _Section(
        "Neural memory",
        [
            Family("Surprise ‖u‖²", r"memory_surprise_(\d+)", "level {}"),
            Family("Retention per token", r"memory_retention_(\d+)", "level {}"),
            Family("Write gate", r"memory_write_(\d+)", "level {}"),
            Family("Read gate", "memory_read"),
        ],
        "A level stores what the one before it missed. Means over heads, tokens and layers.",
    ),
    _Section(
        "Cache",
        [
            Family("Entropy of a token's reading, nats", "cache_entropy"),
            Family("Share of reading that goes to the null slot", "cache_null_share"),
            Family("Importance of latents", "cache_importance(?:_(spread))?"),
            Family("Fill, share of the capacity", "cache_fill", noisy=False),
            Family("Evicted segments per head and row", "cache_evictions"),
        ],
    ),
    _Section(
        "Value head",
        [
            Family("Cross-entropy, nats", "value_cross_entropy"),
            Family("Calibration: mean value − mean target", "value_calibration"),
            Family("AUC", "value_auc"),
        ],
    ),
    _Section(
        "Tree of thoughts",
        [
            Family("Score of the chosen thought", "search_score", noisy=False),
            Family("Share of prompts solved", "search_solve_rate", noisy=False),
            Family("Tokens of a search", "search_tokens", noisy=False),
        ],
    ),
    _Section(
        "FP8",
        [
            Family("Underflow, worst layer", r"fp8_underflow_(\w+)", noisy=False),
            Family("Overflow, worst layer", r"fp8_overflow_(\w+)", noisy=False),
            Family("Greatest amax", r"fp8_amax_(\w+)", noisy=False),
        ],
        "Shares of an operand's numbers that became zero or were clipped, of all linear layers the highest.",
    ),
]
# Said by other charts: the axis, the exponential of a loss, the sum of losses, a part of the spread.
_SAID_ELSEWHERE = {"consumed_tokens", "validation_perplexity", "loss", "cache_importance_square"}
_MOST_OTHERS = 40
_PLAIN = {"lm_loss": "training", "cache_importance": "mean"}


def panels_of(runs: Mapping[str, Run]) -> Iterator[tuple[str, list[Panel], str]]:
    """(title, charts, note) of each section that has something to show, in order. `runs` by their names."""
    curves = {name: _with_derived(run) for name, run in runs.items()}
    keys = list(dict.fromkeys(key for found in curves.values() for key in found if key not in _SAID_ELSEWHERE))
    known: set[str] = set()
    for section in _SECTIONS:
        panels = []
        for family in section.families:
            members = _members(family, keys)
            known |= members.keys()
            panels += _panels(family, members, curves)
        if panels:
            yield section.title, panels, section.note
    others = [key for key in keys if key not in known]
    panels = [panel for key in others[:_MOST_OTHERS] for panel in _panels(Family(key, key), {key: key}, curves)]
    left = len(others) - _MOST_OTHERS
    if panels:
        yield "Other metrics", panels, f"and {left} more, not shown" if left > 0 else ""


def tensorboard_layout() -> dict[str, dict[str, list[object]]]:
    """The same families as charts of TensorBoard's page "custom scalars"."""
    return {
        section.title: {family.title: ["Multiline", [f"^{family.pattern}$"]] for family in section.families}
        for section in _SECTIONS
        if section.title != "FP8"  # of another file
    }


def _members(family: Family, keys: list[str]) -> dict[str, str]:
    """Keys of a family with their labels."""
    found = {}
    for key in keys:
        match = re.fullmatch(family.pattern, key)
        if match:
            part = next((group for group in match.groups() if group), None)
            found[key] = family.label.format(part) if part else _PLAIN.get(key, key)
    return dict(sorted(found.items(), key=lambda item: (item[1] != "training", item[0])))


def _panels(family: Family, members: Mapping[str, str], curves: Mapping[str, Mapping[str, Curve]]) -> list[Panel]:
    """One chart with all members for one run; for several, a chart for each member."""
    groups: list[tuple[str, list[Item]]]
    if len(curves) == 1:
        ((run, found),) = curves.items()
        items = [Item(run, label, i, found[key]) for i, (key, label) in enumerate(members.items())]
        groups = [(family.title, items)]
    else:
        groups = [
            (
                f"{family.title}: {label}" if len(members) > 1 else family.title,
                [Item(run, run, i, found[key]) for i, (run, found) in enumerate(curves.items()) if key in found],
            )
            for key, label in members.items()
        ]
    panels = []
    for title, items in groups:
        shown = [item for item in items if len(item.curve.finite)]
        if shown and not all((item.curve.finite == family.unless).all() for item in shown):
            panels.append(Panel(title, family.noisy, shown))
    return panels


def _with_derived(run: Run) -> dict[str, Curve]:
    """The run's metrics, the spread of the cache's importance, and FP8's figures over all layers."""
    found = dict(run.metrics)
    mean, square = found.get("cache_importance"), found.get("cache_importance_square")
    if mean and square and np.array_equal(mean.steps, square.steps):
        variance = np.maximum(square.values - mean.values**2, 0)
        found["cache_importance_spread"] = Curve(mean.steps, np.sqrt(variance))
    worst: dict[str, dict[int, float]] = {}
    for key, curve in run.fp8.items():
        _, _, rest = key.partition("/")
        operand, _, what = rest.partition("/")
        if what in ("underflow", "overflow", "amax"):
            highest = worst.setdefault(f"fp8_{what}_{operand}", {})
            for step, value in zip(curve.steps.tolist(), curve.values.tolist(), strict=True):
                highest[step] = max(highest.get(step, value), value)
    for key, by_step in worst.items():
        steps = sorted(by_step)
        found[key] = Curve(np.array(steps), np.array([by_step[step] for step in steps]))
    return found
