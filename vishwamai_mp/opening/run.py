"""The run folder that a user means, and its configuration: as it was trained, or for answering. Needs no torch."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vishwamai_mp.checkpoint.store import locate
from vishwamai_mp.config import ParallelConfig, PretrainConfig, UserError, load_config, resolve, to_dict
from vishwamai_mp.config.extensions import refuse_unrepeated
from vishwamai_mp.config.job_environment import job_size
from vishwamai_mp.data.tokenizer import has_tokenizer, tokenizer_file

_NOT_FOR_ANSWERING = {
    "context_parallel_size": 1,
    "sequence_parallel": False,
    "virtual_pipeline_model_parallel_size": None,
    "fully_sharded": False,
}
_OF_TRAINING = ("optimizer", "schedule", "training", "checkpoint", "logging", "watchdog")  # sections
# Keys of these that answering reads too; components are checked against the length of training's sequences.
_OF_BOTH = ("training.threads", "training.deterministic", "training.sequence_length")


@dataclass(frozen=True)
class RunFolder:
    """A run folder with a checkpoint.

    Attributes:
        folder: has `config.yaml` and, usually, a tokenizer.
        checkpoint: the one that is meant.
        skipped: why newer ones are not taken.
    """

    folder: Path
    checkpoint: Path
    skipped: list[str] = field(default_factory=list)

    def trained(self, overrides: Sequence[str] = ()) -> PretrainConfig:
        """The configuration as it was trained, not resolved; its tokenizer is the run folder's, where that has one.

        Raises:
            UserError: it names code (`config.extensions`) that the overrides do not name again.
        """
        config = load_config(to_dict(self._saved()), overrides)
        refuse_unrepeated(config, overrides, self.folder / "config.yaml")
        return config

    def answering(self, overrides: Sequence[str] = ()) -> PretrainConfig:
        """The configuration for answering, resolved: on one process, or on the layout that the overrides name.

        Raises:
            UserError: an override that is for training alone, a layout that these processes do not make up, or the
                model has code of its own that the overrides do not name again.
        """
        trained, plain = self._saved(), load_config({})
        # What only concerns training would be checked against the rest of it. Components are checked against the
        # length of training's sequences.
        training = {"sequence_length": trained.training.sequence_length, "output_dir": str(self.folder)}
        kept = replace(
            trained,
            parallel=ParallelConfig(),
            data=replace(trained.data, source=plain.data.source),
            optimizer=plain.optimizer,
            schedule=plain.schedule,
            training=plain.training,
            checkpoint=plain.checkpoint,
            logging=plain.logging,
        )
        config = load_config({**to_dict(kept), "training": training}, overrides)
        refuse_unrepeated(config, overrides, self.folder / "config.yaml")
        for override in overrides:
            key = override.partition("=")[0].strip()
            if key.partition(".")[0] in _OF_TRAINING and key not in _OF_BOTH:
                raise UserError(f"{key} has no use in generation; leave it out")
        for name, neutral in _NOT_FOR_ANSWERING.items():
            if getattr(config.parallel, name) != neutral:
                raise UserError(f"parallel.{name} has no use in generation; leave it out")
        world = job_size() or 1
        config = replace(config, training=replace(config.training, micro_batch_size=1, global_batch_size=world))
        return resolve(config, world)

    def _saved(self) -> PretrainConfig:
        config = load_config(self.folder / "config.yaml")
        if has_tokenizer(self.folder):
            config = replace(config, data=replace(config.data, tokenizer=str(tokenizer_file(self.folder))))
        return config


def find_run(path: str | os.PathLike[str]) -> RunFolder:
    """The run that `path` means: a run folder, its `checkpoints/`, or one checkpoint.

    Raises:
        UserError: none of these, no whole checkpoint, or its configuration is missing.
    """
    given = Path(path).resolve()  # absolute, for the run folder is two levels above a checkpoint
    if (given / "config.json").is_file() and not (given / "config.yaml").is_file():
        raise UserError(
            f"{path} is a Hugging Face folder; make it a run first: python tools/convert_checkpoint.py from-hf"
            f" --load {shlex.quote(str(path))} --output RUN"
        )
    found = locate(given)
    assert found.path is not None
    folder = found.path.parent.parent
    if not (folder / "config.yaml").is_file():
        raise UserError(
            f"{folder / 'config.yaml'} is missing; give a run folder as training wrote it (training itself takes a"
            " checkpoint alone, as checkpoint.load)"
        )
    return RunFolder(folder, found.path, found.skipped)
