"""OpenAI's requests, checked field by field. What is not understood is refused by its name.

Clients send many fields at the values that change nothing: null, n=1, penalties of 0. These are accepted, others of
the fields that are not supported here are refused.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vishwamai_mp.config.json_text import DuplicateKeyError, parse_json
from vishwamai_mp.inference import SamplingOptions
from vishwamai_mp.serving.limits import Limits, Refusal

# Fields that have no effect here, and the values at which they need none. None: any value.
_NEUTRAL: dict[str, tuple[Any, ...] | None] = {
    "user": None,
    "metadata": None,
    "safety_identifier": None,
    "prompt_cache_key": None,
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
# Values that other servers' clients send for "no such bound".
_UNBOUNDED: dict[str, tuple[Any, ...]] = {"top_k": (0, -1), "min_p": (0,)}
_OF_SAMPLE = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop", "logprobs")
_OF_TREE = ("beam_width", "max_depth")
_MOST_STOPS, _MOST_LIKELIEST = 16, 20

Count = Annotated[int, Field(ge=1)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False
    include_obfuscation: bool = False  # padding against listeners on the network; not needed on loopback


class Common(BaseModel):
    """What both kinds of requests have, and what this server understands besides (from `top_k` on)."""

    model_config = ConfigDict(extra="forbid", strict=True)  # true is no number, "false" is not false
    model: str | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    n: Count = 1
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: str | list[str] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    top_k: Count | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: float = 1.0

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def options(self, seed: int, max_tokens: int, end_tokens: tuple[int, ...]) -> SamplingOptions:
        """How tokens are chosen. Raises `UserError` that begins with the name of a field."""
        greedy = self.temperature == 0
        return SamplingOptions(
            max_new_tokens=max(max_tokens, 1),
            temperature=self.temperature,
            top_p=None if greedy or self.top_p == 1 else self.top_p,
            top_k=None if greedy else self.top_k,
            min_p=None if greedy else self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed if self.seed is not None else seed,
            stop_tokens=end_tokens,
            stop_strings=self.stops,
        )


class CompletionRequest(Common):
    """`/v1/completions`, and `strategy`: `tree` searches instead of sampling."""

    prompt: Any
    best_of: Count | None = None
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=_MOST_LIKELIEST)] | None = None
    strategy: Literal["sample", "tree"] = "sample"
    beam_width: Count | None = None
    max_depth: Count | None = None


class ChatRequest(Common):
    """`/v1/chat/completions`."""

    messages: list[dict[str, Any]]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=_MOST_LIKELIEST)] = 0


T = TypeVar("T", bound=Common)


def parse(kind: type[T], raw: bytes, limits: Limits) -> T:
    """A request of this kind.

    Raises:
        Refusal: it is none, or asks for too much; names the field.
    """
    try:
        data = parse_json(raw, parse_constant=_no_number, parse_float=_number)
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start].encode("unicode_escape").decode()
        raise Refusal(f"the request has {half}, half of a surrogate pair, which is no text") from None
    except DuplicateKeyError as error:
        raise Refusal(str(error), error.key if error.key.isidentifier() else None) from None
    except (ValueError, RecursionError) as error:
        raise Refusal(f"the request is not JSON: {error}") from None
    if not isinstance(data, Mapping):
        raise Refusal("the request is not a JSON object")
    given = {name: value for name, value in data.items() if value is not None}
    for name, unbounded in _UNBOUNDED.items():
        if type(given.get(name)) in (int, float) and given[name] in unbounded:
            del given[name]
    for name in given.keys() & _NEUTRAL.keys():
        allowed, value = _NEUTRAL[name], given.pop(name)
        if allowed is not None and value not in allowed:
            neutral = " or ".join(json.dumps(each) for each in allowed)
            raise Refusal(f"{name}: is not supported here but for {neutral}; leave it out", name)
    try:
        request = kind.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        is_type = [str(part) == "str" or str(part).endswith("]") for part in first["loc"]]
        place = ".".join(str(part) for part, named in zip(first["loc"], is_type, strict=True) if not named)
        problem = "is not known here; leave it out" if first["type"] == "extra_forbidden" else first["msg"].lower()
        raise Refusal(f"{place}: {problem}", str(first["loc"][0])) from None
    _check(request, limits)
    return request


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _number(text: str) -> float:
    """JSON does not tell 5.0 from 5; some clients write every number with a point."""
    value = float(text)
    return int(value) if value.is_integer() else value


def _check(request: Common, limits: Limits) -> None:
    """What concerns several fields, or the server's limits."""
    given = request.model_fields_set
    if "stream_options" in given and not request.stream:
        raise Refusal("stream_options: is for stream=true; leave it out", "stream_options")
    if len(request.stops) > _MOST_STOPS:
        raise Refusal(f"stop: {len(request.stops)} texts; at most {_MOST_STOPS}", "stop")
    if "" in request.stops:
        raise Refusal("stop: a stop text is empty; leave it out", "stop")
    _at_most("n", request.n, limits.choices)
    if isinstance(request, ChatRequest):
        if request.top_logprobs and not request.logprobs:
            raise Refusal("top_logprobs: needs logprobs=true", "top_logprobs")
        if request.max_tokens == 0:
            raise Refusal("max_tokens: input should be greater than or equal to 1", "max_tokens")
    if isinstance(request, CompletionRequest):
        _check_completion(request, limits)


