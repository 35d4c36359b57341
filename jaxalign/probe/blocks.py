"""Vectors of a corpus on disk: a file for each pooling, a block for each language, all checked.

    blocks = Blocks(folder, {"poolings": ["mean"], ...}, ("de", "en"), (13, 2, 200, 640), "float32")
    blocks.done                                  # languages whose vectors are there and intact
    blocks.write("en", {"mean": vectors})        # [L+1, N, D] float32
    blocks.arrays["mean"]                        # [L+1, G, N, D], a memory map

`states.json` says what the vectors were made of and holds the SHA-256 of every block. A block that
is not what was written (a file cut short, emptied or deleted, a bit that changed) is not used: its
language counts as not done, and whoever fills the blocks computes it again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign.checksums import text_digest
from jaxalign.errors import UserError, first_line
from jaxalign.multihost import everywhere
from jaxalign.paths import whole_file
from jaxalign.terminal import say

NOTE = "states.json"


class Blocks:
    """Memory maps of pooled states, and which languages of them are complete.

    Attributes:
      done: languages whose blocks hold what was written.
      arrays: pooling -> [L+1, G, N, D], a memory map.
    """

    def __init__(
        self,
        folder: Path,
        what: Mapping[str, Any],
        languages: Sequence[str],
        shape: tuple[int, ...],
        dtype: str,
    ) -> None:
        """Opens the folder, made if it is not there, and checks what it holds.

        Args:
          folder: holds `POOLING.npy` and `states.json`.
          what: what the vectors depend on, JSON-ready; `poolings` names the files.
          languages: in the order of the second axis.
          shape: [L+1, G, N, D].
          dtype: of the files, float32 or float16.

        Raises:
          UserError: the folder holds vectors of something else, or cannot be written.
        """
        self.folder, self.what, self.languages = folder, dict(what), tuple(languages)
        self._digests: dict[str, dict[str, str]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            kept, reason = self._read()
            opened = {
                name: _open(folder / f"{name}.npy", np.dtype(dtype), shape)
                for name in what["poolings"]
            }
        except OSError as error:
            raise UserError(f"{folder} cannot be written ({first_line(error)})") from error
        self.arrays = {name: array for name, (array, _) in opened.items()}
        fresh = {name for name, (_, made) in opened.items() if made}
        bad = {language: self._damage(language, kept[language], fresh) for language in kept}
        whole = everywhere([not bad.get(language, ["all"]) for language in self.languages])
        self.done = [name for name, intact in zip(self.languages, whole, strict=True) if intact]
        self._digests = {language: kept[language] for language in self.done}
        if reason:
            say(f"{folder}: {reason}; all states are computed again")
        lost = [language for language in kept if language not in self.done]
        if lost:
            files = sorted({f"{name}.npy" for language in lost for name in bad[language]})
            say(
                f"{folder}: the stored states of {_some(lost)} are damaged ({', '.join(files)}); "
                "they are computed again"
            )

    def write(self, language: str, vectors: Mapping[str, np.ndarray]) -> None:
        """Stores a language's vectors; then its hashes, after which it is done.

        Args:
          language: one of `languages`.
          vectors: pooling -> [L+1, N, D] float32.

        Raises:
          UserError: float16 cannot hold a number, or the disk cannot.
        """
        place = self.languages.index(language)
        digests = {}
        try:
            for name, values in vectors.items():
                stored = self._narrow(values, language)
                digests[name] = _digest(stored)
                self.arrays[name][:, place] = stored
                self.arrays[name].flush()
            self._digests[language] = digests
            self.done.append(language)
            self._note()
        except OSError as error:
            raise UserError(f"{self.folder} cannot be written ({first_line(error)})") from error

    def _narrow(self, values: np.ndarray, language: str) -> np.ndarray:
        dtype = next(iter(self.arrays.values())).dtype
        with np.errstate(over="ignore"):
            stored = values.astype(dtype)
        if np.isfinite(values).all() and not np.isfinite(stored).all():
            raise UserError(
                f"a state of {language} has a number of {np.abs(values).max():.3g}, more than "
                "float16 holds; keep the states with --states float32 in another --out"
            )
        return stored

    def _damage(self, language: str, digests: Mapping[str, str], fresh: set[str]) -> list[str]:
        """The poolings of which the language's block is not what was written."""
        place = self.languages.index(language)
        return [
            name
            for name, array in self.arrays.items()
            if name in fresh or digests.get(name) != _digest(array[:, place])
        ]

    def _read(self) -> tuple[dict[str, dict[str, str]], str]:
        """The hashes of each finished language, and why there are none, if something was there."""
        file = self.folder / NOTE
        if not file.exists():
            return {}, ""
        try:
            then = json.loads(file.read_bytes())
            digest = then.pop("digest", "")
        except (ValueError, RecursionError, AttributeError, TypeError):
            return {}, f"{NOTE} is damaged"
        if not digest:
            return {}, f"{NOTE} has no content hashes"
        if digest != _canonical(then):
            return {}, f"{NOTE} is damaged"
        for name, value in self.what.items():
            if name in then and then[name] != value:
                raise UserError(
                    f"{self.folder} holds states made with {name}={_short(then[name])}, now it "
                    f"is {_short(value)}; choose another --out, or remove that folder"
                )
        unsaid = next((name for name in self.what if name not in then), "")
        if unsaid:  # of an older version
            return {}, f"{NOTE} does not say which {unsaid} they were made with"
        return then["blocks"], ""

    def _note(self) -> None:
        content = {**self.what, "done": self.done, "blocks": self._digests}
        text = json.dumps({**content, "digest": _canonical(content)}, indent=1)
        with whole_file(self.folder / NOTE) as file:
            file.write_text(text, "utf-8")


def _open(file: Path, dtype: np.dtype, shape: tuple[int, ...]) -> tuple[np.memmap, bool]:
    """The file's array, and whether it was made anew: none was there, or one of another form."""
    offset = _offset(file, dtype, shape)
    if offset is None:
        array = np.lib.format.open_memmap(file, "w+", dtype, shape)
        return array, True
    # A file that was cut short is filled with zeros, which its hashes do not allow.
    return np.memmap(file, dtype, "r+", offset, shape), False


def _offset(file: Path, dtype: np.dtype, shape: tuple[int, ...]) -> int | None:
    """Where the numbers of an array of this form begin; None if the file holds no such array."""
    if not file.exists():
        return None
    with file.open("rb") as stream:
        try:
            if np.lib.format.read_magic(stream) != (1, 0):
                return None
            found = np.lib.format.read_array_header_1_0(stream)
        except Exception:  # whatever a parser finds wrong with damaged bytes
            return None
        return stream.tell() if found == (shape, False, dtype) else None


def _digest(block: np.ndarray) -> str:
    """SHA-256 of [L+1, N, D], read a layer at a time."""
    digest = hashlib.sha256()
    for layer in block:
        digest.update(np.ascontiguousarray(layer).view(np.uint8).data)
    return digest.hexdigest()


def _canonical(content: Mapping[str, Any]) -> str:
    return text_digest(json.dumps(content, sort_keys=True))


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:6])
    return shown if len(names) < 7 else f"{shown} and {len(names) - 6} more languages"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 80 else text[:77] + "..."
