"""The language model: megatron-core's GPT with explicit positions, documents and a padding-blind loss.

Shapes: B batch, T tokens of the sequence, Q tokens of this context parallel rank, D width, V vocabulary (local).
"""

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn

from vishwamai_mp.config import PretrainConfig, padded_vocab_size
from vishwamai_mp.config.extensions import find_extension, is_own
from vishwamai_mp.model.document_attention import PackedDocuments
from vishwamai_mp.model.freezing import freeze_parts
from vishwamai_mp.model.fully_sharded import ParameterSharding, own_rows, whole_parameters
from vishwamai_mp.model.lora import add_adapters
from vishwamai_mp.model.loss import vocab_parallel_cross_entropy
from vishwamai_mp.model.masks import DocumentBounds, attention_mask, document_bounds
from vishwamai_mp.model.rotary import RotaryEmbedding
from vishwamai_mp.model.softcap import softcap
from vishwamai_mp.model.specs import block_spec, spec_provider
from vishwamai_mp.model.transformer_config import transformer_config
from vishwamai_mp.model.value_head import ValueHead
from vishwamai_mp.precision import PrecisionPolicy, use_arithmetic, use_transformer_engine
from vishwamai_mp.runtime.megatron_versions import is_marked
from vishwamai_mp.runtime.zigzag import local_positions


