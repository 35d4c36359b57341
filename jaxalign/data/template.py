"""The template that belongs to some weights: how their prompts were built, stored with them.

An adapter answers well to prompts that look like those of its training. So a training stores a chat
template which renders the very tokens that it trained on, and whoever prompts, merges or exports
the adapter asks here which one that is. `prompt.template=chat` trains on the tokenizer's own
template. The paper's layout is written by Python code; here the same layout is put into Jinja, from
the same constants, so that transformers and vLLM build the tokens of the training.

    texts = template_files(trained_with(tokenizer, config))         # to write next to the weights
    belonging(folder, lambda: tokenizer)                            # an adapter's own text
    prompts = prompts_of(tokenizer, 'chat', folder, 'runs/a/adapter')   # how it is to be asked
    prompts.template, prompts.note
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxalign.checksums import check_sums
from jaxalign.config import saved_in
from jaxalign.data.chat import (
    LLAMA3_END,
    LLAMA3_OPEN,
    LLAMA3_TOKENS,
    LLAMA3_TURN,
    render_examples,
)
from jaxalign.data.render import on_one_day, takes_system
from jaxalign.data.tasks import Example
from jaxalign.errors import UserError, brief, first_line
from jaxalign.paths import SETTINGS
from jaxalign.settings import Config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_FILE = "chat_template.jinja"  # where PEFT, transformers and vLLM look
TOKENIZER_FILE = "tokenizer_config.json"  # where old versions of transformers look
PAPER = "llama3_paper"
# A training asks for no thinking block; whoever renders the template later need not say so again.
NO_THINKING = "{%- set enable_thinking = false %}"


@dataclass(frozen=True)
class Template:
    """A chat template and whose it is."""

    text: str
    kind: str  # base: the base's own | own: another | none


@dataclass(frozen=True)
class Prompts:
    """How some weights are asked."""

    tokenizer: Any  # with their chat template
    template: str  # a name of `data.chat.TEMPLATES`
    note: str = ""  # one sentence where this is not what `prompt.template` says
    system: str | None = None  # in place of the task's own instruction
    system_note: str = ""  # one sentence where the weights were trained with another


# What a training stores ---------------------------------------------------------------------------


def trained_with(tokenizer: PreTrainedTokenizerBase, config: Config) -> Template:
    """The template that renders the prompts of this training; none where it rendered none."""
    if not config.templated:
        return Template("", "none")
    return _named(tokenizer, training_template(tokenizer, config.prompt.template))


def template_files(template: Template, tokenizer_file: Path | None = None) -> dict[str, str]:
    """Name -> content of the files that hold a template, for old and new versions of transformers.

    Args:
        template: none: there are no files.
        tokenizer_file: the tokenizer_config.json that is written along, where there is one.
    """
    if template.kind == "none":
        return {}
    files = {TEMPLATE_FILE: template.text}
    if template.kind == "own" and tokenizer_file is not None and tokenizer_file.is_file():
        config = _json(tokenizer_file)
        if "chat_template" in config:
            config = config | {"chat_template": template.text}
            files[TOKENIZER_FILE] = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    return files


# What is stored -----------------------------------------------------------------------------------


def belonging(folder: Path, tokenizer: Callable[[], PreTrainedTokenizerBase]) -> str:
    """The template that belongs to the weights in this folder; '' where it says nothing of it.

    A run's own record comes first where it names the paper's layout: earlier versions stored the
    base's template with such adapters.

    Args:
        folder: an adapter's, or a model's.
        tokenizer: gives the base's, where it is needed.

    Raises:
        UserError: a file that is not text, or not JSON.
    """
    config = recorded(folder)
    if config and not config.templated:
        return ""
    if config and config.prompt.template == PAPER:
        return llama3_paper(tokenizer())
    return stored(folder)


def recorded(folder: Path) -> Config | None:
    """The settings that a training wrote next to its adapter, if it was one and they still load."""
    record = folder.parent / SETTINGS
    if folder.name != "adapter" or not record.is_file():
        return None
    try:
        return saved_in(record)
    except UserError:
        return None  # of another version


def stored(folder: Path) -> str:
    """The chat template in a folder, '' where there is none; of several the default one.

    Raises:
        UserError: a file that is not text, not JSON, or not what was written.
    """
    check_sums(folder, [TEMPLATE_FILE, TOKENIZER_FILE])
    file = folder / TEMPLATE_FILE
    if file.is_file():
        return _text_of(file)
    file = folder / TOKENIZER_FILE
    found = _json(file).get("chat_template") if file.is_file() else None
    if isinstance(found, list):  # [{"name": "default", "template": "..."}, ...]
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else ""


def find_template(
    tokenizer: PreTrainedTokenizerBase | None, config: Config | None, folder: Path | None
) -> Template:
    """The template that goes along with weights: their training's, their folder's, the base's.

    Args:
        tokenizer: of the base, where it has one.
        config: of the training, where it is known.
        folder: of the adapter, where it is in one.

    Raises:
        UserError: as `belonging`.
    """
    text = ""
    if folder is not None:
        text = belonging(folder, lambda: _needed(tokenizer))
    elif tokenizer is not None and config is not None:
        text = trained_with(tokenizer, config).text
    if tokenizer is None:
        return Template(text, "own" if text else "none")
    return _named(tokenizer, text or base_template(tokenizer))


# How weights are asked ----------------------------------------------------------------------------


def prompts_of(tokenizer: PreTrainedTokenizerBase, said: str, folder: Path, name: str) -> Prompts:
    """How an adapter's prompts are built: by the template that belongs to it, else as `said`.

    Args:
        tokenizer: of the base.
        said: `prompt.template` of the configuration.
        folder: of the adapter.
        name: what the note calls it.

    Raises:
        UserError: the adapter's template cannot be read or rendered.
    """
    return prompts_by(tokenizer, said, belonging(folder, lambda: tokenizer), name)


def instructed(prompts: Prompts, config: Config, folder: Path, name: str) -> Prompts:
    """With the instruction in front of an adapter's prompts: `prompt.system`, or its training's.

    Args:
        prompts: how the adapter is asked.
        config: `prompt.system` that is not given leaves it to the record of the adapter's run.
        folder: of the adapter.
        name: what the note calls it.
    """
    said, had = config.prompt.system, _otherwise(config, folder)
    if had is None:
        return dataclasses.replace(prompts, system=said)
    trained = _trained(name, had)
    if said is None:
        note = f"{trained} and is prompted with it, as prompt.system is not given"
        return dataclasses.replace(prompts, system=had.prompt.system, system_note=note)
    note = (
        f"{trained}, but is prompted with {_system(said)}; leave that out to prompt as in training"
    )
    return dataclasses.replace(prompts, system=said, system_note=note)


def other_instruction(config: Config, folder: Path, name: str) -> str:
    """'NAME was trained with ...' where a run's record has another instruction; else ''."""
    had = _otherwise(config, folder)
    return _trained(name, had) if had else ""


