"""The tiny model and its rows, for every test of this folder."""

from tests.tiny import base, configure, rows

__all__ = ["base", "configure", "rows"]
