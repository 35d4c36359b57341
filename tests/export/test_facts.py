"""What the card of a run says is in the run's records; scores only of the very weights."""

import copy
import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from jaxalign import objectives
from jaxalign.adapters.dora import Dora
from jaxalign.adapters.lora import Lora
from jaxalign.adapters.ranks import Part, block_range
from jaxalign.data.template import Template
from jaxalign.export.facts import card_facts, streams
from jaxalign.export.request import Request
from jaxalign.export.run import export
from jaxalign.export.scores import scores_of
from jaxalign.export.source import open_source
from jaxalign.generate import Decoding
from jaxalign.hf.card import model_card
from jaxalign.hf.load import load_spec
from jaxalign.hf.peft import save_peft, weights_digest

BASE = Template("", "base")


def card_of(folder):
    text = Path(folder, "README.md").read_text("utf-8")
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_a_run_s_card(run, rows, base):
    out, _ = run("align.weight=0.3", "align.every=joint", "lora.layers=1..2")
    front, body = card_of(export(Request(out)))
    assert front["language"] == sorted(front["language"])
    assert "en" in front["language"] and len(front["language"]) > 1
    assert "base_model" not in front  # a local folder is no name on the hub
    assert front["tags"] == ["lora", "cross-lingual-transfer", "jaxalign"]
    assert "license" not in front
    assert (
        "LoRA adapter of a local base, `base`, fine-tuned for intents and slots and aligned" in body
    )
    for line in (
        "| LoRA | r 4, alpha 16; scale alpha / r |",
        "| blocks | 1, 2 |",
        "| updates | 4 |",
        "| task objective | language_model, weight 1 |",
        "| alignment objective | contrastive, weight 0.3, temperature 0.1, direction one-way, "
        "negatives among 8 consecutive pairs, pooling mean |",
        "| aligned layer | 2 of 3 (its output) |",
        "| turns | task and alignment in every update |",
        "| learning rate | 0.01, constant |",
        "| micro-batch | 8 rows of at most 128 tokens; 8 pairs of at most 48 |",
        "| seed | 1 |",
        "| task | `task.jsonl` | en 64 |",
    ):
        assert line in body, line
    assert "`pairs.jsonl` |" in body
    assert str(rows) not in body and str(Path(base).parent) not in body  # no place of this machine
    assert "Prompts were built by the tokenizer's chat template." in body
    assert "## Scores" not in body and "## Citation" in body


def test_a_run_without_alignment(run):
    out, _ = run("align.weight=0")
    front, body = card_of(export(Request(out)))
    assert front["tags"] == ["lora", "jaxalign"] and front["language"] == ["en"]
    for word in ("align", "pairs", "turns"):
        assert word not in body.split("## Use")[0], word
    assert "Citation" not in body


def test_a_base_without_a_system_turn(run, base, tmp_path):
    """The card says what training did with the instruction, and its call does the same."""
    folder = tmp_path / "other"
    shutil.copytree(base, folder)
    (folder / "SHA256SUMS").unlink(missing_ok=True)
    file = folder / "chat_template.jinja"
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    file.write_text(refuses + file.read_text("utf-8"), "utf-8")
    words = ["prompt.system=Find the slots."]
    for path, joined in ((base, False), (folder, True)):
        out, _ = run(f"model.path={path}", *words)
        _, body = card_of(export(Request(out, out=str(tmp_path / f"{joined}"))))
        assert "\n> Find the slots.\n" in body
        assert ("The system turn was:" in body) == ('"role": "system"' in body) == (not joined)
        assert ("before the user's text:" in body) == ("INSTRUCTION" in body) == joined


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["task.kind=rows", "prompt.system=Find the slots."], "no chat template was applied"),
        (["task.weight=0"], ""),
    ],
    ids=["rows", "alignment"],
)
def test_a_run_that_rendered_no_template(run, jsonl, words, says):
    """The base has one, which comes along: prompts of this training would look otherwise in it."""
    rows = jsonl("r.jsonl", [{"prefix": "a", "text": " b", "lang": "en"}] * 8)
    out, _ = run(*words, f"task.train=[{rows}]")
    folder = export(Request(out))
    assert (folder / "chat_template.jinja").is_file()
    _, body = card_of(folder)
    assert says in body and "Find the slots" not in body
    assert 'tokenizer("PREFIX", return_tensors="pt")' in body
    assert "apply_chat_template" not in body and "turns = " not in body


