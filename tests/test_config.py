"""Settings: three sources in order, origins kept, and every mistake named with its way out."""

import dataclasses
import json
from pathlib import Path

import pytest

from jaxalign.config import load, saved_in, to_yaml
from jaxalign.errors import UserError
from jaxalign.settings import AUTO, Config, abouts, check, flatten
from jaxalign.settings.together import unread
from jaxalign.train.phases.align import ALIGN
from jaxalign.train.phases.prompts import PROMPTS
from jaxalign.train.same import differences

BOUNDS = {key: about.bounds for key, about in abouts() if not key.startswith("objectives.")}
CHOICES = [key for key, bounds in BOUNDS.items() if bounds.choices]
NUMBERS = [key for key, bounds in BOUNDS.items() if bounds.number]
SHIPPED = sorted(
    path
    for path in (Path(__file__).resolve().parents[1] / "configs").rglob("*.yaml")
    if not path.stem.startswith("compare_")  # read by tests/compare
)


@pytest.fixture
def write(tmp_path):
    """Write run.yaml and return its path."""

    def write(text: str) -> Path:
        (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
        return tmp_path / "run.yaml"

    return write


def refusal(path=None, *words: str) -> str:
    with pytest.raises(UserError) as error:
        load(path, words)
    assert "\n" not in str(error.value)
    return str(error.value)


def chosen(loaded) -> dict:
    """What does not come from the defaults: key -> (value, origin)."""
    return {key: (value, origin) for key, value, origin in loaded.rows() if origin != "default"}


# --- what is read -------------------------------------------------------------------------------


def test_defaults_alone():
    loaded = load(None)
    assert loaded.config == Config()
    assert chosen(loaded) == {}
    assert [row[:2] for row in loaded.rows()] == flatten(dataclasses.asdict(Config()))


def test_file_over_defaults_and_words_over_the_file(write):
    path = write("align:\n  layer: 3\n  temperature: 0.2\ntrainable: full\n")
    loaded = load(path, ["align.layer=4", "seed=7"])
    assert chosen(loaded) == {
        "align.layer": (4, "command line"),
        "align.temperature": (0.2, str(path)),
        "seed": (7, "command line"),
        "trainable": ("full", str(path)),
    }
    assert loaded.config.align == dataclasses.replace(Config().align, layer=4, temperature=0.2)


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n"])
def test_an_empty_file_is_the_defaults(write, text):
    assert load(write(text)).config == Config()


def test_numbers_as_people_write_them(write):
    # YAML 1.1 reads 5e-4, without a dot, as a string.
    path = write("optim:\n  learning_rate: 3e-4\n  clip_norm: 2\n")
    optim = load(path, ["optim.eps=1e-6", "optim.beta2=0.95"]).config.optim
    assert (optim.learning_rate, optim.clip_norm, optim.eps, optim.beta2) == (3e-4, 2.0, 1e-6, 0.95)
    assert all(type(value) is float for value in (optim.learning_rate, optim.clip_norm, optim.eps))


def test_words_with_lists_and_signs(write):
    path = write("lora:\n  layers: 5\n")
    config = load(path, ["lora.targets=[q, v]", "batch.buckets=[64,128]", "model.path=a=b"]).config
    assert config.lora.targets == ["q", "v"]
    assert config.batch.buckets == [64, 128]
    assert config.model.path == "a=b"
    assert config.lora.layers == "5"  # read by the adapter, as is 1..16
    assert load(None, ["lora.layers=1..16"]).config.lora.layers == "1..16"


def test_off_is_no_truth_value(write):
    """YAML 1.1 reads it as false."""
    assert load(None, ["generate.share_prefix=off"]).config.generate.share_prefix == "off"
    file = write("generate: {share_prefix: off}")
    assert load(file).config.generate.share_prefix == "off"
    assert load(file, ["generate.share_prefix=auto"]).config.generate.share_prefix == "auto"
    with pytest.raises(UserError, match=r"generate\.share_prefix"):
        load(None, ["generate.share_prefix=on"])


def test_a_hash_in_a_word_is_kept_and_null_clears():
    assert load(None, ["output=runs/a#1"]).config.output == "runs/a#1"
    assert load(None, ["model.revision=main"]).config.model.revision == "main"
    assert load(None, ["model.revision=null"]).config.model.revision is None


def test_an_empty_word_is_empty_text_and_null_is_none(write):
    """What a shell makes of prompt.system="", over a file and over the default."""
    file = write("prompt: {system: Answer.}\nalign: {pivot: de}")
    for words in (["prompt.system="], ["prompt.system=''"], ['prompt.system=""']):
        assert load(None, words).config.prompt.system == ""
        assert load(file, words).config.prompt.system == ""
    assert load(file, ["prompt.system=null"]).config.prompt.system is None
    assert load(file, ["align.pivot="]).config.align.pivot == ""
    assert not load(None, ["adapter.start="]).config.adapter.start
    assert refusal(None, "generate.method=").startswith("generate.method: '' is not among ")


@pytest.mark.parametrize(
    ("key", "word"),
    [("align.pivot", "no"), ("log.wandb", "false"), ("prompt.system", "off"), ("output", "Yes")],
)
def test_text_that_yaml_takes_for_a_truth_value(write, key, word):
    """Else a run would be logged to the project 'False', or have 'False' for its instruction."""
    group, _, name = key.rpartition(".")
    file = write(f"{group}: {{{name}: {word}}}" if group else f"{name}: {word}")
    for given in ((None, [f"{key}={word}"]), (file, [])):
        with pytest.raises(
            UserError, match=rf"{key} is text, and YAML reads this word as .*; put it"
        ):
            load(*given)
    found = load(None, [f"{key}='{word}'"]).config
    assert getattr(getattr(found, group) if group else found, name) == word


def test_what_nothing_reads_is_told():
    """A baseline may inherit it; nobody may take it for what was trained."""
    words = ["objectives=[{objective: cka, phase: align}]", "adapter.kind=prefix", "lora.layers=1"]
    cka, layers = unread(load(None, ["align.weight=0", *words]).config)
    assert cka == (
        "objectives[0] (cka) is not trained: align.weight is 0; to train it alone, name it as "
        "align.objective"
    )
    assert layers == "lora.layers=1 is not read: adapter.kind=prefix"
    assert not [*unread(load(None, words[:1]).config), *unread(Config())]
    told = {
        words: [*unread(load(None, words.split()).config)]
        for words in (
            "optim.combine=pcgrad align.every=step", "optim.combine=pcgrad batch.accumulate=1",
            "optim.combine=task_first align.weight=0", "trainable=full lora.layers=3",
            "optim.combine=pcgrad align.every=joint", "optim.combine=pcgrad",
            "adapter.pool_size=4 adapter.num_virtual_tokens=2",
            "adapter.kind=pool lora.r=4 lora.alpha=8", "task.sampling_temperature=3",
            "align.sampling=temperature align.sampling_temperature=3",
            "task.inner_steps=3 task.rule=maml", "task.inner_steps=3", "align.pivot=de",
            "align.group=4", "align.group=4 align.negatives=global",
            "align.rows=prompts align.layer=2 align.objective=distil batch.pair_max_length=20",
        )
    }  # fmt: skip
    alone = "is not read: an update holds one phase alone (align.every={}); set align.every=joint"
    assert [*told.values()] == [
        [f"optim.combine=pcgrad {alone.format('step')}"],
        [f"optim.combine=pcgrad {alone.format('microbatch')}"],
        ["optim.combine=task_first is not read: align.weight is 0"],
        ["lora.layers=3 is not read: trainable=full trains the base itself"],
        [],
        [],
        [
            "adapter.num_virtual_tokens=2 is not read: adapter.kind=lora",
            "adapter.pool_size=4 is not read: adapter.kind=lora",
        ],
        ["lora.r=4, lora.alpha=8.0 are not read: adapter.kind=pool"],
        ["task.sampling_temperature=3.0 is not read: task.sampling=proportional"],
        [],
        [],
        ["task.inner_steps=3 is not read: task.rule=mean"],
        ["align.pivot=de is not read: align.rows=pairs"],
        [],
        ["align.group=4 is not read: align.negatives=global"],
        [
            "batch.pair_max_length=20 is not read: rows of two prompts are as long as those of the "
            "task (batch.max_length)"
        ],
    ]
    words = ["align.states=standardised", "align.temperature=0.2", "align.pooling=last"]
    told = {
        objective: [*ALIGN.unread(load(None, [*words, *more.split()]).config)]
        for objective, more in {
            "contrastive": "",
            "cka of tokens": "align.objective=cka",
            "pooled cka": "align.objective=cka align.options.rows=pooled",
        }.items()
    }
    temperature = "align.temperature=0.2 is not read by cka"
    assert told["contrastive"] == [] and told["pooled cka"] == [temperature]
    assert told["cka of tokens"] == [
        "align.pooling=last is not read by cka",
        "align.states=standardised is not read by cka",
        temperature,
    ]
    prompts = ["align.rows=prompts", "align.objective=distil", "align.layer=2", *words]
    assert [*PROMPTS.unread(load(None, prompts).config)] == [
        "align.pooling=last is not read by distil",
        "align.states=standardised is not read by distil",
        "align.temperature=0.2 is not read by distil",
    ]
    full = refusal(None, "adapter.start=runs/a/adapter", "trainable=full")
    assert full.startswith("adapter.start: trainable=full begins from the base and would not read")


def test_a_name_of_digits_is_no_number():
    config = load(None, ["output=2026_11", "model.revision=1e3", "align.pivot=010"]).config
    assert (config.output, config.model.revision, config.align.pivot) == ("2026_11", "1e3", "010")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 3\nalign:\n  layer: 010\n", ":3: align.layer: YAML reads 010 as the number 8; put"),
        ("output: 2026_11\n", ":1: output: YAML reads 2026_11 as the number 202611; put it into"),
        ("model: {revision: 1e3}\n", ":1: model.revision: YAML reads 1e3 as the number 1000.0"),
        ("log:\n  profile: [1:30, 3]\n", ":2: log.profile: YAML reads 1:30 as the number 90"),
    ],
)
def test_a_number_that_looks_like_another_is_refused_in_a_file(write, text, message):
    with pytest.raises(UserError) as error:
        load(write(text))
    assert message in str(error.value)


