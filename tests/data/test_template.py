"""The paper's layout in Jinja is the layout in Python: text and tokens, whatever the turns."""

import numpy as np
import pytest

from jaxalign.data.chat import encode_examples, encode_prompts, load_tokenizer, render_examples
from jaxalign.data.tasks import Example
from jaxalign.data.template import joins, llama3_paper, training_template
from tests.data.conftest import CHATML_TEMPLATE
from tests.parity.test_pipeline import CASES

TALKS = [
    Example("wake me up", "None", system="Find the slots."),
    Example("  wake me up\n", "a: b; c: d", system=""),
    Example("x", "y", system="  Find\nthe slots. \n"),
    Example("q {{ bos_token }} {% raw %} 'q' \"q\" \\n", "a\\b {{ a }}", system="{% if %}"),
    Example("third", " padded answer ", system="s", shots=(("one", " 1 "), ("two\n", "2"))),
    Example("ねえ <|eot|>", "Zoë\n\nline", system="日本"),
]


def turns(example, answered=False):
    found = [{"role": "system", "content": example.system}] if example.system else []
    for prompt, answer in example.shots:
        found += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    found.append({"role": "user", "content": example.prompt})
    return found + [{"role": "assistant", "content": example.answer}] * answered


def llama_folders():
    cases = [str(case / "tokenizer") for name, case in CASES.items() if "llama3" in name]
    return ["tiny", *cases]


@pytest.fixture(
    params=llama_folders(), ids=lambda path: path.split("/")[-2] if "/" in path else path
)
def tokenizer(request, llama_folder):
    return load_tokenizer(llama_folder if request.param == "tiny" else request.param)


@pytest.mark.parametrize("example", TALKS, ids=range(len(TALKS)))
def test_prompts(tokenizer, example):
    theirs = tokenizer.apply_chat_template(
        turns(example), chat_template=llama3_paper(tokenizer), tokenize=False,
        add_generation_prompt=True,
    )  # fmt: skip
    (ours,) = render_examples([example], tokenizer, "llama3_paper")
    assert theirs == tokenizer.bos_token + ours.prompt
    ids = tokenizer.apply_chat_template(
        turns(example), chat_template=llama3_paper(tokenizer), add_generation_prompt=True,
        return_dict=False,
    )  # fmt: skip
    (prompt,) = encode_prompts([example], tokenizer, "llama3_paper")
    np.testing.assert_array_equal(ids, prompt)


@pytest.mark.parametrize("example", TALKS, ids=range(len(TALKS)))
def test_whole_rows(tokenizer, example):
    template = llama3_paper(tokenizer)
    ids = tokenizer.apply_chat_template(
        turns(example, answered=True), chat_template=template, return_dict=False
    )
    (row,) = encode_examples([example], tokenizer, "llama3_paper")
    np.testing.assert_array_equal(ids, row.tokens)


def test_a_turn_too_few_would_show(tokenizer):
    """The tokenizer's own template differs: these tests can fail."""
    own = tokenizer.apply_chat_template(
        turns(TALKS[0]), chat_template="{{ bos_token }}", tokenize=False
    )
    assert own != render_examples(TALKS[:1], tokenizer, "llama3_paper")[0].prompt


def test_an_empty_system_turn_is_left_out(tokenizer):
    talk = [{"role": "system", "content": ""}, {"role": "user", "content": "x"}]
    text = tokenizer.apply_chat_template(
        talk, chat_template=llama3_paper(tokenizer), tokenize=False, add_generation_prompt=True
    )
    assert "system" not in text


def test_without_a_begin_token(build_tokenizer, tmp_path):
    """A tokenizer that adds none gets none from the template."""
    special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = load_tokenizer(build_tokenizer(tmp_path / "t", special, eos="<|eot_id|>"))
    (prompt,) = encode_prompts(TALKS[:1], tokenizer, "llama3_paper")
    ids = tokenizer.apply_chat_template(
        turns(TALKS[0]), chat_template=llama3_paper(tokenizer), add_generation_prompt=True,
        return_dict=False,
    )  # fmt: skip
    np.testing.assert_array_equal(ids, prompt)


def test_the_template_of_a_training(tokenizer, chatml):
    assert training_template(tokenizer, "llama3_paper") == llama3_paper(tokenizer)
    assert training_template(chatml, "chat") == chatml.chat_template
    chatml.chat_template, kept = {"default": "a", "tool_use": "b"}, chatml.chat_template
    try:
        assert training_template(chatml, "chat") == "a"
        chatml.chat_template = None
        assert training_template(chatml, "chat") is None
    finally:
        chatml.chat_template = kept


@pytest.mark.parametrize(
    ("head", "joined"),
    [
        ("", False),
        ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}", True),
        ("{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}", True),
    ],
    ids=["taken", "refused", "dropped"],
)  # fmt: skip
def test_where_an_instruction_stands(chatml, head, joined):
    """Whoever prompts later does as training did."""
    template = head + CHATML_TEMPLATE
    assert joins(chatml, template, "Find the slots.") == joined
    own, chatml.chat_template = chatml.chat_template, template
    try:
        (row,) = render_examples(TALKS[:1], chatml)
    finally:
        chatml.chat_template = own
    assert ("Find the slots.\n\nwake me up" in row.prompt) == joined
