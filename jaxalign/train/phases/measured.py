"""Options of objectives that were measured before the run: `{file: x.npz}` becomes its arrays.

    options = opened({'subspace': {'file': 'x.npz'}}, 'align.options')
    options['subspace'].axis                         # see `jaxalign.objectives.subspace`

Such a file is of one base and of some languages; both are compared with those of the run.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxalign.data.languages import language_number
from jaxalign.errors import UserError, brief
from jaxalign.objectives.subspace import Subspace

FILE = "file"
ARRAYS = ("axis", "basis", "shifts", "languages")
WORDS = ("pivot", "layer", "pooling", "base")


def is_file(value: Any) -> bool:
    """Whether an option is `{file: name}`."""
    return isinstance(value, Mapping) and set(value) == {FILE}


def opened(options: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The options with the content of files in place of their names.

    Args:
      key: the setting that holds them, for sentences.

    Raises:
      UserError: a file that is missing, or is none of `jaxalign prepare subspace`.
    """
    return {
        name: read(value[FILE], f"{key}.{name}") if is_file(value) else value
        for name, value in options.items()
    }


def read(file: str, key: str) -> Subspace:
    """The content of an .npz of `jaxalign prepare subspace`.

    Raises:
      UserError: no such file, or another one.
    """
    made = "write it with jaxalign prepare subspace"
    try:
        # Of a zip archive, numpy opens nothing that would run code.
        with np.load(file) as found:
            content = {name: found[name] for name in (*ARRAYS, *WORDS)}
        axis, basis, shifts = (content[name].astype(np.float32) for name in ARRAYS[:3])
        languages = tuple(map(str, content["languages"]))
        (dim, rank), number = basis.shape, len(languages)
        if axis.shape != (dim,) or shifts.shape != (number, dim) or not 0 < rank < number:
            raise ValueError("shapes that do not fit")
        pivot, layer, pooling, base = (content[name].item() for name in WORDS)
        finite = all(np.isfinite(array).all() for array in (axis, basis, shifts))
        if pivot not in languages or not isinstance(layer, int) or not finite:
            raise ValueError("content that cannot be")
    except FileNotFoundError as error:
        raise UserError(f"{key}: there is no file {file}; {made}") from error
    except (
        OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, EOFError,
        zipfile.BadZipFile, zlib.error,
    ) as error:  # fmt: skip
        raise UserError(
            f"{key}: {file} is not an .npz of jaxalign prepare subspace; {made}"
        ) from error
    digest = hashlib.sha256(repr((languages, pivot, layer, pooling, base)).encode())
    for array in (axis, basis, shifts):
        digest.update(repr(array.shape).encode() + array.tobytes())
    numbers = np.array([language_number(name) for name in languages], np.int32)
    return Subspace(
        str(file), axis, basis, shifts, languages, numbers, str(pivot), layer, str(pooling),
        str(base), digest.hexdigest(),
    )  # fmt: skip


def check_width(one: Subspace, dim: int) -> None:
    """Whether it is as wide as the model.

    Raises:
      UserError: it is not.
    """
    if len(one.axis) != dim:
        raise UserError(
            f"{one.file} has {len(one.axis)} dimensions, but the states of model.path have {dim}; "
            "write it with jaxalign prepare subspace for this base"
        )


def check_base(one: Subspace, fingerprint: str) -> None:
    """Whether it was measured on this base.

    Raises:
      UserError: it was not.
    """
    if one.base != fingerprint:
        raise UserError(
            f"{one.file} was measured on another base than model.path; write it with jaxalign "
            "prepare subspace for this one"
        )


def check_languages(one: Subspace, spoken: Iterable[tuple[str, ...]], where: str) -> None:
    """Whether it knows the languages of all rows, and their last side is its pivot.

    Args:
      spoken: of each row, the languages of its sides.
      where: the setting of the rows.

    Raises:
      UserError: it does not, or a target is another language.
    """
    sides = sorted(set(spoken))
    strange = sorted({name for row in sides for name in row} - set(one.languages))
    if strange:
        raise UserError(
            f"{where}: {one.file} does not know the language {brief(strange[0])} (it has: "
            f"{', '.join(one.languages)}); write it with that language, or keep pairs of these "
            "(align.languages)"
        )
    other = next((row for row in sides if row[-1] != one.pivot), None)
    if other:
        raise UserError(
            f"{where}: a pair {'-'.join(other)} has the target {other[-1]}, but {one.file} has the "
            f"pivot {one.pivot}; make {one.pivot} the target of all pairs (align.columns)"
        )
