"""A run goes on as itself or not at all: other settings, older checkpoints, repeated commands."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxalign.base import open_base
from jaxalign.cli import main
from jaxalign.config import to_yaml
from jaxalign.data import sources, streams
from jaxalign.errors import UserError
from jaxalign.hf.save import save_base
from jaxalign.model.decoder import Decoder
from jaxalign.named import code_digest
from jaxalign.paths import RECORD
from jaxalign.train import loop, record
from jaxalign.train.loop import train
from jaxalign.train.phases import task
from jaxalign.train.same import FREE, JUDGE, SAMPLE, differences, inputs_of, other_inputs
from tests.tiny import SPEC
from tests.train.test_loop import Killed, assert_equal, kill_after, lines, use_devices, weights

FAST = ("align.weight=0", "lora.dropout=0.0", "train.steps=4", "train.eval_every=2",
        "checkpoint.every=2", "batch.accumulate=1", "train.eval_batches=1")  # fmt: skip


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    use_devices(monkeypatch, 1)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return tmp_path_factory.mktemp("finished") / "run"


@pytest.fixture
def finished(configure, shelf):
    """The settings of a finished run, whose folder is a copy of one that was trained once."""
    config = configure(*FAST)
    if not shelf.exists():
        train(dataclasses.replace(config, output=str(shelf)))
    shutil.copytree(shelf, config.output)
    return config


def content(folder):
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in Path(folder).rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def changed(config, *words):
    from jaxalign.config import load

    tree = dict(word.split("=", 1) for word in words)
    path = Path(config.output).parent / "changed.yaml"
    path.write_text(to_yaml(config), "utf-8")
    return load(path, [f"{key}={value}" for key, value in tree.items()]).config


def judged_by_step(monkeypatch, values):
    monkeypatch.setattr(loop, "validate", lambda run, state: {"eval/loss": values[int(state.step)]})


def nothing_loads(monkeypatch):
    def refuse(*_):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(loop, "prepare", refuse)


# --- repeated commands ----------------------------------------------------------------------------


def test_a_finished_run_repeated_stays_as_it_is(finished, monkeypatch, tmp_path, capsys):
    nothing_loads(monkeypatch)
    before = content(finished.output)
    again = changed(finished, "log.time_every=7", "checkpoint.keep=1")
    result = train(again)
    assert (result.step, result.best_step, result.stopped) == (4, 4, "finished")
    assert result.repeated and result.exit_code == 0 and result.metrics["eval/loss"] > 0
    assert content(finished.output) == before
    file = tmp_path / "own.yaml"
    file.write_text(to_yaml(finished), "utf-8")
    assert main(["train", str(file)]) == 0
    told = capsys.readouterr().out
    assert "finished at step 4 before, nothing was trained or changed" in told
    assert "raise train.steps to continue" in told


def test_other_settings_are_refused_before_anything_is_loaded(finished, monkeypatch):
    """A sweep that forgets `output=` must not report one run many times."""
    nothing_loads(monkeypatch)
    before = content(finished.output)
    other = changed(finished, "align.temperature=2.0", "optim.learning_rate=0.05")
    told = (r"was trained with align\.temperature=0\.1, now it is 2\.0; with optim\.learning_rate="
            r"0\.01, now it is 0\.05; set them back, or choose another output")  # fmt: skip
    with pytest.raises(UserError, match=told):
        train(other)
    (Path(finished.output) / record.RECORD).unlink()  # a run in the middle is as strict
    with pytest.raises(UserError, match=told):
        train(other)
    del before[record.RECORD]
    assert content(finished.output) == before


def test_the_layer_that_was_chosen_once_stays(finished, monkeypatch):
    """`align.layer=auto`: a repeated command neither probes again nor chooses another one."""
    from jaxalign.probe import auto

    monkeypatch.setattr(auto, "choose", nothing_loads)
    layer, sentence = auto.settle(open_base(finished), finished.output)
    assert layer == finished.align.layer == 2
    assert sentence == "align.layer=auto: block 2, as this run chose before"


def test_a_longer_run_goes_on_and_says_what_its_learning_rates_are(configure, capsys):
    config = configure(*FAST, "optim.schedule=cosine", "train.steps=2")
    train(config)
    capsys.readouterr()
    with pytest.raises(UserError, match=r"has done 2 updates, now the run should have 1; raise"):
        train(changed(config, "train.steps=1"))
    longer = changed(config, "train.steps=4")
    result = train(longer)
    assert result.step == 4 and not result.repeated
    told = capsys.readouterr().out
    assert "the run now has 4 updates instead of 2. " in told
    assert "After update 2, the learning rate (cosine) follows the new length" in told
    assert lines(config, "changed")[0]["total"] == [2, 4]
    assert "steps: 4" in Path(config.output, "config.yaml").read_text()
    assert [row["step"] for row in lines(config, "train")] == [1, 2, 3, 4]


def test_an_adapter_older_than_its_run_is_told(finished, monkeypatch, capsys):
    """Finished, continued and killed: the adapter is of when the run was shorter."""
    adapter = Path(finished.output, "adapter")
    told = f"note: the run in {finished.output} is not finished, so {adapter} may be older"
    longer = changed(finished, "train.steps=8")
    kill_after(monkeypatch, 6)
    with pytest.raises(Killed):
        train(longer)
    monkeypatch.undo()
    use_devices(monkeypatch, 1)
    capsys.readouterr()
    base = open_base(finished)
    base.opened.adapter(adapter)
    assert capsys.readouterr().out.count(told) == 1
    base.wear(str(adapter))  # once is enough: every reader looks before it loads
    assert main(["export", str(adapter), "--out", f"{finished.output}_out"]) == 0
    assert capsys.readouterr().out.count(told) == 1
    train(longer)
    capsys.readouterr()
    base.opened.adapter(adapter)
    assert "note: " not in capsys.readouterr().out


def test_a_model_older_than_its_run_is_told(finished, capsys):
    """As an adapter is, where all weights were trained."""
    model = Path(finished.output, "model")
    shutil.copytree(finished.model.path, model)
    older = open_base(changed(finished, f"model.path={model}")).opened
    assert older.spec and "note: " not in capsys.readouterr().out
    Path(finished.output, record.RECORD).unlink()
    older = open_base(changed(finished, f"model.path={model}")).opened
    assert older.spec and older.spec
    assert capsys.readouterr().out.count(f"{model} may be older than its checkpoints") == 1


def test_a_run_without_checkpoints_does_not_begin_anew(finished):
    for kind in ("checkpoints", "best"):
        shutil.rmtree(Path(finished.output, kind))
    assert train(finished).repeated
    with pytest.raises(UserError, match=r"ended at step 4 and no checkpoint to go on from"):
        train(changed(finished, "train.steps=6"))


def test_an_early_stopped_run_stays_stopped(configure, monkeypatch):
    judged_by_step(monkeypatch, {1: 1.0, 2: 2.0, 3: 2.0, 4: 0.5})
    config = configure(*FAST, "train.steps=8", "train.eval_every=1", "train.patience=1")
    result = train(config)
    assert (result.stopped, result.step, result.best_step) == ("patience", 2, 1)
    before = content(config.output)
    for words in ((), ("train.steps=9",)):
        again = train(changed(config, *words))
        assert again.repeated and (again.stopped, again.step) == ("patience", 2)
    assert content(config.output) == before
    (Path(config.output) / record.RECORD).unlink()  # killed before it was written
    assert train(config).step == 2
    result = train(changed(config, "train.patience=2"))
    assert (result.stopped, result.step, result.best_step) == ("patience", 3, 1)
    assert [row["step"] for row in lines(config, "eval")] == [1, 2, 3]


def test_a_damaged_adapter_is_handed_over_again(finished):
    whole = weights(finished)
    shutil.rmtree(Path(finished.output, "adapter"))
    settings = Path(finished.output, "config.yaml").read_bytes()
    result = train(finished)
    assert not result.repeated and result.step == 4
    assert_equal(weights(finished), whole)
    assert Path(finished.output, "config.yaml").read_bytes() == settings
    assert train(finished).repeated


# --- whose best -----------------------------------------------------------------------------------


def test_an_old_best_does_not_become_another_runs_adapter(configure, monkeypatch):
    """Stopped after a validation, before the first regular checkpoint."""
    words = (*FAST, "checkpoint.every=1000", "checkpoint.minutes=0")
    whole = configure(*words)
    train(whole)
    config = dataclasses.replace(whole, output=f"{whole.output}_parted")
    kill_after(monkeypatch, 3)
    with pytest.raises(Killed):
        train(config)
    assert sorted(p.name for p in Path(config.output, "best").iterdir()) == ["2"]
    monkeypatch.undo()
    use_devices(monkeypatch, 1)
    with pytest.raises(UserError, match=r"was trained with optim\.learning_rate=0\.01, now"):
        train(changed(config, "optim.learning_rate=0.05"))
    # The same run goes on from it: it is a whole state.
    train(config)
    assert_equal(weights(config), weights(whole))
    assert [row["step"] for row in lines(config, "train")] == [1, 2, 3, 4]
    assert [row["step"] for row in lines(config, "eval")] == [2, 4]


def test_a_best_of_another_run_is_not_exported(finished, tmp_path):
    """Folders put together by hand: the identity of the run tells."""
    other = dataclasses.replace(finished, output=str(tmp_path / "other"))
    train(other)
    shutil.rmtree(Path(finished.output, "best"))
    shutil.copytree(Path(other.output, "best"), Path(finished.output, "best"))
    store = loop.Checkpoints(finished.output, 2)
    run = loop.prepare(finished)
    mine = json.loads(Path(finished.output, record.RECORD).read_text())["run"]
    theirs = json.loads(Path(other.output, record.RECORD).read_text())["run"]
    assert mine != theirs
    shutil.rmtree(Path(finished.output, "checkpoints", "4"))
    with pytest.raises(UserError, match=r"best/4 belongs to another run"):
        store.best_weights(run.abstract_state, 4, mine)
    store.close()


def test_a_missing_best_is_told(configure, monkeypatch, capsys):
    judged_by_step(monkeypatch, {2: 1.0, 4: 6.0, 6: 5.0})
    config = configure(*FAST, "checkpoint.keep=1")
    train(config)
    shutil.rmtree(Path(config.output, "best"))
    capsys.readouterr()
    result = train(changed(config, "train.steps=6"))
    assert "the best checkpoint (step 2) no longer exists" in capsys.readouterr().out
    assert result.best_step == 6 and result.metrics["eval/loss"] == 5.0


# --- which settings -------------------------------------------------------------------------------


def tree(config):
    return dataclasses.asdict(config)


def test_every_name_of_the_table_is_a_setting(configure):
    from jaxalign.settings import flatten

    known = [key for key, _ in flatten(tree(configure()))]
    for name in (*FREE, *JUDGE, *SAMPLE):
        assert any(key == name or key.startswith(name.rstrip(".") + ".") for key in known), name


def test_the_documentation_names_what_may_change():
    page = Path(__file__).parents[2].joinpath("docs", "resume.md").read_text("utf-8")
    named = page.partition("| may change |")[2].partition("\n\n")[0]
    for name in (*FREE, *JUDGE, *SAMPLE):
        short = name.rpartition(".")[2] if name.startswith("evaluate.") else name
        assert f"`{short or name}" in named or f"`{name}*`" in named, name


def test_what_the_best_was_chosen_by_is_free_until_then(configure):
    then = tree(configure())
    now = tree(configure("train.metric=eval/task_loss", "train.eval_batches=1"))
    assert differences(then, now, judged=False) == []
    assert [key for key, *_ in differences(then, now, judged=True)] == [
        "train.eval_batches",
        "train.metric",
    ]
    now = tree(configure("generate.beams=2", "evaluate.draws=10"))
    assert differences(then, now, judged=True) == []
    then, now = (part | {"evaluate": part["evaluate"] | {"sample": 2}} for part in (then, now))
    assert [key for key, *_ in differences(then, now, judged=True)] == ["generate.beams"]


def test_rows_are_compared_by_content(configure, rows, tmp_path):
    config = configure(*FAST, "train.steps=2", "train.eval_every=0", "task.valid=[]")
    train(config)
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_bytes((rows / "task.jsonl").read_bytes())
    train(changed(config, f"task.train=[{moved}]", "train.steps=3"))
    text = moved.read_text("utf-8").splitlines()
    moved.write_text("\n".join([text[1], text[0], *text[2:]]) + "\n", "utf-8")
    with pytest.raises(UserError, match=r"was trained with other rows of task\.train than are"):
        train(changed(config, f"task.train=[{moved}]", "train.steps=4"))


def test_other_rows_of_a_finished_run_are_noticed(configure, rows, tmp_path, monkeypatch):
    """A sweep over the data that forgets `output=` must not report one run many times."""
    own, moved = tmp_path / "own.jsonl", tmp_path / "moved.jsonl"
    for file in (own, moved):
        file.write_bytes((rows / "task.jsonl").read_bytes())
    words = (*FAST, "train.steps=2", "train.eval_every=0", "task.valid=[]")
    config = configure(*words, f"task.train=[{own}]")
    train(config)

    def sample(number):
        return changed(config, f"task.transforms=[{{name: sample, options: {{rows: {number}}}}}]")

    with pytest.raises(UserError, match=r"was trained with other rows of task\.train than are"):
        train(sample(6))
    with monkeypatch.context() as patched:  # the same bytes, under another name
        nothing_loads(patched)
        assert train(changed(config, f"task.train=[{moved}]")).repeated
    lines_of = own.read_text("utf-8").splitlines()
    own.write_text("\n".join([lines_of[1], lines_of[0], *lines_of[2:]]) + "\n", "utf-8")
    with pytest.raises(UserError, match=r"was trained with other rows of task\.train than are"):
        train(config)
    own.unlink()  # nothing is there that could be other
    assert train(config).repeated
    own.write_bytes(moved.read_bytes())
    # Other words may make the same rows.
    result = train(sample(len(lines_of)))
    assert result.step == 2 and not result.repeated
    for kind in ("checkpoints", "best"):
        shutil.rmtree(Path(config.output, kind), ignore_errors=True)
    with pytest.raises(UserError, match=r"task\.transforms=.*no checkpoint is left to compare"):
        train(sample(6))


def test_a_name_that_says_other_languages_is_noticed(configure, rows, tmp_path, monkeypatch):
    """The languages of de-en.tsv are in its name: renamed, the same bytes are other rows."""
    pairs = [json.loads(line) for line in (rows / "pairs.jsonl").read_text("utf-8").splitlines()]
    text = "".join(f"{pair['text0']}\t{pair['text1']}\n" for pair in pairs)
    own, moved, other = (tmp_path / name for name in ("da-en.tsv", "moved/da-en.tsv", "nl-en.tsv"))
    moved.parent.mkdir()
    for file in (own, moved, other):
        file.write_text(text, "utf-8")
    config = configure("task.weight=0", "lora.dropout=0.0", "train.steps=1", "train.eval_every=0",
                       "batch.accumulate=1", "align.valid=[]", f"align.train=[{own}]")  # fmt: skip
    train(config)
    with monkeypatch.context() as patched:
        nothing_loads(patched)
        assert train(changed(config, f"align.train=[{moved}]")).repeated
    with pytest.raises(UserError, match=r"was trained with other rows of align\.train than are"):
        train(changed(config, f"align.train=[{other}]"))

    # A record without names in its digests holds for the names in its settings.
    saved = json.loads(Path(config.output, RECORD).read_text("utf-8"))
    saved["inputs"]["align.train"] = sources.digest_of(config.align.train, names=False)

    def found(file):
        renamed = changed(config, f"align.train=[{file}]")
        return [key for key, *_ in other_inputs(saved, renamed, judged=True)]

    assert (found(own), found(moved), found(other)) == ([], ["align.train"], ["align.train"])
    own.write_text(text + "Ja\tYes\n", "utf-8")
    assert found(own) == ["align.train"]


def test_a_hub_set_that_changes_behind_its_name_is_noticed(configure, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file = tmp_path / "set" / "train.jsonl"
    file.parent.mkdir()
    file.write_text('{"src": "Ja", "tgt": "Yes"}\n', "utf-8")
    config = configure(f"task.train=[hf:{file.parent}@train]", "align.weight=0")
    saved = {"config": dataclasses.asdict(config), "inputs": inputs_of(config)}
    assert other_inputs(saved, config, judged=False) == []
    file.write_text('{"src": "Ja", "tgt": "Yeah"}\n', "utf-8")
    ((key, was, now),) = other_inputs(saved, config, judged=False)
    assert key == "task.train" and was != now


def test_another_base_of_a_finished_run_is_noticed(finished, tmp_path, monkeypatch):
    """A sweep over models that forgets `output=` must not report one run many times."""
    other = tmp_path / "other"
    save_base(
        other, Decoder(SPEC).init(jax.random.key(1)), SPEC, tokenizer_from=finished.model.path
    )
    with pytest.raises(UserError, match=r"was trained on another base model \(it was .*/base, now"):
        train(changed(finished, f"model.path={other}"))
    moved = tmp_path / "moved"
    shutil.copytree(finished.model.path, moved)
    with monkeypatch.context() as patched:  # the same weights, under another name
        nothing_loads(patched)
        assert train(changed(finished, f"model.path={moved}")).repeated
    with pytest.raises(UserError, match=r"nowhere"):
        train(changed(finished, "model.path=/nowhere/base"))


OWN = """
from jaxalign.objectives.language_model import language_model

