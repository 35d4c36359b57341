"""COMET scores of translations, by its package or by its command.

The package unbabel-comet (2.2) needs numpy 1 and JAX numpy 2, so they rarely share an environment.
Installed in an environment of its own (`pipx install unbabel-comet`), its command `comet-score`
is found on the PATH
and does the same; it computes in half precision, so scores differ in the last digits. What is
called of the package: download_model(name) -> path, load_from_checkpoint(path) -> model,
model.predict(samples, batch_size=, gpus=, progress_bar=).scores, one number a segment.

    score_comet("Unbabel/wmt22-comet-da", sources, translations, references)    # [0.83, 0.79]
"""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign.errors import UserError

COMMAND = "comet-score"
BATCH = 16


def score_comet(
    model: str,
    sources: Sequence[str],
    translations: Sequence[str],
    references: Sequence[str],
    *,
    gpus: int = 0,
) -> np.ndarray:
    """The COMET score of each segment, [rows] float64, mostly between 0 and 1.

    Args:
        model: a hub name (Unbabel/wmt22-comet-da) or the path of a .ckpt file.
        sources: source texts.
        translations: what is judged.
        references: reference translations.
        gpus: how many GPUs; 0 computes on the CPU.

    Raises:
        UserError: neither package nor command, or the model cannot be had.
    """
    found = find_comet(model)
    columns = (sources, translations, references)
    score = _by_command if isinstance(found, str) else _by_package
    scores = score(found, model, columns, gpus)
    if len(scores) != len(sources):
        raise UserError(f"COMET gave {len(scores)} scores for {len(sources)} rows; see {model!r}")
    return np.asarray(scores, np.float64)


def find_comet(model: str) -> Any:
    """The package, or the path of the command; nothing is loaded.

    Raises:
        UserError: neither is installed, or the model is a path without a file.
    """
    if model.endswith(".ckpt") and not Path(model).is_file():
        raise UserError(f"evaluate.options.comet: there is no file {model}")
    found = _package() or shutil.which(COMMAND)
    if not found:
        raise UserError(
            "COMET is missing, and its package does not go with JAX's numpy; install it beside "
            f"this environment with: pipx install unbabel-comet (its {COMMAND} must be on the PATH)"
        )
    return found


def _package() -> Any:
    try:
        return importlib.import_module("comet")
    except ImportError:
        return None


def _by_package(
    package: Any, model: str, columns: tuple[Sequence[str], ...], gpus: int
) -> Sequence[float]:
    rows = zip(*columns, strict=True)
    samples = [dict(zip(("src", "mt", "ref"), row, strict=True)) for row in rows]
    try:
        path = model if Path(model).is_file() else package.download_model(model)
        judge = package.load_from_checkpoint(path)
    # COMET raises KeyError, OSError and bare Exception for a model it cannot find or read.
    except Exception as error:
        raise _no_model(model, error) from error
    return judge.predict(samples, batch_size=BATCH, gpus=gpus, progress_bar=False).scores


def _by_command(
    command: str, model: str, columns: tuple[Sequence[str], ...], gpus: int
) -> Sequence[float]:
    with tempfile.TemporaryDirectory() as folder:
        words = [command, "--model", model, "--gpus", str(gpus), "--batch_size", str(BATCH)]
        words += ["--quiet", "--only_system", "--to_json", str(Path(folder, "scores.json"))]
        for flag, lines in zip(("-s", "-t", "-r"), columns, strict=True):
            file = Path(folder, flag.strip("-"))
            file.write_text("".join(_line(text) for text in lines), "utf-8")
            words += [flag, str(file)]
        done = subprocess.run(words, capture_output=True, text=True)
        try:
            (rows,) = json.loads(Path(folder, "scores.json").read_text("utf-8")).values()
        except (OSError, ValueError):
            raise _no_model(model, (done.stderr.strip() or "no output").splitlines()[-1]) from None
    return [row["COMET"] for row in rows]


def _line(text: str) -> str:
    return " ".join(text.splitlines()) + "\n"


def _no_model(model: str, reason: object) -> UserError:
    return UserError(
        f"COMET cannot load {model!r} ({reason}); name a hub model it knows, as in "
        "Unbabel/wmt22-comet-da, or the path of a downloaded .ckpt file"
    )
