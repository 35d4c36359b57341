"""From a base and parallel text to a file that a run reads.

subspace(config, 'data/ntrex', 'runs/subspace.npz', layer='final', pooling='last')
clusters(config, 'data/ntrex', 'runs/clusters.json', number=3, layer='8')
"""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from rich.table import Table

from jaxalign.base import Base, open_base
from jaxalign.data.languages import find_language
from jaxalign.errors import UserError
from jaxalign.multihost import is_main
from jaxalign.prepare.clusters import Cluster, cluster, cosine_distances
from jaxalign.prepare.lsar import subspace as subspace_of
from jaxalign.prepare.means import Means, language_means, layer_of, read_text
from jaxalign.probe.states import corpus_tokens, token_digest
from jaxalign.settings import Config
from jaxalign.terminal import console, say


def subspace(
    config: Config,
    parallel: str,
    out: str,
    *,
    layer: str = "final",
    pooling: str = "last",
    languages: Sequence[str] = (),
    rows: int = 0,
    pivot: str = "en",
    rank: int | None = None,
    base: Base | None = None,
) -> None:
    """Writes the subspace of languages as .npz: `axis` [D], `basis` [D, r], `shifts` [n, D] (all
    float32), `languages` [n], `pivot`, `layer`, `pooling`, `base` (the fingerprint), `tokens` (the
    digest of the sentences as the base reads them); prints sizes.

    Args:
      config: `model.*`, `mesh.*` and `generate.batch` are read.
      out: the file.
      layer: `final`, or the number of a block.
      rank: of the basis; None: one less than there are languages.
      base: the base of this configuration, where it is opened already.
      parallel: as of `language_means`, and so are the others.

    Raises:
      UserError: as of `language_means` and `lsar.subspace`.
    """
    tap = layer_of(layer)
    given: dict[str, Any] = {"languages": languages, "rows": rows, "pivot": pivot}
    base = base or open_base(config)
    found = language_means(base, parallel, layer=tap, pooling=pooling, **given)
    pivot = find_language(pivot, found.languages)
    made = subspace_of(found.means, found.languages.index(pivot), rank)
    arrays = {name: value.astype(np.float32) for name, value in made._asdict().items()}
    arrays |= {"languages": np.array(found.languages), "pivot": np.array(pivot), **_place(found)}
    arrays["tokens"] = np.array(found.tokens)
    _write(out, lambda file: np.savez(file, **arrays))
    table = Table("language", f"shift from {pivot}", "mean's length", box=None, header_style="bold")
    for name, shift, mean in zip(found.languages, made.shifts, found.means, strict=True):
        table.add_row(name, f"{np.linalg.norm(shift):.3g}", f"{np.linalg.norm(mean):.3g}")
    console().print(table)
    say(
        f"{len(found.languages)} languages, {found.sentences:,} sentences each: they differ in "
        f"{made.basis.shape[1]} of {len(made.axis):,} dimensions"
    )
    say(out)


def is_of_other_text(
    file: Path,
    base: Base,
    parallel: str,
    *,
    languages: Sequence[str] = (),
    rows: int = 0,
    pivot: str = "en",
    **_: Any,
) -> bool:
    """Whether a file of `subspace` was measured on other sentences, or by another tokenizer.

    True of one that does not say; False of one that cannot be read, which its reader tells.

    Args:
      file: it is there.
      parallel: as of `subspace`, and so are the others.

    Raises:
      UserError: text that cannot be used.
    """
    try:
        with np.load(file) as found:
            tokens = str(found["tokens"]) if "tokens" in found else ""
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        return False
    corpus = read_text(parallel, languages, rows, pivot)
    return tokens != token_digest(corpus_tokens(base, corpus))


def clusters(
    config: Config | None,
    parallel: str,
    out: str,
    *,
    number: int = 3,
    vectors: str = "",
    layer: str = "final",
    pooling: str = "mean",
    states_as: str = "standardised",
    languages: Sequence[str] = (),
    rows: int = 0,
    pivot: str = "en",
) -> None:
    """Writes clusters of languages and their medoids as JSON; prints them.

    Args:
      config: of the base; None where there are vectors.
      number: of clusters.
      vectors: a JSON file `{language: [numbers]}` instead of a base's mean states.
      states_as: `standardised`: each dimension by its mean and deviation; `raw`.
      parallel: as of `subspace`, and so are the others.

    Raises:
      UserError: as of `language_means` and `clusters.cluster`; a file that holds no vectors.
    """
    place: dict[str, Any]
    if config is None:
        names, rows_of = read_vectors(vectors, languages)
        place = {"vectors": vectors}
    else:
        tap = layer_of(layer)
        given: dict[str, Any] = {"languages": languages, "rows": rows, "pivot": pivot}
        found = language_means(open_base(config), parallel, layer=tap, pooling=pooling, **given)
        names = found.languages
        rows_of = found.standardised() if states_as == "standardised" else found.means
        place = {name: value.item() for name, value in _place(found).items()}
        place["states_as"] = states_as
    groups = cluster(rows_of, number)
    written = {
        **place,
        "languages": names,
        "clusters": [
            {"languages": [names[row] for row in one.members], "medoid": names[one.medoid]}
            for one in groups
        ],
        "distances": np.round(cosine_distances(rows_of), 6).tolist(),
    }
    text = json.dumps(written, ensure_ascii=False, indent=1) + "\n"
    _write(out, lambda file: file.write(text.encode()))
    _show(groups, names)
    say(out)


def read_vectors(file: str, languages: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Languages and their vectors [n, D] of a JSON file.

    Raises:
      UserError: something else than `{language: [numbers]}`, or a language that is not there.
    """
    try:
        content = json.loads(Path(file).read_text("utf-8"))
        assert isinstance(content, Mapping) and content
        names = tuple(languages) or tuple(sorted(content))
        rows = np.array([content[name] for name in names], np.float64)
        assert rows.ndim == 2 and np.isfinite(rows).all()
    except KeyError as error:
        raise UserError(f"{file} has no vector of {error}; it has: {', '.join(content)}") from error
    except (OSError, ValueError, TypeError, AssertionError) as error:
        raise UserError(
            f"--vectors: {file} cannot be read; it should hold JSON {{language: [numbers]}}, as "
            "many numbers for each language"
        ) from error
    return names, rows


def _place(found: Means) -> dict[str, np.ndarray]:
    """Where the states were taken."""
    return {
        "layer": np.array(found.layer),
        "pooling": np.array(found.pooling),
        "base": np.array(found.base),
    }


def _write(out: str, fill: Callable[[BinaryIO], Any]) -> None:
    """The file as a whole, or not at all; by the first process alone."""
    if not is_main():
        return
    target = Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    with open(partial, "wb") as file:
        fill(file)
    os.replace(partial, target)


def _show(groups: Sequence[Cluster], names: Sequence[str]) -> None:
    table = Table("cluster", "medoid", "distance", "languages", box=None, header_style="bold")
    for number, one in enumerate(groups, 1):
        members = " ".join(names[row] for row in one.members)
        table.add_row(str(number), names[one.medoid], f"{one.distance:.3f}", members)
    console().print(table)
    medoids = sorted(names[one.medoid] for one in groups)
    say(f"task.languages=[{','.join(medoids)}]")
