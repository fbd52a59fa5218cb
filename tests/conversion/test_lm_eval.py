"""EleutherAI's lm-evaluation-harness, where it is installed (`pip install lm-eval`), scores an export as we do."""

import json
from pathlib import Path

import pytest
import torch

from tests.conversion import models
from tests.workers import WorkerPool
from vishwamai_mp.data.tokenizer import Tokenizer
from vishwamai_mp.data.tokenizer_training import train_tokenizer

VOCAB = 400
DOCUMENTS = [
    {"question": f"{left} and {right} make", "choices": [f"{left + right}", f"{left * right + 1} things", "nothing"]}
    for left in range(2, 6)
    for right in range(3, 6)
]
TASK = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


@pytest.mark.parametrize("components", [[], [models.MEMORY, models.CACHE]], ids=["plain", "components"])
def test_the_harness_and_we_find_the_same_number(
    workers: WorkerPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, components: list[str]
) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    run = tmp_path / "run"
    workers.run(models.save_run, 1, run, [f"model.vocab_size={VOCAB}", *components])
    tokenizer = train_tokenizer([json.dumps(DOCUMENTS), Path(__file__).read_text()], VOCAB, run / "tokenizer")
    models.export(run, tmp_path / "hf", tokenizer=tokenizer.path)

    data, tasks = tmp_path / "sums.jsonl", tmp_path / "tasks"
    data.write_text("\n".join(json.dumps(document) for document in DOCUMENTS))
    tasks.mkdir()
    (tasks / "sums.yaml").write_text(TASK.replace("FILE", str(data)))
    model = HFLM(pretrained=str(tmp_path / "hf"), device="cpu", dtype="float32", trust_remote_code=True, batch_size=5)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = lm_eval.simple_evaluate(model, tasks=["sums"], task_manager=manager, log_samples=True, bootstrap_iters=0)

    theirs = [[float(choice[0][0]) for choice in sample["resps"]] for sample in found["samples"]["sums"]]
    (ours,) = workers.run(log_likelihoods, 1, run, tokenizer.path)
    torch.testing.assert_close(torch.tensor(theirs), torch.tensor(ours), atol=1e-4, rtol=0)
    right = [max(range(3), key=scores.__getitem__) == 0 for scores in ours]
    assert found["results"]["sums"]["acc,none"] == pytest.approx(sum(right) / len(right))


def log_likelihoods(run: Path, tokenizer_path: Path) -> list[list[float]]:
    """In one worker: log p(choice | question) of every choice of every document, by our model."""
    tokenizer = Tokenizer(tokenizer_path)
    found = []
    with models.loaded(run) as model:
        for document in DOCUMENTS:
            scores = []
            for choice in document["choices"]:
                start = len(tokenizer.encode(str(document["question"])))
                tokens = torch.tensor(tokenizer.encode(f"{document['question']} {choice}"))
                log_probs = model(tokens[None])[:-1, 0, :VOCAB].log_softmax(-1)
                scores.append(float(log_probs.gather(-1, tokens[1:, None])[start - 1 :].sum()))
            found.append(scores)
    return found
