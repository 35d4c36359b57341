"""The tiny model, for every test of this folder."""

from tests.tiny import base

__all__ = ["base"]
