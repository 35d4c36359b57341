"""Commands with their slots in brackets, as MASSIVE writes them: `wake me at [time : nine am]`.

read_annotated("wake me at [time : nine am]")        # ['time: nine am'], as the paper's code
whole_annotated("wake me at [time : nine", "FILE:12")    # UserError: an annotation would be lost
"""

from __future__ import annotations

import re

from jaxalign.errors import UserError, brief

ANNOTATED = re.compile(r"\[(.+?)\]")  # MASSIVE: wake me at [time : nine am]


def whole_annotated(annotated: str, origin: str) -> list[str]:
    """`read_annotated` of a command in which no annotation is lost.

    Raises:
        UserError: brackets that do not pair up, or do not hold type and words.
    """
    # What is left are brackets without a partner, or within another. A closing one after text
    # without a colon is a sign of the sentence: it closes no annotation.
    if re.search(r"\[|:[^]]*\]", ANNOTATED.sub("", annotated)):
        raise UserError(
            f"{origin}: the brackets of 'annot_utt' do not pair up ({brief(annotated)}); "
            "write [type : words]"
        )
    for part in ANNOTATED.findall(annotated):
        kind, colon, words = part.partition(":")
        if not (kind.strip() and colon and words.strip()) or "[" in part:
            raise UserError(f"{origin}: [{part}] in 'annot_utt' is not [type : words]; fix it")
    return read_annotated(annotated)


def read_annotated(annotated: str) -> list[str]:
    """'type: words' of each bracket, as the paper's code reads any text.

    Every ' :' becomes ':', in the words too.
    """
    return [part.replace(" :", ":") for part in ANNOTATED.findall(annotated)]
