"""OpenAI's answers: texts as they come or whole, of `/v1/completions` and `/v1/chat/completions`.

An answer is a series of chunks. Streamed, they are sent as they come; else `whole` makes one of them.
"""

import secrets
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vishwamai_mp.config import UserError
from vishwamai_mp.inference.added_text import AddedText
from vishwamai_mp.serving.limits import Limits, Refusal
from vishwamai_mp.serving.requests import ChatRequest, CompletionRequest, messages_of, prompts_of
from vishwamai_mp.serving.service import Job, Piece, Prompts, Service, TokenScore
from vishwamai_mp.tree_of_thoughts import SearchResult
from vishwamai_mp.tree_of_thoughts.picture import to_svg

_TOKENS_BY_DEFAULT = 64
_CHAT_TOKENS_BY_DEFAULT = 1024
Chunk = dict[str, Any]


@dataclass
class Usage:
    """Token counts of an answer; each prompt counts once, however many texts it gets.

    Attributes:
        prompt, completion: tokens.
        cached: of each prompt by number, its tokens that no text of it had to read.
    """

    prompt: int
    completion: int = 0
    cached: dict[int, int] = field(default_factory=dict)

    def add(self, piece: Piece, prompt: int) -> None:
        """A piece of one of the texts of a prompt."""
        self.completion += len(piece.tokens)
        self.cached[prompt] = min(piece.reused, self.cached.get(prompt, piece.reused))

    def to_dict(self) -> dict[str, Any]:
        total = self.prompt + self.completion
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": total,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached.values())},
        }


@dataclass
class Answer:
    """What both kinds have in common.

    Attributes:
        head: fields that every chunk has.
        usage: grows while the chunks come.
    """

    head: dict[str, Any]
    usage: Usage

    @classmethod
    def begun(cls, kind: str, model: str, prompts: Sequence[Sequence[int]]) -> "Answer":
        prefix = "chatcmpl" if kind.startswith("chat") else "cmpl"
        head = {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}
        return cls(head, Usage(sum(map(len, prompts))))

    def chunk(self, *choices: Chunk, **more: Any) -> Chunk:
        return {**self.head, "choices": list(choices), **more}


@dataclass
class _Text:
    """A choice's text as it grows, and where its tokens lie in it."""

    prompts: Prompts
    prompt: list[int]
    text: str = ""
    places: AddedText = field(init=False)

    def __post_init__(self) -> None:
        self.places = AddedText(self.prompts.decode, self.prompt)

    def read(self, piece: Piece) -> tuple[Piece, list[int]]:
        """A piece, and where each of its tokens' text begins, in characters behind the prompt.

        Tokens of a stop text, which is cut off, are not among them.
        """
        self.text += piece.text
        offsets = []
        for token in piece.tokens:
            offsets.append(len(self.places.text))
            self.places.add([token])
        if piece.finish == "stop":
            count = sum(offset < len(self.text) for offset in offsets)
            piece = replace(piece, tokens=piece.tokens[:count], scores=piece.scores[:count])
        return piece, offsets[: len(piece.tokens)]


def completion_jobs(request: CompletionRequest, prompts: Prompts, limits: Limits) -> tuple[list[str], list[Job]]:
    """What is to be done for a request: the text of each prompt, and `best_of` jobs for each. Raises `UserError`."""
    seed = secrets.randbits(31)
    count = _TOKENS_BY_DEFAULT if request.max_tokens is None else request.max_tokens
    options = request.options(seed, count, prompts.ends(request.stops))
    best_of = request.best_of or request.n
    wanted = request.logprobs
    if wanted is not None or best_of > request.n:
        options = replace(options, log_probs=True, top_log_probs=wanted or 0)
    texts, jobs = [], []
    for prompt in prompts_of(request, limits):
        ids = prompts.encode(prompt) if isinstance(prompt, str) else prompt
        texts.append(prompt if isinstance(prompt, str) else _decoded(prompt, prompts))
        scores = wanted if request.echo else None
        samples = [replace(options, sample=sample) if count else None for sample in range(best_of)]
        jobs += [Job(ids, sample, scores) for sample in samples]
    return texts, jobs


