"""All ranks go on, or all raise the same error: none is left waiting in a collective that a failed peer never joins."""

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch.distributed as dist

from vishwamai_mp.config import UserError
from vishwamai_mp.config.errors import NO_SPACE

T = TypeVar("T")


@dataclass(frozen=True)
class Failure:
    """An error in a form that travels between processes. `mendable`: the user's to mend, one line says it all."""

    message: str
    mendable: bool

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        rank = dist.get_rank()
        if isinstance(error, UserError):
            return cls(str(error), True)
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            return cls(f"no space left on the disk (rank {rank}: {error})", True)
        if isinstance(error, OSError):
            return cls(f"input/output error on rank {rank}: {error}", True)
        return cls(f"rank {rank}:\n{''.join(traceback.format_exception(error))}", False)

    def throw(self, doing: str, advice: str = "") -> NoReturn:
        """Raise it: UserError, or RuntimeError for a defect of ours."""
        message = f"{doing}: {self.message}{advice}"
        raise UserError(*message.split("\n")) if self.mendable else RuntimeError(message)


def attempt(function: Callable[[], T]) -> T | Failure:
    """What `function` returns, or its error as a value."""
    try:
        return function()
    except Exception as error:
        return Failure.of(error)


def on_first_rank(function: Callable[[], T]) -> T | Failure:
    """Call `function` on rank 0 and give its result or failure to all ranks."""
    box: list[Any] = [attempt(function) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_all_ranks(function: Callable[[], T]) -> list[T] | Failure:
    """Call `function` on every rank and give the results, by rank, or the first failure to all ranks."""
    results: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(results, attempt(function))
    return next((result for result in results if isinstance(result, Failure)), results)
