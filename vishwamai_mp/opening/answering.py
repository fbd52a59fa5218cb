"""From a run folder to a model that answers on these processes, with its tokenizer."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

from vishwamai_mp.checkpoint import CheckpointManager
from vishwamai_mp.config import PretrainConfig, TreeConfig, UserError, load_config
from vishwamai_mp.config.extensions import extensions_of
from vishwamai_mp.data.tokenizer import Tokenizer
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
        draft: runs the model that guesses for this one; None: there is none.
    """

    config: PretrainConfig
    runtime: Runtime
    model: VishwamAIModel
    tokenizer: PromptTokenizer
    name: str
    draft: Engine | None = None

    def engine(self) -> Engine:
        return Engine(self.config, self.runtime, self.model)

    def generator(self, **options: Any) -> Generator:
        """`options` as `Generator` has them."""
        decode = self.tokenizer.decode
        return Generator(self.config, self.runtime, self.model, decode=decode, draft=self.draft, **options)

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
    draft: RunFolder | None = None,
) -> Iterator[LaidOutModel]:
    """Lay a run's model out for answering; what the user should know of it goes to stderr.

    Args:
        run: from `find_run`.
        overrides: `section.key=value`: the layout, the search, another tokenizer (`data.tokenizer`).
        add_bos: as `PromptTokenizer` has it.
        weights: what linear layers are rounded to (inference/packed_weights.py); None: not at all.
        draft: the run of a smaller model that guesses (inference/draft_model.py), at the same layout and precision.

    Raises:
        UserError: a setting that has no place here, no tokenizer that fits, or a draft model of another one.
    """
    config = run.answering(overrides)
    if config.data.tokenizer is None:
        raise UserError("the run was trained without a tokenizer; set data.tokenizer=PATH.model")
    tokenizer = PromptTokenizer(config.data.tokenizer, config.model.vocab_size, add_bos)
    guessing = None if draft is None else _as_draft(draft, overrides, tokenizer.tokenizer)
    with distributed_session(config) as runtime:
        if runtime.reports:
            for note in [*(f"{reason}; taking {run.checkpoint.name}" for reason in run.skipped), *tokenizer.notes]:
                print(note, file=sys.stderr)
        model = _loaded(run, config, runtime)
        if weights is not None:
            from vishwamai_mp.inference.packed_weights import pack_weights

            for note in pack_weights(model, config, runtime, weights):
                if runtime.tensor_rank == 0:  # each stage has layers of its own
                    print(note, file=sys.stderr)
        vocabulary = tokenizer.tokenizer.vocab_size
        engine = None
        if draft is not None and guessing is not None:
            engine = Engine(_of_vocabulary(guessing, vocabulary), runtime, _loaded(draft, guessing, runtime))
        yield LaidOutModel(_of_vocabulary(config, vocabulary), runtime, model, tokenizer, run.folder.name, engine)


def _loaded(run: RunFolder, config: PretrainConfig, runtime: Runtime) -> VishwamAIModel:
    """This rank's stage, with the checkpoint's weights."""
    (model,) = build_model(config, runtime, initialize=False)
    CheckpointManager(run.checkpoint.parent, config, runtime).load(run.checkpoint, [model])
    return model


def _of_vocabulary(config: PretrainConfig, size: int) -> PretrainConfig:
    return replace(config, model=replace(config.model, vocab_size=size))


def _as_draft(run: RunFolder, overrides: Sequence[str], tokenizer: Tokenizer) -> PretrainConfig:
    """The configuration of a draft model, resolved: laid out as the model that it guesses for.

    Raises:
        UserError: it cannot be laid out so, has code of its own, or another tokenizer.
    """
    if extensions := extensions_of(load_config(run.folder / "config.yaml")):
        raise UserError(
            f"the draft model {run.folder} has code of its own ({', '.join(extensions)}), which only the model itself"
            " may have; use another draft model"
        )
    shared = [one for one in overrides if one.strip().removeprefix("--").startswith(("parallel.", "precision="))]
    try:
        config = run.answering(shared)
    except UserError as error:
        raise UserError(f"the draft model {run.folder} cannot be laid out as the model is: {error}") from None
    if config.data.tokenizer is None:
        raise UserError(f"the draft model {run.folder} was trained without a tokenizer; use one with the model's")
    other = Tokenizer(config.data.tokenizer)
    difference = _difference(tokenizer, other)
    if difference is None and other.vocab_size > config.model.vocab_size:
        difference = f"{other.vocab_size} tokens, the draft model {config.model.vocab_size}"
    if difference is not None:
        raise UserError(
            f"the draft model's tokenizer {other.path} is not the model's ({tokenizer.path}): {difference}; a draft"
            " model has to be trained with the same one"
        )
    return config


def _difference(one: Tokenizer, other: Tokenizer) -> str | None:
    """What two tokenizers do not have in common; None: ids stand for the same texts."""
    if one.vocab_size != other.vocab_size:
        return f"{other.vocab_size} tokens instead of {one.vocab_size}"
    for token in range(one.vocab_size):
        if one.content_of(token) != other.content_of(token):
            return f"token {token} is {other.id_to_token(token)!r} instead of {one.id_to_token(token)!r}"
    return None