def _check_completion(request: CompletionRequest, limits: Limits) -> None:
    given = request.model_fields_set
    of_others = set(_OF_SAMPLE) if request.strategy == "tree" else set(_OF_TREE)
    if request.strategy == "tree":
        of_others |= {name for name in ("n", "best_of", "echo") if getattr(request, name) not in (None, 1, False)}
    if useless := given & of_others:
        name = min(useless)
        raise Refusal(f"{name} has no effect on strategy {request.strategy}; leave it out", name)
    if request.max_tokens == 0 and not request.echo:
        raise Refusal("max_tokens: input should be greater than or equal to 1, or echo true", "max_tokens")
    _at_most("beam_width", request.beam_width or 1, limits.search_nodes)
    _at_most("max_depth", request.max_depth or 1, limits.search_nodes)
    if request.best_of is not None:
        _at_most("best_of", request.best_of, limits.choices)
        if request.best_of < request.n:
            raise Refusal(f"best_of={request.best_of}: is fewer than n={request.n}", "best_of")
        if request.stream and request.best_of > request.n:
            raise Refusal("best_of: cannot be streamed; the best is known at the end", "best_of")


def _at_most(name: str, value: int, most: int) -> None:
    if value > most:
        raise Refusal(f"{name}={value}: this server takes at most {most}", name)


def prompts_of(request: CompletionRequest, limits: Limits) -> list[str | list[int]]:
    """The prompts: one text, one list of token ids, or a list of these."""
    prompt = request.prompt
    if isinstance(prompt, str) or _is_ids(prompt):
        prompts = [prompt]
    elif isinstance(prompt, list) and prompt and all(isinstance(one, str) or _is_ids(one) for one in prompt):
        prompts = prompt
    else:
        raise Refusal("prompt: give a text, a list of token ids, or a list of texts or of such lists", "prompt")
    _at_most("prompt", len(prompts), limits.prompts)
    if request.strategy == "tree" and len(prompts) > 1:
        raise Refusal("prompt: strategy tree takes one prompt", "prompt")
    return prompts


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)


def messages_of(request: ChatRequest) -> list[dict[str, Any]]:
    """Messages with a role and one text each, as chat templates take them."""
    if not request.messages:
        raise Refusal("messages: is empty", "messages")
    found = []
    for number, message in enumerate(request.messages):
        place = f"messages.{number}"
        kept = {name: value for name, value in message.items() if value not in (None, [])}
        if not isinstance(kept.get("role"), str):
            raise Refusal(f"{place}.role: a text is missing", "messages")
        if message.get("content") is None and kept["role"] != "assistant":
            raise Refusal(f"{place}.content: is missing", "messages")
        for name in sorted(kept.keys() - {"role", "content", "name"}):
            raise Refusal(f"{place}.{name}: is not supported here", "messages")
        found.append({**kept, "content": _text_of(kept.get("content", ""), f"{place}.content")})
    return found


def _text_of(content: Any, place: str) -> str:
    """A message's content: a text, or a list of parts that are texts."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    given = [part.get("text") for part in parts if isinstance(part, Mapping) and part.get("type") == "text"]
    texts = [text for text in given if isinstance(text, str)]
    if not parts or len(texts) < len(parts):
        raise Refusal(f"{place}: give a text, or parts of type text", "messages")
    return "".join(texts)
