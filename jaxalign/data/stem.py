"""What texts have in common at their start: a tree of tokens, each of which is computed once.

A chat template writes the same system turn and headers into every row; under a causal mask their
states do not depend on what follows. `find` looks for such starts in the tokens themselves, so
nobody says where the template ends.

    stem = find(rows, texts=32)                      # 32 of them share a sequence
    stem.tokens                                      # [P] of all nodes, parents before children
    stem.start(row)                                  # Start(sees=0b11, depth=95): two nodes of it
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

ROLE_BITS = 2
SAMPLE = 4096  # rows from which the tree is found
MOST = 31  # nodes: each is a bit of an int32, whose sign stays free
LEAST_USES = 1.5  # texts of a sequence that go through a node, on average
LEAST_GAIN = 0.01  # of a sequence's tokens, that a node saves


class Start(NamedTuple):
    """Where in the tree a text begins."""

    sees: int = 0  # the bits of the nodes that it goes through
    depth: int = 0  # their tokens


class Shareable(NamedTuple):
    """A text, as far as others may share it."""

    tokens: np.ndarray  # int32 [t]
    limit: int  # of its tokens
    roles: np.ndarray | None = None  # int8 [t]; tokens are shared where these agree, too


@dataclass(frozen=True)
class Node:
    """A run of tokens after its parent's."""

    words: tuple[int, ...]  # tokens, each with its role
    depth: int  # tokens before it
    parent: int | None
    uses: float  # texts of a sequence, on average

    @property
    def gain(self) -> float:
        """Tokens of a sequence that it saves."""
        return len(self.words) * (self.uses - 1)


@dataclass(frozen=True)
class Stem:
    """The shared starts; empty where nothing pays."""

    nodes: tuple[Node, ...] = ()

    @property
    def tokens(self) -> np.ndarray:
        """int32 [P]."""
        return self._all(lambda _, node: [word >> ROLE_BITS for word in node.words])

    @property
    def roles(self) -> np.ndarray:
        """int32 [P]."""
        return self._all(lambda _, node: [word & (1 << ROLE_BITS) - 1 for word in node.words])

    @property
    def bits(self) -> np.ndarray:
        """int32 [P]: the bit of each token's node."""
        return self._all(lambda number, node: [1 << number] * len(node.words))

    @property
    def sees(self) -> np.ndarray:
        """int32 [P]: the bits of its node and of those above it."""
        return self._all(lambda number, node: [self.path(number)] * len(node.words))

    @property
    def positions(self) -> np.ndarray:
        """int32 [P]: places in the texts."""
        return self._all(lambda _, node: range(node.depth, node.depth + len(node.words)))

    def path(self, number: int | None) -> int:
        """The bits of a node and of those above it."""
        found = 0
        while number is not None:
            found |= 1 << number
            number = self.nodes[number].parent
        return found

    @functools.cached_property
    def _coded(self) -> list[np.ndarray]:
        return [np.array(node.words, np.int64) for node in self.nodes]

    def start(self, text: Shareable) -> Start:
        """Where this text begins."""
        if not self.nodes:
            return Start()
        deepest = max(node.depth + len(node.words) for node in self.nodes)
        words, depth, last = _coded(text)[:deepest], 0, None
        for number, node in enumerate(self.nodes):  # children stand behind their parents
            end = depth + len(node.words)
            on = node.parent == last and node.depth == depth
            if on and np.array_equal(words[depth:end], self._coded[number]):
                depth, last = end, number
        return Start(self.path(last), depth)

    def _all(self, of: Callable[[int, Node], Iterable[int]]) -> np.ndarray:
        found = [of(number, node) for number, node in enumerate(self.nodes)]
        return np.array([number for part in found for number in part], np.int32)


def find(texts: Sequence[Shareable], uses: float, mean: float) -> Stem:
    """The tree of starts that pay.

    Args:
      texts: of the data, in any order.
      uses: how many of them share a sequence, in which a node is computed once.
      mean: tokens of a text.
    """
    if uses < 2 or len(texts) < 2:  # a text alone shares nothing
        return Stem()
    step = -(-len(texts) // SAMPLE)
    words = sorted(tuple(_coded(text).tolist()) for text in texts[::step])
    share = uses / len(words)
    nodes: list[Node] = []
    # Stretches of sorted texts that agree in their first `depth` words, those under a node `parent`
    # in its; a stack, not a recursion, as each text may be the start of the next.
    open_: list[tuple[int, int, int, int | None]] = [(0, len(words), 0, None)]
    while open_:
        first, last, depth, parent = open_.pop()
        low, high, end = words[first], words[last - 1], depth
        while end < min(len(low), len(high)) and low[end] == high[end]:
            end += 1
        stretch = last - first
        node = Node(low[depth:end], depth, parent, stretch * share)
        if stretch > 1 and node.gain > LEAST_GAIN * uses * mean:
            nodes.append(node)
            parent, depth = len(nodes) - 1, end
        # Where it does not pay, its children have its words, too.
        groups = [
            (begin, behind, depth, parent)
            for begin, behind in _groups(words, first, last, end)
            if behind - begin > 1 and (behind - begin) * share >= LEAST_USES
        ]
        open_ += reversed(groups)
    while len(nodes) > MOST:
        parents = {node.parent for node in nodes}
        leaves = [number for number in range(len(nodes)) if number not in parents]
        _drop(nodes, min(leaves, key=lambda number: nodes[number].gain))
    return Stem(tuple(nodes))


def _drop(nodes: list[Node], number: int) -> None:
    """Removes a leaf; those behind it move up."""
    del nodes[number]
    for place, node in enumerate(nodes):
        if node.parent is not None and node.parent > number:
            nodes[place] = Node(node.words, node.depth, node.parent - 1, node.uses)


def _groups(
    words: list[tuple[int, ...]], first: int, last: int, place: int
) -> Iterator[tuple[int, int]]:
    """The stretches of words[first:last] that have the same word at this place; sorted."""
    begin = first
    while begin < last:
        if len(words[begin]) <= place:
            begin += 1
            continue
        behind = begin + 1
        while behind < last and words[behind][place] == words[begin][place]:
            behind += 1
        yield begin, behind
        begin = behind


def _coded(text: Shareable) -> np.ndarray:
    """int64 [limit]: tokens and what they are, in one number."""
    tokens = text.tokens[: text.limit].astype(np.int64) << ROLE_BITS
    return tokens if text.roles is None else tokens | text.roles[: text.limit]
