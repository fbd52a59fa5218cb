"""What the user names as data: sources and weights, shares of a split, and how a file is known wherever it lies."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vishwamai_mp.config import ConfigError, UserError

_WINDOW = 64 * 1024  # bytes read at the start, the middle and the end of a file to recognise it


@dataclass(frozen=True)
class Source:
    """One `.bin/.idx` pair. `weight` is the user's, not normalised; None where none was given."""

    prefix: str
    weight: float | None


@dataclass(frozen=True)
class SourceIdentity:
    """What a `.bin/.idx` pair is, wherever it lies: `name` is the last part of its prefix, sizes are in bytes."""

    name: str
    bin_bytes: int
    idx_bytes: int
    digest: str


def parse_blend(key: str, value: str | Sequence[str | float]) -> list[Source]:
    """Sources of a blend, given as one prefix, several, or `weight prefix weight prefix …`.

    Args:
        key: the setting's name, for messages.
        value: a string is split at white space, unless a pair is there that has all of it as its prefix; in a list, a
            prefix may hold spaces. A single one is a prefix also where it looks like a number.

    Raises:
        ConfigError: nothing named, weights for some sources only, a weight that is not positive, a source named twice.
    """
    if isinstance(value, str):
        items: list[str | float] = [value] if value.strip() and Path(f"{value}.idx").is_file() else [*value.split()]
    else:
        items = list(value)
    if not items:
        raise ConfigError(f"{key} is empty; name at least one .bin/.idx prefix")
    weights = [_number(item) for item in items]
    if len(items) == 1 or all(weight is None for weight in weights):
        sources = [Source(str(item), None) for item in items]
    else:
        pairs_up = len(items) % 2 == 0 and all((w is None) == bool(i % 2) for i, w in enumerate(weights))
        if not pairs_up:
            raise ConfigError(
                f"{key}={value!r}: give prefixes alone, or a weight before each prefix as in [0.7, books, 0.3, code]"
            )
        named = zip(weights[::2], items[1::2], strict=True)
        sources = [Source(str(prefix), weight) for weight, prefix in named]
    for source in sources:
        if source.weight is not None and not (source.weight > 0 and math.isfinite(source.weight)):
            raise ConfigError(
                f"{key}: weight {source.weight:g} of {source.prefix}; use a positive number or leave it out"
            )
    prefixes = [source.prefix for source in sources]
    for prefix in prefixes:
        if prefixes.count(prefix) > 1:
            raise ConfigError(f"{key} names {prefix} twice; name it once, with the sum of its weights")
    if isinstance(value, str) and len(items) > 1:
        _refuse_parts(key, value, sources)
    return sources


def _refuse_parts(key: str, value: str, sources: Sequence[Source]) -> None:
    """Refuse pieces of a text that name nothing: most likely a path with a space was meant."""
    for source in sources:
        if not any(Path(source.prefix + suffix).exists() for suffix in (".bin", ".idx")):
            raise ConfigError(
                f"{key}={value!r} is split at white space, and there is no {source.prefix}.bin; write a prefix with a"
                f" space in a list, as in {key}='[\"my data/books\"]'"
            )


def _number(item: str | float) -> float | None:
    try:
        return float(item)
    except ValueError:
        return None


def parse_split(value: str) -> list[tuple[float, float]]:
    """Where the train, valid and test parts of a corpus begin and end, as fractions of its documents.

    Raises:
        ConfigError: not one to three shares, a negative one, or nothing for training.
    """
    shares = [_number(part) for part in value.split(",")]
    usable = [share for share in shares if share is not None and share >= 0 and math.isfinite(share)]
    if len(usable) != len(shares) or len(usable) > 3 or usable[0] == 0:
        raise ConfigError(
            f"data.split={value!r}: give the shares of train, valid and test, the first above 0, as in 99,1,0"
        )
    usable += [0.0] * (3 - len(usable))
    ends = [sum(usable[: i + 1]) / sum(usable) for i in range(3)]
    return list(zip([0.0, *ends[:2]], ends, strict=True))


def identify(prefix: str) -> SourceIdentity:
    """Recognise a `.bin/.idx` pair by its sizes and a sample of its bytes; not by its folder or its times.

    Raises:
        UserError: a file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    sizes = []
    for suffix in (".bin", ".idx"):
        try:
            with Path(prefix + suffix).open("rb") as file:
                size = file.seek(0, 2)
                for start in (0, (size - _WINDOW) // 2, size - _WINDOW):
                    file.seek(max(0, start))
                    digest.update(file.read(_WINDOW))
        except OSError as error:
            raise UserError(f"cannot read {prefix}{suffix}: {error.strerror}") from error
        sizes.append(size)
    return SourceIdentity(Path(prefix).name, sizes[0], sizes[1], digest.hexdigest())
