"""The pages of settings and commands say what these say."""

import runpy
from pathlib import Path

import pytest

from jaxalign.cli import main
from jaxalign.errors import UserError
from jaxalign.settings import abouts
from jaxalign.settings.explain import explain

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_the_page_has_every_setting():
    page = (DOCS / "configuration.md").read_text("utf-8")
    script = runpy.run_path(str(DOCS / "settings_table.py"))
    assert script["with_table"](page) == page, "run: python docs/settings_table.py"
    assert "| `generate.top_p` | `1.0` | a number, above 0, 1 or less |" in page


def test_the_page_has_every_command_and_option():
    script = runpy.run_path(str(DOCS / "commands_table.py"))
    page = (DOCS / "commands.md").read_text("utf-8")
    assert script["page"]() == page, "run: python docs/commands_table.py"
    assert "| `--rows ROWS` | rows to print of each stream (default 3) |" in page


def test_every_setting_is_explained_and_its_page_exists():
    for key, about in abouts():
        assert about.text.strip(), key
        if about.see:
            page, _, anchor = about.see.partition("#")
            titles = [line.strip("# \n").lower().replace(" ", "-")
                      for line in (DOCS / page).read_text("utf-8").splitlines()
                      if line.startswith("#")]  # fmt: skip
            assert not anchor or anchor in titles, (about.see, titles)


def test_explain_on_the_command_line(capsys):
    assert main(["config", "--explain", "align.layer"]) == 0
    shown = capsys.readouterr().out
    assert "align.layer" in shown and "a whole number, 0 or more, or auto" in shown
    assert [row[0] for row in explain("checkpoint")][:2] == ["checkpoint", "checkpoint.every"]
    assert main(["config", "--explain", "align.tau"]) == 2
    assert "did you mean 'align." in capsys.readouterr().err
    with pytest.raises(UserError, match="unknown setting"):
        explain("ali")


def test_the_defaults_need_no_file(capsys):
    assert main(["config"]) == 0
    assert "runs/default" in capsys.readouterr().out
    assert main(["config", "align.layer=7"]) == 0
    assert "command line" in capsys.readouterr().out
