"""Rows end to end behind what they share, on the golden models: all that is trained is equal.

The reference is the plain batch: the same rows padded, on one device. Losses and gradients of two
micro-batches (relative L2 1e-5), and twenty updates, with the paper's prompts and with ours, in
every layout, on one device and on eight.
"""

import json
import re
import shutil

import jax
import numpy as np
import pytest

from jaxalign import base as bases
from jaxalign.config import load
from jaxalign.data import flat
from jaxalign.sharding import make_mesh, put_batch
from jaxalign.train import setup
from tests.data.conftest import CHATML_TEMPLATE, LLAMA_TEMPLATE, build
from tests.parity.golden import CASES, find
from tests.tiny import ASSETS

PAPER = find("rows.json").get("pipeline_llama3")
TURNS = ["<|end_of_text|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
         "<|eot_id|>"]  # fmt: skip
TOKENIZERS = {
    "llama3": {
        # The last is one that transformers gives to every tokenizer of a Qwen.
        "special": [*TURNS, "<|endoftext|>"], "eos": TURNS[4], "bos": TURNS[1], "pad": TURNS[0],
        "template": LLAMA_TEMPLATE,
    },
    "chatml": {
        "special": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "eos": "<|im_end|>",
        "pad": "<|endoftext|>", "template": CHATML_TEMPLATE,
    },
}  # fmt: skip
# Prompts: the tokenizer, and what a configuration says of them. `rows` are the paper's own texts.
PROMPTS = {
    "paper": ("llama3", ("prompt.template=llama3_paper", "task.kind=slots")),
    "paper's rows": ("llama3", ("task.kind=rows",)),
    "ours": ("chatml", ("prompt.template=chat", "task.kind=slots")),
    "ours, llama": ("llama3", ("prompt.template=chat", "task.kind=intent_slots")),
}
LAYOUTS = {
    "shared": ("batch.pack=auto",),
    "end to end": ("batch.pack=flatten", "batch.share_prefix=off"),
    "packed, shared": ("batch.pack=segments",),
    "packed": ("batch.pack=segments", "batch.share_prefix=off"),
}
MESHES = {"one": (1, 1, 1, 1), "eight": (2, 4, 1, 1)}
QUICK = {("llama_untied_A", "paper"), ("qwen2_untied_B", "ours")}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Files of task rows and of pairs, and the paper's instruction."""
    folder = tmp_path_factory.mktemp("texts")
    lines = (ASSETS / "train.en.jsonl").read_text("utf-8").splitlines()[:48]
    (folder / "slots.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    lines = (ASSETS / "pairs_tatoeba.jsonl").read_text("utf-8").splitlines()
    latin = [line for line in lines if line.isascii()][:48]
    (folder / "pairs.jsonl").write_text("\n".join(latin) + "\n", "utf-8")
    rows = [json.loads(line) for line in PAPER.read_text("utf-8").splitlines()]
    found = re.search(r"system<\|end_header_id\|>\n\n(.*?)<\|eot_id\|>", rows[0]["prefix"], re.S)
    return folder, found.group(1)


@pytest.fixture(scope="module")
def bases_of(tmp_path_factory, texts):
    """(case, tokenizer) -> a folder with the golden weights and a tokenizer of their 256 tokens."""
    made = {}
    folder, instruction = texts
    learnt = [instruction, *(folder / "slots.jsonl").read_text("utf-8").splitlines(),
              *PAPER.read_text("utf-8").splitlines()]  # fmt: skip

    def of(case, tokenizer):
        if (key := (case.folder.name, tokenizer)) not in made:
            made[key] = tmp_path_factory.mktemp("base")
            facts = TOKENIZERS[tokenizer]
            build(made[key], **facts, lines=learnt, size=case.spec.vocab, whole=False)
            for file in (case.folder / "model").iterdir():
                shutil.copy(file, made[key])
        return made[key]

    return of


@pytest.fixture
def prepare(bases_of, texts, tmp_path, monkeypatch):
    """(case, prompts, mesh, words) -> a run that starts from the golden adapter."""
    folder, instruction = texts

    def run(case, prompts, mesh, *words):
        shape = MESHES[mesh]
        devices = jax.devices()[: int(np.prod(shape))]
        monkeypatch.setattr(bases, "make_mesh", lambda *_: make_mesh(*shape, devices=devices))
        tokenizer, settings = PROMPTS[prompts]
        own = PAPER if prompts == "paper's rows" else None
        settings = [
            *settings, f"model.path={bases_of(case, tokenizer)}", f"output={tmp_path / 'run'}",
            f"adapter.start={case.folder / 'adapter'}", "lora.dropout=0", "model.dtype=float32",
            f"task.train=[{own or folder / 'slots.jsonl'}]", "task.valid=[]", "align.valid=[]",
            f"align.train=[{own or folder / 'pairs.jsonl'}]", "align.layer=2",
            "batch.size=16", "batch.pairs=8", "batch.accumulate=2", "batch.max_length=512",
            "align.every=joint", "train.steps=20", "optim.learning_rate=0.0005",
            *words,
        ]  # fmt: skip
        if prompts == "paper":
            settings.append(f"prompt.system={json.dumps(instruction)}")
        return setup.prepare(load(None, settings).config)

    return run


def plain(padded, laid, name, numbers):
    """The rows of these micro-batches of a laid stream, padded to the longest of all rows."""
    stream, own = padded.train[name], laid.train[name]
    parts = []
    for number in numbers:
        slots = own._slots(number)
        places = own._order.most * len(slots)
        rows = [(row,) for slot in slots for row in slot]
        rows += [()] * (places - len(rows))
        parts.append(stream._made(rows, max(stream.lengths)))
    return jax.tree.map(lambda *arrays: np.stack(arrays), *parts)


def batches(run, name, numbers):
    """As a run's own loop stacks them."""
    return put_batch(run.mesh, run.train[name].stack(numbers), stacked=True)


def distance(ours, theirs):
    """Relative L2 over all tensors."""
    ours, theirs = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(jax.device_get(tree))])
        for tree in (ours, theirs)
    )
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def gradient(run, name, stack):
    with jax.set_mesh(run.mesh):
        return jax.device_get(run.step.gradient(name, run.state, run.frozen, stack, None))


