"""What a language code means: its name, its plain two-letter form, how much data the language has.

language_name('cym_Latn'), language_name('zh-TW')    # 'Welsh', 'Chinese (Traditional)'
base_language('zho_Hans')                            # 'zh'
resource_class('cy')                                 # 1, of 0 .. 5 (Joshi et al. 2020)
find_language('en', ['deu_Latn', 'eng_Latn'])        # 'eng_Latn'
split_direction('pt-BR-en')                          # ('pt-BR', 'en')
language_number('de')                                # how batches write it, in every stream alike
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence
from functools import cache

LANGUAGE_NAMES = dict(
    re.findall(
        r"(\w+)=(\w+)",
        """
        af=Afrikaans am=Amharic ar=Arabic az=Azerbaijani be=Belarusian bg=Bulgarian bn=Bengali
        bs=Bosnian ca=Catalan cs=Czech cy=Welsh da=Danish de=German el=Greek en=English
        es=Spanish et=Estonian eu=Basque fa=Persian fi=Finnish fr=French ga=Irish gl=Galician
        gu=Gujarati ha=Hausa he=Hebrew hi=Hindi hr=Croatian hu=Hungarian hy=Armenian
        id=Indonesian is=Icelandic it=Italian ja=Japanese jv=Javanese ka=Georgian kk=Kazakh
        km=Khmer kn=Kannada ko=Korean lt=Lithuanian lv=Latvian mk=Macedonian ml=Malayalam
        mn=Mongolian mr=Marathi ms=Malay mt=Maltese my=Burmese nb=Norwegian ne=Nepali nl=Dutch
        no=Norwegian pa=Punjabi pl=Polish pt=Portuguese ro=Romanian ru=Russian sk=Slovak
        sl=Slovenian so=Somali sq=Albanian sr=Serbian sv=Swedish sw=Swahili ta=Tamil te=Telugu
        th=Thai fil=Filipino tr=Turkish uk=Ukrainian ur=Urdu uz=Uzbek vi=Vietnamese yo=Yoruba
        zh=Chinese zu=Zulu
        """,
    )
)

# Of scripts in which a language is not written mostly; of others the code.
SCRIPT_NAMES = {"Hant": "Traditional", "Latn": "Latin", "Cyrl": "Cyrillic", "Arab": "Arabic"}

# Written in Chinese characters without blanks: one base language, or a code of its own.
CHINESE = ("zh", "yue", "lzh", "wuu", "hak", "nan", "gan", "hsn", "cdo")

# Resource classes of Joshi et al. 2020, "The State and Fate of Linguistic Diversity and Inclusion
# in the NLP World" (ACL), section 2, after the authors' list of languages: 5 has the most data,
# 1 little raw text and hardly any labels.
CLASSES = {
    1: "az cy gu hy jv km kn mk ml mn my nb ne no so sq te",
    2: "am ga ha is mr mt pa sw yo zu",
    3: "af be bg bn bs da el et gl he id ka kk lt lv ms ro sk sl ta th fil uk ur uz",
    4: "ca cs eu fa fi hi hr hu it ko nl pl pt ru sr sv tr vi",
    5: "ar de en es fr ja zh",
}
CLASS_OF = {language: number for number, row in CLASSES.items() for language in row.split()}


@cache
def base_language(code: str) -> str:
    """The language of a code without region or script, in two letters where it has them.

    `pt-BR` is `pt`, and FLORES' `arb_Arab` is `ar`; an unknown code stays as it is, in lower case.
    """
    import langcodes  # 40 ms, which `data show` can do without

    first = re.split("[-_]", code)[0].lower()
    try:
        return langcodes.get(langcodes.standardize_tag(first, macro=True)).language or first
    except langcodes.LanguageTagError:
        return first


@cache
def language_name(code: str) -> str:
    """The English name of a language code, with the script where it is not the usual one.

    `zho_Hant` and `zh-TW` are 'Chinese (Traditional)', `zho_Hans` is 'Chinese'. A region says no
    more than that, and an unknown code stays itself.
    """
    name = LANGUAGE_NAMES.get(base_language(code))
    if name is None:
        return code
    script = _script(code)
    unusual = script and script != _script(base_language(code))
    return f"{name} ({SCRIPT_NAMES.get(script, script)})" if unusual else name


def namesakes(codes: Iterable[str]) -> dict[str, list[str]]:
    """Names that stand for several varieties of these codes, by region: {'Persian': ['fa', 'prs']}.

    Two spellings of one variety (`pt`, `pt-BR`, `por_Latn`) are no varieties.
    """
    import langcodes

    found: dict[str, dict[str, str]] = {}
    for code in sorted(codes):
        try:
            tag = langcodes.standardize_tag(code, macro=True)
            likely = langcodes.get(tag).maximize().to_tag()
        except langcodes.LanguageTagError:
            continue
        found.setdefault(language_name(code), {}).setdefault(likely, code)
    return {name: list(own.values()) for name, own in found.items() if len(own) > 1}


def _script(code: str) -> str:
    """In which script a code is written, as 'Latn'; '' where the code is none."""
    import langcodes

    try:
        return langcodes.get(code).maximize().script or ""
    except langcodes.LanguageTagError:
        return ""


def find_language(code: str, have: Sequence[str]) -> str:
    """`code` as `have` spells it: the same, or the only one of the same language; else `code`.

    Codes of one language may differ in region and script: 'eng_Latn' is 'en'. A variety ('de-st')
    and a direction ('de-en') are found by their own names alone.
    """
    if code in have or not _standard(code):
        return code
    alike = [n for n in have if _standard(n) and base_language(n) == base_language(code)]
    return alike[0] if len(alike) == 1 else code


def _standard(code: str) -> bool:
    """Whether nothing but region and script, which have capitals or digits, follows a language."""
    return not any(part.islower() for part in re.split("[-_]", code)[1:])


def language_number(code: str) -> int:
    """What stands for a language in a batch: of this code alone, whatever other rows there are."""
    return zlib.crc32(code.encode()) >> 1  # an int32


def direction(languages: tuple[str, str]) -> str:
    """'de-en'; the other one alone where a language is '', '' where both are."""
    return "-".join(filter(None, languages))


def split_direction(direction: str) -> tuple[str, str]:
    """The two languages of 'de-en', 'pt-BR-en' or 'en-zho_Hans'; ('de', '') where there is one.

    A language may have hyphens of its own. The border is the one with most languages known on its
    sides, the first of equals; regions (in capitals) begin no language.
    """
    parts = direction.split("-")
    found = [("-".join(parts[:at]), "-".join(parts[at:])) for at in range(1, len(parts))]
    found = [sides for sides in found if sides[1][:1].islower()]
    return max(found, key=_known, default=(direction, ""))


def _known(languages: Sequence[str]) -> int:
    return sum(base_language(code) in LANGUAGE_NAMES for code in languages)


def resource_class(language: str) -> int | None:
    """The class of 'cy', 'zh-TW', 'zho_Hant' or, of a direction 'de-cy', the poorer side.

    None for what is not in the list; a variety ('de-st') is not its standard language.
    """
    first, *rest = re.split("[-_]", language)
    # Regions and scripts have capitals or digits, languages and varieties have neither.
    parts = [base_language(first), *(part for part in rest if part.islower())]
    found = [CLASS_OF.get(part) for part in parts]
    return None if None in found else min(number for number in found if number)
