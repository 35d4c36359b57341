"""A picture in the style of the house: few lines, colours for colour-blind readers, too.

with picture(Path("curves.png"), 6.8, 4.0) as figure:
    figure.subplots().plot([1, 2, 3], color=PALETTE[0])
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")  # Okabe & Ito's
INK, REST, GRID = "#222222", "#8a8f98", "#e4e4e4"
DOTTED = (0, (2, 3))


@contextmanager
def picture(
    path: Path,
    width: float,
    height: float,
    *,
    dpi: int = 160,
    style: Mapping[str, Any] | None = None,
) -> Iterator[Figure]:
    """A figure that is written to `path` on leaving.

    Args:
      path: PNG, overwritten.
      width: in inches.
      height: in inches.
      dpi: dots per inch.
      style: of matplotlib's `rcParams`, what differs from the style of the house.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    house: Any = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
    with rc_context(house | dict(style or {})):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        figure.savefig(path, dpi=dpi)
