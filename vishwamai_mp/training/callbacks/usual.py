"""Which callbacks a run has."""

from collections.abc import Sequence

from vishwamai_mp.config import LoggingConfig, PretrainConfig
from vishwamai_mp.config.extensions import find_extension
from vishwamai_mp.data.tokenizer import Tokenizer
from vishwamai_mp.training.callbacks.base import Callback
from vishwamai_mp.training.callbacks.best_model import BestModel
from vishwamai_mp.training.callbacks.checkpointing import Checkpointing
from vishwamai_mp.training.callbacks.early_stopping import EarlyStopping
from vishwamai_mp.training.callbacks.evaluation import Evaluation
from vishwamai_mp.training.callbacks.fp8_statistics import Fp8Report
from vishwamai_mp.training.callbacks.goodput import Goodput
from vishwamai_mp.training.callbacks.hugging_face_export import HuggingFaceExport
from vishwamai_mp.training.callbacks.memory_snapshot import MemorySnapshot
from vishwamai_mp.training.callbacks.metrics import Metrics
from vishwamai_mp.training.callbacks.profiler import Profiler
from vishwamai_mp.training.callbacks.progress import Progress
from vishwamai_mp.training.callbacks.search_samples import search_callbacks
from vishwamai_mp.training.callbacks.stopping import Stopping
from vishwamai_mp.training.callbacks.stragglers import Stragglers


def usual_callbacks(
    config: PretrainConfig,
    tokenizer: Tokenizer | None = None,
    more: Sequence[Callback] = (),
    began: float | None = None,
) -> list[Callback]:
    """What the configuration asks for, the user's own among it, and `more`.

    Args:
        began: when a process began whose only purpose is this run, seconds since the epoch.
    """
    own = [find_extension("training.callbacks", name, Callback)() for name in config.training.callbacks]
    fp8 = [Fp8Report(config.fp8.report_every)] if config.fp8.report_every else []
    patience = config.training.early_stopping_patience
    stopping = [EarlyStopping(patience)] if patience else []
    best = [BestModel()] if config.checkpoint.load_best else []
    measuring = [Stopping(config.training.exit_after_minutes), Evaluation(), *stopping]
    export = [HuggingFaceExport(config)] if config.checkpoint.export_hf_every else []
    slow = [Stragglers(config.logging.stragglers_every)] if config.logging.stragglers_every else []
    watching = [*_profiling(config.logging), *fp8, *measuring, *search_callbacks(config, tokenizer)]
    return [*watching, *own, *more, Metrics(), *slow, Checkpointing(), *best, Goodput(began), Progress(), *export]


def _profiling(logging: LoggingConfig) -> list[Callback]:
    if logging.profile_steps is None:
        return []
    first, last = logging.profile_steps
    snapshot = [MemorySnapshot(first, last, logging.profile_ranks)] if logging.memory_snapshot else []
    return [Profiler(first, last, logging.profile_ranks, memory=logging.memory_snapshot), *snapshot]
