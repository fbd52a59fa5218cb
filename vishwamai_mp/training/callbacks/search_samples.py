"""Searches over a few prompts at each evaluation, so that one sees the model reason while it trains."""

from pathlib import Path
from typing import TYPE_CHECKING

from vishwamai_mp.config import ConfigError, PretrainConfig
from vishwamai_mp.config.files import write_whole
from vishwamai_mp.data.lines import text_lines
from vishwamai_mp.data.tokenizer import Tokenizer
from vishwamai_mp.diagnosis.shared import Phase
from vishwamai_mp.inference import Engine
from vishwamai_mp.observability.tree_page import to_html
from vishwamai_mp.observability.writers import TensorBoard
from vishwamai_mp.runtime.step_journal import phase
from vishwamai_mp.training.callbacks.base import Callback, Order
from vishwamai_mp.training.callbacks.metrics import Metrics
from vishwamai_mp.tree_of_thoughts import SearchResult, TreeOfThoughts, ending_of_thoughts
from vishwamai_mp.tree_of_thoughts.picture import to_text

if TYPE_CHECKING:
    from vishwamai_mp.training.loop import Trainer


class Search(Callback):
    """Adds `search_score`, `search_tokens` and, where answers are given, `search_solve_rate` to evaluated steps.

    Writes `search/step_00000100.html` to the run folder, and the first tree as text to TensorBoard.

    Args:
        prompts: lines of `tree.prompts`: a prompt, or a prompt, a tab and what a right answer contains.
        tokenizer: of the model.
    """

    order = Order.MEASURE

    def __init__(self, prompts: list[str], tokenizer: Tokenizer) -> None:
        pairs = [line.partition("\t") for line in prompts]
        self.prompts = [prompt for prompt, _, _ in pairs]
        self.answers = [answer for _, _, answer in pairs if answer]
        self.tokenizer = tokenizer
        if self.answers and len(self.answers) < len(pairs):
            raise ConfigError(
                "tree.prompts: some lines have an answer behind a tab and some have none; make them alike"
            )

    def on_train_begin(self, trainer: "Trainer") -> None:
        parallel = trainer.config.parallel
        if parallel.virtual_pipeline_model_parallel_size or parallel.context_parallel_size > 1:
            raise ConfigError(
                "tree.prompts cannot be searched in this layout (virtual pipeline stages or context parallelism);"
                " set tree.prompts=null"
            )

    def on_step_end(self, trainer: "Trainer", record: dict[str, float]) -> None:
        if "validation_loss" not in record:
            return
        with phase(Phase.EVALUATION):
            results = self._search(trainer)
        record["search_score"] = sum(result.nodes[result.best].score for result in results) / len(results)
        record["search_tokens"] = sum(result.generated_tokens for result in results)
        if self.answers:
            solved = [answer in result.answer_text for answer, result in zip(self.answers, results, strict=True)]
            record["search_solve_rate"] = sum(solved) / len(solved)
        if trainer.runtime.reports:
            self._write(trainer, results)

    def _search(self, trainer: "Trainer") -> list[SearchResult]:
        config = trainer.config
        tree, prompts = config.tree, [self.tokenizer.encode(prompt) for prompt in self.prompts]
        assert tree.branching is not None
        # A block of slack for each sequence; kept nodes and their children are in memory together.
        nodes = tree.beam_width * (tree.max_depth * tree.branching + 1)
        room = sum(len(prompt) + 32 + nodes * (tree.max_thought_tokens + 32) for prompt in prompts)
        model = trainer.chunks[0].module
        engine = Engine(config, trainer.runtime, getattr(model, "module", model), kv_tokens=room)
        ending = ending_of_thoughts(self.tokenizer, tree.stop)
        return TreeOfThoughts(engine, tree, decode=self.tokenizer.decode, **ending).search(prompts)

    def _write(self, trainer: "Trainer", results: list[SearchResult]) -> None:
        step = trainer.state.step
        folder = trainer.folder / "search"
        folder.mkdir(exist_ok=True)
        write_whole(folder / f"step_{step:08d}.html", to_html(results, f"Step {step}"))
        for callback in trainer.callbacks:
            for writer in callback.writers if isinstance(callback, Metrics) else []:
                if isinstance(writer, TensorBoard):
                    writer.write_text(step, "search", to_text(results[0]))


def search_callbacks(config: PretrainConfig, tokenizer: Tokenizer | None) -> list[Callback]:
    """A `Search` where the configuration asks for one.

    Raises:
        ConfigError: no tokenizer, or a file that cannot be read or is empty.
    """
    path = config.tree.prompts
    if not config.tree.enabled or path is None:
        return []
    if tokenizer is None:
        raise ConfigError("tree.prompts needs a tokenizer; set data.tokenizer")
    try:
        lines = [line for line in text_lines(Path(path)) if line.strip(" \t")]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"tree.prompts={path}: cannot be read ({error})") from None
    if len(lines) == 1 and "\r" in lines[0]:
        raise ConfigError(
            f"tree.prompts={path}: carriage returns alone end its lines; convert them, with tr '\\r' '\\n'"
        )
    if not lines:
        raise ConfigError(f"tree.prompts={path}: has no prompts; write one a line")
    return [Search(lines, tokenizer)]
