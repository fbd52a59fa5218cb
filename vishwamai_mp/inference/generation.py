"""Generates text with a tensor- and pipeline-parallel model and a key-value cache.

Shapes: B prompts, T tokens of this pass, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from vishwamai_mp.config import PretrainConfig, UserError
from vishwamai_mp.inference.sampling import choose
from vishwamai_mp.model import VishwamAIModel
from vishwamai_mp.precision import PrecisionPolicy
from vishwamai_mp.runtime import Runtime


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen. `temperature` 0 is greedy."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens}: use 1 or more")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature={self.temperature}: use 0 (greedy) or a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k={self.top_k}: use 1 or more, or leave it out")


class Generator:
    """Generates with one model chunk per rank (no interleaving, sequence or context parallelism)."""

    def __init__(self, config: PretrainConfig, runtime: Runtime, model: VishwamAIModel) -> None:
        self.config, self.runtime, self.model = config, runtime, model.eval()

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], options: SamplingOptions, eod_id: int = -1) -> list[list[int]]:
        """Continue prompts of equal length.

        Args:
            prompts: token ids.
            options: how to choose.
            eod_id: a sequence ends when this token is chosen; it is not returned.

        Returns:
            new tokens of each prompt, the same on all ranks.

        Raises:
            UserError: an empty prompt, prompts of different lengths, or no room in the context.
        """
        length = self._check(prompts)
        room = self.config.model.max_position_embeddings - length
        count = min(options.max_new_tokens, room)
        context = StaticInferenceContext(len(prompts), length + count)
        tokens = torch.tensor(prompts, device=self.runtime.device)
        chosen: list[Tensor] = []
        done = torch.zeros(len(prompts), dtype=torch.bool, device=self.runtime.device)
        for position in range(length, length + count):
            tokens = self._next(tokens, context, options, position)[:, None]
            chosen.append(tokens[:, 0])
            done |= tokens[:, 0] == eod_id
            if bool(done.all()):
                break
        return [_until(row, eod_id) for row in torch.stack(chosen, 1).tolist()]

    def _check(self, prompts: Sequence[Sequence[int]]) -> int:
        lengths = {len(prompt) for prompt in prompts}
        limit = self.config.model.max_position_embeddings
        if not lengths or 0 in lengths:
            raise UserError("the prompt is empty; give at least one token")
        if len(lengths) > 1:
            raise UserError(f"prompts of {min(lengths)} to {max(lengths)} tokens; give prompts of one length at a time")
        (length,) = lengths
        if length >= limit:
            raise UserError(
                f"the prompt has {length} tokens, the model's context {limit} (model.max_position_embeddings);"
                " shorten the prompt"
            )
        return length

    def _next(
        self, tokens_BT: Tensor, context: StaticInferenceContext, options: SamplingOptions, position: int
    ) -> Tensor:
        """Run `tokens_BT` through all stages and choose the token at `position`, (B,), on all ranks."""
        group = self.runtime.groups.pp
        output = self._run_stage(tokens_BT, context)
        context.sequence_len_offset += tokens_BT.shape[1]
        context.enable_decode_mode()
        if self.runtime.is_last_stage:
            chosen = choose(
                output[-1],
                self.config.model.vocab_size,
                self.runtime.groups.tp,
                temperature=options.temperature,
                top_k=options.top_k,
                seed=options.seed,
                position=position,
            )
        else:
            chosen = torch.empty(tokens_BT.shape[0], dtype=torch.int64, device=self.runtime.device)
        if group.size() > 1:
            dist.broadcast(chosen, dist.get_global_rank(group, group.size() - 1), group=group)
        return chosen

    def _run_stage(self, tokens_BT: Tensor, context: StaticInferenceContext) -> Tensor:
        """This stage's output; hidden states travel from stage to stage."""
        group, stage = self.runtime.groups.pp, self.runtime.pipeline_rank
        if not self.runtime.is_first_stage:
            hidden = torch.empty(
                tokens_BT.shape[1],
                tokens_BT.shape[0],
                self.config.model.hidden_size,
                dtype=PrecisionPolicy.of(self.config.precision).compute,
                device=self.runtime.device,
            )
            dist.recv(hidden, dist.get_global_rank(group, stage - 1), group=group)
            self.model.set_input_tensor(hidden)
        output = self.model(tokens_BT, inference_context=context)
        if not self.runtime.is_last_stage:
            dist.send(output.contiguous(), dist.get_global_rank(group, stage + 1), group=group)
        return output


def _until(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end)] if end in tokens else tokens
