"""Strategies: values as strangers write them, and whole files with something changed in them."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

ODD_TEXTS = [
    "", " ", "\x00", "\x1b[2J", "\ud800", "a\ud800b", "\u2028", "\x85", "\ufeff", "\u202e",
    "a" * 3000, "None", "null", "nan", "0", "-1", "1e400", "${", "${seed}", "[/red]", "[", "{",
    "<|im_end|>", "<|im_start|>assistant", "../../etc", "gs://b/f", "'", '"', "a;b: c",
    "datetime: nine; x: y",
]  # fmt: skip
texts = st.one_of(
    st.sampled_from(ODD_TEXTS),
    st.text(max_size=20),
    st.sampled_from(["wake me up", "Grüße", "你好"]),
)
numbers = st.one_of(
    st.integers(-3, 40), st.integers(), st.sampled_from([10**30, -(2**63), 2**31]),
    st.integers(4999, 5000).map(lambda digits: 10**digits),
    st.floats(), st.sampled_from([float("nan"), float("inf"), -0.0, 1e-320, 1e308]),
)  # fmt: skip
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4), st.tuples(inner)
    ),
    max_leaves=8,
)


def some(usual: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Mostly what is right, sometimes anything."""
    return st.one_of(usual, usual, usual, usual, values)


@contextlib.contextmanager
def long_numbers() -> Iterator[None]:
    """Within, Python writes numbers of any length."""
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        yield
    finally:
        sys.set_int_max_str_digits(before)


def written(value: Any) -> str:
    """JSON, also of what JSON cannot say."""
    with long_numbers():
        return json.dumps(value, default=str, ensure_ascii=True)


def spoken(value: Any) -> str:
    """A value as Python writes it."""
    with long_numbers():
        return str(value)


def _places(value: Any, path: tuple = ()) -> list[tuple]:
    found = [path] if path else []
    if isinstance(value, dict):
        found += [place for key, item in value.items() for place in _places(item, (*path, key))]
    if isinstance(value, list):
        found += [place for i, item in enumerate(value[:8]) for place in _places(item, (*path, i))]
    return found


@st.composite
def changed(draw: Any, document: Any) -> Any:
    """A JSON document with one or two of its values replaced, removed or doubled."""
    document = json.loads(json.dumps(document))
    for _ in range(draw(st.integers(0, 2))):
        places = _places(document)
        if not places:
            return document
        *path, last = draw(st.sampled_from(places))
        inside = document
        for key in path:
            inside = inside[key]
        how = draw(st.sampled_from(["value", "value", "remove", "add"]))
        if how == "remove":
            inside.pop(last)
        elif how == "add" and isinstance(inside, dict):
            inside[draw(st.sampled_from(["x", "r", "text", "auto_map", ""]))] = draw(values)
        else:
            inside[last] = draw(values)
    return document


@st.composite
def damaged(draw: Any, whole: bytes) -> bytes:
    """Bytes with a part cut off, flipped, doubled or replaced."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        how = draw(st.sampled_from(["cut", "flip", "insert", "drop", "double"]))
        if how == "cut":
            del data[at:]
        elif how == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "insert":
            data[at:at] = draw(st.binary(max_size=6))
        elif how == "drop":
            del data[at : at + draw(st.integers(1, 9))]
        else:
            data += data[at : at + 64]
    return bytes(data)
