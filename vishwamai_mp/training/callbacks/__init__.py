"""Side work of the training loop, one file each."""

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
from vishwamai_mp.training.callbacks.stopping import Stopping
from vishwamai_mp.training.callbacks.stragglers import Stragglers
from vishwamai_mp.training.callbacks.usual import usual_callbacks

__all__ = [
    "BestModel",
    "Callback",
    "Checkpointing",
    "EarlyStopping",
    "Evaluation",
    "Fp8Report",
    "Goodput",
    "HuggingFaceExport",
    "MemorySnapshot",
    "Metrics",
    "Profiler",
    "Progress",
    "Stopping",
    "Stragglers",
    "usual_callbacks",
]
