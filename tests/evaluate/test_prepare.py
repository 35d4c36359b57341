"""Everything that can be wrong with an evaluation is told before weights are loaded."""

import json
import os
import sys
from pathlib import Path

import jax
import pytest

from jaxalign import base as bases
from jaxalign.adapters.lora import Lora
from jaxalign.base import open_base
from jaxalign.errors import UserError
from jaxalign.evaluate.entrants import Entrant, check_name, folder_names
from jaxalign.evaluate.run import evaluate
from jaxalign.evaluate.write import write
from jaxalign.hf.peft import load_peft, save_peft
from jaxalign.hf.save import save_base
from jaxalign.model.decoder import Decoder
from jaxalign.paths import whole_file
from tests.evaluate.conftest import rows_of
from tests.tiny import SPEC, of_run


@pytest.fixture(autouse=True)
def loads(monkeypatch):
    """Which weights were loaded; an evaluation that is refused loads none."""
    from jaxalign.sharding import make_mesh

    asked, real = [], bases.load_params
    monkeypatch.setattr(
        bases, "load_params", lambda path, *rest: asked.append(path) or real(path, *rest)
    )
    monkeypatch.setattr(
        bases, "make_mesh", lambda *axes: make_mesh(*axes, devices=jax.devices()[:1])
    )
    return asked


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """An adapter with more blocks than the base has."""
    import dataclasses

    spec = dataclasses.replace(SPEC, layers=5)
    lora, folder = Lora(r=1, targets=("o",)), tmp_path_factory.mktemp("foreign")
    save_peft(folder / "adapter", lora.init(spec, jax.random.key(1)), spec, lora)
    return str(folder / "adapter")


A = Entrant("a", "A1")  # a good adapter


@pytest.mark.parametrize(
    ("words", "entrants", "message"),
    [
        ([], [A, Entrant("f", "FOREIGN")], "the adapter was trained on another base"),
        ([], [A, Entrant("n", "TMP/none")], "no such folder"),
        ([], [A, Entrant("p", "TMP/none.jsonl", "predictions")], "no such predictions file"),
        ([], [A, Entrant("a", "TMP/bad.txt", "predictions")], "holds 2 answers"),
        (["evaluate.options={tokenize: zh}"], [A], "evaluate.options.tokenize: the scorer of"),
        (["evaluate.options={rules: 5}"], [A], "evaluate.options.rules: 5 should be text"),
        (["evaluate.options={rules: x}"], [A], "rules must be one of paper, mended"),
        (["evaluate.groups={all: [de]}"], [A], "the group name 'all' is taken"),
        (["generate.max_new_tokens=500"], [A], "leaves no room for 500 more"),
        (["evaluate.shots=2", "task.train=[]"], [A, Entrant("few", kind="few_shot")],
         "evaluate.shots: the solved rows come from task.train"),
        ([], [], "nothing to evaluate"),
        ([], [A, Entrant("../x", "A1")], "'../x' cannot name a system"),
    ],
)  # fmt: skip
def test_what_is_refused_loads_no_weights(
    judged, adapters, foreign, loads, tmp_path, words, entrants, message
):
    (tmp_path / "bad.txt").write_text("a\nb\n")
    places = {"A1": f"{adapters}/a1", "FOREIGN": foreign}
    given = [
        Entrant(e.name, places.get(e.source, e.source.replace("TMP", str(tmp_path))), e.kind)
        for e in entrants
    ]
    with pytest.raises(UserError) as error:
        evaluate(judged(*words), given, str(tmp_path / "out"))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert loads == []


def test_a_missing_package_is_told_first(judged, adapters, loads, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "seqeval.metrics.sequence_labeling", None)
    with pytest.raises(UserError, match=r"pip install 'jaxalign\[eval\]'"):
        evaluate(judged(), [Entrant("a", f"{adapters}/a1")], str(tmp_path / "out"))
    assert loads == []


