"""Each adapter gets the chat template of its training; a note says where the two differ."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from jaxalign.base import open_base
from jaxalign.config import load, to_yaml
from jaxalign.data.chat import encode_prompts, load_tokenizer
from jaxalign.data.render import render_examples
from jaxalign.data.tasks import Example
from jaxalign.data.template import (
    NO_THINKING,
    Template,
    belonging,
    find_template,
    llama3_paper,
    prompts_by,
    prompts_of,
    stored,
    template_files,
    trained_with,
    training_template,
)
from jaxalign.errors import UserError
from jaxalign.evaluate.gold import read_golds
from jaxalign.evaluate.run import Entrant, evaluate
from jaxalign.evaluate.write import write
from jaxalign.hf.peft import load_peft, save_peft
from jaxalign.merge.methods import Recipe
from jaxalign.merge.run import merge
from jaxalign.train.loop import train
from tests.evaluate.conftest import rows_of
from tests.export.conftest import llama_base  # noqa: F401  (a fixture)

TALK = [{"role": "system", "content": "Find it."}, {"role": "user", "content": "wake me up"}]
OTHER = "{% for m in messages %}{{ m.role }}> {{ m.content }}\n{% endfor %}<|eot_id|>"


@pytest.fixture(scope="module")
def trained(llama_base, golds, tmp_path_factory):  # noqa: F811
    """A run that trained on the paper's layout, on a base with a template of its own."""
    config = load(
        None,
        [f"output={tmp_path_factory.mktemp('run')}", f"model.path={llama_base}",
         "model.dtype=float32", "task.kind=intent", f"task.train=[{golds}/test.en.jsonl]",
         "align.weight=0", "prompt.template=llama3_paper", "train.steps=1", "batch.size=1",
         "batch.accumulate=1", "batch.max_length=64", "batch.buckets=[64]", "mesh.fsdp=1",
         "mesh.data=1", "lora.r=2", "lora.targets=[o]", "log.progress=none"],
    ).config  # fmt: skip
    import jax

    from jaxalign import base as bases
    from jaxalign.sharding import make_mesh

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bases, "make_mesh", lambda *axes: make_mesh(*axes, devices=jax.devices()[:1]))
        return Path(train(config).adapter)


@pytest.fixture
def judge(llama_base, golds, tmp_path):  # noqa: F811
    def build(*words):
        return load(
            None,
            [f"output={tmp_path / 'run'}", f"model.path={llama_base}", "model.dtype=float32",
             "mesh.fsdp=-1", "task.kind=intent", f"evaluate.data=[{golds}/test.de.jsonl]",
             "evaluate.rows=1", "generate.max_new_tokens=2", "evaluate.draws=5", *words],
        ).config  # fmt: skip

    return build


@pytest.fixture
def adapter(trained, llama_base, tmp_path):  # noqa: F811
    """text or None -> that adapter alone, in a folder that records no settings of a run."""

    def build(text, name="alone"):
        lora, adapter = load_peft(trained, base_spec(llama_base))
        texts = {} if text is None else {"chat_template.jinja": text}
        save_peft(tmp_path / name, lora, base_spec(llama_base), adapter,
                  base_name=llama_base, texts=texts)  # fmt: skip
        return str(tmp_path / name)

    return build


def base_spec(folder):
    from jaxalign.hf.load import load_spec

    return load_spec(folder)


def test_the_stored_template_gives_the_tokens_of_the_training(trained, llama_base):  # noqa: F811
    """As PEFT's and vLLM's users meet it: the base's tokenizer with the file beside the adapter."""
    tokenizer = AutoTokenizer.from_pretrained(llama_base)
    text = (trained / "chat_template.jinja").read_text()
    theirs = tokenizer.apply_chat_template(
        TALK, chat_template=text, add_generation_prompt=True, return_dict=False
    )
    example = Example("wake me up", "x", system="Find it.")
    (ours,) = encode_prompts([example], load_tokenizer(llama_base), "llama3_paper")
    np.testing.assert_array_equal(theirs, ours)
    own = tokenizer.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)
    assert list(own) != list(ours)


def test_an_adapter_is_asked_as_it_was_trained(judge, trained, adapter, tmp_path, capsys):
    """Whatever prompt.template says; one sentence tells where that differs."""
    answers = {}
    paper = adapter((trained / "chat_template.jinja").read_text())
    for name, source, said in (
        ("as_trained", paper, "llama3_paper"), ("chat", paper, "chat"),
        ("untold", adapter(None, "untold"), "chat"),
    ):  # fmt: skip
        capsys.readouterr()
        evaluate(judge(f"prompt.template={said}"), [Entrant("a", source)], str(tmp_path / name))
        told = capsys.readouterr().out
        note = f"{source} was trained and is prompted with prompt.template=llama3_paper"
        assert (note in told) == (name == "chat"), told
        cache = tmp_path / name / "a" / "answers.jsonl"
        answers[name] = [row["key"] for row in rows_of(cache)[1:]], rows_of(cache)[0]
    assert answers["chat"] == answers["as_trained"]
    assert answers["untold"][0] != answers["chat"][0]  # without a record prompt.template counts


