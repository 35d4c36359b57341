"""What a probe's table says: groups, an order of languages, a line for each, plain sentences.

Page, pictures and terminal read the table through this, so that they agree. All take the first
pooling unless asked otherwise, and never warn about what was not measured: NaN stays NaN.

    groups = groups_of(table)                        # {'all': (...), 'low-resource': (...), ...}
    lines = lines_of(table, choose_layer(table).layer)
    lines[0].name, lines[0].accuracy                 # the weakest language, {system: 0..1}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from jaxalign.data.languages import language_name, resource_class
from jaxalign.errors import UserError
from jaxalign.probe.choice import bests, choose_for_training, hidden
from jaxalign.probe.collapse import MASSIVE
from jaxalign.probe.forms import FORMS
from jaxalign.probe.table import MAIN, Table, keyed, mean_of

MISSING = "\u2013"
LOW = 2  # the highest resource class of Joshi et al. 2020 that is called low here
TITLES = {
    "margin": "margin retrieval",
    "csls": "CSLS retrieval",
    "cosine": "cosine retrieval",
    "mexa": "MEXA",
    "cka": "CKA",
    "neighbours": "shared neighbours",
    "nasca": "NASCA",
    "navca": "NAVCA",
    "dali": "DALI",
    "dali_strong": "DALI, strong",
}
FORM_TITLES = {form: form for form in FORMS} | {"all_but_top": "all but the top"}
Groups = dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Line:
    """One language at one layer; numbers in 0..1, NaN where nothing was measured."""

    language: str
    name: str
    resource: int | None  # class of Joshi et al. 2020
    accuracy: dict[str, float]  # system -> mean over the directions from and to it, margin score
    gain: float  # the last system over the first; NaN with one system
    best: int | None  # layer with the highest accuracy in the last system
    mexa: float  # in the last system
    cka: float
    forms: dict[str, float]  # form other than raw -> accuracy by such states, in the last system


def groups_of(table: Table, groups: Mapping[str, Sequence[str]] | None = None) -> Groups:
    """Names with their languages, `all` first; by default also low- and high-resource.

    Raises:
      UserError: a group names a language that was not probed, or none but the pivot.
    """
    if groups is None:
        classes = {name: resource_class(name) for name in table.languages if name != table.pivot}
        low = tuple(name for name, number in classes.items() if number and number <= LOW)
        high = tuple(name for name, number in classes.items() if number and number > LOW)
        groups = {"low-resource": low, "high-resource": high} if low and high else {}
    for group, names in groups.items():
        unknown = [name for name in names if name not in table.languages]
        if unknown or not set(names) - {table.pivot}:
            what = f"{unknown[0]!r}, which was not probed" if unknown else "no language"
            raise UserError(
                f"group {group!r} holds {what}; it needs languages other than the pivot "
                f"{table.pivot!r}, out of: {', '.join(table.languages)}"
            )
    return {"all": table.languages} | {group: tuple(names) for group, names in groups.items()}


def curve_of(
    table: Table, score: str, system: int, pooling: int, languages: Sequence[str] | None = None
) -> np.ndarray:
    """[L+1]: as `Table.curve`, for any score.

    MEXA, CKA and whatever else compares with the pivot: mean over the (these) languages, the pivot
    left out.
    """
    if score not in table.pivoted:
        return table.curve(score, system, pooling, languages)
    inside = table.chosen(languages) & (np.array(table.languages) != table.pivot)
    return mean_of(table.pivoted[score][system, pooling][:, inside], 1)


def lines_of(table: Table, layer: int) -> list[Line]:
    """One line per language, the weakest of the last system first, the unmeasured last."""
    by = mean_of(table.ends(MAIN)[:, 0], -1)  # [S, L+1, G]
    others = {
        form: mean_of(table.ends(keyed(MAIN, form))[-1, 0, layer], -1) for form in table.forms[1:]
    }  # [G] each
    found = []
    for g, language in enumerate(table.languages):
        course = by[-1, :, g]
        found.append(
            Line(
                language,
                language_name(language),
                resource_class(language),
                {name: float(by[s, layer, g]) for s, name in enumerate(table.systems)},
                float(by[-1, layer, g] - by[0, layer, g]) if len(table.systems) > 1 else np.nan,
                None if np.isnan(course).all() else int(np.nanargmax(course)),
                float(table.pivoted["mexa"][-1, 0, layer, g]),
                float(table.pivoted["cka"][-1, 0, layer, g]),
                {form: float(values[g]) for form, values in others.items()},
            )
        )
    last = table.systems[-1]
    return sorted(found, key=lambda line: np.nan_to_num(line.accuracy[last], nan=2.0))


def order_of(table: Table, system: int, layer: int) -> list[int]:
    """Places of the languages so that alike ones are neighbours (average-linkage clustering).

    The distance of two languages is that of their rows and columns of the margin matrix, over what
    both have measured.
    """
    from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
    from scipy.spatial.distance import squareform

    values = table.pairs[MAIN][system, 0, layer]
    if len(values) < 3:
        return list(range(len(values)))
    profile = np.concatenate([values, values.T], axis=1)  # [G, 2G]
    apart = np.stack([mean_of((profile - row) ** 2, 1) for row in profile])
    farthest = np.nanmax(apart, initial=0.0)
    apart = np.sqrt(np.where(np.isnan(apart), max(farthest, 1.0), apart))
    np.fill_diagonal(apart, 0)
    flat = squareform(apart, checks=False)
    return [
        int(place) for place in leaves_list(optimal_leaf_ordering(linkage(flat, "average"), flat))
    ]


def percent(value: float, decimals: int = 1) -> str:
    """'83.1 %' with a space that no line breaks at, or a dash for NaN."""
    return MISSING if np.isnan(value) else f"{value:.{decimals}%}".replace("%", "\u00a0%")


def points(value: float) -> str:
    """'+7.1' of 0.071: a difference in percentage points, or a dash for NaN."""
    text = MISSING if np.isnan(value) else f"{100 * value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def summary(table: Table, layer: int) -> list[str]:
    """What a reader in a hurry should know, in whole sentences."""
    curves = [curve_of(table, MAIN, s, 0) for s in range(len(table.systems))]
    base, last = table.systems[0], table.systems[-1]
    directions = int((~np.isnan(table.pairs[MAIN][0, 0, layer])).sum())
    fewest, most = min(table.sentences.values()), max(table.sentences.values())
    number = f"{most:,}" if fewest == most else f"{fewest:,} to {most:,}"
    found = [
        f"{number} parallel sentences of {table.corpus} in {len(table.languages)} languages went "
        f"through {table.model}; in every layer each sentence looked for its translation among "
        "the sentences of another language.",
        f"The block that finds most translations in {base} is {layer} of {table.layers} "
        f"({percent(layer / table.layers, 0)} of the depth): {percent(curves[0][layer])} by margin "
        f"score, on average over {directions:,} direction{'s' * (directions != 1)}"
        + (
            f" (the embeddings find {percent(curves[0][0])}, the last block "
            f"{percent(curves[0][-1])})."
        ),
    ]
    for name, curve in zip(table.systems[1:], curves[1:], strict=True):
        gain = points(curve[layer] - curves[0][layer])
        found.append(
            f"In {name} that block finds {percent(curve[layer])} ({gain} points)"
            + _best_elsewhere(curve, layer)
        )
    found += _by_other_states(table, layer)
    weakest = [line for line in lines_of(table, layer) if not np.isnan(line.accuracy[last])][:3]
    if len(table.languages) > 2 and weakest:
        named = [f"{line.name} ({percent(line.accuracy[last])})" for line in weakest]
        words = named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"
        found.append(f"Weakest at this layer in {last}: {words}.")
    control = table.health["shuffled"][:, 0, layer]
    if not np.isnan(control).all():
        found.append(f"With shuffled pairs, the control, {percent(np.nanmax(control))} are found.")
    warned = sum(map(len, table.warnings.values()))
    if warned:
        found.append(
            f"There {'is 1 warning' if warned == 1 else f'are {warned} warnings'} about the shape "
            "of the states: read them before trusting a score."
        )
    return found


def _by_other_states(table: Table, layer: int) -> list[str]:
    """Which block the other forms of the states would choose, and whether raw ones say anything."""
    found = []
    best = bests(table, 0, 0)
    for form in table.forms[1:]:
        if MAIN in best.get(form, {}):
            block, value = best[form][MAIN]
            here = table.curve(keyed(MAIN, form), 0, 0)[layer]
            words = "without the main directions" if form == "all_but_top" else f"by {form} states"
            found.append(
                f"{words[0].upper()}{words[1:]} the best block is {block}, with {percent(value)}"
                + ("." if block == layer else f" ({percent(here)} at block {layer}).")
            )
    where = np.flatnonzero(hidden(table, 0, 0)[1:])
    if len(where):
        share = table.health["largest"][0, 0, 1 + where]
        what = (
            f"{percent(share.min(), 0)} to {percent(share.max(), 0)} of the energy in one dimension"
            if share.min() > MASSIVE
            else "cosines of different sentences hardly differ"
        )
        found.append(
            f"Raw cosines of {table.systems[0]} say little in {len(where)} of {table.layers} "
            f"blocks, where massive activations hide the rest ({what}): believe the standardised "
            "states there, and train with align.states=standardised."
        )
        if len(table.forms) > 1 and not np.isnan(table.curve(MAIN, 0, 0)[1:]).all():
            with suppress(UserError):  # nothing is found in any block
                block = choose_for_training(table).layer
                found.append(f"By its rule align.layer=auto would take block {block}.")
    return found


def _best_elsewhere(curve: np.ndarray, layer: int) -> str:
    blocks = curve[1:]
    if np.isnan(blocks).all():
        return "."
    best = 1 + int(np.nanargmax(blocks))
    if best == layer:
        return ", its best block too."
    return f"; its own best block is {best}, with {percent(curve[best])}."
