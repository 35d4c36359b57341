"""Freed memory that the process keeps, on Linux.

    keep_freed_memory()              # once, before the work

XLA's CPU programs take what they need for intermediate values anew in every call. What is above
32 MB the C library fetches from the system and returns each time, and the system hands it out in
zeroed pages of 4 KB: in retrieval between languages that took a third of the time (two cores,
988 sentences, 630 pairs of languages: 23.5 s without this, 16.5 s with it).
"""

from __future__ import annotations

import contextlib
import ctypes

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # as glibc's malloc.h numbers what `mallopt` sets
KEPT = 2**31 - 1  # bytes at the heap's end that are not returned; the largest number it takes


def keep_freed_memory() -> bool:
    """Asks the C library's allocator for it; whether it understood."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # other systems, other libraries
        mallopt = ctypes.CDLL(None).mallopt
        return bool(mallopt(MMAP_MAX, 0) and mallopt(TRIM_THRESHOLD, KEPT))
    return False