def test_a_number_that_looks_like_another_is_refused_as_a_word(write):
    with pytest.raises(UserError, match=r"command line: align\.layer: YAML reads 010 as the numb"):
        load(None, ["align.layer=010"])
    with pytest.raises(UserError, match=r"log\.profile: YAML reads 010 as the number 8"):
        load(None, ["log.profile=[010,3]"])
    config = load(write("output: '2026_11'\nbatch: {max_length: 1_024}\n"), ["seed=1_000"]).config
    assert (config.output, config.batch.max_length, config.seed) == ("2026_11", 1024, 1000)


def test_free_form_groups(write):
    path = write(
        "task:\n"
        "  columns: {text: utterance, prefix: question}\n"
        "  options: {focal: {gamma: 2.0, at: [1, 2]}}\n"
        "objectives:\n"
        "  - {objective: 'my.losses:extra', phase: align, options: {depth: 3}}\n"
    )
    loaded = load(path, ["task.columns.text=utt", "align.options.margin=0.5"])
    task = loaded.config.task
    assert task.columns == {"text": "utt", "prefix": "question"}
    assert task.options == {"focal": {"gamma": 2.0, "at": [1, 2]}}
    assert loaded.config.align.options == {"margin": 0.5}
    (extra,) = loaded.config.objectives
    assert (extra.objective, extra.phase, extra.weight) == ("my.losses:extra", "align", 1.0)
    assert extra.options == {"depth": 3}
    origins = {key: origin for key, (_, origin) in chosen(loaded).items()}
    assert origins == {
        "task.columns.text": "command line",
        "task.columns.prefix": str(path),
        "task.options.focal.gamma": str(path),
        "task.options.focal.at": str(path),
        "align.options.margin": "command line",
        "objectives": str(path),
    }


