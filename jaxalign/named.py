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
from collections.abc import Callable, Mapping
from typing import Any

from jaxalign.checksums import text_digest
from jaxalign.errors import UserError, brief, first_line


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
    """SHA-256 of the module that holds the function of a `package.module:function` path.

    It covers neither comments and layout nor the modules that this one imports. A name of a table
    has the digest '', and so has a module whose source cannot be read.

    Raises:
      UserError: a path that leads to no function.
    """
    if ":" not in name:
        return ""
    function = inspect.unwrap(find(name, {}, "function"))
    try:
        with open(inspect.getsourcefile(function) or "", "rb") as file:
            return text_digest(ast.dump(ast.parse(file.read())))
    except (OSError, TypeError, SyntaxError, ValueError):  # written in C, or edited just now
        return ""
