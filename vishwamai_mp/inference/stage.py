"""One pipeline stage as generation runs it: the model's own modules, on tokens of many sequences laid end to end.

Shapes: N tokens of all sequences, D width, V vocabulary (local), R width of a head that is turned.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vishwamai_mp.config import PretrainConfig
from vishwamai_mp.inference.batch import Batch, Work
from vishwamai_mp.inference.blocks import BlockPool
from vishwamai_mp.inference.direct_layer import DirectHead, DirectLayer
from vishwamai_mp.model import VishwamAIModel
from vishwamai_mp.model.rotary import attention_factors
from vishwamai_mp.precision import PrecisionPolicy
from vishwamai_mp.runtime import Runtime


class Stage:
    """The layers of one pipeline stage, with the embedding on the first and the output layer on the last."""

    def __init__(self, config: PretrainConfig, runtime: Runtime, model: VishwamAIModel) -> None:
        self.model, self.settings, self.runtime = model, config.model, runtime
        self.dtype = PrecisionPolicy.of_run(config).compute
        self.layers = list(model.decoder.layers)
        self.direct = [
            DirectLayer(layer, runtime.groups.tp) if DirectLayer.supports(layer) else None for layer in self.layers
        ]
        self._direct_head = DirectHead(model) if DirectHead.supports(model) else None
        assert config.model.num_key_value_heads is not None
        assert config.model.head_dim is not None
        self.heads = config.model.num_key_value_heads // config.parallel.tensor_model_parallel_size
        self.width = config.model.head_dim
        positions = torch.arange(config.model.max_position_embeddings, device=runtime.device)
        self._cosine, self._sine = self._turn(model.rotary(positions, 0))

    def pool(self, tokens: int) -> BlockPool:
        """Memory for this stage's keys and values of so many tokens."""
        return BlockPool(tokens, len(self.layers), self.heads, self.width, self.dtype, self.runtime.device)

    def batch(self, work: Work, pool: BlockPool, guessed: Sequence[int] | None = None) -> Batch:
        """What sequences read now."""
        return Batch(work, pool, self.settings, self.layers[0].layer_number if self.layers else 1, guessed)

    def run(self, batch: Batch, hidden_ND: Tensor | None, wanted: Tensor | None = None) -> Tensor:
        """Hidden states after this stage's layers, (N, D), or of the wanted tokens.

        Args:
            batch: the new tokens.
            hidden_ND: of the stage before; None on the first.
            wanted: tokens by number; None: all.
        """
        x = self.model.embed(batch.tokens[None])[:, 0] if hidden_ND is None else hidden_ND
        angles = None
        if batch.frequency_lengths is None:
            turn = self._cosine[batch.positions], self._sine[batch.positions]
        else:
            angles = self._angles(batch)
            turn = self._turn(angles)
        for layer, direct in zip(self.layers, self.direct, strict=True):
            if direct is not None and not direct.is_hooked:
                x = direct(x, batch, *turn, wanted if layer is self.layers[-1] else None)
                continue
            angles = self._angles(batch) if angles is None else angles
            x, _ = layer(hidden_states=x[:, None], attention_mask=None, rotary_pos_emb=angles, inference_context=batch)
            x = x[:, 0]
        return x if wanted is None or len(x) == len(wanted) else x[wanted]

    def _angles(self, batch: Batch) -> Tensor:
        """Of the new tokens, (N, 1, A, R)."""
        if batch.frequency_lengths is None:
            return self.model.rotary(batch.positions, 0)
        rows = zip(batch.positions.split(batch.counts), batch.frequency_lengths, strict=True)
        return torch.cat([self.model.rotary(positions, length) for positions, length in rows])

    def _turn(self, angles: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of angles, so that a turn is x · cos + (x with its halves exchanged) · sin."""
        factors = torch.tensor(attention_factors(self.settings), device=angles.device)[:, None]
        cosine, sine = angles.cos() * factors, angles.sin() * factors
        sine[..., : sine.shape[-1] // 2].neg_()
        return cosine.to(self.dtype), sine.to(self.dtype)

    def normed(self, hidden_ND: Tensor) -> Tensor:
        """What the last stage's logits come from, (N, D)."""
        if self._direct_head is not None and not self._direct_head.is_hooked:
            return self._direct_head.normed(hidden_ND)
        return self.model.decoder.final_layernorm(hidden_ND[:, None])[:, 0]

    def logits(self, normed_ND: Tensor) -> Tensor:
        """Of normed hidden states: (N, V)."""
        if self._direct_head is not None and not self._direct_head.is_hooked:
            return self._direct_head.logits(normed_ND)
        return self.model.logits(normed_ND[:, None])[:, 0]