def test_comet_is_looked_for_first(judged, adapters, loads, monkeypatch, tmp_path):
    rows = [{"src": "a", "tgt": "b", "src_lang": "de", "tgt_lang": "en"}]
    (tmp_path / "mt.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["task.kind=translation", f"evaluate.data=[{tmp_path}/mt.jsonl]"]
    monkeypatch.setitem(sys.modules, "comet", None)
    monkeypatch.setenv("PATH", "")
    for options, message in (
        ("{comet: x/y}", "COMET is missing"),
        ("{comet: /none/x.ckpt}", "evaluate.options.comet: there is no file /none/x.ckpt"),
        ("{comet_gpus: -1}", "evaluate.options.comet_gpus: -1 should be a whole number, 0 or more"),
        ("{tokenize: 13b}", "no tokenizer '13b'"),
    ):
        with pytest.raises(UserError) as error:
            config = judged(*words, f"evaluate.options={options}")
            evaluate(config, [Entrant("a", f"{adapters}/a1")], str(tmp_path / "out"))
        assert message in str(error.value)
    assert loads == []


def test_old_answers_of_other_settings_are_told_first(judged, adapters, loads, tmp_path):
    entrant = [Entrant("a", f"{adapters}/a1")]
    config = judged("evaluate.rows=1", "evaluate.languages=[de]")
    evaluate(config, entrant, str(tmp_path / "out"))
    assert len(loads) == 1
    with pytest.raises(UserError, match="made with adapter_weights="):
        evaluate(config, [Entrant("a", f"{adapters}/a2")], str(tmp_path / "out"))
    # What is answered already needs no weights at all.
    before = (tmp_path / "out" / "a" / "predictions.jsonl").read_bytes()
    evaluate(config, entrant, str(tmp_path / "out"))
    assert (tmp_path / "out" / "a" / "predictions.jsonl").read_bytes() == before
    assert len(loads) == 1


def test_another_end_of_answers_is_another_system(judged, adapters, base, tmp_path, monkeypatch):
    """The same prompts and weights, but answers end elsewhere: none of the old ones is taken."""
    entrant = [Entrant("a", f"{adapters}/a1")]
    config = judged("evaluate.rows=1", "evaluate.languages=[de]")
    evaluate(config, entrant, str(tmp_path / "out"))
    monkeypatch.setattr(bases, "stop_ids", lambda *_: (2, 5))
    with pytest.raises(UserError, match=r"made with stop_tokens=\[2\], now it is \[2, 5\]"):
        evaluate(config, entrant, str(tmp_path / "out"))


def test_a_damaged_answer_is_written_again(judged, adapters, loads, tmp_path, capsys):
    entrant = [Entrant("a", f"{adapters}/a1")]
    config = judged("evaluate.rows=5", "evaluate.languages=[en]")
    evaluate(config, entrant, str(tmp_path / "out"))
    folder = tmp_path / "out" / "a"
    whole, cache = (folder / "predictions.jsonl").read_bytes(), folder / "answers.jsonl"
    lines = cache.read_text().splitlines()
    row = json.loads(lines[2])
    lines[2] = json.dumps(row | {"answer": row["answer"] + " "}, ensure_ascii=False)
    cache.write_text("\n".join(lines) + "\n")
    capsys.readouterr()
    evaluate(config, entrant, str(tmp_path / "out"))
    assert "1 lines are not what was written" in " ".join(capsys.readouterr().out.split())
    assert (folder / "predictions.jsonl").read_bytes() == whole
    assert len(rows_of(cache)) == 1 + 5 + 4  # its whole batch of four


def test_an_adapter_of_a_base_of_another_name(judged, adapters, tmp_path, capsys):
    lora, adapter = load_peft(adapters / "a1", SPEC)
    save_peft(tmp_path / "other", lora, SPEC, adapter, base_name="some/other-base")
    config = judged("evaluate.rows=1", "evaluate.languages=[de]")
    evaluate(config, [Entrant("a", str(tmp_path / "other"))], str(tmp_path / "out"))
    told = " ".join(capsys.readouterr().out.split())
    assert f"{tmp_path}/other names some/other-base as its base, not " in told


def test_an_adapter_of_a_base_with_other_weights(judged, adapters, base, loads, tmp_path):
    """The record of its run knows which weights it was trained on."""
    config = judged("evaluate.rows=1", "evaluate.languages=[de]")
    same = of_run(adapters / "a1", tmp_path / "same", base)
    evaluate(config, [Entrant("a", same)], str(tmp_path / "out"))
    save_base(tmp_path / "other", Decoder(SPEC).init(jax.random.key(7)), SPEC)
    adapter = of_run(adapters / "a1", tmp_path / "run", tmp_path / "other")
    loads.clear()
    with pytest.raises(UserError, match=f"{adapter} was trained on another base than {base}"):
        evaluate(config, [Entrant("a", adapter)], str(tmp_path / "out"))
    assert not loads
    with pytest.raises(UserError, match=r"give that base by --base MODEL or as model\.path"):
        open_base(config).wear(adapter)


@pytest.mark.parametrize(("then", "now"), [("nf4", "none"), ("none", "int8"), ("nf4", "nf4")])
def test_an_adapter_that_learnt_on_otherwise_rounded_weights(
    judged, adapters, base, tmp_path, capsys, then, now
):
    adapter = of_run(adapters / "a1", tmp_path / "run", base, then)
    config = judged("evaluate.rows=1", "evaluate.languages=[de]", f"model.quantize={now}")
    evaluate(config, [Entrant("a", adapter)], str(tmp_path / "out"))
    told = " ".join(capsys.readouterr().out.split())
    names = {"none": "full"}
    sentence = (
        f"{adapter} was trained on {names.get(then, then)} weights of its base (model.quantize) "
        f"and is used with {names.get(now, now)} ones here"
    )
    assert (sentence in told) == (then != now)
    assert ("was trained on" in told) == (then != now)


@pytest.mark.parametrize("what", ["file", "inside a file", "system", "read-only"])
def test_an_output_that_cannot_be_written(judged, adapters, loads, tmp_path, monkeypatch, what):
    (tmp_path / "file").write_text("mine")
    out = {"file": tmp_path / "file", "inside a file": tmp_path / "file" / "out"}.get(
        what, tmp_path / "out"
    )
    if what == "system":
        out.mkdir()
        (out / "a").write_text("mine")
    if what == "read-only":

        def refuse(*_, **__):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("jaxalign.paths.tempfile.TemporaryFile", refuse)
    with pytest.raises(UserError, match=r"--out: .* cannot be written"):
        evaluate(judged(), [Entrant("a", f"{adapters}/a1")], str(out))
    if what != "system":
        with pytest.raises(UserError, match=r"--out: .* cannot be written"):
            write(judged(), f"{adapters}/a1", [], [], str(out / "x.jsonl"))
    with pytest.raises(UserError, match="is a folder; name a file in it"):
        write(judged(), f"{adapters}/a1", [], [], str(tmp_path))
    assert loads == [] and (tmp_path / "file").read_text() == "mine"


def test_devices_and_links_are_not_replaced_by_files(judged, adapters, loads, tmp_path):
    """`--out /dev/null` of a privileged user replaced the device: a pipe stands in for it here."""
    pipe, link, kept = tmp_path / "pipe", tmp_path / "link", tmp_path / "kept.jsonl"
    os.mkfifo(pipe)
    (tmp_path / "broken").symlink_to(tmp_path / "none")
    for name in (pipe, tmp_path / "broken"):
        with pytest.raises(UserError, match="is a device or a broken link"):
            write(judged(), f"{adapters}/a1", [], [], str(name))
        with pytest.raises(UserError, match="is a device or a broken link"), whole_file(name):
            pass
    assert pipe.is_fifo() and sorted(tmp_path.iterdir()) == sorted([pipe, tmp_path / "broken"])
    null = "null (byte|character)"  # of Python up to 3.12, and of 3.13
    for name, message in (("x" * 201, "more than 200 bytes"), ("a\x00b/c", null)):
        with pytest.raises(UserError, match=message):
            write(judged(), f"{adapters}/a1", [], [], str(tmp_path / name))
    assert loads == []
    kept.write_text("old")
    link.symlink_to(kept)
    with whole_file(link) as new:
        new.write_text("new")
    assert link.is_symlink() and kept.read_text() == "new"


@pytest.mark.parametrize(
    "name",
    ["", " ", "..", ".", "../x", "a/b", "/etc", "a\\b", ".hidden", "a\x1b[2J", "a\nb", "a\u202eb",
     "\ud800", "x" * 101, "ä" * 60, "report.json", "REPORT.md", "gains.png", "SHA256SUMS", "a\x00"],
)  # fmt: skip
def test_names_that_are_no_folders_are_refused(judged, tmp_path, name):
    with pytest.raises(UserError) as error:
        check_name(name)
    told = str(error.value)
    assert "cannot name a system" in told and told.isprintable() and len(told) < 300
    (tmp_path / "p.txt").write_text("a\n" * 16)
    with pytest.raises(UserError, match="cannot name a system"):
        evaluate(judged(), [Entrant(name, str(tmp_path / "p.txt"), "predictions")],
                 str(tmp_path / "out" / "deeper"))  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"p.txt"}  # nothing was written anywhere


