"""The demo's tokenizer: byte-level BPE with one token per chat marker, as a Hugging Face folder.

It follows Llama 3: a plain text gets `<|begin|>` in front, a chat is rendered by the template in
`tokenizer_config.json`. Each language weighs the same while merges are learned, apart from
English, so that Indonesian with 200 sentences still gets words of its own.

    tokenizer = train_tokenizer(corpus.sentences, vocab_size=4096)
    save_tokenizer(tokenizer, 'jaxalign/demo/assets/base')
    AutoTokenizer.from_pretrained('jaxalign/demo/assets/base')
"""

from __future__ import annotations

import json
from pathlib import Path

MARKERS = ("<|pad|>", "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
PAD, BEGIN, END, SYSTEM, USER, ASSISTANT = range(len(MARKERS))  # their ids

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

CHARACTERS_PER_LANGUAGE = 400_000  # read while learning merges; short languages repeat
MAX_REPEATS = 12


def train_tokenizer(sentences: dict[str, list[str]], vocab_size: int = 4096):
    """A `tokenizers.Tokenizer` with the markers as ids 0 to 5."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    # A digit is a token of its own: times and dates are then spelled alike in all languages.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(MARKERS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_balanced(sentences), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{MARKERS[BEGIN]} $A",
        pair=f"{MARKERS[BEGIN]} $A {MARKERS[BEGIN]} $B",
        special_tokens=[(MARKERS[BEGIN], BEGIN)],
    )
    return tokenizer


def save_tokenizer(tokenizer, folder: str | Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, readable by `AutoTokenizer`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": MARKERS[BEGIN],
        "eos_token": MARKERS[END],
        "pad_token": MARKERS[PAD],
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 256,
        "chat_template": CHAT_TEMPLATE,
    }
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _balanced(sentences: dict[str, list[str]]):
    for texts in sentences.values():
        size = sum(map(len, texts))
        left = min(CHARACTERS_PER_LANGUAGE, MAX_REPEATS * size)
        while left > 0:
            for text in texts:
                yield text
                left -= len(text)
                if left <= 0:
                    break