def _otherwise(config: Config, folder: Path) -> Config | None:
    """The record of an adapter's run, where its instruction is another one than `prompt.system`.

    An instruction is of a kind of task: another kind than the one that is asked says nothing.
    """
    had = recorded(folder)
    if not had or not had.templated or had.task.kind != config.judged:
        return None
    return had if had.prompt.system != config.prompt.system else None


def _trained(name: str, had: Config) -> str:
    return f"{name} was trained with {_system(had.prompt.system)}"


def _system(text: str | None) -> str:
    if text is None:
        return "the task's own instruction"
    return f"prompt.system={brief(text)}" if text else "no instruction (prompt.system='')"


def prompts_by(tokenizer: PreTrainedTokenizerBase, said: str, text: str, name: str) -> Prompts:
    """As `prompts_of`, by the text of the template that belongs to the weights."""
    if not text:
        return Prompts(tokenizer, said)
    if text == (_has_llama3(tokenizer) and llama3_paper(tokenizer)):
        note = f"{name} was trained and is prompted with prompt.template={PAPER}"
        return Prompts(tokenizer, PAPER, "" if said == PAPER else f"{note}, not with {said}")
    if text in (base_template(tokenizer), training_template(tokenizer, "chat")):
        note = (
            f"{name} comes with the base's own chat template and is prompted with it, not with "
            f"prompt.template={said}; remove its {TEMPLATE_FILE} if it was trained with {said}"
        )
        return Prompts(tokenizer, "chat", "" if said == "chat" else note)
    own = wearing(tokenizer, text)
    _check_renders(own, name)
    note = f"{name} is prompted with the chat template in its folder, which is not the base's"
    return Prompts(own, "chat", note)


