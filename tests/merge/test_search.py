"""Weights chosen by a score: the grid, the candidates, the table, the picture, the best one."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from jaxalign import base as bases
from jaxalign.base import open_base
from jaxalign.cli import main
from jaxalign.errors import UserError
from jaxalign.evaluate.gold import kind_of, read_golds
from jaxalign.evaluate.run import Entrant, evaluate, score
from jaxalign.hf.peft import load_peft
from jaxalign.merge import search as searching
from jaxalign.merge.draw import draw
from jaxalign.merge.grid import combinations, free
from jaxalign.merge.methods import Recipe
from jaxalign.merge.run import merge
from jaxalign.merge.search import Candidate, Search, search
from tests.data.conftest import CHATML_TEMPLATE
from tests.evaluate.conftest import rows_of
from tests.tiny import SPEC, of_run

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture
def paths(adapters):
    return [f"{adapters}/a1", f"{adapters}/a2"]


@pytest.fixture
def validated(judged, golds):
    """The judging configuration with rows to validate on."""
    return lambda *words: judged(
        f"task.valid=[{golds}/test.*.jsonl]",
        "evaluate.groups={mine: [en], other: [de, cy]}",
        "batch.size=8",
        "batch.max_length=128",
        "batch.buckets=[128]",
        "prompt.system=''",
        *words,
    )


# --- the grid -----------------------------------------------------------------------------------


def test_a_line_of_weights():
    assert combinations([[0, 0.25, 0.5, 1]], 2) == [(0, 1), (0.5, 0.5), (1, 0)]
    assert combinations([[0, 0.5, 1]], 3) == [
        (0, 0, 1), (0, 0.5, 0.5), (0, 1, 0), (0.5, 0, 0.5), (0.5, 0.5, 0), (1, 0, 0),
    ]  # fmt: skip
    tenths = combinations([[n / 10 for n in range(11)]], 2)
    assert len(tenths) == 11 and all(abs(sum(weights) - 1) < 1e-9 for weights in tenths)


def test_all_combinations():
    assert combinations([[1], [0, 0.5, 0.5]], 2) == [(1, 0), (1, 0.5)]
    assert combinations([[0, 0.5, 1.5]], 1) == [(0,), (0.5,), (1.5,)]
    assert len(combinations([[0, 1], [0, 1, 2]], 2)) == 6


def test_what_tells_candidates_apart():
    assert free(combinations([[0, 0.5, 1]], 2)) == [0]
    assert free(combinations([[1], [0, 0.5, 1]], 2)) == [1]
    assert free(combinations([[0, 1], [0, 1]], 2)) == [0, 1]
    assert free(combinations([[0, 0.5, 1]], 3)) == [0, 1, 2]
    assert free([(0.5, 0.5)]) == []


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        ([[0.3, 0.5]], "--grid: no 3 of 0.3, 0.5 sum to 1"),
        ([[0, 1], [0, 1]], "--grid: given 2 times"),
        ([[0, float("nan")]], "--grid: a value is not a number"),
    ],
)
def test_grids_that_cannot_be(grids, message):
    with pytest.raises(UserError) as error:
        combinations(grids, 3)
    assert message in str(error.value)


# --- the search ---------------------------------------------------------------------------------


def test_adapters_of_another_base_are_refused(validated, paths, folders, tmp_path):
    adapter = of_run(paths[0], tmp_path / "trained", folders["plain"].parent / "model")
    with pytest.raises(UserError, match="adapter was trained on another base"):
        search(validated(), [adapter, paths[1]], Recipe(), [[0.5]], str(tmp_path / "out"))


def test_candidates_write_what_their_merged_adapters_write(
    validated, judged, paths, tmp_path, capsys, monkeypatch
):
    loaded, written = [], []
    load = bases.load_params
    monkeypatch.setattr(bases, "load_params", lambda *a: loaded.append(a) or load(*a))
    monkeypatch.setattr(
        searching, "score", lambda *given: written.append(given[2]) or score(*given)
    )
    grids, words = [[0.4, 0.6]], ("evaluate.rows=3", "generate.batch=8")
    found = search(validated(*words), paths, Recipe("delta"), grids, str(tmp_path / "out"))
    assert len(loaded) == 1
    assert [one.weights for one in found.candidates] == [(0.4, 0.6), (0.6, 0.4)]
    assert found.metric == "slot_f1" and found.adapters == ["a1", "a2"]
    assert found.groups == {"mine": ["en"], "other": ["de"], "all": ["de", "en"]}
    # The same answers as by merging into a folder and evaluating that.
    merge(paths, [0.4, 0.6], Recipe("delta"), str(tmp_path / "merged"))
    entrant = [Entrant("m", str(tmp_path / "merged"))]
    evaluate(judged(*words, "prompt.system=''"), entrant, str(tmp_path / "evaluation"))
    rows = rows_of(tmp_path / "evaluation" / "m" / "predictions.jsonl")
    first, second = written
    assert [row["answer"] for row in rows] == [*first["de"], *first["en"]]
    assert first != second
    # What is best is written, as a folder and in full.
    record = json.loads((tmp_path / "out" / "adapter" / "merge.json").read_text())
    assert "\n## Merge\n" in (tmp_path / "out" / "adapter" / "README.md").read_text()
    assert (tmp_path / "out" / "adapter" / "tokenizer.json").is_file()
    best = found.candidates[found.best].weights
    assert tuple(one["weight"] for one in record["adapters"]) == best
    assert load_peft(tmp_path / "out" / "adapter", SPEC)[1].r == 8
    content = json.loads((tmp_path / "out" / "search.json").read_text())
    assert content["best"] == found.best
    assert content["candidates"][1]["scores"] == found.candidates[1].scores
    assert (tmp_path / "out" / "search.png").read_bytes()[:4] == b"\x89PNG"
    told = capsys.readouterr().out
    assert "slot F1, % by weights (delta)" in told and "0.4" in told and "mine (1)" in told


@pytest.fixture
def templated(paths, tmp_path):
    """The adapters, each with a chat template of its own."""
    for name, path in zip("ab", paths, strict=True):
        shutil.copytree(path, tmp_path / name)
        text = CHATML_TEMPLATE.replace("<|im_start|>", f"<|im_start|>{name} ")
        (tmp_path / name / "chat_template.jinja").write_text(text)
    return [str(tmp_path / "a"), str(tmp_path / "b")]


@pytest.mark.parametrize("metric", ["", "loss"])
def test_candidates_are_asked_by_the_template_that_is_written(
    validated, templated, tmp_path, monkeypatch, capsys, metric
):
    """That of the first adapter whose weight is not 0, whatever stands before it."""
    begun = {}

    def noted(self, merged, bar, judge):
        if metric:
            row = self.streams["en"].rows[0]
            begun[len(begun)] = row.tokens[: row.prompt].tolist()
        else:
            begun[len(begun)] = self.questions.prompts[-9]  # the first of nine English ones
        return judge(self, merged, bar)

    for how in (searching._Answers, searching._Loss):
        judge = how.__call__
        patch = lambda self, merged, bar, judge=judge: noted(self, merged, bar, judge)  # noqa: E731
        monkeypatch.setattr(how, "__call__", patch)
    config, folder = validated("generate.max_new_tokens=2"), tmp_path / "out" / "adapter"
    found = search(config, templated, Recipe(), [[0, 1], [1]], str(tmp_path / "out"),
                   metric=metric)  # fmt: skip
    base = open_base(config)
    example = [read_golds(validated("evaluate.groups={}"))["en"][0].example]
    asked = {
        weights: base.encode(example, base.prompts_of(path))[0][0]
        for weights, path in {(0, 1): templated[1], (1, 1): templated[0]}.items()
    }
    assert asked[0, 1] != asked[1, 1]
    weights = [one.weights for one in found.candidates]
    assert dict(zip(weights, begun.values(), strict=True)) == asked
    best = weights[found.best]
    assert base.encode(example, base.prompts_of(str(folder)))[0][0] == asked[best]
    told = " ".join(capsys.readouterr().out.split())
    for path in templated:
        assert told.count(f"note: {path} is prompted with the chat template in its folder") == 1


def test_another_instruction_of_an_adapter_is_told(validated, paths, tmp_path, capsys):
    """No instruction is written with a merged adapter, so candidates are asked by prompt.system."""
    shutil.copytree(paths[0], tmp_path / "run" / "adapter")
    record = tmp_path / "run" / "config.yaml"
    source, config = str(tmp_path / "run" / "adapter"), validated("evaluate.rows=1")
    told = f"note: {source} was trained with prompt.system='Find it.'; set prompt.system as it"
    for system, times in (("Find it.", 1), ("''", 0)):
        record.write_text(f"prompt: {{system: {system}}}\ntask: {{kind: {kind_of(config)}}}\n")
        search(config, [source], Recipe(), [[1]], str(tmp_path / "out"), metric="loss",
               existing="replace")  # fmt: skip
        assert " ".join(capsys.readouterr().out.split()).count(told) == times


def test_the_loss_is_that_of_whole_rows(validated, paths, tmp_path, monkeypatch):
    """Whatever the training cut: it is measured as answers are asked for."""

    def losses(*words):
        found = search(validated(*words), paths[:1], Recipe(), [[1]], str(tmp_path / "out"),
                       metric="loss", existing="replace")  # fmt: skip
        return found.candidates[0].scores["loss"]

    whole = losses("batch.buckets=[]")
    short = losses("batch.max_length=20", "batch.buckets=[20]")
    assert short == pytest.approx(whole, rel=1e-5)
    # A model or a tokenizer that takes no more.
    tokenizer = open_base(validated()).tokenizer
    tokenizer.model_max_length = 30
    monkeypatch.setattr(bases, "load_tokenizer", lambda *_: tokenizer)
    long = r"test.*\.jsonl:\d+: the row is longer than the 30 tokens that the model takes, so"
    with pytest.raises(UserError, match=long):
        losses()


def test_the_loss_is_that_of_the_rows_that_are_answered(validated, golds, paths, tmp_path):
    rows = rows_of(golds / "test.de.jsonl")
    few, renamed = tmp_path / "few.jsonl", tmp_path / "renamed.jsonl"
    few.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    spoken = [{**row, "said": row["utterance"], "utterance": "-"} for row in rows[:2]]
    renamed.write_text("".join(json.dumps(row) + "\n" for row in spoken))

    def losses(*words, data=(), out="out"):
        found = search(validated(*words), paths[:1], Recipe(), [[1]], str(tmp_path / out),
                       metric="loss", data=data, existing="replace")  # fmt: skip
        return found.candidates[0].scores["loss"]

    expected = losses(data=[str(few)])
    assert list(expected) == ["de"]
    assert losses("evaluate.rows=2", "evaluate.languages=[de]") == expected
    columns = "evaluate.columns={utterance: said}"
    assert losses(columns, data=[str(renamed)]) == expected
    first = "evaluate.transforms=[{name: 'tests.merge.test_search:first_two'}]"
    assert losses(first, data=[f"{golds}/test.de.jsonl"]) == expected


def first_two(records, options, seed):
    """A transform."""
    return records[:2]


@pytest.mark.parametrize(("metric", "best"), [("loss", 1), ("bleu", 0)])
def test_best_is_the_mean_over_languages(metric, best):
    scores = [{"de": 3.0, "en": 2.0, "cy": 1.0}, {"de": 1.0, "en": 2.0, "cy": 1.5},
              {"de": 0.5, "en": 2.5, "cy": 1.5}]  # fmt: skip
    candidates = [Candidate((n, 1 - n), {metric: found}) for n, found in enumerate(scores)]
    groups = {"two": ["de", "cy"], "all": ["de", "en", "cy"]}
    found = Search(["a", "b"], "delta", metric, groups, candidates)
    assert found.best == best  # the first of equals
    assert found.of_group(candidates[0], "two") == 2.0
    assert found.as_json()["best"] == best


@pytest.mark.parametrize("metric", ["loss", "bleu"])
def test_what_is_not_finite_is_never_best(metric):
    scores = [float("nan"), 2.0, float("inf"), 2.0]
    found = [Candidate((n,), {metric: {"de": value}}) for n, value in enumerate(scores)]
    search = Search(["a"], "delta", metric, {"all": ["de"]}, found)
    assert search.best == 1
    search = dataclasses.replace(search, candidates=[found[0], found[2]])
    with pytest.raises(
        UserError, match=f"--search: {metric} is not finite with any of the weights"
    ):
        search.best  # noqa: B018


@pytest.mark.parametrize("pack", ["none", "flatten"])
def test_loss_is_the_tasks_validation_loss(validated, paths, tmp_path, pack):
    """Against the log probabilities of the answers, row by row, from the model's logits."""
    import jax

    from jaxalign.data.streams import task_stream
    from jaxalign.model.decoder import Decoder

    config = validated("batch.buckets=[]", f"batch.pack={pack}")
    found = search(
        config, paths, Recipe("delta"), [[1], [0, 1]], str(tmp_path / "out"), metric="loss"
    )
    assert [one.weights for one in found.candidates] == [(1, 0), (1, 1)]
    values = [found.of_group(one, "all") for one in found.candidates]
    assert found.best == int(np.argmin(values)) and values[0] != values[1]

    model = open_base(config)
    lora, adapter = load_peft(paths[0], SPEC)
    one = dataclasses.replace(config, task=dataclasses.replace(config.task, languages=["de"]))
    stream = task_stream(one, model.tokenizer, "valid")
    rows = [row.tokens for row in stream.rows]
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)  # padding comes behind
    for line, row in zip(tokens, rows, strict=True):
        line[: len(row)] = row
    decoder = Decoder(SPEC, adapter)
    hidden = decoder.forward(model.params, lora, tokens).hidden
    logs = np.asarray(jax.nn.log_softmax(decoder.logits(model.params, hidden)))
    picked = [
        logs[at, place - 1, row.tokens[place]]
        for at, row in enumerate(stream.rows)
        for place in range(row.first, len(row.tokens))
    ]
    assert found.candidates[0].scores["loss"]["de"] == pytest.approx(-np.mean(picked), rel=1e-4)


