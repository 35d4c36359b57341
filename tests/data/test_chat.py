"""What is trained: the answer and its end token, nothing else; prompts are what generation sees."""

import io
import re

import numpy as np
import pytest
from tokenizers import processors

from jaxalign.data.batch import ANSWER, TEMPLATE, TEXT
from jaxalign.data.beginnings import encode_choices
from jaxalign.data.chat import (
    encode_examples,
    encode_prompts,
    encode_texts,
    load_tokenizer,
    render_examples,
    show,
)
from jaxalign.data.pairs import Pair, encode_pairs
from jaxalign.data.tasks import Example
from jaxalign.errors import UserError

EXAMPLE = Example("wake me up", "datetime: tomorrow", system="find the slots")


def trained(row, tokenizer):
    return tokenizer.decode(row.tokens[row.first :])


def masked(row, tokenizer):
    return tokenizer.decode(row.tokens[: row.first])


@pytest.fixture
def ending(llama_folder):
    """As `llama`, but saved with add_eos_token: it ends every text with a token."""
    tokenizer = load_tokenizer(llama_folder)
    tokens = ["<|begin_of_text|>", "<|eot_id|>"]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A <|eot_id|>",
        special_tokens=list(zip(tokens, tokenizer.convert_tokens_to_ids(tokens), strict=True)),
    )
    return tokenizer


def test_llama_chat_row(llama):
    (row,) = encode_examples([EXAMPLE], llama)
    assert trained(row, llama) == "datetime: tomorrow<|eot_id|>"
    assert masked(row, llama) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nfind the slots<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nwake me up<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_chatml_row_ends_at_the_stop_token(chatml):
    """The template writes a newline behind the turn; the model stops before it: no loss there."""
    (row,) = encode_examples([EXAMPLE], chatml)
    assert trained(row, chatml) == "datetime: tomorrow<|im_end|>"
    assert row.tokens[-1] == chatml.eos_token_id


def test_the_row_ends_at_the_first_of_many_special_tokens(build_tokenizer, tmp_path):
    """Whatever their order and whichever begins another; behind an answer that has one, too."""
    many = [f"<unused{number}>" for number in range(200)]
    special = ["<|user|>", "<|answer|>", "<|end|>", "<|end|>>", *many]
    tokenizer = load_tokenizer(build_tokenizer(tmp_path / "t", special, eos="<|end|>"))
    turns = "{% for m in messages %}<|{{ 'user' if m.role != 'assistant' else 'answer' }}|>"
    opened = "{% if add_generation_prompt %}<|answer|>{% endif %}"
    for printed, end in (
        ("<unused107><|end|>", "<unused107>"),
        ("<|end|>\n<unused3>", "<|end|>"),
        ("", "<|end|>"),
    ):
        tail = f"{{{{ m.content }}}}{{% if m.role == 'assistant' %}}{printed}{{% endif %}}"
        tokenizer.chat_template = f"{turns}{tail}{{% endfor %}}{opened}"
        (row,) = render_examples([EXAMPLE], tokenizer)
        assert row.completion == f"datetime: tomorrow{end}"


def test_paper_row(llama):
    (row,) = encode_examples([EXAMPLE], llama, "llama3_paper")
    assert trained(row, llama) == "datetime: tomorrow<|eot_id|>"
    assert masked(row, llama) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nfind the slots<|eot_id|>\n"
        "<|start_header_id|>user<|end_header_id|>\n\nwake me up<|eot_id|>\n"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert (row.tokens == llama.bos_token_id).sum() == 1


@pytest.mark.parametrize("template", ["chat", "llama3_paper"])
def test_training_and_generation_prompts_agree(llama, template):
    examples = [
        EXAMPLE,
        Example("Grüße 哪些", "None", system="x"),
        Example(" padded ", "a", system=""),
    ]
    prompts = encode_prompts(examples, llama, template)
    rows = encode_examples(examples, llama, template)
    for row, prompt in zip(rows, prompts, strict=True):
        assert row.tokens[: row.prompt].tolist() == prompt.tolist()
        assert row.targets == len(row.tokens) - len(prompt) > 0
        assert (row.tokens == llama.bos_token_id).sum() == 1