def test_the_decoding_of_a_run(run, base):
    """That of the scores where there are any, or else of its settings."""
    out, trained = run("generate.method=beam", "generate.beams=3", "generate.max_new_tokens=64")
    source = open_source(out)
    facts = card_facts(source, "adapter", "x", BASE)
    assert facts.call == Decoding(64, "beam", beams=3).call() and not facts.request
    save_peft(f"{out}/adapter", trained, load_spec(base), source.adapter, base_name=base)
    evaluation(
        out, weights_digest(f"{out}/adapter"), method="greedy", max_new_tokens=32, adapter=""
    )
    facts = card_facts(source, "adapter", "x", BASE)
    assert facts.scores and facts.call == Decoding(32).call()
    assert facts.request == Decoding(32).request()


def row(body, name):
    """A row of the card's tables; None where there is none."""
    lines = (line.strip("| ").partition(" | ") for line in body.splitlines())
    return next((rest for key, _, rest in lines if key == name), None)


def body_of(configure, *words):
    """The card of a run with these settings."""
    source = dataclasses.replace(open_source(configure().output), config=configure(*words))
    return model_card(card_facts(source, "adapter", "x", BASE))


def test_settings_as_training_reads_them(run, configure):
    run()
    body = body_of(configure, "optim.clip_norm=0", "batch.pack=segments")
    assert "gradients not clipped" in row(body, "AdamW")
    assert row(body, "micro-batch").startswith("8 packed sequences of at most 128 tokens; ")
    # Negatives are the pairs of a micro-batch; under rule=cached those of an update.
    cached = ("align.rule=cached", "batch.accumulate=4")
    for words, negatives in (
        (["align.group=4"], "4 consecutive pairs"),
        (["align.negatives=global"], "the micro-batch"),
        ([*cached, "align.negatives=global"], "all pairs of the update"),
        ([*cached, "align.group=8"], "8 consecutive pairs"),
        ([*cached, "align.group=16"], "all pairs of the update"),  # task and pairs by turns: 2 x 8
        ([*cached, "align.group=16", "align.every=step"], "16 consecutive pairs"),
    ):
        objective = row(body_of(configure, *words), "alignment objective")
        assert f"negatives among {negatives}, " in objective, words
    assert "states" not in objective
    body = body_of(configure, "align.states=standardised")
    assert ", states standardised" in row(body, "alignment objective")


def test_a_control_run_is_called_one(run, configure):
    run()
    body = body_of(configure, "align.control=shuffled")
    assert "aligned across languages" not in body and "cross-lingual-transfer" not in body
    assert "and trained as a control run at layer 2 on pairs that are shuffled." in body


@objectives.declare(
    lambda mine, **_: objectives.both_sides(objectives.Needs((objectives.Tap(mine),))),
    settings="temperature",
)
def elsewhere(states, batch, *, mine, temperature):
    """An objective that reads one of the settings, and a layer of its own."""


def undeclared(states, batch):
    """An objective that gets what the settings say, and reads no more of them."""


def test_settings_that_the_objective_does_not_read(run, configure, tmp_path):
    """Neither a layer nor a pooling is named that nothing looked at."""
    run()
    file = tmp_path / "x.npz"
    np.savez(file, axis=np.ones(4), basis=np.ones((4, 1)), shifts=np.ones((2, 4)), pivot="en",
             languages=["en", "de"], layer=objectives.FINAL, pooling="last", base="x")  # fmt: skip
    lens = ("align.objective=lens", f"align.options={{subspace: {{file: {file}}}}}")
    body = body_of(configure, *lens)
    assert "aligned across languages after the final norm." in body
    assert row(body, "aligned layer") == "none: the states after the final norm"
    assert "pooling" not in row(body, "alignment objective")
    file.unlink()  # nothing tells any more what it reads
    body = body_of(configure, *lens)
    assert "and aligned across languages.\n" in body and row(body, "aligned layer") is None

    here = f"align.objective={__name__}:"
    body = body_of(configure, f"{here}elsewhere", "align.options={mine: 1}")
    assert "aligned across languages at layer 1." in body
    assert row(body, "aligned layer") == "1 of 3 (its output)"
    assert row(body, "alignment objective").endswith(", weight 1, temperature 0.1, mine 1")
    body = body_of(configure, f"{here}undeclared")
    assert row(body, "aligned layer") == "2 of 3 (its output)"
    assert row(body, "alignment objective").endswith(", weight 1, pooling mean")
    body = body_of(configure, "align.objective=gone:gone")
    assert "layer" not in body.split("## Use")[0]


