"""Pictures of a probe: retrieval by layer, language by language, before and after, health.

groups = groups_of(table)
curves(table, Path('curves.png'), groups)
heatmap(table, Path('heatmap.png'), system=0, layer=14)
difference(table, Path('difference.png'), layer=14)
health(table, Path('health.png'))
forms(table, Path('states.png'))                       # raw beside standardised states
scatter(table, Path('tasks.png'), relations(table, scores), layer=14)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign.data.languages import language_name
from jaxalign.errors import UserError
from jaxalign.evaluate.draw import PALETTE
from jaxalign.probe.choice import choose_layer
from jaxalign.probe.reading import FORM_TITLES, Groups, curve_of, order_of
from jaxalign.probe.table import MAIN, Table, keyed
from jaxalign.probe.tasks import Relation

INK = "#222222"
CONTROL = "#9aa0a8"
LOSS, ZERO, GAIN = "#d55e00", "#f4f4f2", "#0072b2"  # of Okabe & Ito, as PALETTE
FAR = 30.0  # a course whose largest value is so many times the smallest gets a log axis
STYLES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
HEALTH = {
    "norm": "mean length of a state",
    "spread": "spread around the mean",
    "cosine": "cosine of different sentences",
    "contrast": "spread of those cosines",
    "largest": "energy in one dimension",
    "isoscore": "isoscore",
    "dimension": "effective dimensions",
    "sentence": "variance that is the sentence's",
}


def styles(systems: int) -> list[Any]:
    """A dash pattern for each system: the last one solid, as it is what one came for."""
    rest = [STYLES[1 + number % (len(STYLES) - 1)] for number in range(systems - 1)]
    return [*rest, STYLES[0]]


def curves(table: Table, path: Path, groups: Groups) -> None:
    """Writes a PNG of margin retrieval by layer: a colour per group, a dash per system."""
    with _figure(6.8, 4.0, path) as (figure, plt):
        axes = figure.subplots()
        layers = np.arange(table.layers + 1)
        colours = [INK, *(PALETTE[n % len(PALETTE)] for n in range(len(groups) - 1))]
        for s, style in enumerate(styles(len(table.systems))):
            for names, colour in zip(groups.values(), colours, strict=True):
                values = curve_of(table, MAIN, s, 0, names)
                axes.plot(layers, 100 * values, ls=style, color=colour, lw=1.6, ms=2.6, marker="o")
        for s, style in enumerate(styles(len(table.systems))):
            control = 100 * table.health["shuffled"][s, 0]
            axes.plot(layers, control, ls=style, color=CONTROL, lw=0.8)
        layer = choose_layer(table).layer
        axes.axvline(layer, color=INK, lw=0.7, ls=(0, (2, 3)), zorder=0)
        axes.annotate(
            f"block {layer}", (layer, 0), (3, 6), xycoords=("data", "axes fraction"), fontsize=8,
            textcoords="offset points",
        )  # fmt: skip
        # A little room below, or the control would lie on the axis.
        axes.set_ylim(bottom=-0.015 * axes.get_ylim()[1])
        axes.set_xlim(-0.3, table.layers + 0.3)
        axes.xaxis.set_major_locator(plt.MaxNLocator(9, integer=True))
        axes.set_xlabel("layer (0 = embeddings)")
        axes.set_ylabel("sentences that find their translation, %\n(margin score)")
        axes.grid(axis="y", color="#e4e4e4", lw=0.6)
        depth = axes.secondary_xaxis(
            "top", functions=(lambda x: 100 * x / table.layers, lambda x: x * table.layers / 100)
        )
        depth.set_xlabel("depth, %", fontsize=8)
        depth.tick_params(labelsize=8)
        depth.spines["top"].set_visible(False)
        _legend(figure, table, groups, colours)


def heatmap(table: Table, path: Path, system: int, layer: int) -> None:
    """Writes a PNG: how many sentences of the row's language find those of the column's."""
    with _squares(table, path) as (figure, axes):
        order = order_of(table, 0, choose_layer(table).layer)
        values = 100 * table.pairs[MAIN][system, 0, layer][np.ix_(order, order)]
        image = axes.imshow(values, cmap="cividis", vmin=0, vmax=100, interpolation="nearest")
        _languages(axes, table, order)
        what = f"{table.systems[system]}, layer {layer} of {table.layers}"
        figure.suptitle(f"Retrieval by margin score: {what}", fontsize=10)
        figure.colorbar(image, shrink=0.6, label="sentences found, %").outline.set_visible(False)


def difference(table: Table, path: Path, layer: int) -> None:
    """Writes a PNG: what the last system gained over the first in each direction.

    Raises:
      UserError: there is one system only.
    """
    if len(table.systems) < 2:
        raise UserError("a difference needs two systems, and this table has one")
    with _squares(table, path) as (figure, axes):
        from matplotlib.colors import LinearSegmentedColormap

        order = order_of(table, 0, choose_layer(table).layer)
        first, last = (100 * table.pairs[MAIN][system, 0, layer] for system in (0, -1))
        values = (last - first)[np.ix_(order, order)]
        most = max(1.0, np.nanmax(np.abs(values), initial=0.0))
        colours = LinearSegmentedColormap.from_list("gain", [LOSS, ZERO, GAIN])
        image = axes.imshow(values, cmap=colours, vmin=-most, vmax=most, interpolation="nearest")
        _languages(axes, table, order)
        names = f"{table.systems[-1]} \N{MINUS SIGN} {table.systems[0]}"
        figure.suptitle(f"{names}: margin score, layer {layer} of {table.layers}", fontsize=10)
        bar = figure.colorbar(image, shrink=0.6, label="difference, percentage points")
        bar.outline.set_visible(False)


def health(table: Table, path: Path) -> None:
    """Writes a PNG with a panel for each number of HEALTH."""
    with _figure(10.8, 4.6, path) as (figure, plt):
        panels = figure.subplots(2, 4, sharex=True)
        layer = choose_layer(table).layer
        for axes, (name, title) in zip(panels.flat, HEALTH.items(), strict=True):
            values = table.health[name][:, 0]
            for s, style in enumerate(styles(len(table.systems))):
                axes.plot(values[s], ls=style, color=PALETTE[s % len(PALETTE)], lw=1.5)
            axes.axvline(layer, color=INK, lw=0.7, ls=(0, (2, 3)), zorder=0)
            axes.set_title(title, fontsize=9, loc="left")
            axes.grid(axis="y", color="#e4e4e4", lw=0.6)
            axes.xaxis.set_major_locator(plt.MaxNLocator(5, integer=True))
            if np.nanmax(values, initial=0.0) > FAR * np.nanmin(values, initial=np.inf) > 0:
                axes.set_yscale("log")
            elif name in ("cosine", "largest"):
                axes.set_ylim(min(0, np.nanmin(values, initial=0.0)), 1)
            else:
                axes.set_ylim(bottom=0)
        figure.supxlabel(f"layer (0 = embeddings; dotted: block {layer})", fontsize=9)
        from matplotlib.lines import Line2D

        handles = [
            Line2D([], [], color=PALETTE[s % len(PALETTE)], ls=style, lw=1.5, label=name)
            for s, (name, style) in enumerate(
                zip(table.systems, styles(len(table.systems)), strict=True)
            )
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False)


def forms(table: Table, path: Path) -> None:
    """Writes a PNG: margin retrieval by layer, a colour for each form of the states.

    Raises:
      UserError: there is one form only.
    """
    if len(table.forms) < 2:
        raise UserError("a comparison needs states in two forms, and this table has raw ones only")
    with _figure(6.8, 3.8, path) as (figure, plt):
        axes = figure.subplots()
        layers = np.arange(table.layers + 1)
        for s, style in enumerate(styles(len(table.systems))):
            for form, colour in zip(table.forms, (INK, *PALETTE), strict=False):
                values = 100 * table.curve(keyed(MAIN, form), s, 0)
                axes.plot(layers, values, ls=style, color=colour, lw=1.6, ms=2.6, marker="o")
                if s == 0 and not np.isnan(values[1:]).all():
                    best = 1 + int(np.nanargmax(values[1:]))
                    axes.plot(best, values[best], "o", ms=7, mfc="none", mec=colour, mew=1.2)
                    axes.annotate(
                        f"{best}", (best, values[best]), (0, 7), textcoords="offset points",
                        ha="center", fontsize=8, color=colour,
                    )  # fmt: skip
        axes.set_ylim(bottom=0)
        axes.margins(y=0.12)
        axes.set_xlim(-0.3, table.layers + 0.3)
        axes.xaxis.set_major_locator(plt.MaxNLocator(9, integer=True))
        axes.set_xlabel("layer (0 = embeddings; circle: best block of the first system)")
        axes.set_ylabel("sentences that find their translation, %\n(margin score)")
        axes.grid(axis="y", color="#e4e4e4", lw=0.6)
        from matplotlib.lines import Line2D

        keys: list[Any] = [
            Line2D([], [], color=colour, lw=2.4, label=FORM_TITLES[form])
            for form, colour in zip(table.forms, (INK, *PALETTE), strict=False)
        ]
        if len(table.systems) > 1:
            keys += [
                Line2D([], [], color=INK, ls=style, lw=1.4, label=name)
                for style, name in zip(styles(len(table.systems)), table.systems, strict=True)
            ]
        figure.legend(handles=keys, loc="outside upper center", ncols=4, frameon=False, fontsize=8)


def scatter(table: Table, path: Path, related: Sequence[Relation], layer: int) -> None:
    """Writes a PNG: a panel per system and measure, a point per language."""
    across = min(3, len(related))
    down = -(-len(related) // across)
    with _figure(3.3 * across, 3.0 * down, path) as (figure, _):
        panels = figure.subplots(down, across, squeeze=False).flat
        for axes, relation in zip(panels, related, strict=False):
            x, y = 100 * relation.alignment[layer], relation.score
            axes.plot(x, y, "o", color=PALETTE[0], ms=4)
            for code, *at in zip(relation.languages, x, y, strict=True):
                axes.annotate(code, at, (4, 3), textcoords="offset points", fontsize=7, color=INK)
            found = relation.by_layer[layer]
            title = f"{relation.system}: {relation.measure}"
            if found.pearson is not None:
                line = np.polynomial.Polynomial.fit(x, y, 1)
                ends = np.array([x.min(), x.max()])
                axes.plot(ends, line(ends), color=CONTROL, lw=1, zorder=0)
                title += f"\nPearson {found.pearson:.2f}, p = {found.pearson_p:.2g}"
            axes.set_title(title, fontsize=9, loc="left")
            axes.margins(0.12)
            axes.grid(color="#ececec", lw=0.6)
        for axes in list(panels):
            axes.set_visible(False)
        figure.supxlabel(
            f"retrieval with {label(table.pivot)} at layer {layer}, % (margin score)", fontsize=8
        )
        figure.supylabel("task score", fontsize=8)


@contextmanager
def _figure(width: float, height: float, path: Path) -> Iterator[tuple[Any, Any]]:
    """A figure in the house's style, written when left."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style: Any = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
    with plt.rc_context(style):
        figure = plt.figure(figsize=(width, height), layout="constrained")
        try:
            yield figure, plt
            figure.savefig(path, dpi=160, bbox_inches="tight", pad_inches=0.08)
        finally:
            plt.close(figure)