def test_system_replaced_removed_and_filled(chatml):
    example = Example(
        "Hallo",
        "Hello",
        system="own",
        names={"source_language": "German", "target_language": "English"},
    )
    (replaced,) = render_examples([example], chatml, "chat", "From {source_language}, {other}.")
    assert replaced.prompt.startswith("<|im_start|>system\nFrom German, {other}.<|im_end|>")
    (removed,) = render_examples([example], chatml, "chat", "")
    assert removed.prompt.startswith("<|im_start|>user\nHallo")


def test_finished_rows_follow_the_plain_length_rule(llama):
    """labels are masked for len(tokens(prefix)), even where a token spans the border."""
    example = Example("wake me u", "p at nine")
    (row,) = encode_examples([example], llama)
    assert row.tokens.tolist() == llama("wake me up at nine")["input_ids"]
    assert row.prompt == len(llama("wake me u")["input_ids"])
    assert llama("wake me up")["input_ids"][: row.prompt] != llama("wake me u")["input_ids"]


def test_a_token_across_the_border_is_split(chatml):
    """With a template whose prompt ends in mid-word the prompt's tokens win."""
    tokenizer = load_tokenizer(chatml.name_or_path)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    example = Example("wake me u", "p at nine", system="")
    (row,) = encode_examples([example], tokenizer)
    prompt = tokenizer("wake me u")["input_ids"]
    assert tokenizer("wake me up at nine")["input_ids"][: len(prompt)] != prompt
    assert row.tokens[: row.prompt].tolist() == prompt
    assert trained(row, tokenizer) == "p at nine<|im_end|>"
    (cut,) = encode_examples([example], tokenizer, max_length=row.prompt + 1)
    assert cut.tokens.tolist() == row.tokens[: row.prompt + 1].tolist()
    assert cut.whole == len(row.tokens)


def test_template_that_rewrites_finished_turns(chatml):
    tokenizer = load_tokenizer(chatml.name_or_path)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant (thinking) ' }}{% endif %}"
    )
    (row,) = encode_examples([EXAMPLE], tokenizer)
    assert masked(row, tokenizer).endswith("assistant (thinking) ")
    assert trained(row, tokenizer) == "datetime: tomorrow<|im_end|>"


@pytest.mark.parametrize(
    ("turn", "opened", "before"),
    [
        # Old ones ignore add_generation_prompt.
        ("<|im_start|>{{ m['role'] + '\n' + m['content'] }}<|im_end|>", "", "<|im_start|>assist"),
        # A thinking model's open prompt ends within the block that its finished turns close.
        ("{{ m['role'] + (':<think>\n</think>\n' if m['role'] == 'assistant' else ':') }}"
         "{{ m['content'] }}<|im_end|>", "assistant:<think>\n", "</think>"),
    ],
)  # fmt: skip
def test_template_that_writes_more_than_the_answer(chatml, turn, opened, before):
    """A model would write it as a part of every answer, and no answer would be right."""
    tokenizer = load_tokenizer(chatml.name_or_path)
    tokenizer.chat_template = (
        f"{{% for m in messages %}}{turn}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{opened}{{% endif %}}"
    )
    with pytest.raises(UserError, match=f"writes '{re.escape(before)}.* between the open prompt"):
        encode_examples([EXAMPLE], tokenizer)
    with pytest.raises(UserError, match="let the open prompt end with it"):
        encode_prompts([EXAMPLE], tokenizer)


def test_template_without_a_system_role(chatml):
    tokenizer = load_tokenizer(chatml.name_or_path)
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + chatml.chat_template
    )
    (rendered,) = render_examples([EXAMPLE], tokenizer)
    assert rendered.prompt == (
        "<|im_start|>user\nfind the slots\n\nwake me up<|im_end|>\n<|im_start|>assistant\n"
    )


