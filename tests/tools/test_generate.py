"""`tools/generate.py` as a user runs it, on the checkpoint of a short training run."""

import contextlib
import io
import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest

from tests.programs import run_forked
from tests.synthetic import write_corpus
from tests.workers import WorkerPool
from vishwamai_mp.config import UserError
from vishwamai_mp.data.tokenizer import Tokenizer
from vishwamai_mp.data.tokenizer_training import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools/generate.py"
_VOCABULARY = 400
_MODEL = [
    "model.hidden_size=32",
    "model.num_layers=4",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
    "model.intermediate_size=64",
    f"model.vocab_size={_VOCABULARY}",
    "model.max_position_embeddings=64",
    "model.initializer_range=0.1",
    "training.sequence_length=32",
    "training.micro_batch_size=4",
    "training.global_batch_size=8",
    "training.max_steps=8",
    "training.evaluate_every=null",
    "schedule.warmup_steps=0",
    "checkpoint.save_every=null",
    "logging.progress_bar=false",
]
_TP2_PP2 = ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"]
_PROMPT = "def main("


def pretrain(arguments: list[str]) -> None:
    """Runs in the workers."""
    from vishwamai_mp.pretrain import main

    assert main(arguments) == 0


@pytest.fixture(scope="module")
def run_folder(workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of a model trained on this project's own sources, with its data and tokenizer taken away."""
    folder = tmp_path_factory.mktemp("generate")
    texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "vishwamai_mp/config").glob("*.py"))]
    tokenizer = train_tokenizer(texts, _VOCABULARY, folder / "spm")
    corpus = write_corpus(folder / "data/corpus", [[*tokenizer.encode(text), tokenizer.eod_id] for text in texts])
    data = [f"data.train={corpus}", f"data.tokenizer={folder / 'spm.model'}", f"training.output_dir={folder / 'run'}"]
    workers.run(pretrain, 2, ["--config", "tiny", "parallel.tensor_model_parallel_size=2", *_MODEL, *data])
    shutil.rmtree(folder / "data")
    (folder / "spm.model").unlink()
    return folder / "run"


