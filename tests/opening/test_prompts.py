"""How a model is addressed: BOS, ends, chat templates. transformers' own tokenizer says what is right."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from vishwamai_mp.config import UserError
from vishwamai_mp.conversion.tokenizer_files import imported_files
from vishwamai_mp.data.tokenizer import companions
from vishwamai_mp.opening.prompts import PromptTokenizer

_TEXTS = ["[INST] The quick brown fox jumps over the lazy dog. [/INST] Once upon a time there was a house."] * 20
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}"
    "{% elif message.role == 'assistant' %}{{ ' ' + message.content + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
_MESSAGES = [
    {"role": "user", "content": "The fox"},
    {"role": "assistant", "content": "Once upon"},
    {"role": "user", "content": "the house."},
]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spm")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_TEXTS),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
        hard_vocab_limit=False,
    )
    return folder / "tokenizer.model"


@pytest.fixture
def folder(model_file: Path, tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.model").write_bytes(model_file.read_bytes())
    return tmp_path


def opened(folder: Path, settings: Any = None, template: str | None = None, **options: Any) -> PromptTokenizer:
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return PromptTokenizer(folder / "tokenizer.model", 10_000, **options)


@pytest.mark.parametrize(
    ("settings", "add_bos", "begins"),
    [
        (None, None, False),
        (None, True, True),
        ({"add_bos_token": True}, None, True),
        ({"add_bos_token": True}, False, False),
        ({"add_bos_token": False, "tokenizer_class": "LlamaTokenizer"}, None, False),
        ({"tokenizer_class": "LlamaTokenizerFast"}, None, True),  # as transformers' does by itself
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, None, False),
    ],
)
def test_bos(folder: Path, settings: Any, add_bos: bool | None, begins: bool) -> None:
    prompts = opened(folder, settings, add_bos=add_bos)
    plain = prompts.tokenizer.encode("The fox")
    assert prompts.encode("The fox") == ([1] if begins else []) + plain


def test_ends(folder: Path) -> None:
    assert opened(folder).end_tokens == (2,)
    other = PromptTokenizer(folder / "tokenizer.model", 10_000).tokenizer.tokens()[300]
    assert opened(folder, {"eos_token": {"content": other}}).end_tokens == (2, 300)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 301, 9999]}))
    assert opened(folder).end_tokens == (2, 300, 301)  # the settings stay; the tokenizer has no token 9999


@pytest.mark.parametrize("place", ["own file", "settings", "named", "by name"])
def test_chat_is_what_transformers_makes_of_it(folder: Path, place: str) -> None:
    from transformers import AutoTokenizer

    settings: dict[str, Any] = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "legacy": False,
    }
    if place == "settings":
        settings["chat_template"] = _TEMPLATE
    elif place == "named":
        settings["chat_template"] = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": _TEMPLATE}]
    elif place == "by name":
        settings["chat_template"] = {"tool_use": "x", "default": _TEMPLATE}
    prompts = opened(folder, settings, _TEMPLATE if place == "own file" else None)
    assert prompts.render(_MESSAGES) == "<s>[INST] The fox [/INST] Once upon</s>[INST] the house. [/INST]"
    theirs = AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(_MESSAGES, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert prompts.chat(_MESSAGES) == expected


def test_what_a_template_refuses_is_a_line(folder: Path) -> None:
    prompts = opened(folder, template=_TEMPLATE)
    with pytest.raises(UserError, match=r"messages: .*Only user and assistant roles are supported!"):
        prompts.chat([{"role": "tool", "content": "x"}])


def test_a_message_that_a_template_passes_over_is_refused(folder: Path) -> None:
    known = (
        "{% for m in messages %}{% if m.role in ('system', 'user') %}<{{ m.content | trim }}>"
        "{% elif m.role == 'tool' %}<{{ m.content | tojson }}>"
        "{% elif m.role == 'assistant' %}<{{ m.content.split('</think>')[-1] }}>{% endif %}{% endfor %}"
    )
    prompts = opened(folder, template=known)
    thought = {"role": "assistant", "content": "why</think>so"}
    question = {"role": "user", "content": " what\n "}
    assert prompts.render([{"role": "system", "content": "be"}, question, thought]) == "<be><what><so>"
    quoted = {"role": "tool", "content": 'a "name"'}
    assert prompts.render([question, quoted]) == r'<what><"a \"name\"">'  # as Llama 3.1 writes what a tool says
    with pytest.raises(UserError, match=r"messages\.1: the chat template .* leaves this message of role developer out"):
        prompts.chat([question, {"role": "developer", "content": "what"}])  # whose text another message has too


def test_without_a_template_chat_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"no chat template \(chat_template\.jinja or chat_template in"):
        opened(folder).chat(_MESSAGES)


def test_a_template_cannot_reach_out_of_its_sandbox(folder: Path) -> None:
    prompts = opened(folder, template="{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(UserError, match=r"messages: the chat template of chat_template\.jinja does not take them"):
        prompts.chat(_MESSAGES)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ '%9999999999d' % 1 }}", "MiB of memory"),
        ("{{ 'x'.center(10 ** 10) }}", "MiB of memory"),
        ("{{ '{:>9999999999}'.format(1) }}", "MiB of memory"),
        ("{{ messages | tojson(indent=10 ** 9) }}", "MiB of memory"),
        (
            "{% set a = namespace(b='x') %}{% for i in range(99) %}{% set a.b = a.b ~ a.b %}{% endfor %}",
            "MiB of memory",
        ),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "s of processor time"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "recursion"),
        ("{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}", "more than 16777216 characters"),
    ],
)
def test_a_template_cannot_fill_the_machine(folder: Path, template: str, message: str) -> None:
    with pytest.raises(UserError, match=f"chat_template.jinja does not take them .*{message}"):
        opened(folder, template=template).chat(_MESSAGES)
    assert opened(folder, template="{{ messages[0].content }}").render([{"content": "\ud800 ☃"}]) == "\ud800 ☃"


def test_a_template_that_writes_tokens_which_are_not_there_is_refused(folder: Path) -> None:
    settings = {"added_tokens_decoder": {"5000": {"content": "<|im_start|>"}}}
    prompts = opened(folder, settings, "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}")
    with pytest.raises(UserError, match=r"writes <\|im_start\|>, which the tokenizer .* lacks"):
        prompts.chat(_MESSAGES)


def test_a_token_that_only_other_files_name_is_lacking(folder: Path) -> None:
    (folder / "added_tokens.json").write_text('{"<|im_start|>": 5000}')
    with pytest.raises(UserError, match=r"writes <\|im_start\|>, which the tokenizer .* lacks"):
        opened(folder, {}, "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}").chat(_MESSAGES)
    _, note = imported_files(folder, opened(folder).tokenizer.vocab_size)
    assert "lacks tokens that files beside it add, and cuts them like any text: <|im_start|>" in str(note)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", "{", "tokenizer_config.json cannot be read"),
        ("tokenizer_config.json", "[]", "is no JSON object"),
        ("chat_template.jinja", "{% for %}", r"chat template of chat_template\.jinja is not valid"),
    ],
)
def test_damaged_files_are_named(folder: Path, file: str, content: str, message: str) -> None:
    (folder / file).write_text(content)
    with pytest.raises(UserError, match=message):
        opened(folder)


def test_sizes(folder: Path) -> None:
    size = opened(folder).tokenizer.vocab_size
    assert PromptTokenizer(folder / "tokenizer.model", size).notes == []
    assert "never generated" in PromptTokenizer(folder / "tokenizer.model", size + 1).notes[0]
    with pytest.raises(UserError, match=f"has {size} tokens, the model {size - 1}"):
        PromptTokenizer(folder / "tokenizer.model", size - 1)


def test_what_lies_beside_a_tokenizer(folder: Path) -> None:
    assert companions(folder / "tokenizer.model") == []
    opened(folder, {}, "x")
    assert [file.name for file in companions(folder / "tokenizer.model")] == [
        "tokenizer_config.json",
        "chat_template.jinja",
    ]


def test_it_goes_along_when_a_folder_is_imported(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    settings = {"add_bos_token": True}
    size = opened(folder, settings, "x").tokenizer.vocab_size
    run = tmp_path_factory.mktemp("run")
    files, note = imported_files(folder, size)
    assert note is None
    for file in files:
        shutil.copy(file, run / file.name)
    found = opened(run)
    assert found.template is not None
    assert (found.first, found.template.text) == ([1], "x")
