"""One part of one corpus, packed into samples: megatron-core's `GPTDataset` with an index cache that can be trusted.

megatron-core keys its cached shuffle indices by path and number of samples and writes them in place. So a corpus that
is preprocessed anew under its old name meets stale indices, a prolonged run is reshuffled, and a kill while writing
leaves torn files that the next job reads. Here indices are of one epoch, are keyed by what the files hold, and appear
under their name only when complete.
"""

import hashlib
import json
import logging
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

import vishwamai_mp.runtime  # noqa: F401  (before megatron.core)
from vishwamai_mp.config import UserError
from vishwamai_mp.data.blends import SourceIdentity

# isort: split
from megatron.core.datasets import gpt_dataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

_INDICES = ("document_index", "sample_index", "shuffle_index")
_CACHE_VERSION = 1  # part of the key: raise it when the order of samples changes


@dataclass(frozen=True)
class _Vocabulary:
    """As much of a tokenizer as GPTDatasetConfig demands."""

    vocab_size: int
    eod: int = -2  # never in the data, and not -1, which pads: masks are made from `DocumentRules`

    @property
    def unique_identifiers(self) -> dict[str, int]:
        return {"vocab_size": self.vocab_size}


class PackedDocuments(GPTDataset):
    """Samples of `sequence_length` + 1 tokens cut from the shuffled, concatenated documents of one corpus: one epoch.

    Neighbouring samples share one token: the last label of one is the first token of the next. The rest of an epoch
    that does not fill a sample is left out.
    """

    def __init__(
        self,
        corpus: IndexedDataset,
        identity: SourceIdentity,
        documents: range,
        split: Split,
        *,
        sequence_length: int,
        seed: int,
        vocab_size: int,
        cache_dir: Path,
    ) -> None:
        """Open the part, indexing it first where the cache has nothing for it.

        Args:
            corpus: the opened `.bin/.idx`.
            identity: what it holds.
            documents: the part of its documents to read; together at least `sequence_length` + 1 tokens.
            cache_dir: folder for the indices; made if missing.

        Raises:
            UserError: the cache cannot be written.
        """
        description = {
            "version": _CACHE_VERSION,
            "source": asdict(identity) | {"name": None},
            "documents": [documents.start, documents.stop],
            "sequence_length": sequence_length,
            "seed": seed,
        }
        key = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:32]
        self._folder = cache_dir / f"{identity.name}-{split.name}-{key}"
        config = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=sequence_length,
            blend=([corpus.path_prefix], None),
            split="1,0,0",  # unused: `documents` says which
            path_to_cache="",  # megatron-core then builds in memory and caches nothing
            tokenizer=_Vocabulary(vocab_size),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        indices = np.arange(documents.start, documents.stop, dtype=np.int32)
        super().__init__(corpus, identity.name, indices, None, split, config)
        self.indices = indices[:0]  # needed while building only; four bytes per document otherwise

    def text(self, index: int) -> torch.Tensor:
        """Token ids of sample `index`, int64 [sequence_length + 1]."""
        return torch.from_numpy(self._query_document_sample_shuffle_indices(index)[0])

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """megatron-core's hook: the indices, mapped from the cache, which is filled first if need be."""
        cached = self._load()
        if cached is None:
            # It warns that nothing will be cached; we do that.
            logging.getLogger(gpt_dataset.__name__).setLevel(logging.ERROR)
            self._store(super()._build_document_sample_shuffle_indices())
            cached = self._load()
            if cached is None:
                raise UserError(
                    f"the shuffle indices written to {self._folder} cannot be read back; is the disk sound?"
                )
        return cached

    def _load(self) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        try:
            document, sample, shuffle = (np.load(self._folder / f"{name}.npy", mmap_mode="r") for name in _INDICES)
        except (OSError, ValueError):  # not there, or damaged after it was written
            return None
        return document, sample, shuffle

    def _store(self, indices: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
        """Write aside and rename: readers, also other jobs building the same, see all of it or nothing."""
        try:
            self._folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._folder.parent, prefix=".building-") as building:
                whole = Path(building) / "indices"
                whole.mkdir()
                for name, array in zip(_INDICES, indices, strict=True):
                    np.save(whole / f"{name}.npy", array)
                self._publish(whole)
        except OSError as error:
            raise UserError(
                f"cannot write shuffle indices to {self._folder.parent}: {error.strerror};"
                " set data.cache_dir to a folder with room that can be written"
            ) from error

    def _publish(self, whole: Path) -> None:
        try:
            whole.rename(self._folder)
        except OSError:
            if self._load() is not None:  # another process was first, with the same content
                return
            shutil.rmtree(self._folder, ignore_errors=True)
            whole.rename(self._folder)