def call(arguments: Sequence[object]) -> tuple[str, str]:
    """Runs in the workers: what the tool prints on this rank, to both streams; its UserError goes on."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", [str(TOOL), *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        assert runpy.run_path(str(TOOL))["main"]() == 0
    return out.getvalue(), err.getvalue()


def on(workers: WorkerPool, processes: int, *arguments: object) -> str:
    """What the first of `processes` ranks prints; the others print nothing."""
    first, *others = workers.run(call, processes, arguments)
    assert not any(out for out, _ in others)
    return first[0]


def run_tool(*arguments: object, launcher: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    return run_forked([*launcher, TOOL, *arguments])


def test_greedy_text_is_the_same_from_the_command_line_and_under_torchrun(run_folder: Path) -> None:
    """In two processes, a stage each; the model was trained at TP2."""
    alone = run_tool("--load", run_folder, "--prompt", _PROMPT, "--max-new-tokens", 12)
    assert alone.returncode == 0, alone.stderr
    assert alone.stdout.startswith(_PROMPT)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = ["parallel.tensor_model_parallel_size=1", "parallel.pipeline_model_parallel_size=2"]
    together = run_tool("--load", run_folder, "--prompt", _PROMPT, "--max-new-tokens", 12, *two, launcher=torchrun)
    assert together.returncode == 0, together.stderr
    assert together.stdout == alone.stdout


def test_json_tells_the_tokens(workers: WorkerPool, run_folder: Path) -> None:
    options = ["--load", run_folder, "--prompt", _PROMPT, "--prompt", "import", "--max-new-tokens", 7, "--json"]
    lines = [json.loads(line) for line in on(workers, 1, *options).splitlines()]
    tokenizer = Tokenizer(run_folder / "tokenizer.model")
    assert [line["prompt"] for line in lines] == [_PROMPT, "import"]
    for line in lines:
        assert 0 < len(line["new_tokens"]) <= 7
        assert line["text"] == tokenizer.decode(tokenizer.encode(line["prompt"]) + line["new_tokens"])
    assert on(workers, 4, *options, *_TP2_PP2) == on(workers, 1, *options)


def test_sampling_is_the_same_at_every_layout_and_another_for_each_seed(workers: WorkerPool, run_folder: Path) -> None:
    options = ["--load", run_folder, "--prompt", _PROMPT, "--strategy", "sample", "--top-k", 50, "--temperature", 0.9]
    alone = on(workers, 1, *options)
    assert on(workers, 4, *options, *_TP2_PP2) == alone
    assert on(workers, 1, *options, "--seed", 1) != alone
    assert on(workers, 1, *options[:4]) != alone


def test_beams_write_likelier_text_than_greedy(workers: WorkerPool, run_folder: Path) -> None:
    options = ["--load", run_folder, "--prompt", _PROMPT, "--max-new-tokens", 8, "--json"]
    greedy = json.loads(on(workers, 1, *options))
    beams = json.loads(on(workers, 1, *options, "--strategy", "beam", "--num-beams", 3))
    assert beams["score"] * 8 >= sum(greedy["log_probs"]) - 1e-3
    assert [other["score"] for other in beams["others"]] == sorted(
        (other["score"] for other in beams["others"]), reverse=True
    )
    assert on(workers, 4, *options, "--strategy", "beam", "--num-beams", 3, *_TP2_PP2) == json.dumps(beams) + "\n"


def test_a_tree_is_the_same_at_every_layout_and_has_a_picture(
    workers: WorkerPool, run_folder: Path, tmp_path: Path
) -> None:
    """The model has no value head, which is said, once; `stop` is no token of this vocabulary."""
    picture = tmp_path / "tree.html"
    options = ["--load", run_folder, "--prompt", _PROMPT, "--prompt", "import", "--strategy", "tree", "--json"]
    options += ["tree.max_thought_tokens=5", "tree.stop=t(", "--html", picture]
    ((alone, said),) = workers.run(call, 1, options)
    assert "the model has no value head" in said
    trees = [json.loads(line) for line in alone.splitlines()]
    for each in trees:
        assert each["tree"]["answer_tokens"] == len(each["new_tokens"])
        assert each["text"].startswith(each["prompt"])
        assert max(node["depth"] for node in each["tree"]["nodes"]) == 3
    assert picture.read_text(encoding="utf-8").count("<svg") == 2
    assert on(workers, 4, *options, *_TP2_PP2) == alone
    assert on(workers, 1, *options, "--seed", 5) != alone


def test_guesses_leave_the_text_alone_and_are_counted(workers: WorkerPool, run_folder: Path) -> None:
    options = ["--load", run_folder, "--prompt", "if x: if x: if x:", "--strategy", "sample", "--temperature", 0.1]
    plain = json.loads(on(workers, 1, *options, "--json"))
    ((out, said),) = workers.run(call, 1, [*options, "--speculate", 4])
    assert out == plain["text"] + "\n"
    done = json.loads(on(workers, 4, *options, "--speculate", 4, "--json", *_TP2_PP2))
    assert done["new_tokens"] == plain["new_tokens"]
    assert 0 < done["accepted"] <= done["guessed"]
    assert done["passes"] + done["accepted"] == len(done["new_tokens"]) + (done["finish"] == "stop")
    assert f"of {done['guessed']} guessed tokens {done['accepted']} were right" in said


@pytest.fixture(scope="module")
def draft_folder(workers: WorkerPool, run_folder: Path) -> Path:
    """A run folder of a smaller model with the same tokenizer, hardly trained."""
    folder = run_folder.with_name("draft")
    texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "vishwamai_mp/config").glob("*.py"))[:3]]
    tokenizer = Tokenizer(run_folder / "tokenizer.model")
    corpus = write_corpus(folder / "data/corpus", [[*tokenizer.encode(text), tokenizer.eod_id] for text in texts])
    data = [f"data.train={corpus}", f"data.tokenizer={tokenizer.path}", f"training.output_dir={folder / 'run'}"]
    workers.run(pretrain, 1, ["--config", "tiny", *_MODEL, "model.num_layers=1", "training.max_steps=1", *data])
    return folder / "run"


def test_a_draft_model_leaves_the_text_alone(workers: WorkerPool, run_folder: Path, draft_folder: Path) -> None:
    options = ["--load", run_folder, "--prompt", _PROMPT, "--strategy", "sample", "--temperature", 0.3, "--json"]
    plain = json.loads(on(workers, 1, *options))
    guessing = [*options, "--speculate", 4, "--draft-model"]
    for processes, draft, layout in ((1, draft_folder, []), (4, run_folder, _TP2_PP2)):
        done = json.loads(on(workers, processes, *guessing, draft, *layout))
        assert done["new_tokens"] == plain["new_tokens"]
        assert done["guessed"] > 0
        assert done["passes"] + done["accepted"] == len(done["new_tokens"]) + (done["finish"] == "stop")
    assert done["accepted"] > done["passes"]  # a model guesses its own text
    layers = r"the draft model .*draft/run cannot be laid out as the model is: .*model.num_layers"
    with pytest.raises(UserError, match=layers):
        on(workers, 4, *guessing, draft_folder, *_TP2_PP2)


def test_a_draft_model_of_another_tokenizer_is_refused(
    workers: WorkerPool, run_folder: Path, draft_folder: Path, tmp_path: Path
) -> None:
    options = ["--load", run_folder, "--prompt", _PROMPT, "--speculate", 4, "--draft-model"]
    texts = {
        400: "a wholly other text, of many words that stand nowhere else in what was read before. ",
        364: "a text ",
    }
    for size, message in ((400, r"token \d+ is .* instead of "), (364, "364 tokens instead of 400")):
        other = Path(shutil.copytree(draft_folder, tmp_path / str(size)))
        train_tokenizer([texts[size] * 50], size, tmp_path / f"spm{size}")
        shutil.copy(tmp_path / f"spm{size}.model", other / "tokenizer.model")
        with pytest.raises(UserError, match=rf"draft model's tokenizer .* is not the model's .*: {message}"):
            on(workers, 1, *options, other)


def test_weights_are_rounded_when_that_is_asked_for(workers: WorkerPool, run_folder: Path) -> None:
    options = ["--load", run_folder, "--prompt", _PROMPT, "--max-new-tokens", 6, "--json", "precision=bf16"]
    exact, rounded = (json.loads(on(workers, 1, *options, *more)) for more in ([], ["--weights", "int8"]))
    assert rounded["log_probs"] != exact["log_probs"]  # those are rounded to bf16 as well: not each need differ
    assert abs(rounded["log_probs"][0] - exact["log_probs"][0]) < 0.5
    assert len(json.loads(on(workers, 4, *options, "--weights", "int4", *_TP2_PP2))["new_tokens"]) == 6


@pytest.mark.parametrize("part", ["checkpoints", "checkpoints/step_00000008"])
def test_load_takes_a_folder_of_checkpoints_and_one_checkpoint(
    workers: WorkerPool, run_folder: Path, part: str
) -> None:
    options = ["--prompt", _PROMPT, "--max-new-tokens", 3]
    assert on(workers, 1, "--load", run_folder / part, *options) == on(workers, 1, "--load", run_folder, *options)


def test_a_broken_newer_checkpoint_is_mentioned(
    workers: WorkerPool, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a relative path does."""
    other = Path(shutil.copytree(run_folder, tmp_path / "run"))
    whole = other / "checkpoints/step_00000008"
    broken = Path(shutil.copytree(whole, other / "checkpoints/step_00000009"))
    missing = min(path.name for path in broken.glob("*.distcp"))
    (broken / missing).unlink()
    monkeypatch.chdir(whole.parent)
    options = ["--prompt", _PROMPT, "--max-new-tokens", 3]
    (out, err), (_, err_of_other) = workers.run(call, 2, ["--load", other, *options, _TP2_PP2[0]])
    lines = [line for line in err.splitlines() if "skipped" in line]
    assert lines == [f"step_00000009 skipped: {missing} is missing; taking step_00000008"]
    assert "skipped" not in err_of_other
    assert on(workers, 1, "--load", whole.name, *options) == out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strategy", "beam", "--num-beams", "0"], "num_beams=0: use 1 or more"),
        (["--strategy", "beam", "--top-k", "3"], "--top-k has no effect on --strategy beam; it is for sample"),
        (["--strategy", "tree", "--num-beams", "3"], "--num-beams has no effect on --strategy tree; it is for beam"),
        (["--strategy", "tree", "tree.beam_width=0"], "tree.beam_width"),
        (["--strategy", "tree", "tree.pruning_threshold=2"], "tree.pruning_threshold=2.0: a share of the best"),
        (["--strategy", "tree", "--temperature", "-1"], "--temperature -1.0: use a number above 0"),
        (["--strategy", "tree", "--max-tokens", "0"], "max_tokens=0: use a positive number"),
        (["--strategy", "tree", "--max-new-tokens", "9"], "--max-new-tokens has no effect on --strategy tree"),
        (["--strategy", "sample", "--top-p", "0"], "top_p=0.0: use a number above 0 up to 1"),
        (
            ["--strategy", "sample", "--temperature", "0"],
            "--temperature 0.0: use a number above 0, or --strategy greedy",
        ),
        (["--strategy", "sample", "--temperature", "nan"], "--temperature nan: use a number above 0"),
        (["--strategy", "sample", "--top-k", "0"], "top_k=0: use 1 or more"),
        (["--weights", "int8"], "weights=int8 multiplies in bf16, and the model computes in fp32; add precision=bf16"),
        (["--strategy", "tree", "--speculate", "3"], "--speculate has no effect on --strategy tree; it is for greedy"),
        (["--draft-model", "x"], "--draft-model guesses up to --speculate N tokens at a time; add it"),
        (["--draft-model", "nowhere", "--speculate", "2"], "nowhere"),
        (["--strategy", "beam", "--draft-model", "x"], "--draft-model has no effect on --strategy beam"),
        (["--speculate", "-1"], "speculate=-1: use 0 (no guesses) or more"),
        (["--top-k", "3"], "--top-k has no effect on --strategy greedy"),
        (["tree.max_depth=2"], "tree.max_depth=2 has no effect on --strategy greedy; it is for tree"),
        (["--temperature", "0.7"], "--temperature has no effect on --strategy greedy"),
        (["--max-new-tokens", "0"], "max_new_tokens=0"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "x = 1\n" * 40], "the model's context 64 (model.max_position_embeddings); shorten the prompt"),
        (["parallel.context_parallel_size=2"], "parallel.context_parallel_size has no use in generation"),
        (["parallel.sequence_parallel=true"], "parallel.sequence_parallel has no use in generation"),
        (["parallel.tensor_model_parallel_size=2"], "1 process cannot hold tensor 2"),
        (["parallel.tensor_paralel_size=2"], "unknown key 'parallel.tensor_paralel_size'"),
    ],
)
def test_mistakes_are_told_in_one_line(workers: WorkerPool, run_folder: Path, arguments: list, message: str) -> None:
    given = arguments if "--prompt" in arguments else ["--prompt", _PROMPT, *arguments]
    with pytest.raises(UserError) as error:
        on(workers, 1, "--load", run_folder, *given)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_program_prints_that_line_and_fails(tmp_path: Path) -> None:
    done = run_tool("--load", tmp_path, "--prompt", _PROMPT)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert str(tmp_path) in line


