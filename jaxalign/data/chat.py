"""Text to tokens: chat templates, the paper's Llama template, and which tokens carry a loss.

A row trains its answer and the end-of-turn token behind it, nothing else. The prompt of a training
row and the prompt of a generation are the same tokens.

    tokenizer = load_tokenizer("meta-llama/Meta-Llama-3-8B-Instruct")
    rows = encode_examples(examples, tokenizer, template="chat", max_length=2048)
    prompts = encode_prompts(examples, tokenizer, template="chat")    # for generation
    show(rows[:3], tokenizer)                                         # green: trained
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxalign.bucket import copied
from jaxalign.data.batch import Encoded, EncodedPair
from jaxalign.data.tasks import Example
from jaxalign.errors import UserError
from jaxalign.paths import is_remote

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

LLAMA3_TURN = "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>\n"
LLAMA3_OPEN = "<|start_header_id|>assistant<|end_header_id|>\n\n"
LLAMA3_END = "<|eot_id|>"
LLAMA3_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", LLAMA3_END)


def load_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, hub name or gs:// address, with a pad token.

    A tokenizer without a pad token pads with its end token, as the paper's code does for Llama 3;
    padding is masked everywhere, so the choice changes no number.

    Raises:
        UserError: no tokenizer there, or neither pad nor end token.
    """
    from transformers import AutoTokenizer

    folder = copied(path) if is_remote(path) else path
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, revision=revision or "main")
    except Exception as error:  # OSError, ValueError, hub errors: all say "no tokenizer here"
        what = "holds no tokenizer" if Path(folder).is_dir() else "is no folder and no hub name"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} {what} that transformers can load: {reason}") from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise UserError(
                f"the tokenizer of {path} has neither a pad nor an end token; set one of them in "
                "its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def encode_texts(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    special: bool = True,
) -> tuple[list[np.ndarray], list[int]]:
    """Token ids of each text, with the tokenizer's own special tokens, cut on the right.

    Args:
        texts: any number of texts; they go through the tokenizer in one call.
        tokenizer: the tokenizer.
        max_length: longest result; None: no cut.
        special: whether the tokenizer adds its special tokens.

    Returns:
        int32 arrays, and the length of each before the cut.
    """
    if not texts:
        return [], []
    settings = {
        "add_special_tokens": special,
        "return_attention_mask": False,
        "return_token_type_ids": False,
        "verbose": False,
    }
    ids = tokenizer(list(texts), **settings)["input_ids"]
    whole = [len(row) for row in ids]
    if max_length is not None:
        long = [i for i, length in enumerate(whole) if length > max_length]
        if long:
            # The tokenizer cuts, not we: one that ends every text with a token keeps that token.
            cut = tokenizer(
                [texts[i] for i in long],
                **settings,
                truncation=True,
                max_length=max_length,
            )["input_ids"]
            for i, row in zip(long, cut, strict=True):
                ids[i] = row
    return [np.array(row, np.int32) for row in ids], whole


# Templates ---------------------------------------------------------------------------------------


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
        UserError: the tokenizer has no chat template, or lacks the Llama 3 turn tokens.
    """
    out = [Rendered(e.prompt, e.answer) for e in examples]
    open_ = [i for i, e in enumerate(examples) if not e.finished]
    if open_:
        chosen = [examples[i] for i in open_]
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
    talks = _with_system_role(examples, tokenizer, system)
    prompts = _apply(tokenizer, talks, add_generation_prompt=True)
    answered = [
        [*talk, {"role": "assistant", "content": e.answer}]
        for talk, e in zip(talks, examples, strict=True)
    ]
    wholes = _apply(tokenizer, answered, add_generation_prompt=False)
    stops = _stop_texts(tokenizer)
    out = []
    for example, prompt, whole in zip(examples, prompts, wholes, strict=True):
        # Some templates write a finished turn otherwise than an open one (they drop a thinking
        # block). What the model will see is the open one, so the answer follows that.
        completion = whole[len(prompt) :] if whole.startswith(prompt) else example.answer
        out.append(Rendered(prompt, _up_to_stop(completion, example.answer.strip(), stops)))
    return out


def _apply(
    tokenizer: PreTrainedTokenizerBase,
    talks: list[list[dict[str, str]]],
    add_generation_prompt: bool,
) -> list[str]:
    texts = tokenizer.apply_chat_template(
        talks,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        # Templates without a thinking mode ignore it; with one, answers start at once.
        enable_thinking=False,
    )
    return [str(text) for text in texts]


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
    if first is None or _accepts(tokenizer, first):
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


def _accepts(tokenizer: PreTrainedTokenizerBase, talk: list[dict[str, str]]) -> bool:
    from jinja2 import TemplateError

    try:
        _apply(tokenizer, [talk], add_generation_prompt=True)
    except TemplateError:
        return False
    return True


def _stop_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Special tokens as text, the end token first."""
    special = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
    end = [tokenizer.eos_token] if tokenizer.eos_token else []
    return list(dict.fromkeys([*end, *tokenizer.all_special_tokens, *special]))


def _up_to_stop(completion: str, answer: str, stops: Sequence[str]) -> str:
    """The completion up to and with the first special token behind the answer, added if absent."""
    start = max(completion.find(answer), 0) + len(answer)
    found = [(at, stop) for stop in stops if (at := completion.find(stop, start)) >= 0]
    if found:
        at, stop = min(found)
        return completion[: at + len(stop)]
    return completion.rstrip() + (stops[0] if stops else "")