def test_the_card_of_a_tree_for_jax(run, tmp_path, monkeypatch):
    """No library but this one opens it, and its card says how."""
    out, _ = run()
    folder = export(Request(out, out=str(tmp_path / "tree"), format="orbax", dtype="bfloat16"))
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"
    front, body = card_of(folder)
    assert front["library_name"] == "jaxalign"
    assert "| weights | bfloat16 |" in body
    for word in ("import AutoModel", "from_pretrained", "vllm serve", "apply_chat_template"):
        assert word not in body, word
    (code,) = re.findall(r"```python\n(.*?)```", body, re.S)
    monkeypatch.chdir(folder)
    found = {}
    exec(code, found)
    tokens = jnp.zeros((1, 4), int)
    hidden = found["decoder"].forward(found["params"], None, tokens).hidden
    assert hidden.shape == (1, 4, 32) and hidden.dtype == jnp.bfloat16


def test_a_merged_model_s_card(run, llama_base):
    out, _ = run(f"model.path={llama_base}", "prompt.template=llama3_paper", "trainable=full")
    front, body = card_of(export(Request(out, format="merged")))
    assert front["library_name"] == "transformers"
    assert "| weights | bfloat16 |" in body and "| trained | all " in body
    assert "the paper's layout for Llama 3" in body and "PeftModel" not in body


def test_an_adapter_of_unknown_origin(run, base, tmp_path):
    """Nothing tells how it was trained: defaults of settings are not facts."""
    out, trained = run()
    save_peft(tmp_path / "a", trained, load_spec(base), open_source(out).adapter, base_name=base)
    _, body = card_of(export(Request(str(tmp_path / "a"))))
    assert "| LoRA | r 4" in body
    for word in ("learning rate", "objective", "layer", "seed", "updates", "## Data", "Citation"):
        assert word not in body, word


def test_languages(configure, jsonl):
    task = jsonl("t.jsonl", [
        {"lang": lang, "utterance": "a", "intent": "b", "slots": []}
        for lang in ("de-st", "zh-CN", "de-st", "eng_Latn")
    ])  # fmt: skip
    pairs = jsonl("p.jsonl", [
        {"text0": "a", "text1": "b", "lang0": "de-st", "lang1": "en"},
        {"text0": "a", "text1": "b", "lang0": "cy", "lang1": "en"},
    ])  # fmt: skip
    config = configure(f"task.train=[{task}]", f"align.train=[{pairs}]")
    first, second = streams(config)
    assert first.data.languages == "de-st 2, eng_Latn 1, zh-CN 1"
    assert first.codes == {"de", "zh", "en"}
    assert second.data.languages == "cy-en 1, de-st-en 1" and second.codes == {"de", "en", "cy"}
    config = configure(f"task.train=[{task}]", "task.languages=[de-st]", "align.weight=0")
    (only,) = streams(config)
    assert only.data.languages == "de-st" and only.codes == {"de"}


def test_directions_and_data_that_is_gone(configure, jsonl):
    task = jsonl("t.jsonl", [{"src": "a", "tgt": "b", "src_lang": "de", "tgt_lang": "cs"}])
    config = configure("task.kind=translation", f"task.train=[{task}]", "align.weight=0",
                       "prompt.system=null")  # fmt: skip
    (found,) = streams(config)
    assert found.codes == {"de", "cs"} and found.data.languages == "de-cs 1"
    assert found.systems == {
        "Translate the user's text from German into Czech. Write the translation only."
    }
    Path(task).unlink()
    (found,) = streams(config)
    assert (found.codes, found.data.languages, found.systems) == (set(), "", set())
    config.task.train = ["hf:someone/data:subset@train"]
    (found,) = streams(config)
    assert found.data.files == ("hf:someone/data:subset@train",) and not found.codes


def test_data_sets_of_the_hub(run):
    out, _ = run()
    source = open_source(out)
    source.config.task.train = ["hf:someone/data:subset@train", "hf:someone/data@test"]
    facts = card_facts(source, "adapter", "x", BASE)
    assert facts.datasets == ("someone/data",)


@pytest.mark.parametrize(("path", "revision"), [("me/base", "v2"), ("me/base@v2", None)])
def test_the_revision_of_a_base(run, path, revision):
    out, _ = run()
    source = open_source(out)
    opened = copy.copy(source.opened)
    opened.model = dataclasses.replace(opened.model, path=path, revision=revision)
    facts = card_facts(dataclasses.replace(source, opened=opened), "adapter", "x", BASE)
    assert (facts.base, facts.revision, facts.base_folder) == ("me/base", "v2", "")