def test_another_tokenizer_is_refused(workers: WorkerPool, run_folder: Path, tmp_path: Path) -> None:
    """One of more tokens than the model has; of one with fewer, what is beyond is never generated, and that is said."""
    other = Path(shutil.copytree(run_folder, tmp_path / "run"))
    text = "another text entirely, with many different words in it so that a vocabulary can be larger than before. "
    larger = train_tokenizer([text * 50], 410, tmp_path / "larger")
    smaller = train_tokenizer(["a text " * 50], 364, tmp_path / "smaller")
    assert larger.vocab_size > _VOCABULARY
    options = ["--load", other, "--prompt", "a text", "--json"]
    with pytest.raises(UserError, match=r"larger\.model has 410 tokens, the model 400"):
        on(workers, 1, *options, f"data.tokenizer={larger.path}")
    ((out, said),) = workers.run(call, 1, [*options, "--strategy", "sample", f"data.tokenizer={smaller.path}"])
    assert "has 364 tokens, the model 400: those beyond are never generated" in said
    assert max(json.loads(out)["new_tokens"]) < smaller.vocab_size
    (other / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"no tokenizer file .*spm\.model"):
        on(workers, 1, "--load", other, "--prompt", _PROMPT)
    (other / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"config\.yaml is missing"):
        on(workers, 1, "--load", other, "--prompt", _PROMPT)


