"""Parts of a run that a user replaces: each key takes one of our names, or `package.module:Name` for one of his own.

Naming a module makes this program run it, so only a name that the user wrote himself is imported: in his recipe, or in
an override. What a checkpoint or somebody's run folder names is shown and has to be repeated (`refuse_unrepeated`).
Where each part comes in, its room asks `find_extension` for it; docs/extending.md says what each is called with.
"""

import inspect
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from vishwamai_mp.config.errors import ConfigError, UserError
from vishwamai_mp.config.load import load_config
from vishwamai_mp.config.schema import OptimizerConfig, PretrainConfig

_KEYS = (
    *("model.attention", "data.source", "optimizer.name", "schedule.decay"),
    *("training.loss", "training.callbacks"),
)
# A run's state is in terms of these: what was saved without them does not fit, and what was saved with them needs them.
_WITH_STATE = ("model.attention=", "optimizer.name=")
_FROM_WEIGHTS = ", or start another run from its weights (checkpoint.load_optimizer=false)"


def is_own(name: str) -> bool:
    """Whether a name is that of a user's part, not of one of ours."""
    return ":" in name


def extensions_of(config: PretrainConfig) -> list[str]:
    """The user's own parts, each as `section.key=package.module:Name`."""
    found = []
    for key in _KEYS:
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        found += [f"{key}={item}" for item in ([value] if isinstance(value, str) else value) if is_own(item)]
    return found


def find_extension(key: str, name: str, kind: type | int) -> Any:
    """Import what a setting names.

    Args:
        key: of the setting, for messages.
        name: `package.module:Name`.
        kind: the class it has to be derived from; or, of a function, how many arguments it is called with.

    Raises:
        ConfigError: there is no such module or name, or it is of another kind.
    """
    path, _, attribute = name.partition(":")
    try:
        module = import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise  # the module is there, and lacks something itself
        raise ConfigError(
            f"{key}={name}: there is no module {error.name}; install it, or put the folder that holds it on PYTHONPATH"
        ) from None
    found = getattr(module, attribute, None)
    if found is None:
        raise ConfigError(f"{key}={name}: {path} has no {attribute}; it is in {getattr(module, '__file__', None)}")
    if isinstance(kind, type):
        if not (isinstance(found, type) and issubclass(found, kind)):
            raise ConfigError(f"{key}={name}: derive it from {kind.__module__}.{kind.__name__}; it is {_shown(found)}")
    elif not _takes(found, kind):
        raise ConfigError(f"{key}={name}: use a function that takes {kind} arguments; it is {_shown(found)}")
    return found


def check_combinations(config: PretrainConfig, replicas: int | None) -> None:
    """Refuse settings that a user's own parts have no use for, or cannot work with. Imports nothing.

    Args:
        config: in whatever state of being resolved.
        replicas: that share the optimizer's state where it is split; None: not known yet.

    Raises:
        ConfigError: names the key, the value and the mend.
    """
    optimizer, tree = config.optimizer, config.tree
    if not is_own(optimizer.name):
        if optimizer.options:
            raise ConfigError(
                f"optimizer.options={optimizer.options} is for an optimizer of your own;"
                f" optimizer.name={optimizer.name} has the keys beta1, beta2, epsilon, moments_in and moments_on_host"
            )
    else:
        for key in ("beta1", "beta2", "epsilon", "moments_in", "moments_on_host"):
            if getattr(optimizer, key) != getattr(OptimizerConfig(), key):
                raise ConfigError(
                    f"optimizer.{key} has no effect with optimizer.name={optimizer.name}; say it in optimizer.options"
                )
        split = "fully_sharded" if config.parallel.fully_sharded else "use_distributed_optimizer"
        if getattr(config.parallel, split) and replicas != 1 and (replicas or split == "fully_sharded"):
            raise ConfigError(
                f"optimizer.name={optimizer.name} with parallel.{split}=true: only adamw's state is split over"
                f" replicas; set parallel.{split}=false"
            )
    if is_own(config.training.loss) and tree.enabled and tree.value_signal == "likelihood":
        raise ConfigError(
            f"training.loss={config.training.loss} with tree.value_signal=likelihood: the value head learns from"
            " cross-entropy; use tree.value_signal=verdicts or training.loss=cross_entropy"
        )


def refuse_unrepeated(config: PretrainConfig, overrides: Sequence[str], where: object) -> None:
    """Refuse a configuration that was found, not written, and names code which the overrides do not name again.

    Args:
        config: with the overrides.
        overrides: `section.key=value` strings of the user.
        where: the configuration was found, for the message.
    """
    own = [override for override in overrides if override.partition("=")[0].strip().removeprefix("--") in _KEYS]
    written = extensions_of(load_config({}, own))
    if foreign := [part for part in extensions_of(config) if part not in written]:
        raise UserError(
            f"{where} names code of its own, which is run when it is imported; if you trust {', '.join(foreign)},"
            " say so again on the command line"
        )


def check_extensions(path: object, saved: Sequence[str], config: PretrainConfig, weights_only: bool) -> None:
    """Refuse to go on from a checkpoint with other parts than it was saved with. A run may add some without state.

    Args:
        path: of the checkpoint, for the message.
        saved: `extensions_of` the run that saved it.
        config: of this run.
        weights_only: whether only the model's parts matter.

    Raises:
        UserError: names what is missing.
    """
    wanted, kind = extensions_of(config), "model." if weights_only else ""
    missing = [part for part in map(str, saved) if part not in wanted and part.startswith(kind)]
    added = [part for part in wanted if part not in saved and part.startswith(kind) and part.startswith(_WITH_STATE)]
    for parts, how, mend in ((missing, "with", "name it again"), (added, "without", "leave it out")):
        if parts:
            weights = "" if any(part.startswith("model.") for part in parts) else _FROM_WEIGHTS
            raise UserError(f"{path} was saved by a run {how} {', '.join(parts)}; {mend}{weights}")


def _takes(function: Any, count: int) -> bool:
    """Whether a function can be called with so many arguments."""
    if not callable(function) or isinstance(function, type):
        return False
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:  # written in C, and it does not tell
        return True
    return True


def _shown(found: Any) -> str:
    what = "a class" if isinstance(found, type) else "a function" if callable(found) else "no class or function"
    return f"{what}, {' '.join(repr(found).split())[:100]}"