def test_references_are_resolved_last(write):
    path = write("batch:\n  pairs: ${batch.size}\n")
    assert load(path, ["batch.size=64"]).config.batch.pairs == 64


def test_what_is_written_reads_back(write):
    words = ["optim.eps=1e-9", "task.options.a.b=[1,x]", "task.columns.text=utt", "output='ü: #'"]
    first = load(None, words).config
    again = load(write(to_yaml(first))).config
    assert again == first
    assert again != Config()


@pytest.mark.parametrize("text", ["${a}", "\\\\${a}", "a${", "\\\\", "a\\\\${b}c${", "$", "{}"])
def test_any_text_reads_back(write, text):
    """What looks like a reference, or is one behind a backslash, is written as the text it is."""
    config = Config()
    config.prompt.system = text
    config.task.options = {"deep": [{"text": text}]}
    assert load(write(to_yaml(config))).config == config


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configurations_load(path):
    assert load(path).origins  # sparse, not empty


def test_a_path_may_begin_at_home(write, monkeypatch):
    """Whoever writes reads the same folder; text, hub names and what is inside a path stay."""
    monkeypatch.setenv("HOME", "/home/me")
    base = write("model: {path: ~/base}\ntask: {valid: [a.jsonl, ~/b.jsonl]}\n")
    path = base.parent / "over.yaml"
    path.write_text("extends: base.yaml\noutput: ~/runs/t\n".replace("base.yaml", base.name))
    found = load(path, ["prompt.system=~/x", "adapter.start=~/a", "task.train=[hf:~x@train,a~/b]"])
    config = found.config
    assert (config.output, config.model.path) == ("/home/me/runs/t", "/home/me/base")
    assert config.adapter.start == "/home/me/a" and config.prompt.system == "~/x"
    assert config.task.valid == ["a.jsonl", "/home/me/b.jsonl"]
    assert config.task.train == ["hf:~x@train", "a~/b"]
    assert load(None, ["output=gs://b/~/x"]).config.output == "gs://b/~/x"
    assert load(None, ["align.train=[~/p]", "align.valid=[~/v]", "task.train=[~/t]",
                       "evaluate.data=[~/e]"]).rows() == load(
        None, ["align.train=[/home/me/p]", "align.valid=[/home/me/v]", "task.train=[/home/me/t]",
               "evaluate.data=[/home/me/e]"]).rows()  # fmt: skip
    monkeypatch.setenv("HOME", str(path.parent))
    (base.parent / "far.yaml").write_text(f"extends: ~/{path.name}\n")
    assert load(base.parent / "far.yaml").config.output == f"{path.parent}/runs/t"


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("align:\n  layr: 2\n", "unknown setting 'align.layr'; did you mean 'align.layer'?"),
        ("optm:\n  learning_rate: 1\n", "did you mean 'optim.learning_rate'?"),
        ("tained: 1\n", "did you mean 'trainable'?"),
        ("task:\n  colums: {text: a}\n", "did you mean 'task.columns'?"),
        ("1: 2\n", "unknown setting '1'"),
    ],
)
def test_unknown_keys_in_a_file(write, text, near):
    path = write(text)
    assert refusal(path).startswith(f"{path}: ")
    assert near in refusal(path)


