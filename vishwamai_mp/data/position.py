"""Where a run stands in its data, as stored in a checkpoint, and what has changed in the data since.

A position is one number, `consumed_samples`: together with the data it says which samples come next, at any layout.
The fingerprint beside it recognises the data.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vishwamai_mp.config import ConfigError
from vishwamai_mp.config.wording import counted
from vishwamai_mp.data.blends import SourceIdentity

_REPEAT = "samples already seen may repeat"


@dataclass(frozen=True)
class DataFingerprint:
    """Everything that decides which tokens sample number n has.

    Attributes:
        sources: the corpora of `data.train`, in order.
        shares: the fraction of samples drawn from each, summing to 1.
        sequence_length: tokens.
        split: `data.split`; None where `data.valid` is given and the split is not used.
        seed: of the shuffle, `training.seed`.
        rows: of a micro-batch over all replicas, which each read a part of their own (`data.consecutive`); else None.
    """

    sources: tuple[SourceIdentity, ...]
    shares: tuple[float, ...]
    sequence_length: int
    split: str | None
    seed: int
    rows: int | None = None


@dataclass(frozen=True)
class DataPosition:
    """A place in the training data: `consumed_samples` sequences of `fingerprint` have been trained on."""

    consumed_samples: int
    fingerprint: DataFingerprint

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it: dicts, lists, numbers, strings."""
        return {
            "consumed_samples": self.consumed_samples,
            "fingerprint": asdict(self.fingerprint)
            | {
                "sources": [asdict(source) for source in self.fingerprint.sources],
                "shares": list(self.fingerprint.shares),
            },
        }

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> "DataPosition":
        """The inverse of `to_dict`, also after a round trip through JSON."""
        fingerprint = dict(stored["fingerprint"])
        fingerprint["sources"] = tuple(SourceIdentity(**source) for source in fingerprint["sources"])
        fingerprint["shares"] = tuple(fingerprint["shares"])
        return cls(stored["consumed_samples"], DataFingerprint(**fingerprint))

    def changes(self, current: DataFingerprint) -> list[str]:
        """What changed in the data since this position was stored, as sentences to print; empty if nothing did.

        Files are known by what they hold: moving or renaming them is no change.

        Raises:
            ConfigError: `training.sequence_length` changed, so that `consumed_samples` counts other samples.
        """
        stored = self.fingerprint
        if current.sequence_length != stored.sequence_length:
            raise ConfigError(
                f"training.sequence_length {stored.sequence_length} -> {current.sequence_length}: the position,"
                f" {counted(self.consumed_samples, 'sample')} of {stored.sequence_length} tokens, means other samples"
                f" now; set it back, or start a new training.output_dir from these weights with checkpoint.load"
                " and checkpoint.load_optimizer=false"
            )
        if current.rows != stored.rows:
            raise ConfigError(
                f"data.consecutive gave each of {stored.rows} rows a part of the data and now would do so for"
                f" {current.rows} (None: shuffled), so the position means other samples: keep data.consecutive and"
                " training.micro_batch_size × data parallel size, or start a new training.output_dir with"
                " checkpoint.load and checkpoint.load_optimizer=false"
            )
        sentences = _source_changes(stored, current)
        if stored.split != current.split:
            sentences.append(
                f"data.split {stored.split or 'unused'} -> {current.split or 'unused'}: the documents for training"
                f" changed; {_REPEAT}, and validation may hold documents that were trained on"
            )
        if stored.seed != current.seed:
            sentences.append(f"training.seed {stored.seed} -> {current.seed}: samples come in another order; {_REPEAT}")
        return sentences


@dataclass
class _Matches:
    """Sources before and now: the same content, the same name with other content, and the rest."""

    same: list[tuple[int, int]] = field(default_factory=list)
    rewritten: list[tuple[int, int]] = field(default_factory=list)
    removed: list[int] = field(default_factory=list)
    added: list[int] = field(default_factory=list)


def _match(before: Sequence[SourceIdentity], now: Sequence[SourceIdentity]) -> _Matches:
    found = _Matches(removed=list(range(len(before))), added=list(range(len(now))))
    by_content = ("bin_bytes", "idx_bytes", "digest")
    for pairs, fields in ((found.same, by_content), (found.rewritten, ("name",))):
        for i in list(found.removed):
            for j in found.added:
                if all(getattr(before[i], name) == getattr(now[j], name) for name in fields):
                    pairs.append((i, j))
                    found.removed.remove(i)
                    found.added.remove(j)
                    break
    return found


def _source_changes(stored: DataFingerprint, current: DataFingerprint) -> list[str]:
    found = _match(stored.sources, current.sources)
    sentences = [
        f"data.train: {stored.sources[i].name} is no longer read (weight {stored.shares[i]:.4g}); {_REPEAT}"
        for i in found.removed
    ]
    sentences += [
        f"data.train: {current.sources[j].name} is new (weight {current.shares[j]:.4g}); {_REPEAT}" for j in found.added
    ]
    sentences += [
        f"data.train: {current.sources[j].name} holds other data than before ({stored.sources[i].bin_bytes:,} ->"
        f" {current.sources[j].bin_bytes:,} bytes of tokens); {_REPEAT}"
        for i, j in found.rewritten
    ]
    kept = sorted(found.same + found.rewritten)
    for i, j in kept:
        before, now = f"{stored.shares[i]:.4g}", f"{current.shares[j]:.4g}"
        if before != now:
            sentences.append(f"data.train: weight of {current.sources[j].name} {before} -> {now}; {_REPEAT}")
    if [j for _, j in kept] != sorted(j for _, j in kept):
        sentences.append(f"data.train: its sources come in another order; {_REPEAT}")
    return sentences
