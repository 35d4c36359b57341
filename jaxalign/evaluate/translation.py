"""Translations: BLEU and chrF by sacreBLEU; where asked for, COMET and the language of answers.

found = score_translation(golds, ["Hello.", "Good night."], comet="Unbabel/wmt22-comet-da")
found["bleu"].value
found.details["bleu_signature"]     # nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:...
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxalign.data.languages import CHINESE, base_language, split_direction
from jaxalign.errors import UserError, missing_extra
from jaxalign.evaluate.comet import score_comet
from jaxalign.evaluate.fidelity import fidelity as in_language
from jaxalign.evaluate.measure import Gold, Measure, Scored, share

# As sacreBLEU recommends; all others: 13a.
TOKENIZERS = {**dict.fromkeys(CHINESE, "zh"), "ja": "ja-mecab", "ko": "ko-mecab"}
WITHOUT_MECAB = "char"
COMET, FIDELITY = "comet", "fidelity"  # the options, and the measures
SAMPLE = 100  # references that show the script
NO_BLANKS = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
BY_BLANKS = ("13a", "intl", "none")  # sacreBLEU's tokenizers that find words by the blanks around


def score_translation(
    golds: Sequence[Gold],
    answers: Sequence[str],
    *,
    tokenize: str = "",
    comet: str = "",
    comet_gpus: int = 0,
    fidelity: bool = False,
) -> Scored:
    """bleu (main), chrf and, where a COMET model is named, comet (mean x 100).

    Args:
        golds: rows of one direction.
        answers: the translations; line breaks in them become blanks, as a file has one a line.
        tokenize: sacreBLEU's tokenizer for BLEU; '' takes the one for the target language. Where
            Japanese or Korean lack theirs, characters are compared and `tokenizer_note` says so, as
            it does where words are sought by blanks in a script that writes none.
        comet: see `jaxalign.evaluate.comet.score_comet`.
        comet_gpus: how many GPUs COMET gets; JAX usually holds their memory already.
        fidelity: measure also how many answers are in the language that was asked for; it is
            unmeasured, and `fidelity_note` says so, where no reference is recognised.

    Returns:
        BLEU and chrF equal to sacreBLEU's corpus scores; details: bleu_signature, chrf_signature,
        comet_model, tokenizer_note, fidelity_note; counts: empty.

    Raises:
        UserError: sacrebleu or a tokenizer is not installed, no such tokenizer, no such model;
          py3langid is not installed.
    """
    texts = [_one_line(answer) for answer in answers]
    references = [_one_line(gold.example.reference) for gold in golds]
    language = target_language(golds[0]) if golds else ""
    bleu, note = _bleu(language, tokenize)
    note = note or _unspaced(bleu.tokenizer.signature(), references)
    chrf = _sacrebleu().CHRF()
    measures = [
        _measure(name, metric, texts, references)
        for name, metric in (("bleu", bleu), ("chrf", chrf))
    ]
    details = {
        "bleu_signature": str(bleu.get_signature()),
        "chrf_signature": str(chrf.get_signature()),
    }
    if note:
        details["tokenizer_note"] = note
    if comet:
        sources = [gold.example.prompt for gold in golds]
        scores = score_comet(comet, sources, texts, references, gpus=comet_gpus)
        parts = np.stack([scores, np.ones(len(scores))], axis=1)
        measures.append(Measure(COMET, parts, share))
        details["comet_model"] = comet
    unmeasured: tuple[str, ...] = ()
    if fidelity:
        parts = in_language(texts, references, language)
        if parts[:, 1].any():
            measures.append(Measure(FIDELITY, parts, share))
        else:
            unmeasured = (FIDELITY,)
            details["fidelity_note"] = (
                f"missing in {language or 'an unnamed language'}, which py3langid recognises in no "
                "reference"
            )
    return Scored(
        tuple(measures), tuple(texts), {"empty": texts.count("")}, details, unmeasured=unmeasured
    )


def target_language(gold: Gold) -> str:
    """'zh' of a row into zh-TW, zho_Hans or cmn: its `tgt_lang`, or its direction's second side."""
    sides = gold.fields.get("translation")
    given = gold.fields.get("tgt_lang")
    if not given and isinstance(sides, Mapping) and "src" not in gold.fields:
        given = list(sides)[-1]  # the order of the data, as the row was rendered
    return base_language(str(given or split_direction(gold.language)[1]))


def _one_line(text: str) -> str:
    return " ".join(text.splitlines()).strip()


def _sacrebleu() -> Any:
    try:
        import sacrebleu
    except ImportError:
        raise missing_extra("sacrebleu", "eval") from None
    return sacrebleu


def _bleu(language: str, tokenize: str) -> tuple[Any, str]:
    """sacreBLEU's metric and, where it is not the recommended one, a note."""
    metric = functools.partial(_sacrebleu().BLEU, force=True)  # force: no advice about blanks
    known = _sacrebleu().BLEU.TOKENIZERS
    if tokenize and tokenize not in known:
        raise UserError(f"no tokenizer {tokenize!r}; sacreBLEU has {', '.join(known)}")
    wanted = tokenize or TOKENIZERS.get(language, "13a")
    try:
        return metric(tokenize=wanted), ""
    except (RuntimeError, ImportError, OSError) as error:
        reason = f"sacreBLEU's tokenizer {wanted} is not installed"
        if tokenize:
            why = " ".join(str(error).split())
            raise UserError(f"{reason} ({why}); install it or name another tokenize=") from None
    extra = "pip install 'jaxalign[mecab]'"
    note = f"{reason}, so BLEU compares characters; install it with: {extra}"
    return metric(tokenize=WITHOUT_MECAB), note


def _unspaced(tokenizer: str, references: Sequence[str]) -> str:
    """A note where the tokenizer looks for blanks and most references are written without any."""
    if tokenizer not in BY_BLANKS:
        return ""
    letters = [letter for text in references[:SAMPLE] for letter in text if letter.isalpha()]
    if 2 * sum(map(_writes_no_blanks, letters)) <= len(letters):
        return ""
    return (
        f"BLEU splits words at blanks ({tokenizer}), but these references are written without "
        "them, so that hardly any word is found; name the language by its code (tgt_lang), or "
        "choose another evaluate.options.tokenize, such as char or flores200"
    )


def _writes_no_blanks(letter: str) -> bool:
    return unicodedata.name(letter, "").startswith(NO_BLANKS)


def _measure(name: str, metric: Any, texts: Sequence[str], references: Sequence[str]) -> Measure:
    """A corpus score as sacreBLEU's own statistics of each segment and its own formula."""
    parts = metric._extract_corpus_statistics(texts, [references])

    def formula(sums: np.ndarray) -> np.ndarray:
        flat = np.rint(sums).astype(int).reshape(-1, sums.shape[-1])
        scores = [metric._compute_score_from_stats(line.tolist()).score for line in flat]
        return np.array(scores).reshape(sums.shape[:-1])

    return Measure(name, np.array(parts, float), formula)
