"""Templates: an example becomes a prompt and a completion as text.

    (rendered,) = render_examples([example], tokenizer, template="chat")
    rendered.prompt, rendered.completion

What comes out is checked: a template must print what it was given, and text that somebody wrote
must not turn into control tokens.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxalign.data.canary import MOST, ROW_FACTOR, ROW_SECONDS, check_ends, limited
from jaxalign.data.tasks import Example
from jaxalign.errors import UserError, brief, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Templates that print today's date (Llama 3.2) print this one, which those of Llama say where
# nobody tells them the day: rows follow from settings and data, whenever they are made.
DAY = datetime.datetime(2024, 7, 26)
CLOCK = "strftime_now"  # the function that transformers gives to templates
ONE_DAY = (
    f"{{%- macro {CLOCK}(form) -%}}{{{{- form"
    + "".join(
        f" | replace('%{code}', '{DAY.strftime(f'%{code}')}')"
        for code in ("-d", "-m", *"aAbBdeFHIjmMpSTyY")
    )
    + " -}}{%- endmacro %}"
)
AT_ONCE = 64  # rows in one call: quicker, and few enough where each of them prints too much
LLAMA3_TURN = "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>\n"
LLAMA3_OPEN = "<|start_header_id|>assistant<|end_header_id|>\n\n"
LLAMA3_END = "<|eot_id|>"
LLAMA3_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", LLAMA3_END)


@dataclass(frozen=True)
class Rendered:
    """Prompt and completion as text; the completion ends with the token that ends the turn."""

    prompt: str
    completion: str


def instruction(example: Example, system: str | None) -> str:
    """The system turn: the task's own, or `system` where one is given; '' for none.

    `{source_language}` and `{target_language}` in it become the languages of a translation row.
    """
    text = (example.system or "") if system is None else system
    for name, value in example.names.items():
        text = text.replace("{" + name + "}", value)
    return text


def render_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    template: str = "chat",
    system: str | None = None,
) -> list[Rendered]:
    """Prompts and completions as text.

    Args:
        examples: finished rows (kind `rows`) are left as they are.
        tokenizer: supplies the chat template.
        template: 'chat', the tokenizer's own, or 'llama3_paper', the paper's training format: a
            newline after each end of turn and no begin-of-text, which the tokenizer adds.
        system: replaces the instruction of the task; '' for none.

    Raises:
        UserError: the tokenizer has no chat template, or lacks the Llama 3 turn tokens; the
            template fails, does not end, or leaves out what it was given; a text holds a control
            token.
    """
    out = [Rendered(e.prompt, e.answer) for e in examples]
    open_ = [i for i, e in enumerate(examples) if not e.finished]
    if open_:
        chosen = [examples[i] for i in open_]
        _check_control(chosen, tokenizer, system)
        for i, rendered in zip(open_, TEMPLATES[template](chosen, tokenizer, system), strict=True):
            out[i] = rendered
    return out


def _llama3_paper(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, system: str | None
) -> list[Rendered]:
    known = tokenizer.get_vocab()
    missing = [token for token in LLAMA3_TOKENS if token not in known]
    if missing:
        raise UserError(
            f"prompt.template=llama3_paper needs the tokens of Llama 3, but this tokenizer has no "
            f"{', '.join(missing)}; use prompt.template=chat"
        )
    out = []
    for example in examples:
        turns = (
            ("system", instruction(example, system)),
            *((turn["role"], turn["content"]) for turn in _shots(example)),
            ("user", example.prompt),
        )
        prompt = "".join(
            LLAMA3_TURN.format(role=role, content=content.strip())
            for role, content in turns
            if content or role != "system"
        )
        out.append(Rendered(prompt + LLAMA3_OPEN, example.answer + LLAMA3_END))
    return out


def _chat(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, system: str | None
) -> list[Rendered]:
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template; set "
            "prompt.template=llama3_paper (Llama 3), give finished rows with task.kind=rows, or "
            "put a chat_template.jinja into the model's folder"
        )
    check_ends(_template_text(tokenizer), _whose(tokenizer))
    talks = _with_system_role(examples, tokenizer, system)
    prompts = _render_all(examples, tokenizer, talks, add_generation_prompt=True)
    answered = [
        [*talk, {"role": "assistant", "content": e.answer}]
        for talk, e in zip(talks, examples, strict=True)
    ]
    wholes = _render_all(examples, tokenizer, answered, add_generation_prompt=False)
    stops = _stop_texts(tokenizer)
    # One expression for all of them: Gemma has 6,249 special tokens to look for in every row.
    stop = re.compile("|".join(map(re.escape, sorted(stops))) or "(?!)")
    end = next(iter(stops), "")
    out = []
    for example, talk, prompt, whole in zip(examples, talks, prompts, wholes, strict=True):
        # Some templates write a finished turn differently from an open one (they drop a thinking
        # block). What the model will see is the open one, so the answer follows that.
        completion = whole[len(prompt) :] if whole.startswith(prompt) else example.answer
        _check_printed(example, talk, prompt, completion, tokenizer)
        out.append(Rendered(prompt, _up_to_stop(completion, example.answer.strip(), stop, end)))
    return out


def _render_all(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    talks: list[list[dict[str, str]]],
    add_generation_prompt: bool,
) -> list[str]:
    """The talks as text; a template that fails or does not end is reported with its row."""
    texts = []
    for start in range(0, len(talks), AT_ONCE):
        some = slice(start, start + AT_ONCE)
        try:
            texts += _apply(tokenizer, talks[some], add_generation_prompt)
        except Exception:  # a template may fail in any way that an expression can
            # One by one: each row has the time to itself, and the one at fault is found.
            for example, talk in zip(examples[some], talks[some], strict=True):
                try:
                    texts += _apply(tokenizer, [talk], add_generation_prompt)
                except Exception as error:
                    raise UserError(
                        f"{_place(example)}{_whose(tokenizer)} cannot be rendered "
                        f"({first_line(error)}); correct it, or see prompt.template"
                    ) from error
    return texts


def _apply(
    tokenizer: PreTrainedTokenizerBase,
    talks: list[list[dict[str, str]]],
    add_generation_prompt: bool,
) -> list[str]:
    with limited(ROW_SECONDS):
        texts = tokenizer.apply_chat_template(
            talks,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            # Templates without a thinking mode ignore it; with one, answers start at once.
            enable_thinking=False,
            chat_template=on_one_day(_template_text(tokenizer)) or None,
        )
    for text, talk in zip(texts, talks, strict=True):
        given = sum(len(turn["content"]) for turn in talk)
        if len(str(text)) > MOST + ROW_FACTOR * given:
            raise ValueError(f"{given} characters became {len(str(text))}")
    return [str(text) for text in texts]


def on_one_day(template: str) -> str:
    """The template with a clock that stands still, whoever renders it."""
    asks = CLOCK in template and ONE_DAY not in template
    return f"{ONE_DAY}{template}" if asks else template


def _template_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template that transformers takes: of several by name the default one."""
    found = tokenizer.chat_template
    found = found.get("default", "") if isinstance(found, dict) else found
    return found if isinstance(found, str) else ""


