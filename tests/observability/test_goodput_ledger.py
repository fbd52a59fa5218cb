"""The account of a run's time: it adds up, over attempts and the gaps between them."""

import json

import pytest

from tests.observability.run_folders import make_run
from vishwamai_mp.observability.goodput_ledger import Attempt, Ledger, read_ledger
from vishwamai_mp.observability.report import render_report
from vishwamai_mp.observability.run_folder import read_run

FIRST = Attempt(1000.0, 1010.0, {"useful": 6.0, "starting": 3.0, "saving": 1.0}, 6)
SECOND = Attempt(1015.0, 1025.0, {"useful": 4.0, "repeated": 2.0, "starting": 3.0, "data": 1.0}, 10, finished=True)
LATER = Attempt(5000.0, 5010.0, {"useful": 7.0, "starting": 3.0}, 17)


def test_attempts_and_what_lies_between_them_add_up():
    ledger = Ledger([FIRST, SECOND])
    assert ledger.wall == 25.0 == SECOND.ended - FIRST.began
    assert ledger.seconds["down"] == 5.0
    assert ledger.goodput == 0.4
    assert ledger.reached == 10


def test_a_finished_run_is_not_down_until_it_is_trained_further():
    assert Ledger([FIRST, SECOND, LATER]).wall == 35.0


def test_a_ledger_survives_and_a_broken_one_is_said_to_be(tmp_path):
    assert read_ledger(tmp_path) == Ledger([])
    Ledger([FIRST]).with_attempt(SECOND).write(tmp_path)
    assert read_ledger(tmp_path) == Ledger([FIRST, SECOND])
    path = tmp_path / "goodput.json"
    wrong = json.loads(path.read_text())
    wrong["attempts"][0]["ended"] = float("inf")
    for text in ("", "[]", '{"attempts": [{}]}', json.dumps(wrong), '{"attempts": 3}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="cannot be understood"):
            read_ledger(tmp_path)


def test_the_report_has_one_number_and_its_parts(tmp_path):
    folder = make_run(tmp_path / "run")
    assert "Where the time went" not in render_report([read_run(folder)])
    Ledger([FIRST, SECOND]).write(folder)
    page = render_report([read_run(folder)])
    assert "<td>40.0%</td>" in page
    assert "<td>25.0 s</td><td>2</td><td>10.0 s (40.0%)</td><td>2.0 s (8.0%)</td>" in page
    (folder / "goodput.json").write_text("[")
    assert "goodput.json: cannot be understood" in render_report([read_run(folder)])
