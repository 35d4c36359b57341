"""A function by its name in a table, or by its Python path.

find('swap', TRANSFORMS, 'transform')                # TRANSFORMS['swap']
find('my_data:switch', TRANSFORMS, 'transform')      # one's own
code_digest('my_data:switch')                        # whether its code is what it was
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxalign.checksums import text_digest
from jaxalign.errors import UserError, brief, first_line

INSTALLED = ("site-packages", "dist-packages")  # folders in which strangers are neighbours


def find(name: str, table: Mapping[str, Callable], what: str) -> Callable[..., Any]:
    """The function of this name or `package.module:function` path.

    Args:
      what: an objective, a transform, ..., for sentences.

    Raises:
      UserError: neither, or a path that leads to no function.
    """
    if name in table:
        return table[name]
    module, _, function = name.partition(":")
    if not module or not function:
        near = difflib.get_close_matches(name, table, 1, 0.0)[0]
        article = "An" if what[0] in "aeiou" else "A"
        raise UserError(
            f"{what} {name!r} is unknown; did you mean {near!r}? "
            f"{article} {what} of your own is written package.module:function"
        )
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # a module of somebody's own may fail in any way
        raise UserError(f"{what} {name!r} cannot be imported: {first_line(error)}") from error
    if not callable(found):
        raise UserError(f"{what} {name!r} is not a function but {brief(found)}")
    return found


def code_digest(name: str) -> str:
    """SHA-256 of the code behind a `package.module:function` path, without comments and layout.

    It covers the module that the path names and, if a decorator stands between, the module that
    holds the function. It also covers what these import from the same folder or the same installed
    package. A name of a table has the digest '', and so has a module whose
    source cannot be read.

    Raises:
      UserError: a path that leads to no function.
    """
    if ":" not in name:
        return ""
    function = inspect.unwrap(find(name, {}, "function"))
    module = importlib.import_module(name.partition(":")[0])
    first, *others = _dumps_of(module, module.__name__) or [""]
    for more in _dumps_of(function, getattr(function, "__module__", "")):
        if more not in (first, *others):
            others.append(more)
    return text_digest("".join([first, *sorted(others)])) if first or others else ""


def _dumps_of(thing: Any, module: str) -> list[str]:
    """`_dumps` of the file that holds a module or a function; nothing where there is none."""
    try:
        return _dumps(Path(inspect.getsourcefile(thing) or ""), module.split("."))
    except (OSError, TypeError, SyntaxError, ValueError):  # written in C, or edited just now
        return []


def _dumps(file: Path, module: list[str]) -> list[str]:
    """The syntax tree of this file, then of what it imports from beside it, each as text."""
    package = file.name == "__init__.py"
    if (file.parent if package else file.with_suffix("")).parts[-len(module) :] != (*module,):
        module, package = [file.stem], False  # its module calls itself otherwise
    root = file.parents[len(module) - 1 + package]
    found, waiting = dict[Path, str](), [file]
    while waiting:
        if (one := waiting.pop()) in found:
            continue
        tree = ast.parse(one.read_bytes())
        found[one] = ast.dump(tree)
        for name in _imported(tree, one.relative_to(root).parent.parts):
            if name[0] != __package__ and (root.name not in INSTALLED or name[0] == module[0]):
                waiting += _sources(root, name)
    return [*found.values()]


def _imported(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The dotted names that may be modules; relative ones count from the package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else ()
            base = (*start, *(node.module.split(".") if node.module else ()))
            yield from ((*base, alias.name) for alias in node.names)


def _sources(root: Path, name: tuple[str, ...]) -> list[Path]:
    """The files that an import of this name would read: packages on the way, and the module."""
    ways = [root.joinpath(*name[:n]) for n in range(1, len(name) + 1)]
    return [file for way in ways for file in (way / "__init__.py", way.with_name(way.name + ".py"))
            if file.is_file()]  # fmt: skip
