"""What becomes tokens: prompts, pairs, chat templates, tokenizers."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from jaxalign.data.chat import encode_examples, encode_prompts, load_tokenizer, render_examples
from jaxalign.data.pairs import encode_pairs, to_pair
from jaxalign.data.sources import Record
from jaxalign.data.tasks import Example
from tests.data.conftest import CHATML_TEMPLATE, build
from tests.fuzz.odd import changed, damaged, texts, written


@functools.cache
def tokenizer_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="jaxalign-fuzz-"))
    build(folder, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], eos="<|im_end|>",
          pad="<|endoftext|>", template=CHATML_TEMPLATE)  # fmt: skip
    return folder


@functools.cache
def tokenizer() -> Any:
    return load_tokenizer(str(tokenizer_folder()))


@functools.cache
def control_ids() -> set[int]:
    return {i for i, t in tokenizer().added_tokens_decoder.items() if t.special}


def _squeezed(text: str) -> str:
    return "".join(text.split())


sentences = st.one_of(texts, st.lists(texts, max_size=3).map(" ".join))


def read_tokens(value: tuple[str, str, str], _: Path) -> None:
    """The turns hold what was given, between the control tokens of the template and no others."""
    prompt, answer, system = value
    example = Example(prompt, answer, system=system, origin="rows.jsonl:1")
    (row,) = encode_examples([example], tokenizer())
    (asked,) = encode_prompts([example], tokenizer())
    control = [t for t in row.tokens.tolist() if t in control_ids()]
    turns = 2 + bool(system)
    assert len(control) == 2 * turns, control
    assert row.tokens[: row.prompt].tolist() == asked.tolist()[: row.prompt]
    trained = tokenizer().decode(row.tokens[row.first :])
    assert _squeezed(trained) == _squeezed(answer + "<|im_end|>")
    assert _squeezed(prompt) in _squeezed(tokenizer().decode(asked))


def read_pair_tokens(value: tuple[str, str], _: Path) -> None:
    pair = to_pair(Record({"text0": value[0], "text1": value[1]}, "pairs.jsonl:1"))
    (row,) = encode_pairs([pair], tokenizer(), 10_000)
    assert not set(row.source.tolist()) & control_ids()
    assert tokenizer().decode(row.source) == value[0]


pieces = st.sampled_from([
    "{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{{ m['role'] }}", "<|im_end|>",
    "{{ messages[0].content }}", "{% if add_generation_prompt %}", "{% endif %}", "{{ bos_token }}",
    "{{ 'a' * 50000000 }}", "{{ 1 / 0 }}", "{{ raise_exception('no') }}", "{{ x.y.z }}", "{%", "{{",
    "{% for i in range(99999) %}", "{{ m.content | trim }}", "{{ m.content | upper }}", "{#", "\n",
    "{% set ns = namespace(x='ab') %}", "{% set ns.x = ns.x ~ ns.x %}", "{{ ns.x }}",
    "assistant: ",
    "{{ ''.__class__ }}", "{% generation %}", "{% endgeneration %}", "{{ m.content[::-1] }}",
    "\x1b",
    "{% include 'a' %}", "{% import 'os' as os %}", "{{ self }}", "{{ cycler }}", "{% break %}",
])  # fmt: skip
whole = st.sampled_from([CHATML_TEMPLATE, "{% for m in messages %}{{ m.content }}{% endfor %}"])
templates = st.one_of(
    whole, st.tuples(pieces, whole, pieces).map("".join), st.lists(pieces, max_size=6).map("".join),
    damaged(CHATML_TEMPLATE.encode()).map(lambda b: b.decode("utf-8", "replace")),
)  # fmt: skip


def read_template(text: str, _: Path) -> None:
    own = load_tokenizer(str(tokenizer_folder()))
    own.chat_template = text
    example = Example("wake me up", "time: nine", system="find the slots", origin="rows.jsonl:1")
    (rendered,) = render_examples([example], own)
    shown = _squeezed(rendered.prompt)
    assert "wakemeup" in shown and "findtheslots" in shown
    assert "time:nine" in _squeezed(rendered.completion)


def _json_of(file: Path) -> Any:
    return json.loads(file.read_text("utf-8"))


@functools.cache
def tokenizer_files() -> dict[str, Any]:
    found = {file.name: _json_of(file) for file in tokenizer_folder().glob("*.json")}
    model = found["tokenizer.json"]["model"]  # small, or nothing else would ever be changed
    model["merges"] = model["merges"][:5]
    return found


@st.composite
def tokenizer_folders(draw: Any) -> dict[str, Any]:
    name = draw(st.sampled_from(sorted(tokenizer_files())))
    return tokenizer_files() | {name: draw(changed(tokenizer_files()[name]))}


def read_tokenizer(files: dict[str, Any], folder: Path) -> None:
    for name, content in files.items():
        (folder / name).write_text(written(content), "utf-8")
    found = load_tokenizer(str(folder))
    (row,) = encode_pairs([to_pair(Record({"text0": "wake up", "text1": "b"}, "p:1"))], found, 99)
    assert all(0 <= token < len(found) for token in row.source.tolist())
    assert not (folder / "ran").exists()