def _decoded(prompt: list[int], prompts: Prompts) -> str:
    """A prompt of token ids as text. Raises `Refusal` for ids that the tokenizer lacks, be there rows of the model."""
    try:
        return prompts.decode(prompt)
    except UserError as error:
        raise Refusal(f"prompt: {error}", "prompt") from None


async def completion_chunks(
    request: CompletionRequest, service: Service, model: str, texts: list[str], jobs: list[Job]
) -> AsyncIterator[Chunk]:
    """Of `text_completion`; the last has no choices but the usage."""
    best_of, n = request.best_of or request.n, request.n
    answer = Answer.begun("text_completion", model, [job.prompt for job in jobs[::best_of]])
    grown = [_Text(service.prompts, job.prompt) for job in jobs]
    echoed = [texts[i // best_of] if request.echo else "" for i in range(len(jobs))]
    kept: list[list[Piece]] = [[] for _ in jobs]  # where the best are chosen at the end
    begun = [False] * len(jobs)
    async for piece in service.complete(jobs):
        answer.usage.add(piece, piece.index // best_of)
        kept[piece.index].append(piece)
        if best_of == n:
            before = "" if begun[piece.index] else echoed[piece.index]
            begun[piece.index] = True
            yield answer.chunk(_completion_choice(request, grown[piece.index], piece, piece.index, before))
    if best_of > n:
        for start in range(0, len(jobs), best_of):
            merged = [_merged(kept[i]) for i in range(start, start + best_of)]
            best = sorted(merged, key=_mean_log_prob, reverse=True)[:n]
            for rank, piece in enumerate(best):
                index = start // best_of * n + rank
                yield answer.chunk(_completion_choice(request, grown[piece.index], piece, index, echoed[piece.index]))
    yield answer.chunk(usage=answer.usage.to_dict())


def _completion_choice(request: CompletionRequest, text: _Text, piece: Piece, index: int, before: str) -> Chunk:
    """One choice of a chunk. `before`: of the prompt, where it is echoed and this is the first."""
    logprobs = None
    if request.logprobs is not None:
        logprobs = _completion_log_probs(request, text, piece)
    return {"text": before + piece.text, "index": index, "logprobs": logprobs, "finish_reason": piece.finish}


def _completion_log_probs(request: CompletionRequest, text: _Text, piece: Piece) -> Chunk:
    spell = text.prompts.spell
    start = 0
    ids: list[int] = []
    offsets: list[int] = []
    scores: list[TokenScore | None] = []
    if request.echo:
        own = AddedText(text.prompts.decode, [])
        if piece.prompt_scores is not None:  # the first token follows nothing
            ids, scores = list(text.prompt), [None, *piece.prompt_scores]
            for token in ids:
                offsets.append(len(own.text))
                own.add([token])
        start = len(text.prompts.decode(text.prompt))
    piece, places = text.read(piece)
    ids += piece.tokens
    scores += piece.scores
    offsets += [start + place for place in places]
    return {
        "tokens": [spell(token) for token in ids],
        "token_logprobs": [None if score is None else score[0] for score in scores],
        "top_logprobs": [
            None if score is None else {spell(token): log_prob for token, log_prob in reversed(score[1])}
            for score in scores
        ]
        if request.logprobs
        else None,
        "text_offset": offsets,
    }


def chat_job(request: ChatRequest, prompts: Prompts) -> Job:
    """What is to be done for a conversation. Raises `UserError`."""
    count = request.max_completion_tokens or request.max_tokens or _CHAT_TOKENS_BY_DEFAULT
    options = request.options(secrets.randbits(31), count, prompts.ends(request.stops))
    if request.logprobs:
        options = replace(options, log_probs=True, top_log_probs=request.top_logprobs)
    return Job(prompts.chat(messages_of(request)), options)


async def chat_chunks(request: ChatRequest, service: Service, model: str, job: Job) -> AsyncIterator[Chunk]:
    """Of `chat.completion.chunk`; the last has no choices but the usage."""
    assert job.options is not None
    jobs = [Job(job.prompt, replace(job.options, sample=sample)) for sample in range(request.n)]
    answer = Answer.begun("chat.completion.chunk", model, [job.prompt])
    first = [{"role": "assistant", "content": "", "refusal": None} for _ in jobs]
    async for piece in service.complete(jobs):
        answer.usage.add(piece, 0)
        delta: dict[str, Any] = {**first[piece.index], "content": piece.text}
        first[piece.index] = {}
        logprobs = {"content": _chat_log_probs(service.prompts, piece), "refusal": None} if request.logprobs else None
        yield answer.chunk({"index": piece.index, "delta": delta, "logprobs": logprobs, "finish_reason": piece.finish})
    yield answer.chunk(usage=answer.usage.to_dict())


def _chat_log_probs(prompts: Prompts, piece: Piece) -> list[Chunk]:
    def entry(token: int, log_prob: float) -> Chunk:
        return {"token": prompts.spell(token), "logprob": log_prob, "bytes": list(prompts.content_of(token))}

    return [
        {**entry(token, log_prob), "top_logprobs": [entry(*likely) for likely in top]}
        for token, (log_prob, top) in zip(piece.tokens, piece.scores, strict=True)
    ]


async def tree_chunks(
    request: CompletionRequest, service: Service, model: str, texts: list[str], jobs: list[Job]
) -> AsyncIterator[Chunk]:
    """The tree as it grows, as JSON and SVG; the last but one has the text, the last the usage."""
    (job,) = jobs
    answer = Answer.begun("text_completion", model, [job.prompt])
    changes: dict[str, Any] = {"seed": request.seed, "beam_width": request.beam_width, "max_depth": request.max_depth}
    result: SearchResult | None = None
    async for grown in service.search(
        job.prompt, {name: value for name, value in changes.items() if value is not None}
    ):
        if result is not None:
            yield answer.chunk(_tree_choice("", None), tree=result.to_dict(), svg=to_svg(result))
        result = grown
    assert result is not None
    answer.usage.completion = result.generated_tokens
    reason = "stop" if result.within_budget else "length"
    yield answer.chunk(_tree_choice(result.answer_text, reason), tree=result.to_dict(), svg=to_svg(result))
    yield answer.chunk(usage=answer.usage.to_dict())


def _tree_choice(text: str, reason: str | None) -> Chunk:
    return {"text": text, "index": 0, "logprobs": None, "finish_reason": reason}


async def whole(chunks: AsyncIterator[Chunk]) -> Chunk:
    """One answer of all its chunks."""
    choices: dict[int, Chunk] = {}
    answer: Chunk = {}
    async for chunk in chunks:
        for choice in chunk.pop("choices"):
            choices[choice["index"]] = _joined(choices.get(choice["index"]), choice)
        answer |= chunk
    found = [choices[index] for index in sorted(choices)]
    if answer["object"] == "chat.completion.chunk":
        answer["object"] = "chat.completion"
        found = [{"message" if name == "delta" else name: value for name, value in one.items()} for one in found]
    return {**answer, "choices": found}


def _joined(old: Any, new: Any) -> Any:
    """Texts and lists one behind the other, objects by key; of anything else the newer, where there is one."""
    if isinstance(old, dict) and isinstance(new, dict):
        return {**old, **{name: _joined(old.get(name), value) for name, value in new.items()}}
    if isinstance(old, list) and isinstance(new, list):
        return old + new
    if isinstance(old, str) and isinstance(new, str):
        return old + new
    return old if new is None else new


def _merged(pieces: Sequence[Piece]) -> Piece:
    first = pieces[0]
    return Piece(
        first.index,
        "".join(piece.text for piece in pieces),
        [token for piece in pieces for token in piece.tokens],
        [score for piece in pieces for score in piece.scores],
        pieces[-1].finish,
        first.prompt_scores,
    )


def _mean_log_prob(piece: Piece) -> float:
    return sum(log_prob for log_prob, _ in piece.scores) / max(len(piece.scores), 1)
