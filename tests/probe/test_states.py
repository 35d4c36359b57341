"""States of a real forward pass: those of transformers, kept on disk, resumed, chosen from."""

import json
import shutil

import numpy as np
import pytest

import jaxalign
from jaxalign.base import open_base
from jaxalign.errors import UserError
from jaxalign.probe import states as states_module
from jaxalign.probe.auto import choose
from jaxalign.probe.corpus import Parallel
from jaxalign.probe.run import Probed, measure_corpora, probe
from jaxalign.probe.states import corpus_tokens, pooled_states, store_states, token_digest
from tests.tiny import ASSETS, SPEC, lower_case

TEXTS = ["Guten Morgen", "wake me up at nine am on friday please", "è", "where is the cinema"]


def theirs(folder, adapter, texts):
    """Hidden states of transformers, and the mask: padding on the right."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    seen = []
    # Before the final norm: what a hook sees behind the last block.
    blocks = model.get_base_model().model.layers if adapter else model.model.layers
    blocks[-1].register_forward_hook(lambda module, given, out: seen.append(out))
    with torch.no_grad():
        hidden = model(**batch, output_hidden_states=True).hidden_states
    last = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    return np.stack([h.numpy() for h in (*hidden[:-1], last)]), batch["attention_mask"].numpy()


@pytest.mark.parametrize("worn", [False, True])
def test_every_layer_and_pooling_equals_transformers(config, base, adapters, worn):
    adapter = f"{adapters}/a1" if worn else ""
    loaded = open_base(config)
    system = loaded.wear(adapter) if worn else loaded.bare()
    ours = pooled_states(loaded, system, TEXTS, ("mean", "last", "position", "first"), batch_size=3)
    hidden, mask = theirs(base, adapter, TEXTS)  # [L+1, B, T, D], [B, T]
    place = np.cumsum(mask, axis=1) * mask
    ends = mask.sum(1) - 1
    for pooling, weights in {
        "mean": mask / mask.sum(1, keepdims=True),
        "last": np.eye(mask.shape[1])[ends],
        "position": place / place.sum(1, keepdims=True),
        "first": np.eye(mask.shape[1])[np.zeros(len(mask), int)],
    }.items():
        expected = np.einsum("lbtd,bt->lbd", hidden, weights)
        assert ours[pooling].shape == (SPEC.layers + 1, len(TEXTS), SPEC.dim)
        error = np.linalg.norm(ours[pooling] - expected, axis=-1) / np.linalg.norm(
            expected, axis=-1
        )
        assert error.max() < 1e-4


def test_only_the_layers_asked_for(config, base):
    loaded = open_base(config)
    whole = pooled_states(loaded, loaded.bare(), TEXTS)["mean"]
    some = jaxalign_states(base, [2, 0])
    np.testing.assert_allclose(some[2], whole[2], atol=1e-5)
    np.testing.assert_allclose(some[0], whole[0], atol=1e-5)
    with pytest.raises(UserError, match=r"layer=9 .* 3 blocks"):
        pooled_states(loaded, loaded.bare(), TEXTS, layers=[9])
    with pytest.raises(UserError, match="poolings are"):
        pooled_states(loaded, loaded.bare(), TEXTS, ("max",))


def jaxalign_states(base, layers):
    return jaxalign.states(base, TEXTS, layers)


def test_stored_states_resume_by_language(config, tmp_path, monkeypatch):
    corpus = Parallel({"de": TEXTS, "en": TEXTS[::-1], "it": TEXTS}, "made")
    loaded = open_base(config)
    system = loaded.bare()
    expected = store_states(loaded, system, corpus, tmp_path / "a", ("mean",), {"base": "x"})
    real, ran = states_module.pooled_states, []

    def dies(base_, system_, texts, *rest):
        ran.append(texts)
        if len(ran) == 2:
            raise KeyboardInterrupt
        return real(base_, system_, texts, *rest)

    monkeypatch.setattr(states_module, "pooled_states", dies)
    with pytest.raises(KeyboardInterrupt):
        store_states(loaded, system, corpus, tmp_path / "b", ("mean",), {"base": "x"})
    found = store_states(loaded, system, corpus, tmp_path / "b", ("mean",), {"base": "x"})
    assert len(ran) == 4  # de, en (died), en, it
    np.testing.assert_array_equal(found["mean"], expected["mean"])
    assert found["mean"].shape == (SPEC.layers + 1, 3, 4, SPEC.dim)
    store_states(loaded, system, corpus, tmp_path / "b", ("mean",), {"base": "x"})
    assert len(ran) == 4
    with pytest.raises(UserError, match=r"base=x.* y"):
        store_states(loaded, system, corpus, tmp_path / "b", ("mean",), {"base": "y"})


def test_states_of_another_tokenizer_are_refused(base, config, tmp_path):
    """One that was edited in place: same weights, same text, other tokens."""
    corpus = Parallel({"de": TEXTS, "en": TEXTS[::-1]}, "made")
    config.model.path = str(shutil.copytree(base, tmp_path / "base"))

    def store():
        loaded = open_base(config)
        return store_states(loaded, loaded.bare(), corpus, tmp_path / "a", ("mean",), {"base": "x"})

    np.testing.assert_array_equal(store()["mean"], store()["mean"])
    lower_case(config.model.path)
    with pytest.raises(UserError, match=r"made with tokens=\w+, now it is"):
        store()


def test_states_of_a_merged_adapter_are_others(config, adapters, tmp_path):
    """Those of the bare base are the same whatever is done with an adapter."""
    corpora = [Parallel({"de": TEXTS, "en": TEXTS[::-1]}, "made")]

    def measured(*systems):
        return measure_corpora(open_base(config), corpora, systems, str(tmp_path / "a"))

    worn = Probed("a", f"{adapters}/a1")
    measured(Probed("base"), worn)
    config.generate.adapter = "merged"
    measured(Probed("base"))
    with pytest.raises(UserError, match=r"made with generate\.adapter=unmerged, now it is merged"):
        measured(worn)


def test_the_order_of_sentences_is_part_of_the_tokens(config):
    loaded = open_base(config)
    corpora = [Parallel({"de": rows, "en": rows}, "made") for rows in (TEXTS, TEXTS[::-1])]
    one, other = (token_digest(corpus_tokens(loaded, corpus)) for corpus in corpora)
    assert one != other


def test_probe_from_files(config, adapters, tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    rows = {}
    for language in ("en", "de", "nl"):
        lines = (ASSETS / f"test.{language}.jsonl").read_text("utf-8").splitlines()[:20]
        rows[language] = [json.loads(line)["utterance"] for line in lines]
        (folder / f"{language}.txt").write_text("\n".join(rows[language]) + "\n")
    systems = [Probed("base"), Probed("a", f"{adapters}/a1")]
    table = probe(config, str(folder), systems, str(tmp_path / "out"), poolings=("mean", "last"))
    assert table.languages == ("de", "en", "nl") and table.layers == SPEC.layers
    assert table.pairs["margin"].shape == (2, 2, SPEC.layers + 1, 3, 3)
    assert np.isnan(np.einsum("splgg->splg", table.pairs["cosine"])).all()
    # One direction by hand.
    loaded = open_base(config)
    de, en = (pooled_states(loaded, loaded.bare(), rows[x])["mean"][2] for x in ("de", "en"))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (de, en)]
    same = np.unique(rows["en"], return_inverse=True)[1]
    hits = same[np.argmax(unit[0] @ unit[1].T, axis=1)] == same
    assert table.pairs["cosine"][0, 0, 2, 0, 1] == pytest.approx(hits.mean())
    assert np.isnan(table.pivoted["mexa"][..., 1]).all()
    assert np.isfinite(table.pivoted["cka"][..., [0, 2]]).all()
    assert not np.array_equal(table.pairs["cosine"][0], table.pairs["cosine"][1], equal_nan=True)
    with pytest.raises(UserError, match="'base'"):
        probe(config, str(folder), [Probed("base"), Probed("base")], str(tmp_path / "o"))


def test_bilingual_corpora_fill_one_table(config, tmp_path):
    corpora = [
        Parallel({"de": TEXTS, "en": TEXTS}, "de-en"),
        Parallel({"en": TEXTS[:3], "it": TEXTS[:3]}, "en-it"),
    ]
    table = measure_corpora(open_base(config), corpora, [Probed("base")], str(tmp_path), pivot="en")
    found = table.pairs["cosine"][0, 0, 1]
    assert table.languages == ("de", "en", "it")
    measured = ~np.isnan(found)
    assert measured.tolist() == [[False, True, False], [True, False, True], [False, True, False]]
    assert found[0, 1] == found[1, 2] == 1  # the same sentences


def test_corpora_of_which_one_has_no_pivot(config, tmp_path):
    """They have a control, and a language counts the sentences of all of them."""
    corpora = [
        Parallel({"de": TEXTS, "en": TEXTS}, "de-en", ("all.jsonl: 1 of 5 ids was left out.",)),
        Parallel({"de": TEXTS[:3], "it": TEXTS[:3]}, "de-it"),
    ]

    def measured(corpora, folder):
        return measure_corpora(
            open_base(config), corpora, [Probed("base")], str(tmp_path / folder), pivot="en"
        )

    table, first = measured(corpora, "a"), measured(corpora[:1], "b")
    assert table.sentences == {"de": 7, "en": 4, "it": 3}
    assert table.notes == corpora[0].notes
    np.testing.assert_array_equal(table.health["shuffled"], first.health["shuffled"])
    assert np.isfinite(table.health["shuffled"]).all()


def test_a_name_of_a_language_does_not_say_which_texts_are_copies(config, tmp_path):
    """Three sources of each target: any of them is right, be their language before or behind it."""
    lines = (ASSETS / "train.en.jsonl").read_text("utf-8").splitlines()
    texts = list(dict.fromkeys(json.loads(line)["utterance"] for line in lines))[:20]

    def chosen(code):
        rows = [
            {"text0": f"{text}{end}", "text1": text, "lang0": code, "lang1": "en"}
            for text in texts for end in (" !", " ?", " .")
        ]  # fmt: skip
        (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        config.align.train = [str(tmp_path / "pairs.jsonl")]
        return choose(open_base(config))

    assert chosen("de") == chosen("fr")
    assert chosen("de").score > 0.9  # by the first language alone at most half are found


def test_pairs_of_both_directions_are_all_counted(config, tmp_path):
    """Numbers of the two corpora together, whichever comes first."""
    wrong = [f"{text} and something else" for text in reversed(TEXTS[:3])]
    corpora = [
        Parallel({"de": TEXTS, "en": TEXTS}, "de-en"),
        Parallel({"de": TEXTS[:3], "en": wrong}, "en-de"),
    ]

    def measured(corpora, folder):
        return measure_corpora(
            open_base(config), corpora, [Probed("base")], str(tmp_path / folder), neurons=4
        )

    both, turned = measured(corpora, "a"), measured(corpora[::-1], "b")
    alone = [measured(corpora[n : n + 1], f"c{n}") for n in (0, 1)]
    assert both.sentences == {"de": 7, "en": 7}
    for kind, name in (("pairs", "margin"), ("pivoted", "mexa"), ("pivoted", "cka"),
                       ("pivoted", "nasca")):  # fmt: skip
        one, other, found, again = (getattr(t, kind)[name] for t in (*alone, both, turned))
        np.testing.assert_allclose(found, (4 * one + 3 * other) / 7, rtol=1e-6)
        np.testing.assert_allclose(again, found, rtol=1e-6)
        assert not np.allclose(one, other, equal_nan=True)


def test_the_layer_is_chosen_from_the_pairs(config, tmp_path):
    lines = (ASSETS / "pairs_xsid.jsonl").read_text("utf-8").splitlines()[:400]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    config.align.train = [str(tmp_path / "pairs.jsonl")]
    choice = choose(open_base(config))
    assert 1 <= choice.layer <= SPEC.layers == choice.layers
    assert f"chose block {choice.layer} of {SPEC.layers}" in choice.sentence()
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines[:3]) + "\n")
    with pytest.raises(UserError, match="needs 32 pairs"):
        choose(open_base(config))


def test_the_layer_is_chosen_from_the_pairs_that_are_trained(config, tmp_path):
    """Neither from those of other languages nor from those that a transform leaves out."""
    lines = (ASSETS / "pairs_xsid.jsonl").read_text("utf-8").splitlines()
    german, turkish = ([x for x in lines if f'"{name}"' in x][:40] for name in ("de", "tr"))

    def chosen(rows, languages=(), transforms=()):
        (tmp_path / "pairs.jsonl").write_text("\n".join(rows) + "\n")
        config.align.train = [str(tmp_path / "pairs.jsonl")]
        config.align.languages, config.align.transforms = list(languages), list(transforms)
        return choose(open_base(config))

    expected = chosen(german)
    assert chosen(german + turkish) != expected
    assert chosen(german + turkish, ["en", "de"]) == expected
    for rows, words in (
        (german[:5] + turkish, {"languages": ["en", "de"]}),
        (german, {"transforms": [{"name": "sample", "options": {"rows": 5}}]}),
    ):
        with pytest.raises(UserError, match=r"needs 32 pairs .*align\.transforms.* 5;"):
            chosen(rows, **words)
