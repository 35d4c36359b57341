"""Words that YAML reads as other numbers than a reader does.

YAML 1.1 takes 010 for 8, 1:30 for 90 and, where a name should stand, 2026_11 for 202611.

    check_numerals(text, OmegaConf.to_container(OmegaConf.load(file)), file, texts={'output'})
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

import yaml

from jaxalign.errors import UserError

_ODD = re.compile(r"[-+]?0[0-7_]+|.*:.*")  # to base 8, to base 60


def check_numerals(
    text: str, loaded: Any, file: str, texts: Collection[str] = (), key: str = ""
) -> None:
    """Refuses such a word.

    Args:
      text: YAML; of a file, or of the value of one key.
      loaded: what was read of it: dicts, lists and scalars.
      file: where it stands, for sentences.
      texts: dotted keys whose value is text; a number there must stand as it would be printed.
      key: the key whose value it is.

    Raises:
      UserError: naming line, key, word and number.
    """
    tree = yaml.compose(text, Loader=yaml.SafeLoader)
    for node, value, name in _scalars(tree, loaded, key, set()):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or node.style or str(value) == node.value:
            continue
        if _ODD.fullmatch(node.value) or name in texts:
            place = file if key else f"{file}:{node.start_mark.line + 1}"
            raise UserError(
                f"{place}: {name}: YAML reads {node.value} as the number {value}; put it into "
                f"quotes if it is a name, or write {value}"
            )


def _scalars(
    node: Any, loaded: Any, key: str, seen: set[int]
) -> Iterator[tuple[yaml.ScalarNode, Any, str]]:
    """(node, value, dotted key) of each scalar; those of a list have the key of the list.

    What several aliases repeat comes once.
    """
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode):
        yield node, loaded, key
    elif isinstance(node, yaml.SequenceNode) and isinstance(loaded, list):
        for one, value in zip(node.value, loaded, strict=False):
            yield from _scalars(one, value, key, seen)
    elif isinstance(node, yaml.MappingNode) and isinstance(loaded, dict):
        for name, one in node.value:
            if isinstance(name, yaml.ScalarNode):
                dotted = f"{key}.{name.value}" if key else name.value
                yield from _scalars(one, loaded.get(name.value), dotted, seen)