def test_cut_on_the_right(llama):
    (whole,) = encode_examples([EXAMPLE], llama)
    for limit in (len(whole.tokens) - 1, whole.prompt, 5):
        (row,) = encode_examples([EXAMPLE], llama, max_length=limit)
        assert row.tokens.tolist() == whole.tokens[:limit].tolist()
        assert row.whole == len(whole.tokens)
        assert row.targets == max(limit - whole.prompt, 0)


def test_mixed_batches_keep_their_order(llama):
    finished = Example("a ", "b")
    rows = encode_examples([finished, EXAMPLE, finished], llama)
    alone = [encode_examples([e], llama)[0] for e in (finished, EXAMPLE, finished)]
    assert [r.tokens.tolist() for r in rows] == [r.tokens.tolist() for r in alone]
    assert [r.prompt for r in rows] == [r.prompt for r in alone]


def test_encode_texts(llama):
    rows, whole = encode_texts(["wake me up", ""], llama, max_length=2)
    assert rows[0].tolist() == llama("wake me up")["input_ids"][:2]
    assert rows[1].tolist() == [llama.bos_token_id]
    assert rows[0].dtype == np.int32
    assert whole == [len(llama("wake me up")["input_ids"]), 1]
    assert encode_texts([], llama) == ([], [])


def test_pad_token(llama, chatml):
    assert llama.pad_token == llama.eos_token == "<|eot_id|>"
    assert chatml.pad_token == "<|endoftext|>"


def test_no_chat_template(llama_folder, chatml):
    tokenizer = load_tokenizer(llama_folder)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"no chat template.*llama3_paper.*task.kind=rows"):
        encode_examples([EXAMPLE], tokenizer)
    assert encode_examples([EXAMPLE], tokenizer, "llama3_paper")
    assert encode_examples([Example("a", "b")], tokenizer)
    with pytest.raises(UserError, match=r"no <\|start_header_id\|>.*prompt.template=chat"):
        encode_examples([EXAMPLE], chatml, "llama3_paper")


def test_no_tokenizer(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"holds no tokenizer"):
        load_tokenizer(str(tmp_path))


def test_neither_pad_nor_end_token(tmp_path, build_tokenizer):
    folder = build_tokenizer(tmp_path / "bare", ["<x>"], eos=None)
    with pytest.raises(UserError, match=r"neither a pad nor an end token"):
        load_tokenizer(folder)


def printed(rows, tokenizer, **terminal):
    from rich.console import Console

    out = io.StringIO()
    show(rows, tokenizer, Console(file=out, width=60, **terminal))
    return out.getvalue()


def test_show(llama):
    (row,) = encode_examples([EXAMPLE], llama)
    pair = encode_pairs([Pair("Regnet es", "will it rain", "de", "en", "p.tsv:3")], llama, 99)[0]
    plain = printed([row, pair], llama)
    assert "\x1b" not in plain
    assert f"row 1 · {len(row.tokens)} tokens, {row.targets} trained" in plain
    assert "⟦datetime: tomorrow<|eot_id|>⟧" in plain
    assert "row 2 · de-en · p.tsv:3" in plain
    assert f"source, {len(pair.source)} tokens pooled: <|begin_of_text|>Regnet es" in plain
    coloured = printed([row, pair], llama, force_terminal=True, color_system="standard")
    assert "\x1b[32mdatetime: tomorrow\x1b[0m\x1b[1;32m<|eot_id|>" in coloured
    assert "\x1b[1;2m<|eot_id|>\x1b[0m" in coloured and "\x1b[2mwake me up\x1b[0m" in coloured
    assert "\x1b[36mwill it rain\x1b[0m" in coloured
    cut = encode_examples([EXAMPLE], llama, max_length=row.prompt + 2)[0]
    assert f"cut from {len(row.tokens)}, 2 trained" in printed([cut], llama)


