"""Task items become states of premise and option, and DALI of every layer."""

import json

import numpy as np
import pytest

from jaxalign.base import open_base
from jaxalign.errors import UserError
from jaxalign.probe import states as states_module
from jaxalign.probe.corpus import Parallel
from jaxalign.probe.items import measure_items, read_items
from jaxalign.probe.neurons import measure_neurons
from jaxalign.probe.run import Probed, measure_corpora, probe

ITEMS = {
    "en": [("it is cold", ["i put on a coat", "i go swimming"]), ("it rains", ["wet", "dry"])],
    "de": [("es ist kalt", ["ich ziehe einen mantel an", "ich gehe schwimmen"]),
           ("es regnet", ["nass", "trocken"])],
    "it": [("fa freddo", ["metto il cappotto", "vado a nuotare"]), ("piove", ["bagnato", "secco"])],
}  # fmt: skip
TEXTS = {
    "de": ["Guten Morgen", "weck mich um neun", "es regnet heute", "wo ist das Kino"],
    "en": ["good morning", "wake me up at nine", "it rains today", "where is the cinema"],
}


def rows(items=ITEMS):
    return [
        {"id": str(number), "lang": language, "premise": premise, "options": options}
        for language, found in items.items()
        for number, (premise, options) in enumerate(found)
    ]


def written(tmp_path, content):
    file = tmp_path / "items.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in content))
    return str(file)


def torch_model(folder):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return torch, model, AutoTokenizer.from_pretrained(folder)


def test_items_of_the_probed_languages_in_one_order(tmp_path):
    alone = {"id": "9", "lang": "de", "premise": "nur hier", "options": ["a", "b"]}
    content = [*rows()[::-1], alone]
    found = read_items(written(tmp_path, content), ["deu_Latn", "eng_Latn"])
    assert set(found) == {"deu_Latn", "eng_Latn"}
    assert found["eng_Latn"][0] == ["it is cold i put on a coat", "it is cold i go swimming"]
    assert found["deu_Latn"][1] == ["es regnet nass", "es regnet trocken"]


def test_dali_of_every_layer_is_that_of_transformers_states(config, base, tmp_path):
    torch, model, tokenizer = torch_model(base)
    items = read_items(written(tmp_path, rows()), ["de", "en", "it"])
    loaded = open_base(config)
    found = measure_items(loaded, loaded.bare(), items, "en")

    def last(text):  # [L+1, D], the last before the final norm
        seen = []
        hook = model.model.layers[-1].register_forward_hook(lambda m, given, out: seen.append(out))
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True)
        hook.remove()
        top = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
        return np.stack([h[0, -1].numpy() for h in (*hidden.hidden_states[:-1], top)])

    states = {
        language: np.stack([[last(text) for text in options] for options in found_items])
        for language, found_items in items.items()
    }  # [items, options, L+1, D]
    unit = {name: x / np.linalg.norm(x, axis=-1, keepdims=True) for name, x in states.items()}
    for language in ("de", "it"):
        cosine = np.einsum("nild,njld->lnij", unit["en"], unit[language])
        right = np.minimum(cosine[..., 0, 0], cosine[..., 1, 1])
        wrong = np.maximum(cosine[..., 0, 1], cosine[..., 1, 0])
        np.testing.assert_array_equal(found["dali"][language], (right > wrong).mean(axis=-1))
    assert set(found["dali_strong"]) == {"de", "it"}


