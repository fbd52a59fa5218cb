"""Rows by chat templates: transformers' tokens and masks say what is right; what a template cannot do is refused."""

import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.data.test_preprocess import documents_of
from vishwamai_mp.config import UserError
from vishwamai_mp.data import chat_template
from vishwamai_mp.data.chat import UnusableRecord
from vishwamai_mp.data.chat_template import ChatTemplate
from vishwamai_mp.data.marks import BEGINS, LEARNT
from vishwamai_mp.data.prepare import prepare
from vishwamai_mp.data.templated_chat import TemplatedChat
from vishwamai_mp.data.tokenizer import Tokenizer

_MARKS = (
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>", "<|eot|>", "<turn>", "</turn>"),
    *("<tool_call>", "</tool_call>"),
)
# Shapes of templates that models have. ((, )) stand for the marks of generation, which the first three are tried with
# and without.
_CHATML = """\
{%- if messages[0].role != 'system' -%}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}{{ '<|im_start|>assistant\\n' }}(({{ m['content'] }}<|im_end|>)){{ '\\n' }}
{%- else -%}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""
_HEADERS = """\
{{- bos_token -}}
{%- for m in messages -%}
{{- '<|head|>' + m.role + '<|/head|>\\n\\n' -}}
{%- if m.role == 'assistant' -%}(({{ m.content | trim }}<|eot|>)){%- else -%}{{ m.content | trim }}<|eot|>{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|head|>assistant<|/head|>\\n\\n' }}{%- endif -%}"""
_TURNS = """\
{{ bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- if m.role == 'assistant' %}{{ '<turn>model\\n' }}(({{ m.content | trim }}</turn>)){{ '\\n' }}
{%- else %}{{ '<turn>' + m.role + '\\n' + m.content | trim + '</turn>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<turn>model\\n' }}{% endif %}"""
_TOOLS = """\
{%- if tools %}{{ '<|im_start|>system\\n' }}{% for tool in tools %}{{ tool | tojson }}{{ '\\n' }}{% endfor %}<|im_end|>
{%- endif %}
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}(({{ m.content or '' }}
{%- for call in m.tool_calls or [] %}<tool_call>{{ call.function.name }}{{ call.function.arguments | tojson -}}
</tool_call>{% endfor %}<|im_end|>))
{%- else %}{{ m.content }}<|im_end|>{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

_TALK = [
    {"role": "user", "content": "What is 2 plus 3?"},
    {"role": "assistant", "content": "It is 5: ☃ hä! "},
    {"role": "user", "content": "And plus 4?"},
    {"role": "assistant", "content": "9"},
]
_SYSTEM: dict[str, Any] = {"role": "system", "content": "Be brief."}
_CALLS = {
    "messages": [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "a1", "type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}],
        },
        {"role": "tool", "content": '{"sky": "blue"}'},
        {"role": "assistant", "content": "Blue."},
    ],
    "tools": [
        {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {"at": "where"}}}
    ],
}


def _unmarked(template: str) -> str:
    return template.replace("((", "").replace("))", "")


def _marked(template: str) -> str:
    return template.replace("((", "{% generation %}").replace("))", "{% endgeneration %}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level vocabulary with the marks of all templates, as Hugging Face keeps one."""
    from tokenizers import Tokenizer as Theirs
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    made = Theirs(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(_MARKS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["What is 2 plus 3? It is 5.\n\nAnd plus 4? assistant user system model"] * 9, trainer)
    place = tmp_path_factory.mktemp("hf")
    made.save(str(place / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    return place


def _theirs(folder: Path, template: str, record: dict[str, Any]) -> tuple[list[int], list[int]]:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    found = tokenizer.apply_chat_template(
        record["messages"],
        tools=record.get("tools"),
        chat_template=template,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return found["input_ids"], found["assistant_masks"]


def _ours(folder: Path, template: str, *records: Any, ignored: tuple[str, ...] = ()) -> list[Any]:
    chat = TemplatedChat(Tokenizer(folder), ChatTemplate(template, "t.jinja"), ignored, datetime(2026, 11, 27))
    return list(chat.encode_records(records))


@pytest.mark.parametrize("marks", [True, False], ids=["marks", "prefixes"])
@pytest.mark.parametrize(
    ("template", "record"),
    [
        (_CHATML, {"messages": _TALK}),
        (_CHATML, {"messages": [_SYSTEM, *_TALK]}),
        (_HEADERS, {"messages": [_SYSTEM, *_TALK]}),
        (_TURNS, {"messages": _TALK}),
        (_TOOLS, _CALLS),
        (_TOOLS, {"messages": _TALK}),
    ],
    ids=["chatml", "chatml-system", "headers", "turns", "tools", "no-tools"],
)
def test_tokens_and_marks_are_those_of_transformers(folder: Path, template: str, record: Any, marks: bool) -> None:
    ((ids, found),) = _ours(folder, (_marked if marks else _unmarked)(template), record)
    expected, mask = _theirs(folder, _marked(template), record)
    assert ids == expected
    assert [mark & LEARNT for mark in found] == [LEARNT * counts for counts in mask]
    assert [mark & BEGINS for mark in found] == [BEGINS] + [0] * (len(found) - 1)


@pytest.mark.parametrize("make", [_marked, _unmarked])
def test_answers_without_weight_and_turns_behind_the_last_answer(folder: Path, make: Any) -> None:
    tokenizer = Tokenizer(folder)
    asked, first, again, last = _TALK
    shared = [{"from": "human", "value": asked["content"]}, {"from": "gpt", "value": "Five", "loss": False}]
    found = _ours(
        folder,
        make(_CHATML),
        {"messages": [asked, first | {"weight": 0}, again, last, asked]},
        {"conversations": [*shared, {"from": "gpt", "value": "6", "weight": 1}]},
        {"question": "x", "answer": " 7 ☃"},
        {"prompt": "as it", "completion": " stands"},
    )
    learnt = [tokenizer.decode([i for i, mark in zip(*one, strict=True) if mark & LEARNT]) for one in found]
    assert learnt == ["9", "6", " 7 ☃", " stands"]
    assert "Five" in tokenizer.decode(found[1][0])
    assert tokenizer.decode(found[0][0]).count("What is 2") == 1
    assert tokenizer.decode(found[3][0]) == "as it stands"


_ASKED = {"role": "user", "content": "x"}
_ANSWERED = {"role": "assistant", "content": "y"}
_CALL = {"function": {"name": "f", "arguments": {}}, "id": "7", "why": 1}


@pytest.mark.parametrize(
    ("template", "record", "reason"),
    [
        (_TURNS, {"messages": [_SYSTEM, _ASKED, _ANSWERED]}, "t.jinja does not take it: no system role here"),
        (_CHATML, {"messages": [_ANSWERED], "tools": [{"f": 1}]}, "the record has 'tools'.*--ignore-keys tools"),
        (_CHATML, {"messages": [_ASKED, _ANSWERED], "bos_token": "x"}, "the record has 'bos_token'"),
        (_CHATML, {"messages": [_ASKED, _ANSWERED | {"tool_calls": [{"a": 1}]}]}, "message 2.tool_calls is not read"),
        (_TOOLS, {"messages": [_ASKED, _ANSWERED | {"tool_calls": [_CALL]}]},
         r"message 2.tool_calls\[1\].why is not read by it.*--ignore-keys why"),
        (_CHATML, {"messages": [_ASKED | {"name": "Ann"}, _ANSWERED]}, "message 1.name is not read"),
        (_CHATML, {"messages": [_ASKED]}, "no answer to learn"),
        (_CHATML, {"messages": [_ASKED, _ANSWERED], "tools": "x"}, "'tools' is no array"),
        (_CHATML, {"messages": [_ASKED, _ANSWERED | {"weight": 2}]}, "'weight'=2; use"),
        (_CHATML, {"conversations": [{"from": "gpt", "value": "y", "content": "z"}]}, "has 'content' beside 'from'"),
        (_CHATML, {"messages": ["x"]}, "message 1 is no object with a 'role'"),
        ("{{ messages | length }}{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}",
         {"messages": [_ASKED, _ANSWERED, _ASKED, _ANSWERED]}, r"up to message 2 .* from character 0 .* generation"),
        (_CHATML, {"messages": [_ASKED | {"content": "\0"}, _ANSWERED]}, "a NUL character"),
        ("{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}",
         {"messages": [_ASKED | {"content": [{"type": "text", "text": "x"}]}, _ANSWERED]}, "a content is an array"),
        *(
            ("{% for m in messages %}{{ m.role }}{{ m.content" + end + " }}{% endfor %}",
             {"messages": [_ASKED, {"role": "assistant", "content": None, "tool_calls": [_CALL]}]}, "null as 'None'")
            for end in ("", " | trim")
        ),
        (_marked(_CHATML).replace("generation %}{{ m", "generation %}{% endgeneration %}{% generation %}{{ m"),
         {"messages": [_ASKED, _ANSWERED | {"loss": False}, _ASKED, _ANSWERED]}, "4 texts for 2 answers"),
        ("{% generation %}{% endgeneration %}" + _unmarked(_CHATML), {"messages": [_ANSWERED]}, "nothing stands"),
        ("{% for m in messages %}{{ m.role }}{% set x %}{% generation %} {{ m.content }}{% endgeneration %}{% endset %}"
         "{{ x | trim }}{% endfor %}", {"messages": [_ANSWERED]}, "generation marks in it"),
    ],
)  # fmt: skip
def test_what_a_template_does_not_take(folder: Path, template: str, record: Any, reason: str) -> None:
    if "generation %}" not in template:
        template = _unmarked(template)
    (refused,) = _ours(folder, template, record)
    assert isinstance(refused, UnusableRecord)
    with pytest.raises(UnusableRecord, match=reason):
        raise refused


def test_keys_that_are_ignored(folder: Path) -> None:
    given = {
        "messages": [_ASKED | {"name": "Ann"}, _ANSWERED | {"tool_calls": [_CALL], "x": None}],
        "id": 7,
        "tools": [],
    }
    found, expected = _ours(
        folder, _unmarked(_CHATML), given, {"question": "x", "answer": "y"}, ignored=("name", "tool_calls", "id")
    )
    assert found == expected
    odd = {"messages": [_ASKED, _ANSWERED | {"weight": 0.5}]}
    assert _ours(folder, _unmarked(_CHATML), odd, ignored=("weight",)) == [expected]
    pairs = {"prompt": "x", "completion": "y"}, {"prompt": "x", "completion": "y", "id": 7}
    found, expected = _ours(folder, _unmarked(_CHATML), *pairs, ignored=("id",))
    assert found == expected
    parts = {"messages": [_ASKED | {"content": [{"type": "text", "text": "x"}]}, _ANSWERED]}
    taking_apart = _unmarked(_CHATML).replace(
        "m.content +", "(m.content if m.content is string else m.content[0].text) +"
    )
    assert _ours(folder, taking_apart, parts) == _ours(folder, _unmarked(_CHATML), {"messages": [_ASKED, _ANSWERED]})
    ((within, _),) = _ours(folder, _unmarked(_TOOLS), given, ignored=("name", "why", "id"))
    assert "<tool_call>f{}" in "".join(Tokenizer(folder).id_to_token(token) for token in within)


def test_one_process_writes_thousands_and_a_template_that_runs_wild_costs_its_own_only(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[None] = []
    started = chat_template._started

    def start() -> Any:
        starts.append(None)
        return started()

    monkeypatch.setattr(chat_template, "_started", start)
    chat_template._process(os.getpid()).__init__()  # type: ignore[misc]
    wild = (
        "{% if messages[0].content == 'loop' %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
        "{% endfor %}{% elif messages[0].content == 'grow' %}{{ 'x' * 10 ** 10 }}{% endif %}" + _unmarked(_CHATML)
    )
    records: list[Any] = [{"question": f"{i} " * 40, "answer": str(i)} for i in range(1000)]
    records[7], records[9] = ({"question": word, "answer": "x"} for word in ("grow", "loop"))
    found = _ours(folder, wild, *records)
    assert [str(one) for one in found if isinstance(one, UnusableRecord)] == [
        "the chat template of t.jinja does not take it: it takes more than 384 MiB of memory",
        "the chat template of t.jinja does not take it: it takes more than 2 s of processor time",
    ]
    assert len(found) == 1000
    assert len(starts) == 2  # and one more behind the one that looped


def test_rows_by_the_template_beside_the_tokenizer(folder: Path, tmp_path: Path) -> None:
    (folder / "chat_template.jinja").write_text(_unmarked(_CHATML))
    (tmp_path / "in.jsonl").write_text(json.dumps({"messages": _TALK}) + "\n" + json.dumps(_CALLS) + "\n")
    try:
        with pytest.raises(UserError, match=r"in\.jsonl:2: the chat template of chat_template\.jinja does not take it"):
            prepare([tmp_path / "in.jsonl"], folder, tmp_path / "out", sequence_length=127)
        (tmp_path / "tools.jinja").write_text(_marked(_TOOLS) + "{% if no %}{{ strftime_now('%d') }}{% endif %}")
        with pytest.raises(UserError, match=r"--bos: the chat template of tools\.jinja says"):
            prepare(
                [tmp_path / "in.jsonl"], folder, tmp_path / "x", sequence_length=127, begin=True,
                chat_template=tmp_path / "tools.jinja",
            )  # fmt: skip
        for workers in (1, 2):
            report = prepare(
                [tmp_path / "in.jsonl"], folder, tmp_path / f"w{workers}", sequence_length=255, packing=False,
                workers=workers, chat_template=tmp_path / "tools.jinja",
            )  # fmt: skip
    finally:
        (folder / "chat_template.jinja").unlink()
    assert report.template is not None
    rows = documents_of(tmp_path / "w1")
    expected = [_theirs(folder, _marked(_TOOLS), record)[0] for record in ({"messages": _TALK}, _CALLS)]
    assert [row[: len(ids)] for row, ids in zip(rows, expected, strict=True)] == expected
    for name in (".bin", ".idx", "_marks.bin", "_marks.idx", "_rows.json"):
        assert (tmp_path / f"w1{name}").read_bytes() == (tmp_path / f"w2{name}").read_bytes()
    described = json.loads((tmp_path / "w1_rows.json").read_text())
    assert described["chat_template"]["name"] == "tools.jinja"
    assert described["chat_template"]["sha256"] == report.template.sha256
    assert described["chat_template"]["answers"] == "generation marks"
    assert described["chat_template"]["date"]
    assert described["conversations"] == 2


def test_a_sentencepiece_vocabulary_gives_the_same_learnt_texts(tmp_path: Path) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["What is 2 plus 3? It is 5.\n\nAnd plus 4? assistant user system"] * 20),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        control_symbols=["<|im_start|>", "<|im_end|>"],
        minloglevel=2,
        hard_vocab_limit=False,
    )
    tokenizer = Tokenizer(tmp_path / "tokenizer.model")
    ((ids, marks),) = _ours(tmp_path / "tokenizer.model", _unmarked(_CHATML), {"messages": _TALK})
    end = tokenizer.token_to_id("<|im_end|>")
    learnt = [token for token, mark in zip(ids, marks, strict=True) if mark & LEARNT]
    first = learnt[: learnt.index(end)]
    assert tokenizer.decode(first).strip() == "It is 5: ☃ hä!"
    assert learnt[len(first) :] == [end, *tokenizer.encode("\n9")[len(tokenizer.encode("\n")) :], end]