def test_what_vllm_takes(run):
    out, _ = run()
    source = open_source(out)
    for adapter, rank in (
        (Lora(r=4), 8),
        (Lora(r=16), 16),
        (Lora(r=20), 32),
        (Lora(r=600), None),
        (Dora(r=8), None),
        (Lora(r=8, parts=(Part("q", 1, 2, 16.0),)), None),
    ):
        facts = card_facts(dataclasses.replace(source, adapter=adapter), "adapter", "x", BASE)
        assert bool(facts.limits) == (rank is None), adapter
        assert rank is None or facts.served_rank == rank


# --- scores -------------------------------------------------------------------------------------


def evaluation(out, *digests, rows=None, **changed):
    """An evaluation of adapters of one name, next to another system."""
    folder = Path(out, "evaluation")
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"base": open_source(out).opened.fingerprint, "dtype": "bfloat16 nf4"} | changed
    made_by = {
        system: [facts | {"adapter_weights": one} for one in of]
        for system, of in (("aligned", digests), ("sft", ("0" * 16,)))
    }
    score = {"std": None, "seeds": [1.0], "rows": 9}
    groups = {
        system: {group: score | {"mean": mean} for group in ("seen", "all")}
        for system, mean in (("sft", 50.04), ("aligned", 61.26))
    }
    report = {
        "made_by": made_by,
        "systems": ["sft", "aligned"],
        "seeds": {"sft": 1, "aligned": 1},
        "groups": {"seen": ["en"], "all": ["en", "cy"]},
        "rows": rows or {"en": 20, "cy": 1500},
        "measures": {"slot_f1": {"groups": groups}},
    }
    (folder / "report.json").write_text(json.dumps(report))


def test_scores_of_these_weights(run, base):
    out, trained = run("lora.layers=1..2")
    source = open_source(out)
    save_peft(f"{out}/adapter", trained, load_spec(base), source.adapter, base_name=base)
    evaluation(out, weights_digest(f"{out}/adapter"))
    _, body = card_of(export(Request(out)))
    assert "|  | languages | **aligned** | sft |" in body
    assert "| slot F1, %, seen | en | 61.3 | 50.0 |" in body
    assert "| slot F1, %, all | en cy | 61.3 | 50.0 |" in body
    assert "**aligned** is this adapter, on its base in bfloat16 nf4; means" in body
    assert "means. Rows of each language: 20 to 1,500." in body
    evaluation(out, weights_digest(f"{out}/adapter"), rows={"en": 20, "cy": 20})
    assert "Rows of each language: 20." in scores_of(open_source(out)).notes[0]
    # The adapter folder of the run is the same adapter.
    _, body = card_of(export(Request(f"{out}/adapter")))
    assert "## Scores" in body


def test_no_scores_that_are_not_of_these_weights_alone(run, base):
    out, trained = run()
    save_peft(f"{out}/adapter", trained, load_spec(base), open_source(out).adapter, base_name=base)
    own, file = weights_digest(f"{out}/adapter"), Path(out, "evaluation", "report.json")

    def scores():
        return scores_of(open_source(out))

    evaluation(out, own)
    assert scores()
    evaluation(out, own, "f" * 16)  # the mean over two seeds
    assert scores() is None
    evaluation(out, own, base="another")
    assert scores() is None
    evaluation(out, own)
    report = json.loads(file.read_text())
    del report["made_by"]  # an older release wrote it
    file.write_text(json.dumps(report))
    assert scores() is None
    # A report of other answers says nothing about these weights.
    evaluation(out, "f" * 16)
    line = json.dumps({"made_by": {"adapter_weights": own}})
    (file.parent / "aligned").mkdir()
    (file.parent / "aligned" / "answers.jsonl").write_text(line + "\n")
    assert scores() is None


def test_no_scores_of_other_weights(run, base):
    out, trained = run()
    spec, adapter = load_spec(base), open_source(out).adapter
    evaluation(out, "f" * 16)
    assert "## Scores" not in card_of(export(Request(out)))[1]  # nothing to compare with
    save_peft(f"{out}/adapter", trained, spec, adapter, base_name=base)
    assert "## Scores" not in card_of(export(Request(out, force=True)))[1]
    evaluation(out, weights_digest(f"{out}/adapter"))
    assert "## Scores" in card_of(export(Request(out, force=True)))[1]
    run(step=6, seed=9)  # another step is exported than was evaluated
    assert "## Scores" not in card_of(export(Request(out, force=True)))[1]
    Path(out, "evaluation", "report.json").write_text("{")
    export(Request(out, step="4", force=True))


def test_ranges():
    assert block_range((1, 2, 3)) == "1 to 3"
    assert block_range((1, 2)) == "1, 2"
    assert block_range((2, 4, 5)) == "2, 4, 5"
    assert block_range(()) == ""
