"""The report: complete, alone, honest about what it leaves out."""

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.observability.run_folders import CONFIG, make_run
from vishwamai_mp.observability.report import render_report, unique_names
from vishwamai_mp.observability.run_folder import read_run


def titles(page: str) -> list[str]:
    return re.findall(r"<figcaption><b>(.*?)</b>", page)


def report(*folders: Path) -> str:
    return render_report([read_run(folder) for folder in folders])


def test_one_run(tmp_path):
    page = report(make_run(tmp_path / "run"))
    assert titles(page) == [
        *("Loss, nats per token", "Auxiliary losses, weighted", "Learning rate", "Gradient norm before clipping"),
        *("Tokens per second", "MFU, share of the hardware&#x27;s peak", "Peak memory of the fullest process, GiB"),
        *("Surprise ‖u‖²", "Retention per token", "Write gate", "Read gate"),
        *("Entropy of a token&#x27;s reading, nats", "Share of reading that goes to the null slot"),
        *("Importance of latents", "Fill, share of the capacity", "Evicted segments per head and row"),
        *("Cross-entropy, nats", "Calibration: mean value − mean target", "AUC"),
    ]  # no step was skipped
    for label in ("training", "validation", "memory_mix", "value", "level 1", "level 3", "mean", "spread"):
        assert f">{label}</span>" in page
    spread = re.search(r'"label":"spread".*?"values":\[([\d.]+)', page)
    assert spread
    assert float(spread[1]) == pytest.approx(0.2)  # √(0.29 − 0.5²)
    assert "<td>60 of 100</td>" in page
    assert "<td>9,000</td><td>25.0%</td><td>1.50</td><td>0</td>" in page
    assert "pretrain.py --config &#39;a b&#39;" in page
    assert not re.search(r"(?:src|href)\s*=|url\(|@import|https?:", page.replace("http://www.w3.org", ""))
    assert page == report(tmp_path / "run")


def test_several_runs_have_a_chart_for_each_metric_and_their_differences(tmp_path):
    other = {**CONFIG, "training": {"max_steps": 100, "seed": 2, "new": None}}
    folders = [
        make_run(tmp_path / "a"),
        make_run(tmp_path / "b", 200, every=7, config=other),
        make_run(tmp_path / "c", 1),
    ]
    page = report(*folders)
    assert "Surprise ‖u‖²: level 2" in titles(page)
    assert "Loss, nats per token: validation" in titles(page)
    rows = re.findall(r"<tr><td>training\.(\w+)</td><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td></tr>", page)
    assert rows == [("seed", "1", "2", "1"), ("new", "–", "null", "–")]
    assert page.count("</figure>") == len(titles(page)) > 20


def test_names_are_as_long_as_it_takes(tmp_path):
    runs = [read_run(make_run(tmp_path / name)) for name in ("x/run", "y/run", "z/other")]
    assert unique_names(runs) == ["x/run", "y/run", "z/other"]
    assert unique_names(runs[1:]) == ["run", "other"]


def test_a_hundred_thousand_steps_take_a_bounded_page_that_says_so(tmp_path):
    folder = make_run(tmp_path / "long", 1)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, 100_001):
            loss = "null" if 500 < step < 600 else 77.125 if step == 54321 else 1 + step % 977 / 977
            file.write(f'{{"step": {step}, "consumed_tokens": {step * 8}, "lm_loss": {loss}, "grad_norm": {step}}}\n')
    page = report(folder)
    assert len(page) < 200_000
    assert "Up to 100,000 logged steps. Curves are thinned: of each of 180 stretches" in page
    assert "77.125" in page
    numbers = [json.loads(text) for text in re.findall(r'<script type="application/json">(.*?)</script>', page)]
    assert all(len(line["values"]) <= 900 for chart in numbers for line in chart)


def test_metrics_that_are_new_are_shown_and_those_without_a_number_are_not(tmp_path):
    folder = make_run(tmp_path / "run", 1)
    row = {"step": 1, "lm_loss": None, "mfu": None, "my_metric": 3.0, "</script>": 1.0}
    (folder / "metrics.jsonl").write_text(json.dumps(row | {f"x{i}": 1 for i in range(50)}) + "\n")
    page = report(folder)
    assert titles(page)[:2] == ["my_metric", "&lt;/script&gt;"]
    assert len(titles(page)) == 40
    assert "and 12 more, not shown" in page
    assert "not finite" in page  # the loss in the table
    assert page.count("</script>") == len(titles(page)) + 1


def test_fp8_shows_the_worst_layer(tmp_path):
    folder = make_run(tmp_path / "run", 2)
    rows = [
        {
            "step": step,
            "layers.0.a/gradient/underflow": 0.1 * step,
            "layers.1.a/gradient/underflow": 0.3,
            "l/input/amax": 4,
        }
        for step in (1, 5)
    ]
    (folder / "fp8.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = report(folder)
    assert titles(page)[-2:] == ["Underflow, worst layer", "Greatest amax"]
    assert '"steps":[1,5],"tokens":[512,1024],"values":[0.3,0.5]' in page


def test_what_could_not_be_read_is_said(tmp_path):
    folder = make_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "lm_')
    (folder / "profile").mkdir()
    (folder / "profile/steps.txt").write_text("aten::mm <b>" * 5000)
    page = report(folder)
    assert '<p class="wrong">metrics.jsonl: left out 1 of its lines' in page
    assert "aten::mm &lt;b&gt;" in page
    assert len(page) < 400_000
    shutil.rmtree(folder / "profile")
    assert "<summary>steps.txt" not in report(folder)


def test_nothing_a_folder_holds_is_markup(tmp_path):
    mark = "<i>&\"'"
    folder = make_run(tmp_path / "<i>&'", config={**CONFIG, mark: {"a": mark}})
    environment = json.loads((folder / "environment.json").read_text())
    (folder / "environment.json").write_text(json.dumps(environment | {"command": ["x", mark], mark: mark}))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "lm_loss": 1.0, mark: 2.0}) + "\n")
    (folder / "profile").mkdir()
    (folder / f"profile/{mark}.txt").write_text(mark)
    page = report(folder, make_run(tmp_path / "other"))
    assert "<i>" not in page
    assert "&<" not in page
    assert page.count("&lt;i&gt;&amp;") > 10