def test_unknown_keys_in_words():
    assert refusal(None, "align.tau=1").startswith("command line: unknown setting 'align.tau'")
    assert "did you mean 'lora.r'?" in refusal(None, "lora.rr=8")
    assert "did you mean 'task.train'?" in refusal(None, "task.train.0=a.jsonl")


def test_a_setting_that_has_another_name_now(tmp_path):
    """A run's own file, which an older version wrote, is still read."""
    told = "lora.start is called adapter.start now; change its name"
    assert refusal(None, "lora.start=x") == f"command line: {told}"
    file = tmp_path / "config.yaml"
    file.write_text("lora: {r: 4, start: theirs}\n", "utf-8")
    assert refusal(file) == f"{file}: {told}"
    config = saved_in(file)
    assert (config.lora.r, config.adapter.start) == (4, "theirs")
    then = {"lora": {"r": 8, "start": "a"}}
    now = {"lora": {"r": 8}, "adapter": {"start": "b"}}
    assert differences(then, now, judged=False) == [("adapter.start", "a", "b")]


@pytest.mark.parametrize("word", ["align.layer", "=3", "--align.layer=3", "align"])
def test_words_that_are_no_setting(word):
    assert (
        refusal(None, word) == f"{word!r} is not a setting; write key=value, as in align.layer=16"
    )


