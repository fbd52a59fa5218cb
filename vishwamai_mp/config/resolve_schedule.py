"""The section `schedule`: derived values, and what becomes of a recipe's warm-up in a run that an override shortens."""

from collections.abc import Sequence
from dataclasses import replace

from vishwamai_mp.config.errors import ConfigError
from vishwamai_mp.config.schema import PretrainConfig, ScheduleConfig
from vishwamai_mp.config.wording import counted


def shortened_schedule(config: PretrainConfig, changed: Sequence[tuple[str, ...]]) -> tuple[PretrainConfig, list[str]]:
    """Fit a recipe's warm-up and final decay into a run that an override made shorter than them (a smoke run).

    What the user chose together, in one recipe or in overrides, is left for `resolve_schedule` to refuse.

    Args:
        config: as loaded.
        changed: parts of the keys that overrides set.

    Returns:
        the configuration, and a line about each value that was lowered.
    """
    schedule, steps = config.schedule, config.training.max_steps
    notes: list[str] = []

    def chosen(*key: str) -> bool:
        return any(path == key[: len(path)] for path in changed)

    if not chosen("training", "max_steps") or schedule.decay_steps is not None:
        return config, notes

    def lower(name: str, value: int) -> None:
        nonlocal schedule
        old = getattr(schedule, name)
        notes.append(
            f"schedule.{name}={old} of the recipe does not fit training.max_steps={steps}: lowered to {value};"
            " set it to choose yourself"
        )
        schedule = replace(schedule, **{name: value})  # type: ignore[arg-type]

    if schedule.warmup_steps >= steps and not chosen("schedule", "warmup_steps"):
        lower("warmup_steps", steps // 10)
    final = schedule.wsd_decay_steps
    if final is not None and final > steps - schedule.warmup_steps and not chosen("schedule", "wsd_decay_steps"):
        lower("wsd_decay_steps", max(1, steps // 10))
    return replace(config, schedule=schedule), notes


def resolve_schedule(schedule: ScheduleConfig, max_steps: int) -> ScheduleConfig:
    """Fill in derived values and validate the section.

    Raises:
        ConfigError: names the key, the value and the mend.
    """
    decay_steps = max_steps if schedule.decay_steps is None else schedule.decay_steps
    final = max(1, decay_steps // 10) if schedule.wsd_decay_steps is None else schedule.wsd_decay_steps
    remaining = decay_steps - schedule.warmup_steps
    if schedule.warmup_steps and remaining <= 0:
        raise ConfigError(
            f"schedule.warmup_steps={schedule.warmup_steps} leaves nothing of schedule.decay_steps="
            f"{decay_steps} (training.max_steps if unset); shorten the warm-up"
        )
    if schedule.decay == "wsd" and final > remaining:
        raise ConfigError(
            f"schedule.wsd_decay_steps={final} exceeds the {counted(remaining, 'step')} after the warm-up; shorten it"
        )
    return replace(schedule, decay_steps=decay_steps, wsd_decay_steps=final)
