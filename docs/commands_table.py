"""Writes docs/commands.md from the options of the commands: python docs/commands_table.py"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxalign.cli import COMMANDS, options_of

PAGE = Path(__file__).with_name("commands.md")
HEAD = """# Commands

Written by `python docs/commands_table.py` from the options of the commands, which
`jaxalign COMMAND --help` prints. Every command also takes `--debug`, which shows the traceback of
an error. `key=value` are settings of [configuration.md](configuration.md); they may stand anywhere
after the command.
"""


def page() -> str:
    """The page of today."""
    parts = [HEAD]
    for name, (text, _) in COMMANDS.items():
        parts.append(f"## jaxalign {name}\n\n{text[0].upper()}{text[1:]}.\n")
        parts.append("| word or option | meaning |\n|---|---|")
        parts += [
            f"| `{word}` | {meaning.replace('|', '&#124;')} |" for word, meaning in rows(name)
        ]
        parts.append("")
    return "\n".join(parts)


def rows(name: str) -> Iterator[tuple[str, str]]:
    """What may be said, and what it means."""
    for one in dataclasses.fields(options_of(name)):  # type: ignore[arg-type]
        flag = f"--{one.name.replace('_', '-')}"
        if given := one.metadata.get("words"):
            word = given["metavar"] or one.name.upper()
            yield (
                {"*": f"[{word} ...]", "?": f"[{word}]"}.get(given.get("nargs"), word),
                given["help"],
            )
        elif given := one.metadata.get("option"):
            yield f"{flag}{_value(one.name, given)}", _meaning(given)
        for other, text in one.metadata.get("named", {}).items():
            yield f"--{other} [NAME=]PATH", f"{text}; may be given several times"


def _value(name: str, given: dict[str, Any]) -> str:
    if given.get("action") == "store_true":
        return ""
    choices = f"{{{','.join(given['choices'])}}}" if "choices" in given else ""
    return f" {given.get('metavar') or choices or name.upper()}"


def _meaning(given: dict[str, Any]) -> str:
    text = given["help"]
    if given.get("action") == "append":
        text += "; may be given several times"
    return f"{text}; required" if given.get("required") else text


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