@pytest.mark.parametrize("word", ["task.columns.text={", "model.path=[x"])
def test_words_that_cannot_be_read(word):
    assert refusal(None, word) == f"command line: cannot read {word!r}; quote the value"


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("train.steps=1e3", "train.steps"),
        ("optim.learning_rate=fast", "optim.learning_rate"),
        ("log.tensorboard=perhaps", "log.tensorboard"),
        ("model.path=null", "model.path"),
        ("batch.buckets=[64,a]", "batch.buckets[1]"),
        ("align.layer=${nothing}", "align.layer"),
    ],
)
def test_wrong_types(word, key):
    assert refusal(None, word).startswith(f"command line: {key}: ")


def test_one_file_where_a_list_belongs(write):
    sentence = "task.train: not a list; write task.train=[one,two]"
    assert refusal(None, "task.train=a.jsonl") == f"command line: {sentence}"
    path = write("task:\n  train: a.jsonl\n")
    assert refusal(path) == f"{path}: {sentence}"


def test_a_group_is_no_value(write):
    path = write("align: 3\n")
    assert refusal(path) == f"{path}: align is a group of settings; set one of its keys"
    assert "align is a group" in refusal(None, "align=3")


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("seed: 1\nalign: [1\nbatch: 2\n", 3, "expected ',' or ']'"),
        ("seed: 1\na: b: c\n", 2, "mapping values are not allowed"),
        ("align:\n  layer: 3\n  layer: 4\n", 3, "duplicate key"),
    ],
)
def test_broken_yaml(write, text, line, problem):
    path = write(text)
    assert refusal(path).startswith(f"{path}:{line}: not valid YAML: ")
    assert problem in refusal(path)


def nested(opening: str, closing: str, number: int) -> str:
    return opening * number + "1" + closing * number


ODD = {
    "output: ${": "output: ",
    "null: 1": "Incompatible key type 'NoneType'",
    "? [a, b]\n: 1": "unhashable key",
    "align: {1: 2}": "align.1: this key is not text",
    "task: {columns: {1: a}}": "task.columns.1: this key is not text",
    "task: {columns: {null: a}}": "task.columns: ",
    "task: {columns: [a]}": "task.columns: not a mapping",
    "evaluate: {groups: [a]}": "evaluate.groups: not a mapping",
    "align: []": "align is a group of settings",
    "task:\n\ttrain: a": ":2: not valid YAML",
    f"train: {{steps: {'9' * 5000}}}": "cannot be read",
    "seed: !!int a": "cannot be read",
    "output: !!binary aGk=": "output: ",
    "output: !!python/object/apply:os.getcwd []": "not valid YAML",
    nested("[", "]", 3000): "nesting",
    "a: " + nested("[", "]", 900): "RecursionError",
    "task: {options: " + nested("{a: ", "}", 500) + "}": "RecursionError",
    "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
        f"{now}: &{now} [{','.join([f'*{was}'] * 9)}]\n" for was, now in zip("abcdefgh", "bcdefghi",
                                                                           strict=True)
    ): "expansion",
    "a: &a [*a]": "recursive aliases",
    "objectives: [3]": "objectives[0]: ",
    "objectives: [{options: {1: 2}}]": "options.1: ",
    "task: {train: [[a]]}": "task.train[0]: ['a'] should be text",
    "evaluate: {groups: {north: [no]}}": "evaluate.groups.north: YAML reads a word of this list as",
    "task: {languages: [no, en]}": "task.languages: YAML reads a word of this list as true or",
    "output: ${output}": "Recursive interpolation",
    "seed: '${seed:'": "seed: ",
    "a" * 3000 + ": 1\n": "not valid YAML",
    "? " + "a" * 3000 + "\n: 1\n": "unknown setting",
    "'a\\x1b[31m': 1": "unknown setting",
}  # fmt: skip


