"""Codes of several standards name the same languages."""

import pytest

from jaxalign.data.languages import (
    CLASS_OF,
    LANGUAGE_NAMES,
    base_language,
    find_language,
    language_name,
    namesakes,
    resource_class,
    split_direction,
)


def test_language_names():
    assert language_name("de") == "German"
    assert language_name("pt-BR") == language_name("pt") == "Portuguese"
    assert language_name("xx") == "xx"
    assert language_name("cym_Latn") == "Welsh"


def test_a_language_in_two_scripts_has_two_names():
    """Else the prompts of two directions would be one, with two answers."""
    assert language_name("zho_Hant") == language_name("zh-TW") == "Chinese (Traditional)"
    assert language_name("zho_Hans") == language_name("zh-CN") == language_name("zh") == "Chinese"
    assert language_name("srp_Latn") == "Serbian (Latin)"
    assert language_name("srp_Cyrl") == language_name("sr") == "Serbian"
    assert language_name("kk-Mong") == "Kazakh (Mong)"
    assert language_name("de-st") == "German"


@pytest.mark.parametrize(
    "codes, named",
    [
        ("pes_Arab prs_Arab eng_Latn", {"Persian": ["pes_Arab", "prs_Arab"]}),
        ("pt-BR pt-PT de", {"Portuguese": ["pt-BR", "pt-PT"]}),
        ("pt pt-BR por_Latn es es-ES zh zho_Hant zho_Hans sr srp_Latn xx", {}),
    ],
)
def test_varieties_that_prompts_call_by_one_name(codes, named):
    assert namesakes({*codes.split(), "", "Brazilian Portuguese"}) == named


@pytest.mark.parametrize(
    "code, plain",
    [
        ("eng_Latn", "en"),
        ("zho_Hans", "zh"),
        ("arb_Arab", "ar"),
        ("npi_Deva", "ne"),
        ("swh_Latn", "sw"),
        ("zh-TW", "zh"),
        ("de-st", "de"),
        ("ckb_Arab", "ckb"),
        ("tlh", "tlh"),
        ("no code", "no code"),
    ],
)
def test_base_language(code, plain):
    assert base_language(code) == plain


@pytest.mark.parametrize(
    "direction, sides",
    [
        ("de-en", ("de", "en")),
        ("pt-BR-en", ("pt-BR", "en")),
        ("en-zh-TW", ("en", "zh-TW")),
        ("pt-BR-zh-Hans-CN", ("pt-BR", "zh-Hans-CN")),
        ("en-fr-CA", ("en", "fr-CA")),
        ("eng_Latn-zho_Hans", ("eng_Latn", "zho_Hans")),
        ("de-st-en", ("de-st", "en")),
        ("en-de-st", ("en", "de-st")),
        ("tlh-qya", ("tlh", "qya")),
        ("en", ("en", "")),
        ("zh-CN", ("zh-CN", "")),
        ("", ("", "")),
        ("-", ("-", "")),
    ],
)
def test_split_direction(direction, sides):
    assert split_direction(direction) == sides


def test_a_language_is_found_as_the_data_spells_it():
    flores = ["deu_Latn", "eng_Latn", "zho_Hans", "zho_Hant"]
    assert find_language("en", flores) == "eng_Latn"
    assert find_language("eng_Latn", flores) == "eng_Latn"
    assert find_language("zh", flores) == "zh"  # either could be meant
    assert find_language("cy", flores) == "cy"
    # Varieties and directions are no codes of their first language.
    for code in ("de-st", "de-en", "en-de", "deu_Latn-eng_Latn", "ca-valencia"):
        assert find_language(code, ["de", "en", "ca", "da"]) == code
    assert find_language("de", ["de-st", "en"]) == "de"
    assert find_language("de", ["de-st", "deu_Latn"]) == "deu_Latn"
    assert find_language("es-419", ["es", "en"]) == "es"


def test_resource_classes():
    assert resource_class("cy") == resource_class("cym_Latn") == 1
    assert resource_class("zh-TW") == resource_class("zho_Hant") == 5
    assert resource_class("en-cy") == resource_class("cy-en") == 1
    assert resource_class("es-419") == 5 and resource_class("es-419-cy") == 1
    assert resource_class("tl-PH") == resource_class("fil") == 3
    assert resource_class("de-st") is None
    assert resource_class("tlh") is None
    assert set(CLASS_OF) == set(LANGUAGE_NAMES)


def test_tables_are_read_by_the_plain_code():
    assert [code for code in {**LANGUAGE_NAMES, **CLASS_OF} if base_language(code) != code] == []
