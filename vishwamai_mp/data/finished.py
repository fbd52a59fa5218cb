"""What preprocessing leaves beside a finished pair: how it was made.

By it the same command, given again, knows that there is nothing to do, and another replaces no corpus unasked: a run
may train on it, and would go on with other texts.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vishwamai_mp.config.errors import UserError
from vishwamai_mp.config.files import write_whole
from vishwamai_mp.config.json_text import parse_json
from vishwamai_mp.data.unfinished import difference


class FinishedPairs:
    """The records `PREFIX.json` of the pairs PREFIX.bin, PREFIX.idx that one run writes.

    Args:
        prefixes: of the pairs.
        settings: by flag, all that decides what is written, as `UnfinishedRun` has it.
    """

    def __init__(self, prefixes: Sequence[str], settings: Mapping[str, Any]) -> None:
        self._prefixes = prefixes
        self._settings = settings

    def report(self) -> dict[str, Any] | None:
        """What was told of the pairs when they were made by these settings; None where none of them is there.

        Raises:
            UserError: there are pairs that were made otherwise, or not all.
        """
        files = [file for prefix in self._prefixes for file in _pair(prefix)]
        there = [file for file in files if file.exists()]
        if not there:
            return None
        records = [_read(prefix) for prefix in self._prefixes]
        changes = [difference(record["settings"], self._settings) for record in records if record]
        if len(there) < len(files) or len(changes) < len(records):
            how = "it is not known how"
        elif any(changes):
            how = f"by other settings: {next(filter(None, changes))}"
        elif any(record["sizes"] != _sizes(prefix) for record, prefix in zip(records, self._prefixes, strict=True)):
            how = "and its size is not what it was"
        else:
            return dict(records[0]["report"])
        raise UserError(
            f"{there[0]} was made before, {how}; --restart replaces it, another --output-prefix leaves it alone"
        )

    def forget(self) -> None:
        """To be called before the pairs are replaced."""
        for prefix in self._prefixes:
            _record(prefix).unlink(missing_ok=True)

    def write(self, report: Mapping[str, Any]) -> None:
        """Note how the pairs, which are complete, were made.

        Raises:
            UserError: the disk is full or fails.
        """
        for prefix in self._prefixes:
            record = {"settings": self._settings, "sizes": _sizes(prefix), "report": report}
            try:
                write_whole(_record(prefix), json.dumps(record, indent=1))
            except OSError as error:
                raise UserError(f"cannot write {_record(prefix)}: {error.strerror}") from error


def _pair(prefix: str) -> tuple[Path, Path]:
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


def _record(prefix: str) -> Path:
    return Path(f"{prefix}.json")


def _sizes(prefix: str) -> list[int]:
    return [file.stat().st_size for file in _pair(prefix)]


def _read(prefix: str) -> dict[str, Any]:
    """Empty where there is no record that can be read."""
    try:
        record = parse_json(_record(prefix).read_bytes())
        return {name: record[name] for name in ("settings", "sizes", "report")}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
