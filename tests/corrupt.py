"""Damage as disks and copies do it: files cut short, emptied, lost, or with one bit changed.

for damage in sweep(folder, flips=200):
    with damage:                 # the files are as they were afterwards
        ...read it...
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass
class Damage(contextlib.AbstractContextManager):
    """One file that is not what was written."""

    path: Path
    how: str  # cut | empty | lost | bit

    bit: int = 0

    def __enter__(self):
        self._before = self.path.read_bytes()
        content = bytearray(self._before)
        if self.how == "lost":
            self.path.unlink()
            return self
        if self.how == "cut":
            del content[len(content) // 2 :]
        elif self.how == "empty":
            content.clear()
        else:
            content[self.bit // 8] ^= 1 << self.bit % 8
        self.path.write_bytes(content)
        return self

    def __exit__(self, *_):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_bytes(self._before)

    def __str__(self):
        return f"{self.how} {self.path.name}" + (f" at bit {self.bit}" if self.how == "bit" else "")


def files(folder: Path) -> list[Path]:
    """Files with something in them."""
    return sorted(p for p in Path(folder).rglob("*") if p.is_file() and p.stat().st_size)


def sweep(folder: Path, flips: int, seed: int = 0) -> Iterator[Damage]:
    """Every file cut, emptied and lost; then random bits, each file as often as the others."""
    found = files(folder)
    for path in found:
        for how in ("cut", "empty", "lost"):
            yield Damage(path, how)
    numbers = np.random.default_rng(seed)
    for number in range(flips):
        path = found[number % len(found)]
        yield Damage(path, "bit", int(numbers.integers(8 * path.stat().st_size)))
