"""What a compiled program does, read from its optimised HLO: work, traffic, the compiler's cycles.

XLA's own `cost_analysis()` counts the body of a loop once and a custom call as nothing. Here every
instruction counts as often as the loops around it turn; a loop whose count cannot be read is named
in `Cost.unknown` and counted once.

    cost = measure(compiled.as_text(), kernels=attention_flops)
    cost.flops, cost.cycles                          # of one device
    cost.collectives['all-gather'].bytes
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from jaxalign.plan.hlo import Computation, Op, dims, group, meetings, parse, size, window

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)

# Calls that something else than the chip's main core runs meanwhile: a SparseCore, a stream.
ASIDE = ("call-start", "async-start")

ABSURD = 1e7  # cycles of a product that the chip would need a fiftieth of: an estimate gone wrong


@dataclass
class Traffic:
    """What one kind of collective moves."""

    count: float = 0.0
    bytes: float = 0.0  # sent by one device
    hidden: float = 0.0  # of these, in asynchronous calls, during which the chip computes

    def add(self, other: Traffic, times: float) -> None:
        """Adds another's, `times` over."""
        self.count += times * other.count
        self.bytes += times * other.bytes
        self.hidden += times * other.hidden


@dataclass
class Cost:
    """The price of one program on one device."""

    flops: float = 0.0  # of matrix products, convolutions and kernels
    kernel_flops: float = 0.0  # of these, in custom calls
    cycles: float = 0.0  # the compiler's estimate, kernels and unestimated collectives left out
    collectives: dict[str, Traffic] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)  # loops and kernels that could not be counted

    def add(self, other: Cost, times: float = 1.0) -> None:
        """Adds another's, `times` over."""
        self.flops += times * other.flops
        self.kernel_flops += times * other.kernel_flops
        self.cycles += times * other.cycles
        for kind, traffic in other.collectives.items():
            self.collectives.setdefault(kind, Traffic()).add(traffic, times)
        self.unknown += [name for name in other.unknown if name not in self.unknown]

    @property
    def traffic(self) -> float:
        """Bytes that one device sends."""
        return sum(traffic.bytes for traffic in self.collectives.values())


Kernels = Callable[[Op, "list[str]"], float | None]  # (call, shapes of its operands) -> FLOPs


def measure(
    text: str,
    kernels: Kernels = lambda op, shapes: None,
    open_loops: int | None = None,
    rate: float = 0.0,
) -> Cost:
    """The cost of an optimised, scheduled HLO module.

    Args:
      text: `compiled.as_text()`.
      kernels: FLOPs of a custom call that runs a kernel, or None where it is not known.
      open_loops: turns of a loop whose count cannot be read; None: it is named in `unknown`.
      rate: FLOPs of the chip in a cycle; a product whose cycles cannot be true at it is
        named in `unknown`. 0: cycles are not looked at.
    """
    computations, entry = parse(text)
    return _Reader(computations, kernels, open_loops, rate).cost(entry)


