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

    model: str = word("a folder in Hugging Face layout, a hub name, or a YAML file")
    settings: Sequence[str] = words("settings, as in model.dtype=float32", "key=value")
    parallel: str = needed(PARALLEL, "SOURCE")
    out: str = needed("the .npz file to write", "FILE")
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
        "a folder in Hugging Face layout, a hub name, or a YAML file", "MODEL", "?"
    )
    settings: Sequence[str] = words("settings, as in model.dtype=float32", "key=value")
    parallel: str = option("", PARALLEL, metavar="SOURCE")
    vectors: str = option(
        "", "JSON {language: [numbers]}, instead of the states of a model", metavar="FILE"
    )
    out: str = needed("the JSON file to write", "FILE")
    number: int = option(3, "clusters", lowest=1)
    layer: str = option("final", LAYER)
    pooling: str = option("mean", POOLING)
    states_as: str = option(
        "standardised",
        "how means of states are compared: each dimension by its mean and deviation, or raw",
        choices=("standardised", "raw"),
    )
    languages: str = option("", "keep only these languages, as in en,de,cy")
    rows: int = option(0, "use only the first N sentences (default all)", metavar="N", lowest=0)
    pivot: str = option("en", "a language that must be there")

    def run(self) -> None:
        """Clusters, writes the file, prints the languages to train on."""
        if bool(self.vectors) == bool(self.model and self.parallel):
            raise UserError("give a MODEL with --parallel SOURCE, or --vectors FILE alone")
        config = None if self.vectors else _config(self.model or "", self.settings)
        begin()
        from jaxalign.prepare.run import clusters

        clusters(config, self.parallel, self.out, number=self.number, vectors=self.vectors,
                 states_as=self.states_as, **_given(self))  # fmt: skip


def _given(options: Subspace | Clusters) -> dict[str, Any]:
    """The states that both commands read."""
    languages = [name for name in options.languages.split(",") if name]
    found = {name: getattr(options, name) for name in ("layer", "pooling", "rows", "pivot")}
    return found | {"languages": languages}


def _config(model: str, settings: Sequence[str]) -> Config:
    from jaxalign.config import load

    named = model.endswith((".yaml", ".yml"))
    given = settings if named else [f"model.path={model}", *settings]
    return load(model if named else None, given).config
