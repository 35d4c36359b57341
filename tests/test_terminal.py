"""Foreign text cannot steer a terminal, and a closed pipe does not end a command."""

import subprocess
import sys

import pytest

from jaxalign import terminal
from jaxalign.terminal import visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("a\rb\x00\x7f\x9b31m", r"a\rb\x00\x7f\x9b31m"),
        ("abc\u202egnp.exe", r"abc\u202egnp.exe"),
        ("half \ud800", r"half \ud800"),
        ("a\u2028b", r"a\u2028b"),
        ("Größe 你好 שלום\u200f\tx\n", "Größe 你好 שלום\u200f\tx\n"),
        (ValueError("\x1b[31m"), r"\x1b[31m"),
    ],
)
def test_what_steers_is_written_out(text, shown):
    assert visible(text) == shown


def test_a_closed_pipe_does_not_end_the_command(tmp_path):
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from jaxalign.terminal import steady_output\n"
        "with steady_output():\n"
        "    for number in range(100_000): print('line', number)\n"
        "    print('\\ud800')\n"
        f"    Path({str(tmp_path / 'report')!r}).write_text('whole')\n"
    )
    command = f'{sys.executable} -c "$CODE" | head -1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", command], env={"CODE": code, "PYTHONPATH": ":".join(sys.path),
        "PATH": "/usr/bin:/bin"}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "line 0\n", "")
    assert (tmp_path / "report").read_text() == "whole"


def test_a_log_gets_a_line_of_progress_a_minute(capsys, monkeypatch):
    with terminal.bars("{task.fields[rate]}") as bar:
        task = bar.add_task("answers", total=2000, rate="")
        bar.advance(task, 500)
        assert capsys.readouterr().out == ""
        monkeypatch.setattr(terminal, "MINUTE", 0)
        bar.update(task, advance=700, rate="9 tokens/s")
    assert capsys.readouterr().out.startswith("answers: 1,200 of 2,000, ")
    with terminal.bars(mode="none") as bar:
        bar.advance(bar.add_task("answers", total=2), 1)
    assert capsys.readouterr().out == ""