@pytest.mark.parametrize("template", ["chat", "llama3_paper"])
@pytest.mark.parametrize(
    "text", ["wake me up", "  wacht auf: é\u4e16 ", "find the slots", "a", "ant", "<"]
)
def test_every_token_has_a_role(llama, template, text):
    """The user's text is the last turn, though an instruction or an example may say the same."""
    example = Example(text, "None", system="find the slots", shots=((text, "None"),))
    (row,) = encode_examples([example], llama, template)
    said = {role: row.tokens[row.roles == role] for role in (TEMPLATE, TEXT, ANSWER)}
    assert llama.decode(said[ANSWER]) == "None<|eot_id|>"
    assert llama.decode(said[TEXT]).strip() == text.strip()
    places = np.flatnonzero(row.roles == TEXT)
    assert (np.diff(places) == 1).all() and places[-1] < row.prompt
    assert llama.bos_token_id in said[TEMPLATE]


def test_of_a_finished_row_all_is_text_but_the_begin_token(llama):
    (row,) = encode_examples([Example("Question: wake\nAnswer:", " me")], llama)
    assert row.roles.tolist() == [TEMPLATE] + [TEXT] * (row.prompt - 1) + [ANSWER] * row.targets


@pytest.mark.parametrize("kind", ["llama", "ending"])
def test_a_row_that_brings_its_begin_token_has_one(kind, request):
    """As where a chat template was printed into the prefix; without it the row is the same."""
    tokenizer = request.getfixturevalue(kind)
    turn = "<|start_header_id|>user<|end_header_id|>\n\nwake me<|eot_id|>"
    choices = (" None", " today")
    own = Example(f"<|begin_of_text|>{turn}", " None", choices=choices)
    added = Example(turn, " None", choices=choices)
    rows = encode_examples([own, added], tokenizer)
    prompts = encode_prompts([own, added], tokenizer)
    assert rows[0].tokens.tolist() == rows[1].tokens.tolist()
    assert rows[0].roles.tolist() == rows[1].roles.tolist()
    assert rows[0].whole == len(rows[0].tokens)
    assert trained(rows[0], tokenizer).startswith(" None")
    for row, prompt in zip(rows, prompts, strict=True):
        assert (row.tokens == tokenizer.bos_token_id).sum() == 1
        assert row.tokens[: row.prompt].tolist() == prompt.tolist()
    assert len({str(some) for some in encode_choices([own, added], tokenizer)}) == 1
    bare = [Example("<|begin_of_text|>", "None"), Example("", "<|begin_of_text|>None")]
    for row in encode_examples(bare, tokenizer):
        assert row.tokens.tolist() == tokenizer("None")["input_ids"] and row.prompt == 1


def test_a_tokenizer_that_ends_texts_ends_no_prompt(llama, ending):
    example = Example("Question: rain\nAnswer:", " intent: weather/find", choices=(" None", " it"))
    (row,), (plain,) = (encode_examples([example], one) for one in (ending, llama))
    (prompt,), (asked,) = (encode_prompts([example], one) for one in (ending, llama))
    assert prompt.tolist() == asked.tolist() == row.tokens[: row.prompt].tolist()
    assert row.tokens.tolist() == [*plain.tokens, ending.eos_token_id]
    assert trained(row, ending) == " intent: weather/find<|eot_id|>"
    assert row.text == plain.text
    assert encode_choices([example], ending) == encode_choices([example], llama)
    (cut,) = encode_examples([example], ending, max_length=row.prompt + 2)
    assert cut.tokens.tolist() == row.tokens[: row.prompt + 2].tolist()
    assert cut.whole == len(row.tokens)
    # A side of a pair keeps its end, whose state may be the sentence's.
    (pair,) = encode_pairs([Pair("wake me up", "None")], ending, 3)
    assert pair.source[-1] == ending.eos_token_id and len(pair.source) == 3


def test_a_row_that_brings_its_end_token_has_one(ending):
    """As where whole conversations were printed; without it the row is the same."""
    own, added = Example("wake:", " me<|eot_id|>"), Example("wake:", " me")
    rows = encode_examples([own, added], ending)
    assert rows[0].tokens.tolist() == rows[1].tokens.tolist()
    assert (rows[0].tokens == ending.eos_token_id).sum() == 1
