"""Where metrics go: `metrics.jsonl` always, TensorBoard and Weights & Biases on request."""

import json
import math
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from vishwamai_mp.config import ConfigError, PretrainConfig, UserError, to_dict
from vishwamai_mp.config.errors import one_line
from vishwamai_mp.config.files import write_whole
from vishwamai_mp.config.json_text import parse_json
from vishwamai_mp.config.wording import lacks
from vishwamai_mp.data.lines import text_lines
from vishwamai_mp.observability.panels import tensorboard_layout


class MetricWriter(Protocol):
    """Takes one record of numbers per logged step."""

    def write(self, step: int, record: Mapping[str, float]) -> None:
        """Record the metrics of `step`."""

    def close(self) -> None:
        """Flush what is buffered."""


class JsonLines:
    """One JSON object per logged step; non-finite numbers become null, which JSON can say.

    A resumed run cuts what was logged after the step it resumes from, so each step stands once.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        lines = text_lines(path, errors="replace") if path.exists() else ()
        write_whole(path, "".join(f"{line}\n" for line in lines if _step_of(line) <= resume_step))
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, record: Mapping[str, float]) -> None:
        row = {"step": step} | {key: value if math.isfinite(value) else None for key, value in record.items()}
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self._file.name}: cannot be written ({error.strerror}); free space there") from None

    def close(self) -> None:
        self._file.close()


def _step_of(line: str) -> float:
    try:
        return float(parse_json(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return math.inf  # the torn last line of a killed run


class TensorBoard:
    """Scalars for TensorBoard, and charts of those that belong together (its page "custom scalars").

    A resumed run hides what an earlier attempt logged beyond its first step.
    """

    def __init__(self, folder: Path, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1)
        self._writer.add_custom_scalars(tensorboard_layout())

    def write(self, step: int, record: Mapping[str, float]) -> None:
        for key, value in record.items():
            self._writer.add_scalar(key, value, step)

    def write_text(self, step: int, key: str, text: str) -> None:
        """Show `text` as it is, in the dashboard's text page."""
        self._writer.add_text(key, "".join(f"    {line}\n" for line in text.split("\n")), step)  # Markdown's code

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Scalars for Weights & Biases; one run id per run folder, so that a resumed run continues its curves.

    WANDB_MODE=offline keeps all in `wandb/` of the run folder, for `wandb sync` to send later.

    Raises:
        ConfigError: the package is missing or broken, or cannot begin a run: no key or a wrong one, no network.
    """

    def __init__(self, folder: Path, config: PretrainConfig) -> None:
        wandb = _import_wandb()
        options = {"project": config.logging.project, "dir": str(folder), "id": _run_id(folder / "wandb_id")}
        try:
            self._run = wandb.init(**options, resume="allow", config=to_dict(config))
        except Exception as error:  # wandb.Error, but of a key of the wrong length, ValueError
            raise ConfigError(
                f"logging.report_to names wandb, which cannot begin a run: {one_line(error)} Set"
                " WANDB_API_KEY, set WANDB_MODE=offline to send the run later, or leave wandb out"
            ) from error

    def write(self, step: int, record: Mapping[str, float]) -> None:
        self._run.log(dict(record), step=step)

    def close(self) -> None:
        self._run.finish()


def _import_wandb() -> Any:
    try:
        import wandb
    except Exception as error:  # whatever a package's own modules raise
        if isinstance(error, ModuleNotFoundError) and error.name == "wandb":
            raise ConfigError(lacks("logging.report_to=[wandb]", "wandb")) from None
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"logging.report_to names wandb, which is installed and cannot be imported ({reason}); mend the"
            " installation, or leave wandb out"
        ) from error
    if wandb.__file__ is None:  # a folder of that name, as wandb makes one where runs are begun
        raise ConfigError(lacks("logging.report_to=[wandb]", "wandb"))
    return wandb


def _run_id(file: Path) -> str:
    """What the file says; a new one where there is none."""
    if not file.exists():
        write_whole(file, secrets.token_hex(4))
    return file.read_text()


def open_writers(folder: Path, config: PretrainConfig, resume_step: int) -> list[MetricWriter]:
    """The writers that `logging.report_to` asks for, and `metrics.jsonl`."""
    writers: list[Any] = [JsonLines(folder / "metrics.jsonl", resume_step)]
    if "tensorboard" in config.logging.report_to:
        writers.append(TensorBoard(folder / "tensorboard", resume_step))
    if "wandb" in config.logging.report_to:
        writers.append(WeightsAndBiases(folder, config))
    return writers