def test_the_bare_base_can_win(validated, paths, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        searching._Loss,
        "__call__",
        lambda self, merged, bar: {"loss": {"de": bool(merged), "en": 0}},
    )
    (tmp_path / "out" / "adapter").mkdir(parents=True)  # of an older search
    (tmp_path / "out" / "search.json").write_text("{}")
    words = {"metric": "loss", "existing": "replace"}
    out = str(tmp_path / "out")
    found = search(validated(), paths[:1], Recipe(), [[1, 0, 0.5]], out, **words)
    assert found.candidates[found.best].weights == (0,)
    assert "(every weight 0)" in capsys.readouterr().out
    assert not (tmp_path / "out" / "adapter").exists()


def test_the_result_does_not_replace_what_is_searched(validated, paths, tmp_path):
    shutil.copytree(paths[0], tmp_path / "out" / "adapter")
    (tmp_path / "out" / "search.json").write_text("{}")
    again = [str(tmp_path / "out" / "adapter"), paths[1]]
    with pytest.raises(UserError, match=r"--force would remove .*out/adapter with it; choose an"):
        search(validated(), again, Recipe(), [[0, 1]], str(tmp_path / "out"), existing="replace")


def test_command(validated, golds, paths, tmp_path, capsys):
    from jaxalign.config import to_yaml

    file = tmp_path / "own.yaml"
    file.write_text(to_yaml(validated()))
    words = ["merge", *paths, "--search", str(file), "--grid", "0,1", "--metric", "loss",
             "--out", str(tmp_path / "out")]  # fmt: skip
    assert main([*words, "--data", f"{golds}/test.de.jsonl", "log.progress=none"]) == 0
    found = json.loads((tmp_path / "out" / "search.json").read_text())
    assert found["groups"] == {"other": ["de"], "all": ["de"]} and found["metric"] == "loss"
    assert [one["weights"] for one in found["candidates"]] == [[0, 1], [1, 0]]
    assert main(words) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main([*words, "--force"]) == 0


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        (["task.valid=[]"], {}, "task.valid is empty"),
        ([], {"metric": "slot_f2"}, "--metric: 'slot_f2' "),
        ([], {"data": ["nowhere.jsonl"]}, "nowhere.jsonl"),
        (
            ["task.transforms=[{name: swap, splits: [train, valid]}]"],
            {},
            "task.transforms: a search reads the rows of task.valid through evaluate.transforms",
        ),
    ],
)
def test_searches_that_cannot_be(validated, paths, tmp_path, words, options, message):
    with pytest.raises(UserError) as error:
        search(validated(*words), paths, Recipe(), [[0, 1]], str(tmp_path / "out"), **options)
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_pictures_of_lines_and_rankings(tmp_path):
    rng = np.random.default_rng(0)

    def result(grids, number):
        candidates = [
            Candidate(weights, {"loss": {"de": rng.random(), "en": rng.random()}})
            for weights in combinations(grids, number)
        ]
        groups = {"supervised": ["en"], "all": ["de", "en"]}
        return Search(["task", "align", "more"][:number], "delta", "loss", groups, candidates)

    for name, found in {
        "line": result([[0, 0.5, 1]], 2),
        "one": result([[0, 0.5, 1]], 1),
        "plane": result([[0, 1], [0, 0.5, 1]], 2),
        "three": result([[0, 0.5, 1]], 3),
    }.items():
        draw(found, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
