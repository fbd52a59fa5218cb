"""Latent deliberation: one pass over all branches is the model run on each by itself."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.model.builds import build

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "ablations"))

from deliberator import Deliberator, PauseTokens, deliberate, lay_out

TOKENS, LATENTS, AHEAD = 20, 3, 4
POSITIONS = torch.tensor([2, 9, 10, 15])


class Given(nn.Module):
    """Latents that are as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(len(POSITIONS), LATENTS, 2, 32))

    def forward(self, hidden_TBD: Tensor, positions: Tensor) -> Tensor:
        return self.latents


def both_ways(window: int | None) -> tuple[Tensor, Tensor, bool]:
    """Logits of all branches at once and one by one, and whether only the latents have gradients."""
    _, _, (model,) = build()
    model.requires_grad_(False)
    thinker = Given()
    tokens = torch.arange(2 * TOKENS).view(2, TOKENS)
    at_once = deliberate(model, thinker, tokens, POSITIONS, AHEAD, window)
    at_once.sum().backward()
    assert thinker.latents.grad is not None
    trained = thinker.latents.grad.abs().min() > 0 and all(p.grad is None for p in model.parameters())
    alone = []
    embedded = model.embed(tokens)
    for i, p in enumerate(POSITIONS.tolist()):
        row = torch.cat((embedded[: p + 1], thinker.latents[i], embedded[p + 1 : p + AHEAD]))
        place = torch.arange(len(row))
        distance = place[:, None] - place
        allowed = (distance >= 0) & (distance < (window or TOKENS + LATENTS))
        out = model.decoder(row, allowed[None, None], rotary_pos_emb=model.rotary(place, TOKENS))
        alone.append(model.output_layer(out[-AHEAD:])[0])
    return at_once.detach(), torch.stack(alone).detach(), bool(trained)


@pytest.mark.parametrize("window", [None, 6])
def test_branches_at_once_are_branches_alone(workers, window):
    at_once, alone, trained = workers.run(both_ways, 1, window)[0]
    assert at_once.shape == (len(POSITIONS), AHEAD, 2, 256)
    torch.testing.assert_close(at_once, alone, rtol=0, atol=1e-5)
    assert trained


def test_targets_follow_the_positions():
    layout = lay_out(TOKENS, POSITIONS, LATENTS, AHEAD)
    assert layout.targets.tolist() == [[p + 1 + i for i in range(AHEAD)] for p in POSITIONS.tolist()]
    assert torch.equal(layout.copied, layout.targets[:, :-1])


def test_a_deliberator_sees_no_later_token():
    thinker = Deliberator(32, LATENTS).double()
    hidden = torch.randn(TOKENS, 2, 32, dtype=torch.float64)
    before = thinker(hidden, POSITIONS)
    later = hidden.clone()
    later[10:] += 1
    after = thinker(later, POSITIONS)
    torch.testing.assert_close(after[:2], before[:2], rtol=0, atol=1e-13)
    assert (after - before)[2:].abs().max() > 1e-2


def test_pause_tokens_know_nothing_of_the_row():
    pause = PauseTokens(32, LATENTS)
    latents = pause(torch.randn(TOKENS, 2, 32), POSITIONS)
    assert latents.shape == (len(POSITIONS), LATENTS, 2, 32)
    assert (latents == latents[:1, :, :1]).all()