def mine(states, batch):
    return language_model(states, batch)

def shorter(records, options, seed):
    return records[:4]
"""


def test_code_of_ones_own_is_compared(configure, tmp_path, monkeypatch):
    """An objective or a transform that is edited is another one, under the same name."""
    own = tmp_path / "my_own.py"
    own.write_text(OWN, "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    words = (*FAST, "train.steps=1", "train.eval_every=0", "task.valid=[]")
    config = configure(*words, "task.objective=my_own:mine", "task.transforms=[my_own:shorter]")
    train(config)
    own.write_text("# A note.\n" + OWN, "utf-8")
    assert train(config).repeated
    own.write_text(OWN.replace("(states, batch)\n", "(states, batch)  \n", 1), "utf-8")
    assert train(config).repeated
    own.write_text(OWN.replace("return language", "return 2 * language"), "utf-8")
    for steps in (1, 2):
        with pytest.raises(UserError, match=r"other lines in the code of task\.objective than are"):
            train(changed(config, f"train.steps={steps}"))


def test_what_ones_own_code_imports_from_beside_it_is_compared(tmp_path, monkeypatch):
    own = "import numpy\nimport jaxalign.named\nfrom . import near\ndef mine(): return near\n"
    far = "import mine_too.losses as again\nimport besides\nx = 1\n"
    near = "from .more import *\nfrom .more.far import x\n"

    def digest(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text, "utf-8")
        return code_digest("mine_too.losses:mine")

    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "besides.py").write_text("y = 1\n", "utf-8")
    digests = [
        digest({"mine_too/losses.py": own, "mine_too/near.py": near, "mine_too/more/far.py": far}),
        digest({"mine_too/near.py": near + "# A note.\n", "unrelated.py": "z = 1\n"}),
        digest({"mine_too/more/far.py": far.replace("1", "2")}),
        digest({"besides.py": "y = 2\n"}),
        digest({"mine_too/more/__init__.py": "every = 1\n"}),
    ]
    assert digests[0] == digests[1] and len({*digests}) == 4 and all(digests)


def test_an_installed_module_is_compared_without_its_neighbours(tmp_path, monkeypatch):
    folder = tmp_path / "site-packages"
    folder.mkdir()
    (folder / "mine_alone.py").write_text("import stranger\ndef mine(): return 1\n", "utf-8")
    (folder / "stranger.py").write_text("x = 1\n", "utf-8")
    monkeypatch.syspath_prepend(str(folder))
    before = code_digest("mine_alone:mine")
    (folder / "stranger.py").write_text("x = 2\n", "utf-8")
    assert before and code_digest("mine_alone:mine") == before


FAR = "def base(): return 1\ndef bare(f): return lambda: f()\n"
MADE = {
    "partial": "import functools\ndef plain(): return 1\nmine = functools.partial(plain)\n",
    "instance": "class Call:\n    def __call__(self): return 1\nmine = Call()\n",
    "decorated elsewhere": "import mine_far\n@mine_far.bare\ndef mine(): return 1\n",
    "wrapper": "from functools import wraps\nimport mine_far\n@wraps(mine_far.base)\n"
    "def mine(): return 1\n",
}


@pytest.mark.parametrize("form", MADE)
def test_the_module_of_the_path_is_compared_whatever_the_name_leads_to(tmp_path, monkeypatch, form):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mine_far.py").write_text(FAR, "utf-8")
    own, digests = tmp_path / "mine_made.py", []
    for text in (MADE[form], "# A note.\n" + MADE[form], MADE[form].replace("1", "2")):
        monkeypatch.delitem(sys.modules, "mine_made", raising=False)
        own.write_text(text, "utf-8")
        digests.append(code_digest("mine_made:mine"))
    assert digests[0] == digests[1] != digests[2] and all(digests)
    monkeypatch.delitem(sys.modules, "mine_made")


def test_an_edited_transform_is_compared_by_its_rows(configure, tmp_path, monkeypatch):
    own = tmp_path / "my_rows.py"
    own.write_text(OWN, "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    words = (*FAST, "train.steps=1", "train.eval_every=0", "task.valid=[]")
    config = configure(*words, "task.transforms=[my_rows:shorter]")
    train(config)
    own.write_text(OWN.replace("records[:4]", "list(records)[:4]"), "utf-8")
    assert not train(config).repeated  # it is looked at again, and its rows are the same
    own.write_text(OWN.replace("[:4]", "[:3]"), "utf-8")
    monkeypatch.delitem(sys.modules, "my_rows")
    with pytest.raises(UserError, match=r"was trained with other rows of task\.train than are"):
        train(config)


def test_what_else_a_finished_run_has_read_is_compared(configure, tmp_path):
    folder, file = tmp_path / "base", tmp_path / "a.npz"
    config = configure("align.weight=0")
    shutil.copytree(config.model.path, folder)
    file.write_bytes(b"one")
    config = changed(config, f"model.path={folder}")
    config.align.options = {"subspace": {"file": str(file)}}
    saved = {"config": dataclasses.asdict(config), "inputs": inputs_of(config)}
    assert saved["inputs"].keys() == {
        "model.path", "tokenizer", "options", "task.train", "task.valid",
    }  # fmt: skip
    assert other_inputs(saved, config, judged=True) == []
    written = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps(written, indent=1), "utf-8")
    file.write_bytes(b"another")
    assert [key for key, *_ in other_inputs(saved, config, True)] == ["tokenizer", "options"]
    file.unlink()  # nothing is there that could be other
    assert [key for key, *_ in other_inputs(saved, config, True)] == ["tokenizer"]
    config.align.options = {"subspace": {"file": "b.npz"}}
    ((key, was, now),) = other_inputs(saved | {"inputs": {}}, config, True)
    assert (key, was, now) == ("options", [str(file)], ["b.npz"])
    for stored in folder.glob("*.safetensors"):  # as a base whose weights are on the hub alone
        stored.unlink()
    assert "model.path" not in inputs_of(config) and "tokenizer" in inputs_of(config)


def test_a_data_file_that_changes_during_the_run_is_not_the_one_it_read(
    configure, rows, tmp_path, monkeypatch
):
    own = tmp_path / "own.jsonl"
    own.write_bytes((rows / "task.jsonl").read_bytes())
    words = (*FAST, "train.steps=1", "train.eval_every=0", "task.valid=[]")
    config, read = configure(*words, f"task.train=[{own}]"), streams.task_stream

    def edited(*args, **named):
        stream = read(*args, **named)
        own.write_text("".join(own.read_text("utf-8").splitlines(keepends=True)[::-1]), "utf-8")
        return stream

    with monkeypatch.context() as patched:
        patched.setattr(task, "task_stream", edited)
        train(config)
    with pytest.raises(UserError, match=r"was trained with other rows of task\.train than are"):
        train(config)


# --- the time between checkpoints -----------------------------------------------------------------


def test_a_checkpoint_is_due_by_updates_and_by_time(monkeypatch):
    from jaxalign.train import clock

    now = [0.0]
    monkeypatch.setattr(clock.time, "monotonic", lambda: now[0])
    due = clock.Due(every=4, minutes=1)
    saved = []
    for step in range(1, 20):
        now[0] += 25 if step > 8 else 1
        if due(step):
            saved.append(step)
    # From update 9 on each takes 25 s: 60 s are over before four updates are.
    assert saved == [4, 8, 11, 12, 15, 16, 19]


def test_with_several_processes_the_first_ones_clock_decides(monkeypatch):
    from jaxalign.train import clock

    now, asked = [0.0], []
    monkeypatch.setattr(clock.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(clock.jax, "process_count", lambda: 2)
    monkeypatch.setattr(clock, "from_main", lambda array: asked.append(array) or array)
    due = clock.Due(every=10**6, minutes=1)
    saved = []
    for step in range(1, 1001):
        now[0] += 0.25
        if due(step):
            saved.append(step)
    assert saved == [240, 480, 720, 960]
    assert len(asked) < 60


# --- where a run writes ---------------------------------------------------------------------------


def test_one_run_at_a_time_in_a_folder(finished, monkeypatch):
    from jaxalign.lock import only_run

    nothing_loads(monkeypatch)
    import os
    import socket

    with only_run(finished.output):
        told = rf"is in use by process {os.getpid()} on {socket.gethostname()}; wait until"
        with pytest.raises(UserError, match=told):
            train(finished)
    assert train(finished).repeated


def test_a_folder_that_cannot_be_written_is_told_first(configure, monkeypatch, tmp_path):
    nothing_loads(monkeypatch)
    file = tmp_path / "file"
    file.write_text("x")
    for output in (file, file / "run"):
        with pytest.raises(UserError, match=r"output: .* is a file, or is below one; name a fold"):
            train(configure(f"output={output}"))
    import os

    from jaxalign import lock

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(lock.os, "open", refuse)
    with pytest.raises(UserError, match=r"cannot be written \(Permission denied\); name a folder"):
        train(configure(f"output={tmp_path / 'other'}"))
    assert os.path.isdir(tmp_path / "other")


def test_the_log_survives_a_kill_while_it_is_rewritten(tmp_path):
    from jaxalign.train.metrics import _Jsonl

    path = tmp_path / "log.jsonl"
    rows = [{"step": n, "event": e} for n in (1, 2, 3) for e in ("train", "eval", "goodput")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "ev')
    _Jsonl(path, 2, again=False).close()
    left = [json.loads(line) for line in path.read_text().splitlines()]
    assert left == rows[:6]
    _Jsonl(path, 2, again=True).close()
    left = [json.loads(line) for line in path.read_text().splitlines()]
    assert left == rows[:4]
    assert np.all([not p.name.endswith(".partial") for p in tmp_path.iterdir()])