def test_names_that_are_folders():
    names = ["base 2-shot", "sft", "zh (mit Umlaut ä)", "日本", "x" * 100, "a..b", "50%"]
    assert folder_names([Entrant(name) for name in names]) == names
    assert folder_names([Entrant("a"), Entrant("b"), Entrant("a")]) == ["a_1", "b", "a_2"]
    for same in (
        [Entrant("base", kind="base"), Entrant("base", "runs/base/adapter", guessed=True)],
        [Entrant("base", kind="base"), Entrant("base", "runs/x/adapter")],
        [Entrant("peft", "a/export/peft", guessed=True), Entrant("peft", "b/export/peft")],
    ):
        with pytest.raises(
            UserError, match=r"as seeds of one system are; write --adapter NAME=PAT"
        ):
            folder_names(same)
    for names in (["a", "a", "a_1"], ["Sft", "sft"]):
        with pytest.raises(UserError, match="would write to the folder"):
            folder_names([Entrant(name) for name in names])


def test_foreign_text_cannot_steer_the_terminal(judged, golds, tmp_path, capsys):
    """Data names the languages, files name the systems: all of it is shown, nothing obeyed."""
    rows = rows_of(golds / "test.de.jsonl")[:2]
    nasty = "\x1b]0;owned\x07[bold]de[/nope]"
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row | {"lang": nasty}) + "\n" for row in rows))
    (tmp_path / "p.txt").write_text("a\nb\n")
    evaluate(judged(f"evaluate.data=[{file}]"),
             [Entrant("[red]x[no]", str(tmp_path / "p.txt"), "predictions")],
             str(tmp_path / "[out]"))  # fmt: skip
    told = capsys.readouterr().out
    assert "\x1b]0" not in told and "\\x1b]0;owned\\x07[bold]de[/nope]" in told
    assert "[red]x[no]" in "".join(told.split())
    assert Path(tmp_path, "[out]", "report.md").read_text().isprintable() is False  # has newlines
    assert "\x1b" not in Path(tmp_path, "[out]", "report.md").read_text()