def test_long_items_are_read_to_their_options(config, tmp_path, monkeypatch):
    """Options stand behind the premise: cut as sentences are, all would have one state."""
    items = read_items(
        written(tmp_path, rows({"de": ITEMS["en"], "en": ITEMS["en"]})), ["de", "en"]
    )
    loaded, shapes, real = open_base(config), [], states_module._batches

    def batches(*args):
        for batch in real(*args):
            shapes.append(batch[1].shape)
            yield batch

    monkeypatch.setattr(states_module, "LONGEST", 4)
    monkeypatch.setattr(states_module, "_batches", batches)
    found = measure_items(loaded, loaded.bare(), items, "en", batch_size=8)
    np.testing.assert_array_equal(found["dali"]["de"], 1)  # the very same texts
    assert all(rows == max(8 * 4**2 // width**2, 1) for rows, width in shapes)  # scores of 4 tokens


def test_items_that_are_left_out_are_told(config, tmp_path):
    loaded, corpus = open_base(config), Parallel(TEXTS, "four sentences")
    content = [row for row in rows() if row["lang"] != "it"]

    def measured(more, folder):
        items = read_items(written(tmp_path, more), ["de", "en"])
        out = str(tmp_path / folder)
        return measure_corpora(loaded, [corpus], [Probed("base")], out, items=items)

    long = {"premise": "wake me up " * 300, "options": ["a", "b"]}
    lost = [{"id": "8", "lang": lang, **long} for lang in ("de", "en")]
    alone = {"id": "9", "lang": "de", "premise": "nur hier", "options": ["a", "b"]}
    table, short = measured([*content, *lost, alone], "a"), measured(content, "b")
    assert short.notes == ()
    assert table.notes == (
        f"{tmp_path / 'items.jsonl'}: ids that some languages lack were left out: 1 of 4.",
        "Of 3 items 1 are longer than the 512 tokens of the model and were left out.",
    )
    np.testing.assert_array_equal(table.pivoted["dali"], short.pivoted["dali"])
    with pytest.raises(UserError, match=r"--items: of 1 items 1 are longer than the 512 tokens"):
        measured(lost, "c")


def test_neurons_are_the_gates_of_transformers(config, base):
    torch, model, tokenizer = torch_model(base)
    loaded = open_base(config)
    corpus = Parallel(TEXTS, "four sentences")
    found = measure_neurons(loaded, loaded.bare(), corpus, "en", rows=4)

    def gates(text):  # [L, F]: later tokens weigh more
        seen = []
        hooks = [
            layer.mlp.act_fn.register_forward_hook(lambda m, given, out: seen.append(out[0]))
            for layer in model.model.layers
        ]
        with torch.no_grad():
            model(**tokenizer(text, return_tensors="pt"))
        for hook in hooks:
            hook.remove()
        weights = torch.arange(1, len(seen[0]) + 1, dtype=torch.float32)
        return np.stack([((weights[:, None] * h).sum(0) / weights.sum()).numpy() for h in seen])

    theirs = {name: np.stack([gates(t) for t in texts]) for name, texts in TEXTS.items()}
    for name, state in (("nasca", lambda x: (x > 0).astype(float)), ("navca", np.abs)):
        for layer in range(1, found[name]["de"].shape[0]):
            x, y = (state(theirs[lang][:, layer - 1]) for lang in ("en", "de"))
            x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))
            cosine = x @ y.T
            own = np.diag(cosine)
            rest = np.where(np.eye(4, dtype=bool), -np.inf, cosine)
            wanted = np.mean((own > rest.max(0)) & (own > rest.max(1)))
            assert found[name]["de"][layer] == wanted, (name, layer)
        assert np.isnan(found[name]["de"][0])


def test_a_probe_holds_what_was_asked_for(config, adapters, tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for language, texts in TEXTS.items():
        (folder / f"{language}.txt").write_text("\n".join(texts))
    table = probe(
        config,
        str(folder),
        [Probed("base"), Probed("a1", f"{adapters}/a1")],
        str(tmp_path / "out"),
        poolings=("mean", "last"),
        neurons=3,
        items=written(tmp_path, rows()),
    )
    layers = table.layers + 1
    for name in ("nasca", "navca", "dali", "dali_strong"):
        values = table.pivoted[name]
        assert values.shape == (2, 2, layers, 2)
        assert np.isnan(values[..., 1]).all()  # English with itself
        start = 1 if name in ("nasca", "navca") else 0
        assert not np.isnan(values[:, :, start:, 0]).any()
        np.testing.assert_array_equal(values[:, 0], values[:, 1])


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda rows: rows[0].pop("premise"), "items.jsonl:1: .*premise"),
        (lambda rows: rows[0].update(options=["one"]), "at least two texts"),
        (lambda rows: rows[0].update(options=["one", " "]), "at least two texts"),
        (lambda rows: rows[0].update(options=["a", "b", "c"]), r"item '0' has \[2, 3\] options"),
        (lambda rows: [row.update(lang="cy") for row in rows], "has items in none of the probed"),
        (lambda rows: [row.update(id=str(n)) for n, row in enumerate(rows)], "no id occurs in all"),
    ],
)
def test_items_that_do_not_fit(tmp_path, change, words):
    content = rows()
    change(content)
    with pytest.raises(UserError, match=words):
        read_items(written(tmp_path, content), ["de", "en", "it"])


def test_items_without_the_pivot(config, tmp_path):
    items = read_items(written(tmp_path, rows()), ["de", "it"])
    loaded = open_base(config)
    with pytest.raises(UserError, match="pivot language 'en'"):
        measure_items(loaded, loaded.bare(), items, "en")