@pytest.mark.parametrize("text", ODD, ids=range(len(ODD)))
def test_odd_yaml(write, text):
    path = write(text)
    sentence = refusal(path)
    assert ODD[text] in sentence
    assert len(sentence) < 400 + len(str(path))


def test_a_large_file_is_not_even_read(write):
    assert "a configuration is a short file" in refusal(write("#" * (1 << 20) + "\n"))


@pytest.mark.parametrize(
    "word", ["output=${", "task.options.x=" + "[" * 2000, f"seed={'9' * 5000}", "output=\t"]
)
def test_odd_words(word):
    assert refusal(None, word).startswith("command line: cannot read ")
    assert len(refusal(None, word)) < 200


def test_files_that_hold_something_else(write, tmp_path):
    path = write("- align\n- batch\n")
    assert refusal(path) == f"{path}: a configuration is a mapping of keys to values"
    path.write_bytes(b"\xff\xfe\x00seed: 1")
    assert refusal(path) == f"{path}: not text in UTF-8; save it as UTF-8"
    assert refusal(tmp_path / "no.yaml") == f"{tmp_path / 'no.yaml'}: no such configuration file"
    assert refusal(tmp_path) == f"{tmp_path}: no such configuration file"


@pytest.mark.parametrize("key", CHOICES)
def test_choices(key):
    choices = BOUNDS[key].choices
    for choice in choices:
        word = f"{key}={choice}"
        values = dict(flatten(dataclasses.asdict(load(None, [word]).config)))
        assert values[key] == choice
    wrong = choices[-1] + "x"
    assert refusal(None, f"{key}={wrong}") == (
        f"{key}: {wrong!r} is not among {', '.join(choices)}; did you mean {choices[-1]}?"
    )


def test_defaults_are_choices():
    check(Config())


# What is meant to have no bound but the numbers of a device.
BOUNDLESS = {"generate.length_penalty"}
LISTED = {"lora.ranks": "{q: %s}", "lora.alphas": "{q: %s}", "batch.buckets": "[%s]",
          "log.profile": "[%s, 3]"}  # fmt: skip


def outside(key: str) -> list[str]:
    """Words that this number may not be."""
    bounds = BOUNDS[key]
    beyond = [10**12, 10**40] if bounds.whole else ["1e60"]
    beyond += [] if bounds.lowest is None else [bounds.lowest - 1]
    beyond += [bounds.above, bounds.below] if bounds.above is not None or bounds.below else []
    beyond += [] if bounds.highest is None else [bounds.highest + 1]
    beyond += [".nan", ".inf", "-.inf", "true", "[1]", "a"]
    return [str(value) for value in beyond if value is not None and value not in bounds.besides]


@pytest.mark.parametrize("key", NUMBERS)
def test_numbers_outside_their_bounds(key):
    for value in outside(key):
        assert key in refusal(None, f"{key}={LISTED.get(key, '%s') % value}"), value


@pytest.mark.parametrize("key", NUMBERS)
def test_numbers_at_their_bounds(key):
    bounds = BOUNDS[key]
    ends = [end for end in (bounds.lowest, bounds.highest, *bounds.besides) if end is not None]
    for value in ends:
        config = load(None, [f"{key}={LISTED.get(key, '%s') % value}", "batch.accumulate=1",
                             "align.negatives=global"]).config  # fmt: skip
        assert str(value) in str(dict(flatten(dataclasses.asdict(config))).get(key, config.lora))


