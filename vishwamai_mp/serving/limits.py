"""What one client may ask for, and how it is told that it may not."""

import re
from dataclasses import dataclass

from vishwamai_mp.config import UserError
from vishwamai_mp.inference import ContextLengthError

_FIELD = re.compile(r"(\w+)(?:\.\d+|: |=)")


@dataclass(frozen=True)
class Limits:
    """Bounds that keep one request from holding up the others.

    Attributes:
        body_bytes: of a request.
        waiting: texts that wait or are being written, of all clients together.
        searches: that wait or run; they run one at a time, beside the texts.
        prompts: of a request.
        choices: texts per prompt (`n`, `best_of`).
        search_nodes: `beam_width` times `max_depth`.
        search_tokens: that a search generates.
        seconds: that a request takes, its waiting included.
    """

    body_bytes: int = 4 << 20
    waiting: int = 256
    searches: int = 8
    prompts: int = 64
    choices: int = 16
    search_nodes: int = 256
    search_tokens: int = 16384
    seconds: float = 600.0


class Refusal(UserError):  # noqa: N818 (a word that says what it is)
    """A request that is not answered, as OpenAI's clients are told of it.

    Args:
        message: one line.
        parameter: the field that is to be mended.
        status: of HTTP.
        code: a word for programs.
    """

    def __init__(self, message: str, parameter: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.parameter, self.status, self.code = parameter, status, code

    def body(self) -> dict[str, object]:
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.parameter, "code": self.code}}


def refusal_of(error: Exception, prompt: str = "prompt") -> Refusal:
    """Any error as a refusal: a user's mistake is the client's, anything else the server's.

    Args:
        error: what was raised.
        prompt: the field that the prompt was made of.
    """
    if isinstance(error, Refusal):
        return error
    message = " ".join(str(error).split())
    if not isinstance(error, UserError):
        return Refusal(f"{type(error).__name__}: {message}", status=500)
    if isinstance(error, ContextLengthError):
        return Refusal(message, prompt, code="context_length_exceeded")  # what clients shorten conversations at
    # Options are refused as "top_p=2.0: use …", conversations as "messages.0: …", prompts as "the prompt …".
    named = _FIELD.match(message)
    return Refusal(message, prompt if message.startswith("the prompt") else named and named[1])