Renderer = Callable[[Sequence[Example], "PreTrainedTokenizerBase", "str | None"], "list[Rendered]"]
TEMPLATES: dict[str, Renderer] = {"chat": _chat, "llama3_paper": _llama3_paper}


# Tokens ------------------------------------------------------------------------------------------


def encode_prompts(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    template: str = "chat",
    system: str | None = None,
) -> list[np.ndarray]:
    """The prompts alone, as a generation starts from them: int32 [t] each, not padded, not cut."""
    rendered = render_examples(examples, tokenizer, template, system)
    return _encode_prompts(examples, rendered, tokenizer, template)


def encode_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    template: str = "chat",
    system: str | None = None,
    max_length: int | None = None,
) -> list[Encoded]:
    """Prompt and completion as tokens, with the length of the prompt, cut on the right.

    Finished rows and the paper's template follow the paper's code: the tokens of the whole text,
    of which the first len(tokens(prompt)) have no loss, whether or not a token reaches across the
    border. With a chat template the prompt's tokens must be the beginning of the row's; where a
    token reaches across, prompt and completion are encoded apart, as the model will meet them.

    Args:
        examples: what to encode.
        tokenizer: the tokenizer.
        template: 'chat' or 'llama3_paper' (see `render_examples`).
        system: replaces the task's instruction.
        max_length: longest row; None: no cut.

    Returns:
        One row for each example. A row whose answer was cut away whole has no target.
    """
    rendered = render_examples(examples, tokenizer, template, system)
    prompts = _encode_prompts(examples, rendered, tokenizer, template)
    rows: list[Encoded | None] = [None] * len(examples)
    for special in (True, False):
        these = [i for i, e in enumerate(examples) if _adds_special(e, template) is special]
        texts = [rendered[i].prompt + rendered[i].completion for i in these]
        ids, whole = encode_texts(texts, tokenizer, max_length, special)
        for i, tokens, length in zip(these, ids, whole, strict=True):
            prompt = prompts[i]
            if not special and not np.array_equal(tokens[: len(prompt)], prompt[: len(tokens)]):
                (tail,), _ = encode_texts([rendered[i].completion], tokenizer, None, False)
                tokens, length = np.concatenate([prompt, tail]), len(prompt) + len(tail)
                tokens = tokens[:max_length]
            rows[i] = Encoded(
                tokens=tokens,
                prompt=min(len(prompt), len(tokens)),
                language=examples[i].language,
                origin=examples[i].origin,
                whole=length,
            )
    return [row for row in rows if row is not None]


def _adds_special(example: Example, template: str) -> bool:
    """A chat template writes its begin token itself; the others leave it to the tokenizer."""
    return example.finished or template != "chat"


def _encode_prompts(
    examples: Sequence[Example],
    rendered: Sequence[Rendered],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
) -> list[np.ndarray]:
    out: list[np.ndarray] = [np.empty(0, np.int32)] * len(examples)
    for special in (True, False):
        these = [i for i, e in enumerate(examples) if _adds_special(e, template) is special]
        ids, _ = encode_texts([rendered[i].prompt for i in these], tokenizer, None, special)
        for i, tokens in zip(these, ids, strict=True):
            out[i] = tokens
    return out


# Looking at it -----------------------------------------------------------------------------------


def show(
    rows: Sequence[Encoded | EncodedPair],
    tokenizer: PreTrainedTokenizerBase,
    console: Console | None = None,
) -> None:
    """Prints rows as the model gets them.

    Task rows: trained tokens green between ⟦ ⟧, the rest dim. Pairs: pooled tokens cyan. Special
    tokens are written out and bold. Piped output has no colours; the brackets stay.
    """
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    for number, row in enumerate(rows, start=1):
        place = " · ".join(filter(None, (row.language, row.origin)))
        head = Text(f"row {number} · {place}" if place else f"row {number}", style="bold")
        body = Text()
        if isinstance(row, EncodedPair):
            for side, tokens in (("source", row.source), ("target", row.target)):
                body.append(f"{side}, {len(tokens)} tokens pooled: ", style="dim")
                _append(body, tokens, tokenizer, "cyan")
                body.append("\n")
        else:
            cut = f", cut from {row.whole}" if row.whole > len(row.tokens) else ""
            head.append(f" · {len(row.tokens)} tokens{cut}, {row.targets} trained")
            _append(body, row.tokens[: row.first], tokenizer, "dim")
            body.append("⟦", style="green")
            _append(body, row.tokens[row.first :], tokenizer, "green")
            body.append("⟧\n", style="green")
        console.print(head, soft_wrap=True)
        console.print(body, soft_wrap=True)


def _append(text: Text, tokens: np.ndarray, tokenizer: PreTrainedTokenizerBase, style: str) -> None:
    """Adds decoded runs of ordinary tokens and, each alone and bold, the special ones."""
    special = set(tokenizer.all_special_ids)
    special |= {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    run: list[int] = []

    def flush() -> None:
        if run:
            decoded = tokenizer.decode(run, clean_up_tokenization_spaces=False)
            text.append(str(decoded), style=style)
            run.clear()

    for token in tokens.tolist():
        if token in special:
            flush()
            text.append(str(tokenizer.convert_ids_to_tokens(token)), style=f"bold {style}")
        else:
            run.append(token)
    flush()
