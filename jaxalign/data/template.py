"""The paper's Llama 3 layout as a chat template: what travels with an export is what was trained.

`prompt.template=chat` trains on the tokenizer's own template, which is copied. The paper's layout
is written by Python code; here the same layout is put into Jinja, from the same constants, so that
transformers and vLLM build the very tokens of the training.

    text = llama3_paper(tokenizer)
    tokenizer.chat_template = text
    tokenizer.apply_chat_template(turns, add_generation_prompt=True)    # the training's prompt
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from jaxalign.data.chat import LLAMA3_END, LLAMA3_OPEN, LLAMA3_TURN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def training_template(tokenizer: PreTrainedTokenizerBase, template: str) -> str | None:
    """The chat template that builds the prompts of the training; None where there is none.

    Args:
        tokenizer: of the base.
        template: `prompt.template` of the configuration.
    """
    if template == "llama3_paper":
        return llama3_paper(tokenizer)
    own = tokenizer.chat_template
    # Some tokenizers bring several by name; the default is the one that training takes.
    return own.get("default") if isinstance(own, dict) else own


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
