"""Pictures of a probe: retrieval by layer, language by language, before and after, health.

groups = groups_of(table)
curves(table, Path('curves.png'), groups)
heatmap(table, Path('heatmap.png'), system=0, layer=14)
difference(table, Path('difference.png'), layer=14)
health(table, Path('health.png'))
forms(table, Path('states.png'))                       # raw and standardised states
scatter(table, Path('tasks.png'), relations(table, scores), layer=14)
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign.data.languages import language_name
from jaxalign.errors import UserError
from jaxalign.picture import DOTTED, GRID, INK, PALETTE, picture
from jaxalign.probe.choice import choose_layer
from jaxalign.probe.reading import FORM_TITLES, Groups, curve_of, order_of
from jaxalign.probe.table import MAIN, Table, keyed
from jaxalign.probe.tasks import Relation

CONTROL = "#9aa0a8"
LOSS, ZERO, GAIN = PALETTE[5], "#f4f4f2", PALETTE[0]
FAR = 30.0  # a course whose largest value is so many times the smallest gets a log axis
STYLES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
CURVE: dict[str, Any] = {"lw": 1.6, "ms": 2.6, "marker": "o"}
CLOSE = {"savefig.bbox": "tight", "savefig.pad_inches": 0.08}
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


def curves(table: Table, path: Path, groups: Groups) -> None:
    """Writes a PNG of margin retrieval by layer: a colour per group, a dash per system."""
    with picture(path, 6.8, 4.0, style=CLOSE) as figure:
        axes = _by_layer(figure, table, "layer (0 = embeddings)")
        colours = dict(zip(groups, (INK, *PALETTE * len(groups)), strict=False))
        for s, style in enumerate(_dashes(table)):
            for group, colour in colours.items():
                values = curve_of(table, MAIN, s, 0, groups[group])
                axes.plot(100 * values, ls=style, color=colour, **CURVE)
        for s, style in enumerate(_dashes(table)):
            axes.plot(100 * table.health["shuffled"][s, 0], ls=style, color=CONTROL, lw=0.8)
        layer = choose_layer(table).layer
        axes.axvline(layer, color=INK, lw=0.7, ls=DOTTED, zorder=0)
        axes.annotate(
            f"block {layer}", (layer, 0), (3, 6), xycoords=("data", "axes fraction"), fontsize=8,
            textcoords="offset points",
        )  # fmt: skip
        # A little room below, or the control would be on the axis.
        axes.set_ylim(bottom=-0.015 * axes.get_ylim()[1])
        depth = axes.secondary_xaxis(
            "top", functions=(lambda x: 100 * x / table.layers, lambda x: x * table.layers / 100)
        )
        depth.set_xlabel("depth, %", fontsize=8)
        depth.tick_params(labelsize=8)
        depth.spines["top"].set_visible(False)
        inside = {group: len(names) for group, names in groups.items()}
        named = {
            group if number == 1 else f"{group} ({number})": {"color": colours[group], "lw": 2.4}
            for group, number in inside.items()
        }
        _legend(figure, table, named | {"shuffled pairs": {"color": CONTROL, "lw": 0.8}})


def heatmap(table: Table, path: Path, system: int, layer: int) -> None:
    """Writes a PNG: how many sentences of the row's language find those of the column's."""
    values = 100 * table.pairs[MAIN][system, 0, layer]
    what = f"{table.systems[system]}, layer {layer} of {table.layers}"
    _squares(table, path, values, "cividis", (0, 100), f"Retrieval by margin score: {what}",
             "sentences found, %")  # fmt: skip


def difference(table: Table, path: Path, layer: int) -> None:
    """Writes a PNG: what the last system gained over the first in each direction.

    Raises:
      UserError: there is one system only.
    """
    if len(table.systems) < 2:
        raise UserError("a difference needs two systems, and this table has one")
    from matplotlib.colors import LinearSegmentedColormap

    first, last = (100 * table.pairs[MAIN][system, 0, layer] for system in (0, -1))
    most = max(1.0, np.nanmax(np.abs(last - first), initial=0.0))
    colours = LinearSegmentedColormap.from_list("gain", [LOSS, ZERO, GAIN])
    names = f"{table.systems[-1]} \N{MINUS SIGN} {table.systems[0]}"
    _squares(table, path, last - first, colours, (-most, most),
             f"{names}: margin score, layer {layer} of {table.layers}",
             "difference, percentage points")  # fmt: skip


def health(table: Table, path: Path) -> None:
    """Writes a PNG with a panel for each number of HEALTH."""
    from matplotlib.ticker import MaxNLocator

    with picture(path, 10.8, 4.6, style=CLOSE) as figure:
        panels = figure.subplots(2, 4, sharex=True)
        layer = choose_layer(table).layer
        looks = [
            {"color": colour, "ls": style, "lw": 1.5}
            for colour, style in zip(cycle(PALETTE), _dashes(table), strict=False)
        ]
        for axes, (name, title) in zip(panels.flat, HEALTH.items(), strict=True):
            values = table.health[name][:, 0]
            for course, look in zip(values, looks, strict=True):
                axes.plot(course, **look)
            axes.axvline(layer, color=INK, lw=0.7, ls=DOTTED, zorder=0)
            axes.set_title(title, fontsize=9, loc="left")
            axes.grid(axis="y", color=GRID, lw=0.6)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            if np.nanmax(values, initial=0.0) > FAR * np.nanmin(values, initial=np.inf) > 0:
                axes.set_yscale("log")
            elif name in ("cosine", "largest"):
                axes.set_ylim(min(0, np.nanmin(values, initial=0.0)), 1)
            else:
                axes.set_ylim(bottom=0)
        figure.supxlabel(f"layer (0 = embeddings; dotted: block {layer})", fontsize=9)
        _keys(figure, list(zip(table.systems, looks, strict=True)), 9)


def forms(table: Table, path: Path) -> None:
    """Writes a PNG: margin retrieval by layer, a colour for each form of the states.

    Raises:
      UserError: there is one form only.
    """
    if len(table.forms) < 2:
        raise UserError("a comparison needs states in two forms, and this table has raw ones only")
    with picture(path, 6.8, 3.8, style=CLOSE) as figure:
        words = "layer (0 = embeddings; circle: best block of the first system)"
        axes = _by_layer(figure, table, words)
        colours = dict(zip(table.forms, (INK, *PALETTE), strict=False))
        for s, style in enumerate(_dashes(table)):
            for form, colour in colours.items():
                values = 100 * table.curve(keyed(MAIN, form), s, 0)
                axes.plot(values, ls=style, color=colour, **CURVE)
                if s == 0 and not np.isnan(values[1:]).all():
                    best = 1 + int(np.nanargmax(values[1:]))
                    axes.plot(best, values[best], "o", ms=7, mfc="none", mec=colour, mew=1.2)
                    axes.annotate(
                        f"{best}", (best, values[best]), (0, 7), textcoords="offset points",
                        ha="center", fontsize=8, color=colour,
                    )  # fmt: skip
        axes.set_ylim(bottom=0)
        axes.margins(y=0.12)
        named = {FORM_TITLES[form]: {"color": it, "lw": 2.4} for form, it in colours.items()}
        _legend(figure, table, named)


def scatter(table: Table, path: Path, related: Sequence[Relation], layer: int) -> None:
    """Writes a PNG: a panel per system and measure, a point per language."""
    across = min(3, len(related))
    down = -(-len(related) // across)
    with picture(path, 3.3 * across, 3.0 * down, style=CLOSE) as figure:
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


def label(code: str) -> str:
    """'Welsh cy'; the code alone where it has no name."""
    name = language_name(code)
    return code if name == code else f"{name} {code}"


def _dashes(table: Table) -> list[Any]:
    """A dash pattern for each system: the last one solid, as it is what one came for."""
    rest = [STYLES[1 + number % (len(STYLES) - 1)] for number in range(len(table.systems) - 1)]
    return [*rest, STYLES[0]]


def _by_layer(figure: Any, table: Table, words: str) -> Any:
    """Axes of retrieval by layer."""
    from matplotlib.ticker import MaxNLocator

    axes = figure.subplots()
    axes.set_xlim(-0.3, table.layers + 0.3)
    axes.xaxis.set_major_locator(MaxNLocator(9, integer=True))
    axes.set_xlabel(words)
    axes.set_ylabel("sentences that find their translation, %\n(margin score)")
    axes.grid(axis="y", color=GRID, lw=0.6)
    return axes


def _squares(
    table: Table,
    path: Path,
    values: np.ndarray,  # [G, G]
    colours: Any,
    ends: tuple[float, float],
    title: str,
    words: str,
) -> None:
    """A square for each direction, alike languages together."""
    side = min(24.0, max(2.4, 0.19 * len(table.languages)))
    order = order_of(table, 0, choose_layer(table).layer)
    codes = [table.languages[place] for place in order]
    with picture(path, side + 2.4, side + 1.0, style=CLOSE) as figure:
        axes = figure.subplots()
        image = axes.imshow(
            values[np.ix_(order, order)], cmap=colours, vmin=ends[0], vmax=ends[1],
            interpolation="nearest",
        )  # fmt: skip
        axes.set_xticks(range(len(codes)), codes, rotation=90, fontsize=7)
        axes.set_yticks(range(len(codes)), [label(code) for code in codes], fontsize=7)
        axes.tick_params(length=0)
        axes.set_xlabel("into", fontsize=8)
        axes.set_ylabel("from", fontsize=8)
        axes.spines[:].set_visible(False)
        # White seams let the eye follow a row.
        for place in range(len(codes) - 1):
            axes.axhline(place + 0.5, color="white", lw=0.4)
            axes.axvline(place + 0.5, color="white", lw=0.4)
        figure.suptitle(title, fontsize=10)
        figure.colorbar(image, shrink=0.6, label=words).outline.set_visible(False)


def _legend(figure: Any, table: Table, looks: dict[str, dict[str, Any]]) -> None:
    """Keys of the colours, then of the systems' dashes."""
    dashes = zip(table.systems, _dashes(table), strict=True) if len(table.systems) > 1 else ()
    systems = {name: {"color": INK, "ls": style, "lw": 1.4} for name, style in dashes}
    _keys(figure, [*looks.items(), *systems.items()], 8)


def _keys(figure: Any, looks: Sequence[tuple[str, dict[str, Any]]], size: int) -> None:
    from matplotlib.lines import Line2D

    keys = [Line2D([], [], label=name, **look) for name, look in looks]
    figure.legend(handles=keys, loc="outside upper center", ncols=4, frameon=False, fontsize=size)
