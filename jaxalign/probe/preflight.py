"""Whatever can be wrong with a probe, found before the model is loaded.

check(base, corpora, [Probed('base'), Probed('a', 'runs/a/adapter')], 'report', ...)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxalign.base import Base
from jaxalign.errors import UserError
from jaxalign.paths import check_writable
from jaxalign.probe.corpus import Parallel
from jaxalign.probe.forms import FORMS
from jaxalign.probe.items import Items, check_pivot
from jaxalign.probe.states import POOLINGS


@dataclass(frozen=True)
class Probed:
    """One set of weights."""

    name: str
    adapter: str = ""  # PEFT folder or hub name; empty: the bare base


def check(
    base: Base,
    corpora: Sequence[Parallel],
    systems: Sequence[Probed],
    out: str,
    *,
    poolings: Sequence[str],
    pivot: str,
    dtype: str,
    forms: Sequence[str],
    width: int | None,
    neurons: int,
    items: Items | None,
) -> None:
    """Refuses what `measure_corpora` could not finish; arguments are its own.

    Raises:
      UserError: a name or number that does not exist, text of one sentence, an adapter of another
        base, a folder that cannot be written.
    """
    check_systems(systems)
    _check_names("--pooling", poolings, POOLINGS)
    _check_names("--states-as", forms, FORMS)
    _check_names("--states", [dtype], ("float32", "float16"))
    if width is not None and width < 1:
        raise UserError(f"--width: {width} should be 1 or more principal directions")
    if neurons < 0 or neurons == 1:
        raise UserError(f"--neurons: {neurons} should be 0 (none), or 2 or more sentences")
    for corpus in corpora:
        _check_text(corpus, pivot)
    if items:
        check_pivot(items, pivot)
    check_writable(Path(out), "--out")
    for system in systems:
        if system.adapter:
            base.opened.adapter(system.adapter)


def check_systems(systems: Sequence[Probed]) -> None:
    """Refuses two systems of one name, and a name that cannot be a folder in the report.

    Raises:
      UserError: either.
    """
    names = [system.name for system in systems]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"two systems are called {twice!r}; write --adapter NAME=PATH")
    odd = next((n for n in names if n != folder_of(n) or len(n.encode()) > 200), None)
    if odd is not None:
        raise UserError(
            f"{odd!r} cannot name a system, since its states get a folder of that name; use "
            "letters, digits, spaces and ._-+, and write --adapter NAME=PATH"
        )


def folder_of(name: str) -> str:
    """The name as a folder in the report: the last part of a path, without an ending `.tsv`."""
    last = re.split(r"[/\\]", name.removesuffix(".tsv"))[-1]
    return "".join(c if c.isalnum() or c in " ._-+" else "_" for c in last).strip(". ") or "_"


def _check_names(option: str, given: Sequence[str], known: Sequence[str]) -> None:
    wrong = next((name for name in given if name not in known), None)
    if wrong is not None or not given:
        raise UserError(f"{option}: {wrong or ''!r} is not one of {', '.join(known)}")
    twice = next((name for name in given if list(given).count(name) > 1), None)
    if twice:
        raise UserError(f"{option}: {twice!r} is given twice")


def _check_text(corpus: Parallel, pivot: str) -> None:
    if len(corpus) < 2:
        raise UserError(
            f"{corpus.name}: one sentence has no other to be distinguished from; give at least 2"
        )
    for language in corpus.told_by(pivot):
        if corpus.same(language).max() == 0:
            raise UserError(
                f"{corpus.name}: all {len(corpus)} sentences of {language} are the same, so that "
                "every sentence would find its translation; give sentences that differ"
            )
