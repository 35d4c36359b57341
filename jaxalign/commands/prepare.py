"""`jaxalign prepare`: what a method needs to know of a base before a run of it begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxalign.arguments import needed, option, word, words
from jaxalign.errors import UserError
from jaxalign.programs import begin

if TYPE_CHECKING:
    from jaxalign.settings import Config

PARALLEL = "the same sentences in all languages: LANG.txt files, FLORES folder, JSONL, hf:NAME"
LAYER = "where states are taken: the number of a block, or final (after the final norm)"
POOLING = "how token states become one vector: mean, mean_rest, last, position, first"


@dataclass(frozen=True, kw_only=True)
class Subspace:
    """Whose languages, and where."""

    model: str = word("a folder in Hugging Face layout, a hub name, or a YAML file", path=True)
    settings: Sequence[str] = words("settings, as in model.dtype=float32", "key=value")
    parallel: str = needed(PARALLEL, "SOURCE", path=True)
    out: str = needed("the .npz file to write", "FILE", path=True)
    layer: str = option("final", LAYER)
    pooling: str = option("last", POOLING)
    languages: str = option("", "keep only these languages, as in en,de,cy")
    rows: int = option(0, "use only the first N sentences (default all)", metavar="N", lowest=0)
    pivot: str = option("en", "the language that the others are shifted from")
    rank: int | None = option(
        None, "dimensions of the subspace (default one less than languages)", whole=True, lowest=1
    )

    def run(self) -> None:
        """Measures, writes the file, prints what is in it."""
        config = _config(self.model, self.settings)
        begin()
        from jaxalign.prepare.run import subspace

        subspace(config, self.parallel, self.out, rank=self.rank, **_given(self))


@dataclass(frozen=True, kw_only=True)
class Clusters:
    """Which languages, by what."""

    model: str | None = words(
        "a folder in Hugging Face layout, a hub name, or a YAML file", "MODEL", "?", path=True
    )
    settings: Sequence[str] = words("settings, as in model.dtype=float32", "key=value")
    parallel: str = option("", PARALLEL, metavar="SOURCE", path=True)
    vectors: str = option(
        "",
        "JSON {language: [numbers]}, instead of the states of a model",
        metavar="FILE",
        path=True,
    )
    out: str = needed("the JSON file to write", "FILE", path=True)
    number: int = option(3, "clusters", lowest=1)
    # Empty: not given. What is given needs a model.
    layer: str = option("", f"{LAYER} (default final)")
    pooling: str = option("", f"{POOLING} (default mean)")
    states_as: str = option(
        "",
        "how means of states are compared: each dimension by its mean and deviation, or raw "
        "(default standardised)",
        choices=("standardised", "raw"),
    )
    languages: str = option("", "keep only these languages, as in en,de,cy")
    rows: int = option(0, "use only the first N sentences (default all)", metavar="N", lowest=0)
    pivot: str = option("", "a language that must be there (default en)")

    def run(self) -> None:
        """Clusters, writes the file, prints the languages to train on."""
        if self.vectors:
            self._check_alone()
        elif not (self.model and self.parallel):
            raise UserError("give a MODEL with --parallel SOURCE, or --vectors FILE alone")
        config = None if self.vectors else _config(self.model or "", self.settings)
        begin()
        from jaxalign.prepare.run import clusters

        given = _given(self) | ({"states_as": self.states_as} if self.states_as else {})
        clusters(config, self.parallel, self.out, number=self.number, vectors=self.vectors, **given)

    def _check_alone(self) -> None:
        """Refuses, next to vectors, what only a model and its sentences would read."""
        words = [*filter(None, [self.model]), *self.settings]
        for name in ("parallel", "layer", "pooling", "states_as", "rows", "pivot"):
            if getattr(self, name):
                words.append(f"--{name.replace('_', '-')}")
        if words:
            raise UserError(f"--vectors: no model is run over them; leave out {', '.join(words)}")


def _given(options: Subspace | Clusters) -> dict[str, Any]:
    """The states that both commands read, as far as an option says something of them."""
    languages = [name for name in options.languages.split(",") if name]
    found = {name: getattr(options, name) for name in ("layer", "pooling", "rows", "pivot")}
    return {name: value for name, value in found.items() if value} | {"languages": languages}


def _config(model: str, settings: Sequence[str]) -> Config:
    from jaxalign.config import load

    named = model.endswith((".yaml", ".yml"))
    given = settings if named else [f"model.path={model}", *settings]
    return load(model if named else None, given).config
