"""Which tokens end an answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from jaxalign.data.chat import encode_examples
from jaxalign.data.tasks import Example
from jaxalign.data.template import wearing
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
    return tuple(dict.fromkeys((*spec.eos_ids, *_taught(tokenizer, template))))


def taught_stops(tokenizer: PreTrainedTokenizerBase | None, text: str) -> tuple[int, ...]:
    """The tokens by which weights learned to end an answer, whatever their base's files say.

    Args:
        tokenizer: of the base; None where it comes without one.
        text: the chat template that goes along with the weights; '' where there is none.

    Raises:
        UserError: the template cannot be rendered.
    """
    if tokenizer is None:
        return ()
    return tuple(dict.fromkeys(_taught(wearing(tokenizer, text), "chat")))


def _taught(tokenizer: PreTrainedTokenizerBase, template: str) -> Iterator[int]:
    if tokenizer.eos_token_id is not None:
        yield tokenizer.eos_token_id
    if template != "chat" or tokenizer.chat_template:
        (row,) = encode_examples([Example("a", "b", system="")], tokenizer, template)
        yield int(row.tokens[-1])
