"""The tokenizer of a base, checked: it pads, its lengths are numbers, its tokens are its own.

tokenizer = load_tokenizer("meta-llama/Meta-Llama-3-8B-Instruct")
"""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxalign.checksums import check_sums, file_digests, read_sums, text_digest
from jaxalign.errors import UserError, brief, first_line, reading
from jaxalign.hf.find import TOKENIZER_FILES, small_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The class that AutoTokenizer takes for a family whose tokenizer_config.json names it.
CLASSES = {
    "llama": "PreTrainedTokenizerFast",
    "qwen2": "Qwen2TokenizerFast",
    "qwen3": "Qwen2TokenizerFast",
    "gemma2": "GemmaTokenizerFast",
    "gemma3_text": "GemmaTokenizerFast",
}


def load_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, hub name or gs:// address, with a pad token, cutting on the right.

    A tokenizer without a pad token pads with its end token, as the paper's code does for Llama 3;
    padding is masked everywhere, so the choice changes no number. One that cuts texts on the left
    would take tokens of the prompt, and the loss would be of others than the answer's.

    Raises:
        UserError: no tokenizer there, or neither pad nor end token.
    """
    folder = small_files(path, revision)
    check_sums(folder, [name for name in read_sums(folder) if _of_tokenizer(name)])
    try:
        # A folder may name code that would run when it is loaded; none of it does.
        tokenizer = _class_for(folder).from_pretrained(folder, trust_remote_code=False)
    # OSError, ValueError, a panic of the tokenizers library: all say the same.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(
            f"{path} holds no tokenizer that transformers can load: {first_line(error)}"
        ) from error
    _check_tokenizer(tokenizer, path)
    tokenizer.truncation_side = "right"
    return tokenizer


def tokenizer_digest(path: str, revision: str | None = None) -> str:
    """SHA-256 of a tokenizer's files, with their names.

    Raises:
        UserError: no such folder, or the hub cannot give it.
    """
    folder = small_files(path, revision)
    files = sorted(file for file in folder.iterdir() if _of_tokenizer(file.name))
    digests = zip(files, file_digests(files), strict=True)
    return text_digest("".join(f"{digest}  {file.name}\n" for file, digest in digests))


def _class_for(folder: Path) -> Any:
    """The class of a folder's tokenizer, or AutoTokenizer, which finds it.

    AutoTokenizer imports PyTorch, where it is installed: 1.5 s before the first token.
    """
    import transformers

    try:
        model, said = (
            json.loads((folder / name).read_text("utf-8"))
            for name in ("config.json", "tokenizer_config.json")
        )
        known = CLASSES[model["model_type"]]
        plain = "auto_map" not in said and (folder / "tokenizer.json").is_file()
        if plain and said["tokenizer_class"] in (known, known.removesuffix("Fast")):
            return getattr(transformers, known)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass  # AutoTokenizer says what is wrong, or does without that file
    return transformers.AutoTokenizer


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """A pad token, a length that is one, and a text that comes back from its tokens."""
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise UserError(
                f"the tokenizer of {path} has neither a pad nor an end token; set one of them in "
                "its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    longest = tokenizer.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, int | float) or not longest >= 1:
        raise UserError(
            f"the tokenizer of {path}: model_max_length {brief(longest)} in tokenizer_config.json "
            "is not a number of tokens; mend or remove it"
        )
    with reading(f"the tokenizer of {path}", "one that encodes a text"):
        ids = tokenizer(["a", "b c"])["input_ids"]
        if not all(isinstance(i, int) and 0 <= i < len(tokenizer) for row in ids for i in row):
            raise UserError(
                f"the tokenizer of {path} writes tokens beyond its own {len(tokenizer)}; its files "
                "do not belong together"
            )


def _of_tokenizer(name: str) -> bool:
    return "/" not in name and any(fnmatch(name, pattern) for pattern in TOKENIZER_FILES)