def wearing(tokenizer: PreTrainedTokenizerBase, text: str) -> PreTrainedTokenizerBase:
    """The tokenizer with another chat template; '' for none."""
    own: Any = copy.copy(tokenizer)
    own.chat_template = text or None
    return own


def joins(tokenizer: PreTrainedTokenizerBase, text: str, system: str) -> bool:
    """Whether training put an instruction before the user's text, for want of a system turn.

    Args:
        tokenizer: of the base.
        text: the chat template that belongs to the weights.
        system: the instruction.
    """
    talk = [{"role": "system", "content": system}, {"role": "user", "content": "a"}]
    return not takes_system(wearing(tokenizer, text), talk)


def _check_renders(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    try:
        render_examples([Example("a", "b", system="")], tokenizer)
    except UserError as error:
        # As the template's own failure says it, where it is one.
        reason = first_line(error.__cause__) if error.__cause__ else str(error)
        raise UserError(
            f"{name}: its chat template cannot be rendered ({reason}); correct it, or remove it to "
            "use prompt.template"
        ) from error


def _named(tokenizer: PreTrainedTokenizerBase, text: str | None) -> Template:
    if not text:
        return Template("", "none")
    return Template(text, "base" if text == base_template(tokenizer) else "own")


def _needed(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise UserError(
            f"the run was trained with prompt.template={PAPER}, but its base comes without a "
            "tokenizer; put the base's tokenizer files into its folder"
        )
    return tokenizer


def _has_llama3(tokenizer: PreTrainedTokenizerBase) -> bool:
    return set(LLAMA3_TOKENS) <= tokenizer.get_vocab().keys()


def _text_of(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not a text in UTF-8; copy it again, or remove it") from error


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(_text_of(file))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: not valid JSON ({first_line(error)}); copy it again") from error
    return found if isinstance(found, dict) else {}


# Templates ----------------------------------------------------------------------------------------


def base_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The tokenizer's own template; of several by name the default one, which training takes."""
    own = tokenizer.chat_template
    return own.get("default") if isinstance(own, dict) else own


def training_template(tokenizer: PreTrainedTokenizerBase, template: str) -> str | None:
    """The chat template that builds the prompts of the training; None where there is none.

    Args:
        tokenizer: of the base.
        template: `prompt.template` of the configuration.
    """
    if template == PAPER:
        return llama3_paper(tokenizer)
    own = base_template(tokenizer)
    if not own:
        return own
    return (NO_THINKING if "enable_thinking" in own else "") + on_one_day(own)


def llama3_paper(tokenizer: PreTrainedTokenizerBase) -> str:
    """The paper's training layout in Jinja.

    The rendered text is a prompt's own; tokenizers that begin every text with a token of theirs do
    not so with a rendered template, hence that token stands at its beginning.
    """
    head, tail = LLAMA3_TURN.split("{role}")
    middle, end = tail.split("{content}")
    begins = list(tokenizer("")["input_ids"]) == [tokenizer.bos_token_id]
    return "".join(
        [
            "{{- bos_token }}" if begins else "",
            "{%- for message in messages %}",
            # An empty system turn is left out, as in training.
            "{%- if message['content'] or message['role'] != 'system' %}",
            "{{- ", _text(head), " + message['role'] + ", _text(middle), " }}",
            # The answer that is trained stands as it is and ends with its end token; the turns
            # before the question are stripped and each is followed by a newline.
            "{%- if loop.last and message['role'] == 'assistant' %}",
            "{{- message['content'] + ", _text(LLAMA3_END), " }}",
            "{%- else %}",
            "{{- (message['content'] | trim) + ", _text(end), " }}",
            "{%- endif %}",
            "{%- endif %}",
            "{%- endfor %}",
            "{%- if add_generation_prompt %}",
            "{{- ", _text(LLAMA3_OPEN), " }}",
            "{%- endif %}",
        ]
    )  # fmt: skip


def _text(text: str) -> str:
    """A string as Jinja writes it; newlines are escaped, or Jinja would trim them."""
    return json.dumps(text, ensure_ascii=False)