def check_layout(run, layout):
    """That the run is what the test says it is."""
    stream = run.train["task"]
    assert stream.tokens(0)[0] <= stream.tokens(0)[1]
    assert (stream._order.most > 1) == layout.startswith("packed")
    if layout != "packed":
        # Two texts of a sequence share what all rows do; more share branches, too.
        least = 30 if stream.layout.ways == 1 else 0
        assert (len(stream.layout.stem.tokens) > least) == ("shared" in layout)


def slow(case, prompts, layout, mesh, quick=("shared",)):
    """A parameter, slow unless it is one of a few."""
    chosen = (case.folder.name, prompts) in QUICK and layout in quick and mesh == "one"
    name = f"{case.folder.name}, {prompts}, {layout}, {mesh}"
    marks = () if chosen else pytest.mark.slow
    return pytest.param(case, prompts, layout, mesh, id=name, marks=marks)


def every(quick):
    return [
        slow(case, prompts, layout, mesh, quick)
        for case in CASES
        for prompts in PROMPTS
        for layout in LAYOUTS
        for mesh in MESHES
    ]


@pytest.mark.parametrize(("case", "prompts", "layout", "mesh"), every(("shared",)))
def test_losses_and_gradients_are_those_of_the_plain_batch(prepare, case, prompts, layout, mesh):
    padded = prepare(case, prompts, "one", "batch.pack=none")
    run = prepare(case, prompts, mesh, *LAYOUTS[layout])
    check_layout(run, layout)
    for name in ("task", "align"):
        wanted, metrics = gradient(padded, name, plain(padded, run, name, (0, 1)))
        found, ours = gradient(run, name, batches(run, name, (0, 1)))
        assert distance(found, wanted) < 1e-5
        for what, value in metrics.items():
            np.testing.assert_allclose(ours[what], value, rtol=1e-5, atol=1e-6, err_msg=what)


@pytest.mark.parametrize(("case", "prompts", "layout", "mesh"), every(()))
def test_twenty_updates_are_those_of_the_plain_batch(
    prepare, monkeypatch, case, prompts, layout, mesh
):
    monkeypatch.setattr(flat, "LENGTHS", 1)  # one program
    padded = prepare(case, prompts, "one", "batch.pack=none")
    run = prepare(case, prompts, mesh, *LAYOUTS[layout])
    start = jax.device_get(run.state.trained)
    one, other = padded.state, run.state
    for update in range(20):
        numbers = (2 * update, 2 * update + 1)
        with jax.set_mesh(padded.mesh):
            stacks = {name: plain(padded, run, name, numbers) for name in run.train}
            one, wanted = padded.step(one, padded.frozen, stacks, None)
        with jax.set_mesh(run.mesh):
            stacks = {name: batches(run, name, numbers) for name in run.train}
            other, found = run.step(other, run.frozen, stacks, None)
        for what in ("task/micro_losses", "align/micro_losses"):
            np.testing.assert_allclose(found[what], wanted[what], atol=2e-4, rtol=0)
        np.testing.assert_allclose(found["grad_norm"], wanted["grad_norm"], rtol=1e-4)
    moved = [
        jax.tree.map(lambda end, begin: np.asarray(end) - begin, jax.device_get(s.trained), start)
        for s in (other, one)
    ]
    assert distance(*moved) < 1e-3
