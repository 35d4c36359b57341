"""Settings, as words and as YAML."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from jaxalign.cli import main
from jaxalign.config import load, to_yaml
from jaxalign.errors import UserError
from jaxalign.settings import Config, abouts, check, flatten
from tests.fuzz.odd import damaged, scalars, spoken, texts, values, written

DEFAULTS = dict(flatten(dataclasses.asdict(Config())))
keys = st.one_of(
    st.sampled_from(sorted(DEFAULTS)),
    st.sampled_from(["align.layr", "task.columns.text", "task.options.a.b", "", ".", "a[0]", "x"]),
    texts,
)
yaml_values = st.one_of(
    scalars.map(spoken), values.map(written), texts,
    st.sampled_from(["null", "~", "no", "[a,b]", "[1,2]", "{q: 2}", "auto", "1e-4", "0x10", "!!x 1",
                     "&a [*a]", "${seed}", "???", "[" * 300, "2020-01-01", "1:30", ".nan"]),
)  # fmt: skip


@st.composite
def entries(draw: Any) -> tuple[str, str]:
    """A setting and a value: mostly one that may fit."""
    if draw(st.integers(0, 3)) == 0:
        return draw(keys), draw(yaml_values)
    key = draw(st.sampled_from(sorted(DEFAULTS)))
    value = DEFAULTS[key]
    if type(value) in (int, float):
        return key, spoken(draw(st.one_of(st.integers(0, 9), st.floats(0, 1), st.integers(-2, 99))))
    if isinstance(value, bool) or value is None:
        return key, draw(st.sampled_from(["true", "false", "null", "a"]))
    if isinstance(value, str):
        bounds = dict(abouts())[key].bounds
        return key, draw(st.sampled_from(bounds.choices or ("a", "a b", "'[x]'", "1..3", "ü")))
    return key, draw(st.sampled_from(["[a]", "[1,2]", "{a: b}", "{q: 3}", "[]", "{}", "{a: [de]}"]))


settings_words = st.lists(entries().map("=".join), min_size=1, max_size=2)


def _holds(config: Config, folder: Path) -> None:
    check(config)
    for key, value in flatten(dataclasses.asdict(config)):
        if type(value) in (int, float) and "options" not in key:
            assert math.isfinite(value), key
    (folder / "again.yaml").write_text(to_yaml(config), "utf-8")
    try:
        again = load(folder / "again.yaml").config
    except UserError as error:
        raise AssertionError(f"what was written is refused: {error}") from error
    assert again == config


def read_words(words: list[str], folder: Path) -> None:
    _holds(load(None, words).config, folder)


def _nested(pairs: list[tuple[str, Any]]) -> str:
    """YAML of (dotted key, value)."""
    groups: dict[str, list[str]] = {}
    for key, value in pairs:
        group, _, name = key.rpartition(".")
        groups.setdefault(group, []).append(f"{name}: {value}")
    return "\n".join(
        "\n".join(rows) if not group else f"{group}:\n" + "\n".join("  " + row for row in rows)
        for group, rows in groups.items()
    )


yamls = st.one_of(
    st.lists(entries(), max_size=3).map(_nested).map(
        lambda text: text.encode("utf-8", "surrogatepass")
    ),
    damaged(b"align:\n  layer: 3\n  train: [a.jsonl]\nlora: {r: 4, ranks: {q: 2}}\nseed: 7\n"),
    values.map(lambda value: written(value).encode()),
)  # fmt: skip


def read_yaml(content: bytes, folder: Path) -> None:
    (folder / "run.yaml").write_bytes(content)
    _holds(load(folder / "run.yaml").config, folder)


def read_command(words: list[str], folder: Path) -> None:
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        try:
            code = main(["config", *words])
        except SystemExit as left:  # argparse
            code = left.code
    assert "\x1b" not in err.getvalue()
    assert code in (0, 2)
    if code == 2:
        raise UserError("told")
