"""Whether answers are in the language that was asked for: language fidelity, by py3langid.

    fidelity(["Guten Tag, wie geht es?"], ["Hallo, wie geht es dir?"], "de")   # [[1, 1]]

A detector errs on short texts. Rows count only where it names the language of the reference
rightly, so that what it cannot tell is not held against an answer. Its model comes with the package
(BSD, 97 languages by their code of two letters): nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from jaxalign.data.languages import base_language
from jaxalign.errors import missing_extra


def fidelity(answers: Sequence[str], references: Sequence[str], language: str) -> np.ndarray:
    """Hits and tries of each row, [rows, 2] float64.

    Args:
        answers: what is judged; an empty one is in no language.
        references: texts in the language.
        language: its code, as of `base_language`.

    Raises:
        UserError: py3langid is not installed.
    """
    detect = _detector()
    tries = [base_language(detect(text)) == language for text in references]
    hits = [
        known and bool(answer) and base_language(detect(answer)) == language
        for known, answer in zip(tries, answers, strict=True)
    ]
    return np.stack([hits, tries], axis=1).astype(np.float64)


def _detector() -> Callable[[str], str]:
    try:
        from py3langid import classify
    except ImportError:
        raise missing_extra("py3langid", "language") from None
    return lambda text: classify(text)[0]
