"""The text of a compiled program (optimised HLO), read into instructions.

computations, entry = parse(compiled.as_text())
computations[entry].ops['fusion.3'].kind         # 'fusion'
size('bf16[16,32]{1,0}')                         # 1024 bytes
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

WIDTHS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "token": 0}  # bits; else in name


@dataclass(frozen=True)
class Op:
    """One instruction."""

    name: str
    kind: str
    shape: str
    operands: tuple[str, ...]
    text: str  # what stands in the parentheses
    attributes: str

    def attribute(self, key: str) -> str | None:
        """The word after `key=`."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None


@dataclass
class Computation:
    """Instructions by name, in order."""

    ops: dict[str, Op] = field(default_factory=dict)
    root: str = ""


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Computations by name, and the entry's name."""
    computations: dict[str, Computation] = {}
    current, entry = Computation(), ""
    for line in text.splitlines():
        if line and not line[0].isspace():
            found = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
            if found:
                current = computations[found[2]] = Computation()
                entry = found[2] if found[1] else entry
            continue
        op = _op(line)
        if op:
            current.ops[op.name] = op
            if line.lstrip().startswith("ROOT"):
                current.root = op.name
    return computations, entry


def size(shape: str) -> float:
    """Bytes of a shape, tuples summed; layouts are not looked at."""
    total = 0.0
    for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape):
        bits = WIDTHS.get(kind) or int(re.sub(r"\D", "", kind[:3]) or 0)
        total += bits / 8 * math.prod(int(n) for n in dims.split(",") if n)
    return total


def dims(shape: str) -> list[int]:
    """The dimensions of an array's shape."""
    found = re.search(r"\[([\d,]*)\]", shape)
    return [int(n) for n in found[1].split(",") if n] if found else []


def group(attributes: str) -> int:
    """Devices that take part in one group of a collective; 0 where it is not given."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    if listed:
        return len(listed[1].split(","))
    counted = re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes)
    if counted:
        return int(counted[2])
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes)
    if named:
        sizes = dict(re.findall(r"'([\w]+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([\w]+)'", named[2]))
    return 0


def window(attributes: str, spatial: int) -> list[tuple[int, int, int, int, int, int]]:
    """(size, stride, padding low and high, base dilation, window dilation) of each dimension."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    words = dict(word.split("=") for word in found[1].split()) if found else {}

    def numbers(key: str, default: str) -> list[str]:
        return words[key].split("x") if key in words else [default] * spatial

    rows = zip(
        numbers("size", "1"),
        numbers("stride", "1"),
        numbers("pad", "0_0"),
        numbers("lhs_dilate", "1"),
        numbers("rhs_dilate", "1"),
        strict=True,
    )
    found_rows = []
    for size, stride, pad, base, spread in rows:
        low, _, high = pad.partition("_")
        found_rows.append((int(size), int(stride), int(low), int(high), int(base), int(spread)))
    return found_rows


def meetings(given: int, width: int, out: int, window: tuple[int, int, int, int]) -> int:
    """How many (output, window) places of one dimension read a real number of the input."""
    stride, low, dilated, spread = window
    last = (given - 1) * dilated
    count = 0
    for place in range(out):
        for offset in range(width):
            at = place * stride + offset * spread - low
            count += 0 <= at <= last and at % dilated == 0
    return count


def _op(line: str) -> Op | None:
    head = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    rest = line[head.end() :]
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    kind, start = rest.split("(", 1)[0], rest.index("(")
    end = start + _closing(rest[start:])
    inside = rest[start + 1 : end - 1]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Op(head[1], kind, shape, operands, inside, rest[end:])


def _closing(text: str) -> int:
    """The place behind the parenthesis that closes the first one."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return place + 1
    raise ValueError(f"unbalanced: {text[:80]}")