@pytest.fixture
def instructed(trained, tmp_path):
    """instruction -> the adapter in the folder of a run that set this `prompt.system`."""

    def build(system):
        run = tmp_path / "instructed"
        shutil.copytree(trained, run / "adapter", dirs_exist_ok=True)
        config = load(trained.parent / "config.yaml").config
        config.prompt.system = system
        (run / "config.yaml").write_text(to_yaml(config))
        return str(run / "adapter")

    return build


def test_an_adapter_is_asked_with_the_instruction_of_its_run(judge, instructed, tmp_path, capsys):
    """Unless another is given; and never with that of another kind of task."""
    example = [read_golds(judge())["de"][0].example]

    def asked(source, *words):
        base = open_base(judge("prompt.template=llama3_paper", *words))
        how = base.prompts_of(source)
        return base.encode(example, how)[0][0], how.system_note

    source = instructed("Find it.")
    given, note = asked(source, "prompt.system=Find it.")
    assert note == ""
    found, note = asked(source)
    assert found == given
    assert note == (
        f"{source} was trained with prompt.system='Find it.' and is prompted with it, "
        "as prompt.system is not given"
    )
    other, note = asked(source, "prompt.system=''")
    assert (
        other != given and "trained with prompt.system='Find it.', but is prompted with no" in note
    )
    plain, note = asked(source, "task.kind=slots")  # the example is rendered: an intent's
    assert note == "" and plain == asked(instructed(None))[0] != given
    assert "trained with the task's own instruction" in asked(source, "prompt.system=x")[1]
    source = instructed("Find it.")
    capsys.readouterr()
    evaluate(judge("prompt.template=llama3_paper"), [Entrant("a", source)], str(tmp_path / "e"))
    write(judge("prompt.template=llama3_paper"), source, ["wake me up"], [], "")
    told = " ".join(capsys.readouterr().out.split())
    assert told.count(f"note: {source} was trained with prompt.system='Find it.'") == 2


def test_two_adapters_of_two_templates(judge, trained, adapter, tmp_path, capsys):
    own = stored(Path(judge().model.path))
    entrants = [Entrant("chat", adapter(own, "c")), Entrant("other", adapter(OTHER, "o"))]
    evaluate(judge(), entrants, str(tmp_path / "out"))
    told = capsys.readouterr().out
    assert told.count("note: ") == 1
    assert f"{tmp_path / 'o'} is prompted with the chat template in its folder" in told
    keys = {
        name: [row["key"] for row in rows_of(tmp_path / "out" / name / "answers.jsonl")[1:]]
        for name in ("chat", "other")
    }
    assert keys["chat"] != keys["other"]


def test_generate_tells_it_too(judge, trained, capsys):
    write(judge(), str(trained), ["wake me up"], [], "")
    assert "note: " in capsys.readouterr().out
    # Finished rows know no template.
    write(judge("task.kind=rows"), str(trained), ["wake me up"], [], "")
    assert "note: " not in capsys.readouterr().out


def test_a_chat_adapter_under_another_setting(judge, adapter):
    base = open_base(judge("prompt.template=llama3_paper"))
    own = stored(Path(judge().model.path))
    found = prompts_of(base.tokenizer, "llama3_paper", Path(adapter(own)), "a")
    assert found.template == "chat" and "remove its chat_template.jinja if" in found.note
    (gold, *_) = read_golds(judge())["de"]
    chat, _ = open_base(judge()).encode([gold.example])
    assert base.encode([gold.example], found)[0] == chat


@pytest.mark.parametrize(
    "text, message",
    [
        ("{% for", "cannot be rendered (TemplateSyntaxError"),
        ("{{ messages[7].content }}", "cannot be rendered (UndefinedError"),
        ("{{ 1 / 0 }}", "cannot be rendered (ZeroDivisionError"),
        ("{{ raise_exception('no') }}", "cannot be rendered (TemplateError: no"),
    ],
)
def test_a_broken_template_is_told(judge, adapter, text, message):
    with pytest.raises(UserError) as error:
        open_base(judge()).wear(adapter(text))
    assert message in str(error.value)


