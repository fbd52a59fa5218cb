"""From a run folder to a model that answers on these processes, with its tokenizer."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

from vishwamai_mp.checkpoint import CheckpointManager
from vishwamai_mp.config import PretrainConfig, TreeConfig, UserError
from vishwamai_mp.inference import Engine, Generator
from vishwamai_mp.model import VishwamAIModel, build_model
from vishwamai_mp.opening.prompts import PromptTokenizer
from vishwamai_mp.opening.run import RunFolder
from vishwamai_mp.runtime import Runtime, distributed_session


@dataclass(frozen=True)
class LaidOutModel:
    """A model with its weights on these processes.

    Attributes:
        config: resolved. Its vocabulary is the tokenizer's: ids beyond are never generated.
        runtime: process groups and device.
        model: this rank's stage.
        tokenizer: of prompts.
        name: of the run.
    """

    config: PretrainConfig
    runtime: Runtime
    model: VishwamAIModel
    tokenizer: PromptTokenizer
    name: str

    def engine(self) -> Engine:
        return Engine(self.config, self.runtime, self.model)

    def generator(self, **options: Any) -> Generator:
        """`options` as `Generator` has them."""
        return Generator(self.config, self.runtime, self.model, decode=self.tokenizer.decode, **options)

    def tree_settings(self) -> TreeConfig:
        """The run's settings of searches; a model without a value head compares nodes by their probability."""
        tree = self.config.tree
        if self.config.tree.enabled or not tree.value_weight or tree.logprob_weight:
            return tree
        return replace(tree, value_weight=0.0, logprob_weight=1.0)


@contextmanager
def laid_out(
    run: RunFolder,
    overrides: Sequence[str] = (),
    add_bos: bool | None = None,
    weights: Literal["int8", "int4"] | None = None,
) -> Iterator[LaidOutModel]:
    """Lay a run's model out for answering; what the user should know of it goes to stderr.

    Args:
        run: from `find_run`.
        overrides: `section.key=value`: the layout, the search, another tokenizer (`data.tokenizer`).
        add_bos: as `PromptTokenizer` has it.
        weights: what linear layers are rounded to (inference/packed_weights.py); None: not at all.

    Raises:
        UserError: a setting that has no place here, or no tokenizer that fits.
    """
    config = run.answering(overrides)
    if config.data.tokenizer is None:
        raise UserError("the run was trained without a tokenizer; set data.tokenizer=PATH.model")
    tokenizer = PromptTokenizer(config.data.tokenizer, config.model.vocab_size, add_bos)
    with distributed_session(config) as runtime:
        if runtime.reports:
            for note in [*(f"{reason}; taking {run.checkpoint.name}" for reason in run.skipped), *tokenizer.notes]:
                print(note, file=sys.stderr)
        (model,) = build_model(config, runtime, initialize=False)
        CheckpointManager(run.checkpoint.parent, config, runtime).load(run.checkpoint, [model])
        if weights is not None:
            from vishwamai_mp.inference.packed_weights import pack_weights

            for note in pack_weights(model, config, runtime, weights):
                if runtime.tensor_rank == 0:  # each stage has layers of its own
                    print(note, file=sys.stderr)
        real = replace(config, model=replace(config.model, vocab_size=tokenizer.tokenizer.vocab_size))
        yield LaidOutModel(real, runtime, model, tokenizer, run.folder.name)
