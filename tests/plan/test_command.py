"""`jaxalign plan`: exit codes, JSON and what is refused. GPU places are planned by formula here."""

import json
import re
from pathlib import Path

import pytest

from jaxalign.cli import main
from jaxalign.plan.report import SOURCES
from jaxalign.plan.run import PADDED

PAGE = Path(__file__).resolve().parents[2] / "docs" / "plan.md"
CONFIG = "configs/llama3_8b_slots_align.yaml"


def plan(*words):
    return main(["plan", CONFIG, *words])


def test_a_run_that_fits(tmp_path, capsys):
    file = tmp_path / "plan.json"
    assert plan("--topology", "h100:8", "--price", "2.5", "--json", str(file)) == 0
    told = capsys.readouterr()
    assert "meta-llama/Meta-Llama-3-8B-Instruct on h100:8: 8 chips" in told.out
    assert "Estimated by formula" in told.out
    assert "fits: " in told.out
    assert "one update (2 x task + 2 x align + update): time unknown, roofline" in told.out
    values = json.loads(file.read_text("utf-8"))
    assert values["fits"] and values["source"] == "formula" and values["dollars"] is None
    assert [program["name"] for program in values["programs"]] == [
        "task", "align", "update", "task_eval", "align_eval", "prompt", "token",
    ]  # fmt: skip
    assert values["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1, "seq": 1}
    assert values["settings"]["model"]["path"] == "meta-llama/Meta-Llama-3-8B-Instruct"


def fails(states, batch, *, width: int = 1):
    """A user's objective with an error in it."""
    return states.source[width].no_such_thing


def test_an_objective_that_fails_is_told_by_a_formula_too(capsys):
    own = f"align.objective={__name__}:fails"
    assert plan("--topology", "h100:8", "--phases", "update", own, "align.options={width: 16}") == 2
    said = capsys.readouterr().err
    assert f"{__name__}:fails fails: AttributeError" in said and "test_command.py, line" in said


def test_the_page_shows_what_is_printed(capsys):
    """The columns and the notes of docs/plan.md; its numbers are a compiler's."""
    plan("--topology", "h100:8", "--phases", "task")
    printed = capsys.readouterr().out.splitlines()
    shown = PAGE.read_text("utf-8").split("```text\n")[1].partition("```")[0].splitlines()
    (ours,), (theirs,) = (
        [re.split(" {2,}", line.strip()) for line in lines if line.startswith(" program ")]
        for lines in (printed, shown)
    )
    assert theirs == ours
    assert PADDED in printed and PADDED in shown and SOURCES["compiler"] in shown


def test_a_run_that_does_not_fit_leaves_with_1_and_the_way_out(tmp_path, capsys):
    file = tmp_path / "plan.json"
    words = ("--topology", "a100-40:8", "--phases", "task", "--json", str(file))
    assert plan(*words, "model.remat=none") == 1
    told = capsys.readouterr().out
    assert "does not fit: task (32 x 2048) needs" in told
    assert "try model.remat=names" in told or "try model.remat=full" in told
    values = json.loads(file.read_text("utf-8"))
    assert not values["fits"] and values["advice"][0]["settings"].startswith("model.remat=")


def test_only_the_phases_of_the_run_are_planned(tmp_path):
    file = tmp_path / "plan.json"
    plan("--topology", "h100:8", "--json", str(file), "align.weight=0")
    names = [program["name"] for program in json.loads(file.read_text("utf-8"))["programs"]]
    assert names == ["task", "update", "task_eval", "prompt", "token"]


def test_a_search_tells_what_to_set(tmp_path, capsys):
    file = tmp_path / "search.json"
    words = ("--topology", "h100:4", "--search", "--tries", "3", "--phases", "task")
    assert plan(*words, "--json", str(file), "align.weight=0", "batch.accumulate=1") == 0
    told = capsys.readouterr()
    assert "1/3 as configured" in told.err
    assert "as configured" in told.out and "Estimated by formula" in told.out
    assert len(json.loads(file.read_text("utf-8"))) == 3


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--topology", "v9:4x4"), "'v9:4x4' names no chip known here"),
        (("--topology", "v5e:4"), "needs 2 numbers of chips, as in v5e:4x4"),
        (("--topology", "h100:8", "--slices", "0"), "--slices: 0 should be 1 or more"),
        (("--topology", "h100:8", "--phases", "tusk"), "'tusk' is not among task, align"),
        (("--topology", "h100:7"), "batch.size: 32 rows cannot be divided among 7 devices"),
        (("--topology", "h100:8", "model.path=no/such"), "without a download these are known"),
        (("--topology", "h100:8", "--tries", "8"), "--tries: only --search tries anything"),
        (("--topology", "h100:8", "--search", "--price", "2"), "--price: --search counts no cost"),
        (("--topology", "h100:8", "align.weight=0", "task.weight=0"), "nothing would be trained"),
        (("--topology", "h100:8", "--phases", "align", "align.weight=0"), "none of --phases"),
    ],
)
def test_what_cannot_be_planned_is_told_in_one_sentence(words, told, capsys):
    assert plan(*words) == 2
    error = capsys.readouterr().err
    assert error.startswith("jaxalign: ") and error.count("\n") == 1
    assert told in error