def _whose(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"the chat template of {tokenizer.name_or_path or 'this tokenizer'}"


def _place(example: Example) -> str:
    return f"{example.origin}: " if example.origin else ""


def _check_printed(
    example: Example,
    talk: list[dict[str, str]],
    prompt: str,
    completion: str,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Refuses a template that would train, or ask, something else than the row says.

    It drops a turn, or writes more between the open prompt and the answer: that would be trained,
    written and judged as a part of every answer.
    """
    shown = _squeezed(prompt)
    left_out = next((t for t in talk if _squeezed(t["content"]) not in shown), None)
    written = _squeezed(completion)
    at = written.find(_squeezed(example.answer))
    if left_out is None and at < 0:
        left_out = {"role": "assistant", "content": example.answer}
    if left_out is not None:
        raise UserError(
            f"{_place(example)}{_whose(tokenizer)} does not print the {left_out['role']}'s text "
            f"{brief(left_out['content'])}; correct it, or see prompt.template"
        )
    if at > 0:
        raise UserError(
            f"{_place(example)}{_whose(tokenizer)} writes {brief(written[:at])} between the open "
            "prompt (add_generation_prompt) and the answer, so that a model would write it as a "
            "part of every answer; let the open prompt end with it, in the model's "
            "chat_template.jinja, or see prompt.template"
        )


def _squeezed(text: str) -> str:
    """Without blanks, which templates strip and add."""
    return "".join(text.split())


def _check_control(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, system: str | None
) -> None:
    """Refuses texts in which somebody wrote a control token: they would end or open a turn."""
    stops = [stop for stop in _stop_texts(tokenizer) if stop]
    control = re.compile("|".join(map(re.escape, stops)) or "(?!)")
    for example in examples:
        shown = [text for shot in example.shots for text in shot]
        for text in (instruction(example, system), example.prompt, example.answer, *shown):
            found = control.search(text)
            if found and _changes(tokenizer, text):
                raise UserError(
                    f"{_place(example)}the text holds {found[0]!r}, a control token of this "
                    "tokenizer, which would end or begin a turn; write it differently or remove "
                    "the row (only finished rows, task.kind=rows, may hold them)"
                )


def _changes(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether control tokens are read out of a text; a pad token such as '!' may be plain text."""
    read, plain = (
        tokenizer(text, add_special_tokens=False, split_special_tokens=split)["input_ids"]
        for split in (False, True)
    )
    return read != plain


def _with_system_role(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, system: str | None
) -> list[list[dict[str, str]]]:
    """Conversations up to the user's turn; the instruction joins it where no system turn may be."""
    instructions = [instruction(example, system) for example in examples]
    talks = [
        [
            *([{"role": "system", "content": text}] if text else []),
            *_shots(example),
            {"role": "user", "content": example.prompt},
        ]
        for example, text in zip(examples, instructions, strict=True)
    ]
    first = next((talk for talk in talks if talk[0]["role"] == "system"), None)
    if first is None or takes_system(tokenizer, first):
        return talks
    return [_without_system(talk) if text else talk
            for talk, text in zip(talks, instructions, strict=True)]  # fmt: skip


def _without_system(talk: list[dict[str, str]]) -> list[dict[str, str]]:
    """The first turn's text put before the second's."""
    system, user, *rest = talk
    return [{"role": "user", "content": f"{system['content']}\n\n{user['content']}"}, *rest]


def _shots(example: Example) -> list[dict[str, str]]:
    """The turns of the solved examples shown before the question."""
    return [
        {"role": role, "content": content}
        for prompt, answer in example.shots
        for role, content in (("user", prompt), ("assistant", answer))
    ]


def takes_system(tokenizer: PreTrainedTokenizerBase, talk: list[dict[str, str]]) -> bool:
    """Whether the template takes a system turn, and prints it.

    Where it does not (Gemma 2, Mistral 0.2), the instruction and a blank line go before the text of
    the first turn of the user.

    Args:
        tokenizer: with the template.
        talk: begins with a system turn.
    """
    try:
        (text,) = _apply(tokenizer, [talk], add_generation_prompt=True)
    except Exception:  # most raise a TemplateError of their own words
        return False
    return _squeezed(talk[0]["content"]) in _squeezed(text)


def _stop_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Special tokens as text, the end token first."""
    special = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
    end = [tokenizer.eos_token] if tokenizer.eos_token else []
    return list(dict.fromkeys([*end, *tokenizer.all_special_tokens, *special]))


def _up_to_stop(completion: str, answer: str, stop: re.Pattern[str], end: str) -> str:
    """The completion up to and with the first special token behind the answer, `end` if absent."""
    found = stop.search(completion, max(completion.find(answer), 0) + len(answer))
    return completion[: found.end()] if found else completion.rstrip() + end


Renderer = Callable[[Sequence[Example], "PreTrainedTokenizerBase", "str | None"], "list[Rendered]"]
TEMPLATES: dict[str, Renderer] = {"chat": _chat, "llama3_paper": _llama3_paper}