@contextmanager
def _squares(table: Table, path: Path) -> Iterator[tuple[Any, Any]]:
    side = min(24.0, max(2.4, 0.19 * len(table.languages)))
    with _figure(side + 2.4, side + 1.0, path) as (figure, _):
        yield figure, figure.subplots()


def _languages(axes: Any, table: Table, order: list[int]) -> None:
    codes = [table.languages[place] for place in order]
    axes.set_xticks(range(len(codes)), codes, rotation=90, fontsize=7)
    axes.set_yticks(range(len(codes)), [label(code) for code in codes], fontsize=7)
    axes.tick_params(length=0)
    axes.set_xlabel("into", fontsize=8)
    axes.set_ylabel("from", fontsize=8)
    for spine in axes.spines.values():
        spine.set_visible(False)
    # White seams let the eye follow a row.
    for place, _ in pairwise(range(len(codes))):
        axes.axhline(place + 0.5, color="white", lw=0.4)
        axes.axvline(place + 0.5, color="white", lw=0.4)


def label(code: str) -> str:
    """'Welsh cy'; the code alone where it has no name."""
    name = language_name(code)
    return code if name == code else f"{name} {code}"


def _legend(figure: Any, table: Table, groups: Groups, colours: list[str]) -> None:
    from matplotlib.lines import Line2D

    def words(group: str) -> str:
        inside = groups[group]
        return group if len(inside) == 1 else f"{group} ({len(inside)})"

    keys: list[Any] = [
        Line2D([], [], color=colour, lw=2.4, label=words(group))
        for group, colour in zip(groups, colours, strict=True)
    ]
    keys.append(Line2D([], [], color=CONTROL, lw=0.8, label="shuffled pairs"))
    if len(table.systems) > 1:
        keys += [
            Line2D([], [], color=INK, ls=style, lw=1.4, label=name)
            for style, name in zip(styles(len(table.systems)), table.systems, strict=True)
        ]
    figure.legend(handles=keys, loc="outside upper center", ncols=4, frameon=False, fontsize=8)
