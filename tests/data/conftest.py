"""Two tiny tokenizers in the manner of Llama 3 (begin token everywhere) and of ChatML (none)."""

import json

import pytest

LINES = [
    "wake me up at nine tomorrow",
    "will it rain in Berlin today",
    "play some music by the band",
    "Regnet es heute in Berlin",
    "datetime: tomorrow; location: Berlin",
    "intent: weather/find",
    "None",
]

LLAMA_TEMPLATE = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim"
    " + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
CHATML_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content']"
    " + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build(
    folder, special, eos, bos=None, pad=None, template=None, lines=LINES, size=400, whole=True
):
    """Saves a byte-level BPE tokenizer, trained on lines, in Hugging Face layout.

    Args:
        whole: whether it knows every byte, or those of the lines alone.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if whole else []
    raw.train_from_iterator(
        lines,
        trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet),
    )
    if bos:
        raw.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, raw.token_to_id(bos))]
        )
    names = {"eos_token": eos, "bos_token": bos, "pad_token": pad}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw, **{name: value for name, value in names.items() if value}
    )
    fast.chat_template = template
    fast.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def build_tokenizer():
    return build


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    return build(
        tmp_path_factory.mktemp("llama"),
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        eos="<|eot_id|>",
        bos="<|begin_of_text|>",
        template=LLAMA_TEMPLATE,
    )


@pytest.fixture(scope="session")
def chatml_folder(tmp_path_factory):
    return build(
        tmp_path_factory.mktemp("chatml"),
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        eos="<|im_end|>",
        pad="<|endoftext|>",
        template=CHATML_TEMPLATE,
    )


@pytest.fixture(scope="session")
def llama(llama_folder):
    from jaxalign.data.chat import load_tokenizer

    return load_tokenizer(llama_folder)


@pytest.fixture(scope="session")
def chatml(chatml_folder):
    from jaxalign.data.chat import load_tokenizer

    return load_tokenizer(chatml_folder)


@pytest.fixture
def jsonl(tmp_path):
    """Writes rows to a JSONL file and returns its path."""

    def write(name, rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
        return str(path)

    return write