def test_every_number_has_a_bound():
    bounded = ("lowest", "above", "highest", "below")
    free = {k for k in NUMBERS if all(getattr(BOUNDS[k], name) is None for name in bounded)}
    assert free == BOUNDLESS
    numeric = {k for k, v in flatten(dataclasses.asdict(Config())) if type(v) in (int, float)}
    assert numeric <= set(NUMBERS)


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("align.temperature=0", "align.temperature: 0.0 should be a number, above 0"),
        ("optim.learning_rate=nan", "optim.learning_rate: nan should be a number, above 0"),
        ("optim.learning_rate=1e-60", "optim.learning_rate: 1e-60 should be a number, above 0"),
        ("align.weight=nan", "align.weight: nan should be a number, 0 or more"),
        ("lora.dropout=1.0", "lora.dropout: 1.0 should be a number, 0 or more, below 1"),
        ("optim.beta1=1.5", "optim.beta1: 1.5 should be a number, 0 or more, below 1"),
        ("optim.beta2=0.9999999999", "optim.beta2: 0.9999999999 should be a number, 0 or more, "
         "below 1"),
        ("optim.warmup_ratio=5", "optim.warmup_ratio: 5.0 should be a number, from 0 to 1"),
        ("generate.length_penalty=.inf", "generate.length_penalty: inf should be a finite number"),
        ("train.steps=3000000000", "train.steps: 3000000000 should be a whole number, 0 or more, "
         "2147483647 or less"),
        (f"train.steps={10**60}", "train.steps: a whole number of 200 bits should be a whole "
         "number, 0 or more, 2147483647 or less"),
        ("mesh.tensor=0", "mesh.tensor: 0 should be a whole number, 1 or more, or -1"),
        ("align.layer=-1", "align.layer: -1 should be a whole number, 0 or more, or auto"),
        ("align.layer=two", "align.layer: 'two' should be a whole number, 0 or more, or auto"),
        ("align.layer=1.5", "align.layer: 1.5 should be a whole number, 0 or more, or auto"),
        ("align.layer=[2]", "align.layer: [2] should be a whole number, 0 or more, or auto"),
        ("align.layer=", "align.layer: None should be a whole number, 0 or more, or auto"),
        ("align.layer=null", "align.layer: None should be a whole number, 0 or more, or auto"),
        ("batch.buckets=[64,0]", "batch.buckets[1]: 0 should be a whole number, 1 or more"),
        ("lora.ranks={q: 0}", "lora.ranks.q: 0 should be a whole number, 1 or more"),
        ("lora.alphas={q: -.5}", "lora.alphas.q: -0.5 should be a number, above 0"),
        ("objectives=[{weight: -1}]", "objectives[0].weight: -1.0 should be a number, 0 or more"),
        ("log.profile=[10]", "log.profile: [10] should be the first update and how many, both 1 "
         "or more, as in [10,3]"),
    ],
)  # fmt: skip
def test_numbers_out_of_range(word, sentence):
    assert refusal(None, word) == sentence


def test_text_that_no_file_can_hold():
    assert refusal(None, "output=a\ud800").startswith(
        "command line: 'output=a\\ud800' has half of a character at position 9"
    )
    config = Config()
    config.task.train = "a.jsonl"  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"task.train: 'a.jsonl' should be a list"):
        check(config)
    config.task.train = []
    config.task.columns = {"text": "a\0b"}
    with pytest.raises(UserError, match=r"columns.text: .* holds a NUL character"):
        check(config)


def test_group_and_pairs():
    assert refusal(None, "batch.pairs=40") == (
        "batch.pairs: 40 is not a multiple of align.group=32; change one of them or set "
        "align.negatives=global"
    )
    for words in (
        ["batch.pairs=64"],  # two groups
        ["batch.pairs=16"],  # one group, not full
        ["batch.pairs=40", "align.negatives=global"],
        ["batch.pairs=40", "align.group=20"],
        ["batch.pairs=40", "align.weight=0"],
        ["batch.pairs=40", "align.objective=my.losses:own"],
    ):
        load(None, words)


