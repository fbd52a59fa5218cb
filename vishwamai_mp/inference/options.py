"""What a caller can ask of generation, checked."""

import math
from dataclasses import dataclass
from typing import Literal

from vishwamai_mp.config import UserError


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen, one at a time. Filters apply in the order of their names here.

    Attributes:
        max_new_tokens: at most; the model's context may leave room for fewer.
        temperature: 0 takes the likeliest token; above, samples from softmax(logits / temperature).
        top_k: sample among this many likeliest tokens.
        top_p: among the fewest likeliest that have this probability together.
        min_p: among those at least this fraction as likely as the likeliest.
        repetition_penalty: above 1 makes tokens that the text has already less likely (arXiv 1909.05858).
        seed, sample: name the random numbers. A text depends on its prompt, these and the other options alone, not
            on what else is generated at the time; samples of one prompt differ in `sample`.
        stop_tokens: a text ends before one of these ids.
        stop_strings: a text ends before one of these.
        log_probs: also return the model's log-probability of each token.
        top_log_probs: with `log_probs`: also those of so many likeliest tokens in each place.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0
    sample: int = 0
    stop_tokens: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    log_probs: bool = False
    top_log_probs: int = 0

    def __post_init__(self) -> None:
        _at_least_one("max_new_tokens", self.max_new_tokens)
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature={self.temperature}: use 0 (greedy) or a positive number")
        if self.top_k is not None:
            _at_least_one("top_k", self.top_k)
        if self.top_log_probs < 0 or (self.top_log_probs and not self.log_probs):
            raise UserError(f"top_log_probs={self.top_log_probs}: use 0 or more, with log_probs")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise UserError(f"{name}={value}: use a number above 0 up to 1, or leave it out")
        for name in ("top_k", "top_p", "min_p"):
            if self.temperature == 0 and getattr(self, name) is not None:
                raise UserError(f"{name}={getattr(self, name)} has no effect at temperature 0; set a temperature")
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(f"repetition_penalty={self.repetition_penalty}: use a positive number; 1 changes nothing")
        for name in ("seed", "sample"):
            if not 0 <= getattr(self, name) < 2**63:
                raise UserError(f"{name}={getattr(self, name)}: use a number from 0 on")
        if "" in self.stop_strings:
            raise UserError("a stop string is empty; leave it out")

    @property
    def filters(self) -> tuple[float, int | None, float | None, float | None]:
        """What rows must share to be sampled together."""
        return self.temperature, self.top_k, self.top_p, self.min_p


@dataclass(frozen=True)
class BeamOptions:
    """Beam search: the likeliest text, as far as `num_beams` prefixes kept at each length find it.

    Attributes:
        num_beams: prefixes kept.
        max_new_tokens: at most.
        length_penalty: a text's score is its log-probability / length ** this; above 0 favours longer texts.
        early_stopping: True: stop as soon as `num_beams` texts have ended. False: when the best running prefix scores
            below the worst ended text. "never": when no longer text could score better.
        stop_tokens: a text ends with one of these ids, which counts in its score and is not returned.
    """

    num_beams: int = 4
    max_new_tokens: int = 64
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    stop_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _at_least_one("num_beams", self.num_beams)
        _at_least_one("max_new_tokens", self.max_new_tokens)
        if not math.isfinite(self.length_penalty):
            raise UserError(f"length_penalty={self.length_penalty}: use a finite number; 0 ignores length")
        if self.early_stopping not in (True, False, "never"):
            raise UserError(f"early_stopping={self.early_stopping!r}: use True, False or 'never'")


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise UserError(f"{name}={value}: use 1 or more")