def test_every_strategy_gives_the_text_behind_the_prompt(workers: WorkerPool, run_folder: Path) -> None:
    """Also where a stop text ends it, and where the answer begins with that."""
    tokenizer = Tokenizer(run_folder / "tokenizer.model")
    base = ["--load", run_folder, "--prompt", _PROMPT, "--json"]
    plain = json.loads(on(workers, 1, *base, "--max-new-tokens", 12))
    added = plain["text"].removeprefix(_PROMPT)
    for stop in (added[:1], added[2:4]):
        done = json.loads(on(workers, 1, *base, "--max-new-tokens", 12, "--stop", stop))
        assert done["finish"] == "stop"
        assert done["text"] == _PROMPT + added[: added.index(stop)]
    for options in (["beam", "--max-new-tokens", 6], ["tree", "tree.max_thought_tokens=4", "tree.max_depth=2"]):
        done = json.loads(on(workers, 1, *base, "--strategy", *options))
        assert done["text"] == tokenizer.decode(tokenizer.encode(_PROMPT) + done["new_tokens"])


def test_prompts_begin_with_bos_where_that_is_asked_for(workers: WorkerPool, run_folder: Path, tmp_path: Path) -> None:
    """By the option, or by tokenizer_config.json beside the tokenizer; the option is the stronger."""
    tokenizer = Tokenizer(run_folder / "tokenizer.model")
    other = Path(shutil.copytree(run_folder, tmp_path / "run"))
    (other / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    base = ["--prompt", _PROMPT, "--strategy", "tree", "--json", "tree.max_thought_tokens=2", "tree.max_depth=1"]

    def root(*options: object) -> list[int]:
        return json.loads(on(workers, 1, *base, *options))["tree"]["nodes"][0]["tokens"]

    plain = tokenizer.encode(_PROMPT)
    assert root("--load", run_folder) == root("--load", other, "--no-bos") == plain
    assert root("--load", run_folder, "--bos") == root("--load", other) == [tokenizer.bos_id, *plain]
