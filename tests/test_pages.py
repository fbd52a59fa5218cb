"""What people look at, in a real browser: the run report, TensorBoard and the picture of a search.

The page of the server is tested beside it, tests/serving/test_server.py.
"""

import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import Browser, browser_window
from tests.observability.run_folders import make_run
from tests.synthetic import write_corpus
from tests.workers import WorkerPool
from vishwamai_mp.data.tokenizer_training import train_tokenizer

_ROOT = Path(__file__).resolve().parent.parent
# Texts of a chart that lie on each other.
_OVERLAPS = """
const found = [];
for (const svg of document.querySelectorAll('svg')) {
  const texts = [...svg.querySelectorAll('text')].map(text => [text.textContent, text.getBoundingClientRect()])
    .filter(([, box]) => box.width);
  for (const [i, [a, p]] of texts.entries()) for (const [b, q] of texts.slice(i + 1))
    if (p.left < q.right && q.left < p.right && p.top < q.bottom - 2 && q.top < p.bottom - 2) found.push(`${a} | ${b}`);
}
return found;
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browser_window() as window:
        yield window


def pretrain(arguments: list[str]) -> None:
    """Runs in the workers."""
    from vishwamai_mp.pretrain import main

    assert main(arguments) == 0


@pytest.fixture(scope="module")
def run_folder(browser: Browser, workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a real run with memory, cache and value head. Asks for the browser first: without one, nothing is trained."""
    folder = tmp_path_factory.mktemp("pages")
    texts = [path.read_text(encoding="utf-8") for path in sorted((_ROOT / "vishwamai_mp/config").glob("*.py"))]
    tokenizer = train_tokenizer(texts, 400, folder / "spm")
    corpus = write_corpus(folder / "corpus", [[*tokenizer.encode(text), tokenizer.eod_id] for text in texts])
    settings = {
        "model": "hidden_size=32 num_layers=2 num_attention_heads=4 num_key_value_heads=2 intermediate_size=64"
        " vocab_size=400 max_position_embeddings=64",
        "memory": "enabled=true memory_size=32 head_dim=16 layers=[0]",
        "cache": "enabled=true num_heads=2 segment_length=8 latents_per_segment=2 layers=[1]",
        "tree": "enabled=true max_thought_tokens=6 beam_width=3 max_depth=2",
        "training": "sequence_length=32 micro_batch_size=4 global_batch_size=8 max_steps=6 evaluate_every=2"
        f" evaluate_batches=1 output_dir={folder / 'run'}",
        "data": f"train={corpus} tokenizer={folder / 'spm.model'} split=80,20,0",
        "logging": "log_every=1 progress_bar=false hardware_peak_tflops=1",
        "schedule": "warmup_steps=0",
    }
    overrides = [f"{section}.{pair}" for section, text in settings.items() for pair in text.split()]
    workers.run(pretrain, 1, ["--config", "tiny", "precision=fp32", *overrides])
    return folder / "run"


def run_tool(name: str, *arguments: object) -> None:
    command = [sys.executable, str(_ROOT / "tools" / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def background(browser: Browser) -> str:
    return browser.run("return getComputedStyle(document.body).backgroundColor")


def fits(browser: Browser) -> bool:
    """Whether nothing is wider than the window."""
    return browser.run("return document.documentElement.scrollWidth <= innerWidth")


def test_the_report(browser: Browser, run_folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    run_tool("report.py", run_folder, make_run(tmp_path / "other", 200), "--output", page)
    browser.resize(1280)
    browser.prefer("light")
    browser.open(page.as_uri())
    light = background(browser)
    charts = browser.count("figure.chart")
    assert charts > 20
    drawn = browser.run(
        "return [...document.querySelectorAll('figure.chart')].filter(f => [...f.querySelectorAll('[data-line]')]"
        ".some(p => p.getBBox().width > 50)).length"
    )
    assert drawn >= charts - 2  # every chart shows a curve, but one of two points in so short a run may not
    assert fits(browser)
    assert browser.run(_OVERLAPS) == []

    # Choices: style sheets show other variants of the same charts.
    across = "return [...document.querySelectorAll('figure.chart')[0].querySelectorAll('.tick:not([class*=y-]) text')]"
    across += ".filter(t => t.getBoundingClientRect().width).map(t => t.textContent)"
    assert browser.run(across)[-1] == "200"
    browser.click("#across-tokens")
    assert browser.run(across)[-1] == "100k"
    up = across.replace(":not([class*=y-])", "[class*=y-]").replace("t.textContent", "t.getAttribute('y')")
    linear = browser.run(up)
    browser.click("#up-log")
    assert browser.run(up) != linear
    assert browser.run(_OVERLAPS) == []
    smooth = "return [...document.querySelectorAll('.smooth')].filter(p => p.getBoundingClientRect().width).length"
    assert browser.run(smooth) > 0
    browser.click("#smoothed")
    assert browser.run(smooth) == 0

    browser.hover("figure.chart svg", 0.9, 0.5)
    tip = browser.text("#tip")
    assert "other: 2" in tip
    assert "tokens" in tip
    assert "step 6, 1,536 tokens" in tip  # the shorter run's last

    browser.prefer("dark")
    assert background(browser) != light
    browser.resize(480)
    assert fits(browser)
    assert browser.complaints() == []


def test_tensorboard(browser: Browser, run_folder: Path) -> None:
    from tensorboard import program

    board = program.TensorBoard()
    board.configure(argv=["tensorboard", f"--logdir={run_folder}", "--port=0", "--load_fast=false"])
    address = board.launch()
    with urllib.request.urlopen(f"{address}data/plugin/scalars/tags", timeout=30) as answer:
        assert b"memory_surprise_1" in answer.read()
    browser.resize(1280)
    browser.open(f"{address}#timeseries")
    browser.wait(lambda: "cache_entropy" in browser.text("body"))
    assert "value_loss" in browser.text("body")
    browser.wait(lambda: browser.count("line-chart"))
    browser.open("about:blank")
    browser.open(f"{address}#custom_scalars")
    # Its elements are within shadow roots, which selectors do not see into.
    everything = (
        "const walk = n => [...n.children].map(c => walk(c) + (c.shadowRoot ? walk(c.shadowRoot) : '')).join('') +"
        " (n.children.length ? '' : n.textContent + ' '); return walk(document.body)"
    )
    browser.wait(lambda: "Retention per token" in browser.run(everything))


def test_the_picture_of_a_search(browser: Browser, run_folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "tree.html"
    run_tool("generate.py", "--load", run_folder, "--prompt", "def f(", "--strategy", "tree", "--html", page)
    browser.resize(1280)
    browser.open(page.as_uri())
    nodes = browser.count(".node")
    assert nodes > 6
    assert browser.count(".node.best") == 3
    assert browser.run(_OVERLAPS) == []
    browser.hover(".node.best ~ .node.best rect")
    tip = browser.text("#tip")
    assert "mean log-probability" in tip
    assert browser.run("return document.getElementById('tip').style.opacity") == "1"  # it fades in
    browser.resize(480)
    assert fits(browser)  # a wide tree scrolls within its frame
    assert browser.complaints() == []