class VishwamAIModel(GPTModel):
    """One pipeline stage (or one virtual chunk of it) of the model.

    Args:
        config: resolved.
        groups: process groups.
        chunk: which virtual chunk of the stage; None without interleaving.
    """

    def __init__(self, config: PretrainConfig, groups: ProcessGroupCollection, chunk: int | None = None) -> None:
        stage, stages = groups.pp.rank(), groups.pp.size()
        chunks = config.parallel.virtual_pipeline_model_parallel_size
        megatron, policy = transformer_config(config), PrecisionPolicy.of_run(config)
        sharding = ParameterSharding.of(config, groups)
        if sharding:
            megatron.params_dtype = torch.float32  # of what a rank keeps; gathered, parameters are of the compute type
        first = get_transformer_layer_offset(megatron, vp_stage=chunk, pp_rank=stage)
        layers = range(first, first + get_num_layers_to_build(megatron, vp_stage=chunk, pp_rank=stage))
        super().__init__(
            config=megatron,
            transformer_layer_spec=block_spec(spec_provider(policy), config, layers, sharding),
            vocab_size=padded_vocab_size(config),
            max_sequence_length=config.model.max_position_embeddings,
            pre_process=stage == 0 and chunk in (None, 0),
            post_process=stage == stages - 1 and chunk in (None, (chunks or 1) - 1),
            share_embeddings_and_output_weights=config.model.tie_word_embeddings,
            position_embedding_type="none",  # the angles are ours, below
            pg_collection=groups,
            vp_stage=chunk,
        )
        self.model_config, self.sharding = config.model, sharding
        self.rotary = RotaryEmbedding(config.model)
        own_loss = config.training.loss if is_own(config.training.loss) else None
        self.training_loss = find_extension("training.loss", own_loss, 4) if own_loss else vocab_parallel_cross_entropy
        # Transformer Engine's attention knows windows and context parallelism by itself, and documents by their length.
        self.attends_without_mask = use_transformer_engine(policy)
        self.value_head = (
            ValueHead(config.tree, megatron, groups) if config.tree.enabled and self.post_process else None
        )
        add_adapters(self, config)
        freeze_parts(self, config)
        _mark_sharded_parameters(self)
        use_arithmetic(self, policy)
        if self.sharding:
            self.sharding(self)

    def forward(
        self,
        tokens: Tensor,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        document_ids: Tensor | None = None,
        verdicts: Tensor | None = None,
        bounds: DocumentBounds | None = None,
    ) -> Tensor:
        """Run this stage on whole rows. Generation runs the same modules one by one (`inference.stage`).

        Args:
            tokens: (B, T) ids of the whole sequence; context parallel ranks take their share here.
            position_ids: (B, T); None: 0 … T−1.
            labels: (B, T) target ids.
            document_ids: (B, T); tokens attend within their own document only.
            verdicts: (B, T) what the value head may learn: 1, 0, or NaN where none is known.
            bounds: of the documents, as the host knows them; None: they are found from `document_ids` where needed.

        Returns:
            on the last stage, losses (B, Q) fp32 with labels and logits (Q, B, V) without; else hidden states.
        """
        whole, cp, device = tokens, self.pg_collection.cp, tokens.device
        documents = None
        if document_ids is not None and self.attends_without_mask:
            # Rows are turned alike, from place 0 on: attention sees differences of positions only.
            bounds, position_ids = bounds or document_bounds(document_ids, cp.rank(), cp.size()), None
            documents = PackedDocuments(bounds=bounds)
        keys = [local_positions(tokens.shape[1], rank, cp.size(), device) for rank in range(cp.size())]
        local = keys[cp.rank()]
        if cp.size() > 1:
            tokens = tokens[:, local]
            labels = labels if labels is None else labels[:, local]
        hidden = self.decoder(
            hidden_states=self.embed(tokens) if self.pre_process else None,
            attention_mask=self._mask(local, torch.cat(keys), document_ids),
            rotary_pos_emb=self.rotary(local if position_ids is None else position_ids[:, local], whole.shape[1]),
            packed_seq_params=documents,
            context=document_ids,
        )
        return self._head(hidden, labels, whole, document_ids, verdicts) if self.post_process else hidden

    def _head(
        self,
        hidden: Tensor,
        labels: Tensor | None,
        tokens: Tensor,
        document_ids: Tensor | None,
        verdicts: Tensor | None,
    ) -> Tensor:
        """Losses with labels, else logits. All but hidden states and labels is the whole sequence's."""
        logits = self.logits(hidden)
        if labels is None:
            return logits
        # Evaluation measures cross-entropy whatever training minimises, so that runs compare.
        loss = self.training_loss if self.training else vocab_parallel_cross_entropy
        losses = loss(logits, labels.transpose(0, 1), self.model_config.vocab_size, self.pg_collection.tp)
        losses = losses.transpose(0, 1)
        if self.value_head is None or not (self.training and torch.is_grad_enabled()):
            return losses
        return self.value_head.add_loss(losses, hidden, tokens, document_ids, verdicts)

    def embed(self, tokens: Tensor) -> Tensor:
        """What the first layer is given of token ids (B, Q): (Q, B, D)."""
        embedded, multiplier = self.embedding(tokens, position_ids=None), self.model_config.embedding_multiplier
        if multiplier is None:
            return embedded
        # Rounded as the embedding is, which is how transformers multiplies in 16 bits.
        return embedded * float(torch.tensor(multiplier, dtype=embedded.dtype, device="cpu"))

    def logits(self, hidden: Tensor) -> Tensor:
        """Of the last stage's normed hidden states (Q, B, D): (Q, B, V)."""
        tied = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        multiplier, cap = self.model_config.logit_multiplier, self.model_config.logit_softcap
        # Hidden states are fewer numbers than the logits.
        logits = self.output_layer(hidden if multiplier is None else hidden * multiplier, weight=tied)[0]
        return softcap(logits, cap) if cap else logits

    def _mask(self, queries: Tensor, keys: Tensor, document_ids: Tensor | None) -> Tensor | None:
        """None where plain causal order says it all, which attention kernels know by themselves."""
        window = self.model_config.sliding_window
        plain = document_ids is None and window is None and self.pg_collection.cp.size() == 1
        if plain or self.attends_without_mask:
            return None
        mask = attention_mask(queries, keys, window, document_ids)
        if self.model_config.layer_pattern is None:
            return mask
        without = attention_mask(queries, keys, None, document_ids)
        return torch.cat((without, mask), 1)  # layers choose (layer.py)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """megatron-core's, with every layer under its own global number: layers may differ.

        The extra states of Transformer Engine's layers are empty and left out (`precision/extra_state.py`).
        Of fully sharded parameters these are the rows of this rank.
        """
        metadata = {**(metadata or {}), "non_homogeneous_layers": True}
        with whole_parameters(self) as split:
            entries = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        entries = own_rows(entries, split) if self.sharding else entries
        pickled = [key for key, entry in entries.items() if isinstance(entry, ShardedObject) and not _is_empty(entry)]
        assert not pickled, pickled
        return {key: entry for key, entry in entries.items() if not isinstance(entry, ShardedObject)}


def _is_empty(entry: ShardedObject) -> bool:
    return entry.data is None or (isinstance(entry.data, Tensor) and entry.data.numel() == 0)


def _mark_sharded_parameters(model: nn.Module) -> None:
    """Say which parameters are shards, as megatron-core's own initialisation would: gradient norms count on it."""
    dims = {ColumnParallelLinear: 0, RowParallelLinear: 1, VocabParallelEmbedding: 0}
    for module in model.modules():
        for kind, dim in dims.items():
            weight = getattr(module, "weight", None)
            if isinstance(module, kind) and weight is not None and not is_marked(weight):
                set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dim, stride=1)