def test_a_template_that_is_no_text(judge, adapter):
    folder = Path(adapter("x"))
    (folder / "SHA256SUMS").unlink()
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe{{")
    with pytest.raises(UserError, match=r"chat_template.jinja: is not a text in UTF-8"):
        open_base(judge()).wear(str(folder))


def test_a_record_of_the_paper_s_layout_beats_an_older_file(trained, llama_base, tmp_path):  # noqa: F811
    """Earlier versions stored the base's template beside such an adapter."""
    tokenizer = load_tokenizer(llama_base)
    run, own = tmp_path / "old", stored(Path(llama_base))
    (run / "adapter").mkdir(parents=True)
    (run / "adapter" / "chat_template.jinja").write_text(own)
    (run / "config.yaml").write_text("prompt: {template: llama3_paper}\ntask: {kind: intent}\n")
    assert belonging(run / "adapter", lambda: tokenizer) == llama3_paper(tokenizer)
    assert find_template(tokenizer, None, run / "adapter").kind == "own"
    (run / "config.yaml").write_text("task: {kind: rows}\n")
    assert belonging(run / "adapter", lambda: tokenizer) == ""
    (run / "config.yaml").write_text("of: {another: version}\n")
    assert belonging(run / "adapter", lambda: tokenizer) == own


@pytest.mark.parametrize("file, content", [
    ("tokenizer_config.json", json.dumps({"chat_template": OTHER})),
    ("tokenizer_config.json", json.dumps({"chat_template": [
        {"name": "tools", "template": "x"}, {"name": "default", "template": OTHER}]})),
    ("chat_template.jinja", OTHER),
])  # fmt: skip
def test_where_a_template_may_be(tmp_path, file, content):
    (tmp_path / file).write_text(content)
    assert stored(tmp_path) == OTHER


def test_merges_keep_the_template_of_the_training(trained, llama_base, tmp_path):  # noqa: F811
    paper = llama3_paper(load_tokenizer(llama_base))
    merge([str(trained)], [0.5], Recipe("delta"), str(tmp_path / "half"))
    assert stored(tmp_path / "half") == paper
    file = Path(llama_base, "config.json")
    Path(llama_base, "SHA256SUMS").unlink(missing_ok=True)
    before = file.read_text()
    file.write_text(json.dumps(json.loads(before) | {"of_its_own": [1]}))
    try:
        merge([str(trained)], [1.0], Recipe("delta"), str(tmp_path / "model"), into=llama_base)
    finally:
        file.write_text(before)
    model = tmp_path / "model"
    assert json.loads((model / "config.json").read_text())["of_its_own"] == [1]
    assert stored(model) == paper


def test_old_versions_of_transformers_find_it_too(tmp_path):
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({"chat_template": "the base's", "more": 1}))
    files = template_files(Template("mine", "own"), file)
    assert files["chat_template.jinja"] == "mine"
    assert json.loads(files["tokenizer_config.json"]) == {"chat_template": "mine", "more": 1}
    assert list(template_files(Template("the base's", "base"), file)) == ["chat_template.jinja"]
    assert template_files(Template("", "none"), file) == {}


def test_thinking_stays_off_as_in_training(llama_base):  # noqa: F811
    """A template with a thinking mode is stored with that mode off: training asked for none."""
    tokenizer = load_tokenizer(llama_base)
    own = "{{ messages[0].content }}{% if enable_thinking is not false %}<think>{% endif %}"
    tokenizer.chat_template = own
    assert training_template(tokenizer, "chat") == NO_THINKING + own
    talk = [{"role": "user", "content": "a"}]
    text = training_template(tokenizer, "chat")
    assert tokenizer.apply_chat_template(talk, chat_template=text, tokenize=False) == "a"
    assert tokenizer.apply_chat_template(talk, tokenize=False) == "a<think>"
    config = load(None, ["task.kind=intent"]).config
    assert trained_with(tokenizer, config).kind == "own"


def test_a_date_is_that_of_every_day(llama_base):  # noqa: F811
    """A run that goes on tomorrow has the rows of today, and is asked as it was trained."""
    tokenizer = load_tokenizer(llama_base)
    tokenizer.chat_template = (
        "{%- if strftime_now is defined and not date_string is defined %}"
        "{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
        "Today: {{ date_string }} ({{ strftime_now('%A, %-d.%-m.%y') }})\n"
        "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (row,) = render_examples([Example("a", "b", system="")], tokenizer)
    assert row.prompt == "Today: 26 Jul 2024 (Friday, 26.7.24)\n<user>a<assistant>"
    talk, text = [{"role": "user", "content": "a"}], training_template(tokenizer, "chat")
    how = {"tokenize": False, "add_generation_prompt": True}
    assert tokenizer.apply_chat_template(talk, chat_template=text, **how) == row.prompt
    assert tokenizer.apply_chat_template(talk, **how) != row.prompt
    asked = prompts_by(tokenizer, "chat", text, "an adapter")
    assert (asked.template, asked.note) == ("chat", "")