class _Reader:
    def __init__(
        self,
        computations: dict[str, Computation],
        kernels: Kernels,
        open_loops: int | None,
        rate: float,
    ) -> None:
        self._all, self._kernels, self._open, self._rate = computations, kernels, open_loops, rate
        self._known: dict[str, Cost] = {}

    def cost(self, name: str) -> Cost:
        """The cost of one run of a computation."""
        if name not in self._known:
            total = Cost()
            for op in self._all[name].ops.values():
                for part, times in self._parts(name, op):
                    total.add(part, times)
            for kind, traffic in self._moves(name).values():
                total.collectives.setdefault(kind, Traffic()).add(traffic, 1.0)
            self._known[name] = total
        return self._known[name]

    def _moves(self, name: str) -> dict[str, tuple[str, Traffic]]:
        """Collectives by channel, those in fusions included.

        One that the compiler weaves into the computation next to it appears in several fusions: its
        start, what runs meanwhile, its end.
        """
        found: dict[str, tuple[str, Traffic]] = {}
        for op in self._all[name].ops.values():
            if op.kind == "fusion":
                for channel, (kind, traffic) in self._moves(op.attribute("calls") or "").items():
                    woven = Traffic(1.0, traffic.bytes, traffic.bytes if channel in found else 0.0)
                    found[channel] = (kind, woven)
                continue
            if op.kind in ASIDE:
                for channel, (kind, traffic) in self._moves(_target(op)).items():
                    found[channel] = (kind, Traffic(1.0, traffic.bytes, traffic.bytes))
                continue
            kind = op.kind.removesuffix("-start")
            if kind in COLLECTIVES:
                moved = self._moved(name, op, kind)
                hidden = moved if op.kind != kind else 0.0
                found[op.attribute("channel_id") or op.name] = (kind, Traffic(1.0, moved, hidden))
        return found

    def _parts(self, name: str, op: Op) -> Iterator[tuple[Cost, float]]:
        own = Cost(cycles=_cycles(op))
        if op.kind == "while":
            turns = self._turns(name, op)
            turns = self._open if turns is None else turns
            if turns is None:
                own.unknown.append(f"loop {op.name}")
                turns = 1
            body, condition = op.attribute("body"), op.attribute("condition")
            yield self.cost(body or ""), turns
            yield self.cost(condition or ""), turns + 1
        elif op.kind == "fusion":
            inside = self.cost(op.attribute("calls") or "")
            # Cycles are those of the fusion as a whole.
            own.flops, own.kernel_flops = inside.flops, inside.kernel_flops
            own.unknown = inside.unknown + self._nonsense(op, own)
        elif op.kind == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", op.attributes)
            names = re.findall(r"[\w.\-]+", branches[1]) if branches else []
            names = names or [
                op.attribute(f"{side}_computation") or "" for side in ("true", "false")
            ]
            yield (
                max((self.cost(branch) for branch in names), key=lambda c: c.cycles + c.flops),
                1.0,
            )
        elif op.kind == "call":
            yield self.cost(_target(op)), 1.0
        elif op.kind in ASIDE:
            inside = self.cost(_target(op))  # its collectives are among `_moves`
            own.flops, own.kernel_flops = inside.flops, inside.kernel_flops
            own.unknown = list(inside.unknown)
        elif op.kind == "dot":
            own.flops = self._dot(name, op)
        elif op.kind == "convolution":
            own.flops = self._convolution(name, op)
        elif op.kind == "custom-call" and "__cublas$" in op.attributes:
            own.flops = self._dot(name, op)
        elif op.kind == "custom-call":
            self._kernel(name, op, own)
        yield own, 1.0

    def _nonsense(self, op: Op, own: Cost) -> list[str]:
        """The estimate's name, where it beats the chip or takes it for a pocket calculator."""
        if not (self._rate and own.flops and own.cycles):
            return []
        needed = own.flops / self._rate
        slow = own.cycles > ABSURD and own.cycles > 50 * needed
        return [f"estimate {op.name}"] if slow or own.cycles < 0.9 * needed else []

    def _shape(self, name: str, operand: str) -> str:
        return self._all[name].ops[operand].shape

    def _dot(self, name: str, op: Op) -> float:
        left = dims(self._shape(name, op.operands[0]))
        # XLA's own word, or what it hands to cuBLAS.
        named = r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)'
        found = re.search(named, op.attributes)
        inner = math.prod(left[int(n)] for n in re.findall(r"\d+", found[1])) if found else 1
        return 2.0 * math.prod(dims(op.shape)) * inner

    def _convolution(self, name: str, op: Op) -> float:
        """2 x products that meet real numbers: places in the padding are not counted."""
        left, right = (dims(self._shape(name, operand)) for operand in op.operands[:2])
        out = dims(op.shape)
        labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.attributes)
        if not labels:
            return 0.0
        places = window(op.attributes, sum(c.isdigit() for c in labels[1]))
        total = 2.0 * out[labels[3].index("b")] * out[labels[3].index("f")]
        total *= right[labels[2].index("i")]
        for place, (_, stride, low, _, dilated, spread) in enumerate(places):
            spot = str(place)
            total *= meetings(
                left[labels[1].index(spot)],
                right[labels[2].index(spot)],
                out[labels[3].index(spot)],
                (stride, low, dilated, spread),
            )
        groups = re.search(r"batch_group_count=(\d+)", op.attributes)
        return total / (int(groups[1]) if groups else 1)

    def _kernel(self, name: str, op: Op, own: Cost) -> None:
        if "tpu_custom_call" not in op.attributes and "cudnn" not in op.attributes:
            return
        flops = self._kernels(op, [self._shape(name, operand) for operand in op.operands])
        if flops is None:
            own.unknown.append(f"kernel {op.name}")
        own.flops = own.kernel_flops = flops or 0.0

    def _moved(self, name: str, op: Op, base: str) -> float:
        """Bytes that a device sends: rings, or as many by any other way (Chan et al. 2007)."""
        given = sum(size(self._shape(name, operand)) for operand in op.operands)
        if base == "collective-permute":
            return given
        ways = group(op.attributes)
        share = (ways - 1) / ways if ways else 1.0
        if base == "all-gather":
            return given * (ways - 1 if ways else 1)
        return given * share * (2 if base == "all-reduce" else 1)

    def _turns(self, name: str, op: Op) -> int | None:
        """How often a loop turns: as the compiler says, or start, step and bound of its counter."""
        known = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', op.attributes)
        if known:
            return int(known[1])
        condition = self._all[op.attribute("condition") or ""]
        test = _through(condition, condition.root)
        if test is None or test.kind != "compare":
            return None
        start_tuple = self._all[name].ops[op.operands[0]]

        def initial(index: int) -> int | None:
            if start_tuple.kind != "tuple":
                return None
            return self._constant(name, start_tuple.operands[index])

        values = []
        counter = None
        for operand in test.operands:
            index = _element(condition, operand)
            if index is None:
                values.append(self._constant(self._name(condition), operand))
                continue
            body = self._all[op.attribute("body") or ""]
            step = self._step(body, index)
            if step:
                counter = (len(values), initial(index), step)
                values.append(None)
            else:
                values.append(initial(index))
        if counter is None or len(values) != 2:
            return None
        place, start, step = counter
        bound = values[1 - place]
        if start is None or bound is None:
            return None
        direction = test.attribute("direction")
        inclusive = direction in ("LE", "GE")
        distance = (bound - start if step > 0 else start - bound) + inclusive
        return max(0, -(-distance // abs(step)))

    def _name(self, computation: Computation) -> str:
        return next(name for name, found in self._all.items() if found is computation)

    def _constant(self, name: str, operand: str, depth: int = 0) -> int | None:
        op = self._all[name].ops.get(operand)
        if op is None or depth > 8:
            return None
        if op.kind == "constant":
            return int(op.text) if re.fullmatch(r"-?\d+", op.text) else None
        if op.kind in ("copy", "bitcast", "convert", "reshape") and op.operands:
            return self._constant(name, op.operands[0], depth + 1)
        return None

    def _step(self, body: Computation, index: int) -> int | None:
        """What one turn adds to element `index` of the loop's tuple."""
        root = body.ops[body.root]
        if root.kind != "tuple" or index >= len(root.operands):
            return None
        op = body.ops[root.operands[index]]
        name = self._name(body)
        while op.kind in ("copy", "bitcast") and op.operands:
            op = body.ops[op.operands[0]]
        if op.kind == "fusion":
            inner = self._all[op.attribute("calls") or ""]
            name, op = self._name(inner), inner.ops[inner.root]
        if op.kind not in ("add", "subtract"):
            return None
        steps = [self._constant(name, operand) for operand in op.operands]
        known = [step for step in steps if step is not None]
        return (known[0] if op.kind == "add" else -known[0]) if known else None


def _through(computation: Computation, name: str) -> Op | None:
    op = computation.ops.get(name)
    while op is not None and op.kind in ("copy", "bitcast") and op.operands:
        op = computation.ops.get(op.operands[0])
    return op


def _element(computation: Computation, operand: str) -> int | None:
    """Which element of the loop's tuple an operand of its condition is."""
    op = _through(computation, operand)
    if op is None or op.kind != "get-tuple-element":
        return None
    return int(op.attribute("index") or 0)


def _target(op: Op) -> str:
    """The computation that a call runs."""
    return op.attribute("to_apply") or op.attribute("calls") or ""


def _cycles(op: Op) -> float:
    found = re.search(r'"estimated_cycles":"(\d+)"', op.attributes)
    return float(found[1]) if found else 0.0
