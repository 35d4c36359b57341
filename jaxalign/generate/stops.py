"""Which tokens end an answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxalign.data.chat import encode_examples
from jaxalign.data.tasks import Example
from jaxalign.model.spec import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def stop_ids(
    spec: ModelSpec, tokenizer: PreTrainedTokenizerBase, template: str = "chat"
) -> tuple[int, ...]:
    """The tokens that end an answer.

    They are those of the model's configuration (`load_spec` adds generation_config.json's), the
    tokenizer's end token, and the token with which the template ends a turn: what training taught.

    Args:
        spec: the model.
        tokenizer: the tokenizer; without a chat template `chat` adds nothing.
        template: as in `jaxalign.data.chat`.
    """
    ids = list(spec.eos_ids)
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    if template != "chat" or tokenizer.chat_template:
        (row,) = encode_examples([Example("a", "b", system="")], tokenizer, template)
        ids.append(int(row.tokens[-1]))
    return tuple(dict.fromkeys(ids))
