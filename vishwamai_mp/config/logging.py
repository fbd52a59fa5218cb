"""The section `logging`: which steps can be profiled, and where."""

from vishwamai_mp.config.errors import ConfigError, leave_out
from vishwamai_mp.config.schema import LoggingConfig, PretrainConfig
from vishwamai_mp.config.wording import counted

MOST_PROFILED_STEPS = 20  # a trace of more is too large for the programs that show it


def check_logging(config: PretrainConfig, world_size: int | None) -> None:
    """Refuse a profile that cannot be made.

    Raises:
        ConfigError: names the key, the value and the mend.
    """
    logging = config.logging
    if logging.profile_steps is None:
        for name in ("profile_ranks", "memory_snapshot"):
            value = getattr(logging, name)
            if value != getattr(LoggingConfig(), name):
                raise ConfigError(
                    f"logging.{name}={_spelt(value)} without logging.profile_steps: there is no profile; set"
                    f" logging.profile_steps=[FIRST,LAST] or {leave_out(f'logging.{name}')}"
                )
        return
    _check_steps(logging.profile_steps, config.training.max_steps)
    ranks = logging.profile_ranks
    if not ranks or len(set(ranks)) < len(ranks):
        raise ConfigError(f"logging.profile_ranks={_spelt(ranks)}: name each rank once, at least one")
    if world_size is not None and max(ranks) >= world_size:
        raise ConfigError(
            f"logging.profile_ranks={_spelt(ranks)}: rank {max(ranks)} is beyond the job's"
            f" {counted(world_size, 'process')}; use ranks from 0 to {world_size - 1}"
        )


def _check_steps(steps: list[int], max_steps: int) -> None:
    if len(steps) != 2 or steps[0] > steps[1]:
        raise ConfigError(f"logging.profile_steps={_spelt(steps)}: give the first step and the last, such as [11,13]")
    first, last = steps
    if last > max_steps:
        raise ConfigError(
            f"logging.profile_steps={_spelt(steps)} ends beyond training.max_steps={max_steps}; choose earlier steps"
        )
    if last - first >= MOST_PROFILED_STEPS:
        raise ConfigError(
            f"logging.profile_steps={_spelt(steps)} are {last - first + 1} steps, too many for one trace; use at most"
            f" {MOST_PROFILED_STEPS}"
        )


def _spelt(value: object) -> str:
    """As a recipe has it."""
    return str(value).replace(" ", "") if isinstance(value, list) else str(value).lower()
