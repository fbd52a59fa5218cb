"""Runs ragged batches of tokens through all stages, and lets all ranks know what was chosen from the logits.

Every rank of a replica calls the same methods with the same arguments. Shapes: N rows of logits, V vocabulary (local),
D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from vishwamai_mp.config import PretrainConfig, UserError
from vishwamai_mp.config.wording import counted
from vishwamai_mp.inference.batch import Work
from vishwamai_mp.inference.blocks import KvSequence
from vishwamai_mp.inference.stage import Stage
from vishwamai_mp.inference.vocabulary import Shard
from vishwamai_mp.model import VishwamAIModel
from vishwamai_mp.model.decoding import Decoding
from vishwamai_mp.model.rotary import frequency_length
from vishwamai_mp.runtime import Runtime


@dataclass(frozen=True)
class Output:
    """What the last stage computed; `logits` and `hidden` are None on other stages.

    Attributes:
        rows: N.
        logits: this rank's vocabulary, −∞ at padding; None where they were not asked for.
        hidden: normed, (N, D): what the logits come from.
    """

    rows: int
    logits: Shard | None = None
    hidden: Tensor | None = None


class Engine:
    """Key-value pool and the passes through the model. One model chunk per rank.

    Args:
        config: resolved.
        runtime: process groups and device.
        model: this rank's stage. Its weights are read at every pass, so it may be trained on between passes.
        kv_tokens: tokens whose keys and values fit at once; None: 65,536, or one full context where that is more.
    """

    def __init__(
        self, config: PretrainConfig, runtime: Runtime, model: VishwamAIModel, kv_tokens: int | None = None
    ) -> None:
        self.config, self.runtime, self.model = config, runtime, model
        self.stage, self._decoding = Stage(config, runtime, model), Decoding(model)
        self.pool = self.stage.pool(kv_tokens or max(65536, config.model.max_position_embeddings))
        self.computed_tokens = 0

    @property
    def context(self) -> int:
        """Tokens that a sequence may have."""
        return self.config.model.max_position_embeddings

    @property
    def token_bytes(self) -> int:
        """Of keys and values of one token, in all layers and on all ranks of a replica together."""
        settings = self.config.model
        assert settings.num_key_value_heads is not None
        assert settings.head_dim is not None
        numbers = 2 * settings.num_layers * settings.num_key_value_heads * settings.head_dim
        return numbers * self.stage.dtype.itemsize

    @torch.inference_mode()
    def run(
        self, work: Work, every_token: bool = False, logits: bool = True, guessed: Sequence[int] | None = None
    ) -> Output:
        """Let sequences read tokens.

        Args:
            work: sequences, each once, with at least one token each.
            every_token: rows for every token, not only for the last of each sequence.
            logits: False leaves them out; hidden states are all that is asked for.
            guessed: how many of each sequence's tokens, its last ones, are guesses: there are rows for these and for
                the token before them, and `take_back` forgets those that are wrong.

        Raises:
            UserError: a sequence would outgrow the context, or key-value pool is full.
        """
        for sequence, tokens in work:
            check_fits(sequence.length + len(tokens) - 1, self.context)
            if self.outgrows(sequence, len(tokens)):
                assert self.config.model.rope_scaling is not None
                raise UserError(
                    f"a text outgrows the {counted(sequence.length, 'token')} whose rotary frequencies it was read with"
                    f" (model.rope_scaling of rope_type={self.config.model.rope_scaling.rope_type}); only sampling and"
                    " greedy decoding read such a text again: shorten the prompt or lower max_new_tokens"
                )
        batch = self.stage.batch(work, self.pool, guessed)
        self.computed_tokens += len(batch.tokens)
        rows = len(batch.tokens) if every_token else len(batch.counts) + sum(batch.guessed)
        wanted = batch.judged if rows < len(batch.tokens) and self.runtime.is_last_stage else None
        with self._decoding:
            hidden = self.stage.run(batch, self._receive(len(batch.tokens)), wanted)
            if not self.runtime.is_last_stage:
                dist.send(hidden.contiguous(), self._neighbour(1), group=self.runtime.groups.pp)
                return Output(rows)
            normed = self.stage.normed(hidden)
            shard = None
            if logits:
                vocabulary = self.config.model.vocab_size
                shard = Shard.of(self.stage.logits(normed), vocabulary, self.runtime.groups.tp)
        return Output(len(normed), shard, normed)

    @torch.inference_mode()
    def decide(self, output: Output, choose: Callable[[Shard, Tensor], Tensor], columns: int) -> Tensor:
        """What `choose` makes of the last stage's logits and hidden states, on all ranks, as float64 (N, columns)."""
        if output.logits is not None:
            assert output.hidden is not None
            chosen = choose(output.logits, output.hidden).double().view(output.rows, columns)
        else:
            chosen = torch.empty(output.rows, columns, dtype=torch.float64, device=self.runtime.device)
        group = self.runtime.groups.pp
        if group.size() > 1:
            dist.broadcast(chosen, dist.get_global_rank(group, group.size() - 1), group=group)
        return chosen

    def outgrows(self, sequence: KvSequence, count: int) -> bool:
        """Whether `count` more tokens change the rotary frequencies of those before: they have to be read again."""
        length = frequency_length(self.config.model, sequence.length + count)
        return sequence.length > 0 and length != sequence.frequency_length

    def fork(self, sequence: KvSequence) -> KvSequence:
        return self.pool.fork(sequence)

    def take_back(self, sequence: KvSequence, count: int) -> None:
        """Forget the last tokens of those that were guessed in the last pass."""
        self.pool.take_back(sequence, count)

    def release(self, sequence: KvSequence) -> None:
        self.pool.release(sequence)

    def _receive(self, tokens: int) -> Tensor | None:
        if self.runtime.is_first_stage:
            return None
        hidden = torch.empty(tokens, self.config.model.hidden_size, dtype=self.stage.dtype, device=self.runtime.device)
        dist.recv(hidden, self._neighbour(-1), group=self.runtime.groups.pp)
        return hidden

    def _neighbour(self, step: int) -> int:
        return dist.get_global_rank(self.runtime.groups.pp, self.runtime.pipeline_rank + step)


class ContextLengthError(UserError):
    """A text that the model's context has no room for."""


def check_fits(length: int, context: int) -> None:
    """Raises `ContextLengthError` where a text leaves no room for one more token."""
    if length >= context:
        raise ContextLengthError(
            f"the prompt has {length} tokens, the model's context {context} (model.max_position_embeddings);"
            " shorten the prompt"
        )
