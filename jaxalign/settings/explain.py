"""What every setting is for, as the terminal and docs/configuration.md show it.

explain("align.layer")     # [('align.layer', '16', 'a whole number, 0 or more, or auto', ...)]
table()                    # the Markdown table of docs/configuration.md
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from typing import Any

from jaxalign.bounds import About
from jaxalign.errors import UserError, brief
from jaxalign.settings import Config, ExtraObjective, abouts, flatten

Row = tuple[str, str, str, str]  # key, default, what it may be, what it is for


def explain(name: str) -> list[Row]:
    """A setting, or all settings of a group.

    Raises:
      UserError: there is no such setting; the nearest is named.
    """
    found = [(key, about) for key, about in abouts() if f"{key}.".startswith(f"{name}.")]
    if not found:
        keys = [key for key, _ in abouts()]
        near = difflib.get_close_matches(name[:60], keys, 1, 0.0)[0]
        raise UserError(f"--explain: unknown setting {brief(name)}; did you mean {near!r}?")
    return [
        (key, _default(key), _may_be(about), f"{about.text.replace('`', '')}{_page(about)}")
        for key, about in found
    ]


def table() -> str:
    """Every setting as a row of Markdown."""
    lines = ["| key | default | may be | meaning |", "|---|---|---|---|"]
    for key, about in abouts():
        default = _default(key)
        may_be = ", ".join(f"`{word}`" for word in about.bounds.choices) or _may_be(about)
        see = f" ([{about.see.partition('#')[0]}]({about.see}))" if about.see else ""
        lines.append(
            f"| {f'**{key}**' if _is_group(key) else f'`{key}`'} "
            f"| {f'`{default}`' if default else ''} | {may_be} | {about.text}{see} |"
        )
    return re.sub(r" {2,}", " ", "\n".join(lines))


def _is_group(key: str) -> bool:
    return "." not in key and dataclasses.is_dataclass(getattr(Config(), key))


def _default(key: str) -> str:
    extra = {"objectives": dataclasses.asdict(ExtraObjective())}
    values = dict([*flatten(dataclasses.asdict(Config())), *flatten(extra)])
    return _written(values.get(key))


def _written(value: Any) -> str:
    """A value as it is written in YAML; nothing for what is empty."""
    if value is None or value == "":
        return ""
    if isinstance(value, list):
        return f"[{', '.join(map(_written, value))}]"
    return value if isinstance(value, str) else json.dumps(value)


def _may_be(about: About) -> str:
    bounds = about.bounds
    if bounds.number:
        return f"each: {bounds.phrase()}" if bounds.many else bounds.phrase()
    return " | ".join(bounds.choices)


def _page(about: About) -> str:
    return f" (docs/{about.see})" if about.see else ""