def test_settings_that_contradict_each_other(write):
    assert "skip works on adapters only; set trainable=lora" in refusal(
        None, "optim.missing=skip", "trainable=full"
    )
    path = write("objectives:\n  - {objective: 'a:b', phase: tsk}\n")
    assert refusal(path) == (
        "objectives[0].phase: 'tsk' is not among task, align; did you mean task?"
    )
    path = write("objectives:\n  - {objectve: 'a:b'}\n")
    assert "Did you mean: 'objective'" in refusal(path)


def test_other_groups_replace_those_of_the_file(write):
    path = write("evaluate: {groups: {supervised: [en], aligned: [de]}}")
    assert load(path, []).config.evaluate.groups == {"supervised": ["en"], "aligned": ["de"]}
    assert load(path, ["evaluate.groups={low: [cy]}"]).config.evaluate.groups == {"low": ["cy"]}
    assert load(path, ["evaluate.groups={}"]).config.evaluate.groups == {}


# Mappings with names of one's own: what a file says, another mapping, one name of it.
MAPPINGS = {
    "task.columns": ({"utterance": "text"}, {"lang": "code"}, "lang=code"),
    "task.options": ({"label_smoothing": 0.1}, {"deep": {"a": 1}}, "deep.a=1"),
    "align.columns": ({"text0": "a"}, {"text1": "b"}, "text1=b"),
    "align.options": ({"subspace": {"file": "x"}}, {"rows": "pooled"}, "rows=pooled"),
    "evaluate.columns": ({"utterance": "text"}, {"lang": "code"}, "lang=code"),
    "evaluate.groups": ({"aligned": ["de"]}, {"unseen": ["cy"]}, "unseen=[cy]"),
    "evaluate.options": ({"rules": "mended"}, {"tokenize": "zh"}, "tokenize=zh"),
    "lora.ranks": ({"down": 16}, {"q": 4}, "q=4"),
    "lora.alphas": ({"down": 16.0}, {"q": 4.0}, "q=4.0"),
}


def test_no_free_mapping_is_forgotten():
    assert MAPPINGS.keys() == {k for k, v in flatten(dataclasses.asdict(Config())) if v == {}}


@pytest.mark.parametrize("key", MAPPINGS)
def test_a_mapping_replaces_the_one_before_it_and_a_name_joins_it(write, key):
    first, other, name = MAPPINGS[key]
    group, part = key.split(".")
    path = write(f"{group}: {{{part}: {json.dumps(first)}}}")

    def found(*words: str) -> dict:
        return getattr(getattr(load(path, words).config, group), part)

    assert found() == first
    assert found(f"{key}={{}}") == {}
    assert found(f"{key}={json.dumps(other)}") == other
    assert found(f"{group}={{{part}: {json.dumps(other)}}}") == other
    assert found(f"{key}.{name}") == first | other
    # Words count in their order.
    assert found(f"{key}.{name}", f"{key}={{}}") == {}
    assert found(f"{key}={{}}", f"{key}.{name}") == other
    later = path.parent / "later.yaml"
    later.write_text(f"extends: run.yaml\n{group}: {{{part}: {{}}}}", "utf-8")
    assert getattr(getattr(load(later).config, group), part) == {}


def test_the_origins_of_a_mapping_that_is_replaced(write):
    path = write("task: {columns: {text: a, prefix: b}}")
    assert chosen(load(path, ["task.columns={}"])) == {"task.columns": ({}, "command line")}
    assert chosen(load(path, ["task.columns={}", "task.columns.text=c"])) == {
        "task.columns.text": ("c", "command line")
    }


def test_the_layer_may_be_chosen_by_a_probe(write):
    path = write("align: {layer: auto}")
    assert load(path, []).config.align.layer == AUTO
    assert load(path, ["align.layer=3"]).config.align.layer == 3
    assert load(None, ["align.layer=auto"]).config.align.layer == AUTO
