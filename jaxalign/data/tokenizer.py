"""The tokenizer of a base, checked: it pads, its lengths are numbers, its tokens are its own.

tokenizer = load_tokenizer("meta-llama/Meta-Llama-3-8B-Instruct")
"""

from __future__ import annotations

import filecmp
import json
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxalign.checksums import check_sums, file_digests, read_sums, text_digest
from jaxalign.errors import UserError, brief, first_line, reading
from jaxalign.hf.find import TOKENIZER_FILES, small_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FAST = "tokenizer.json"
VOCABULARY = ("tokenizer.*", "vocab.*")  # those of a tokenizer's files without which there is none
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
    padding is masked everywhere, so the choice changes no number. One that cuts on the left would
    take the beginnings of sentences.

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


def check_tokens(
    adapter: Path, base: Path, name: str, own: Callable[[], PreTrainedTokenizerBase]
) -> None:
    """Whether a base's tokenizer knows every token of an adapter's, where both have one.

    An adapter's prompts are built by its chat template and cut by the base's tokenizer: a token
    that only the adapter's knows would be cut into pieces. Padding is no part of a prompt: a token
    for it, which training scripts like to add, may be unknown.

    Args:
        adapter: its folder.
        base: the base's folder.
        name: what the base is called.
        own: gives the base's tokenizer; it is asked where their files differ.

    Raises:
        UserError: a token is not known, or known by another number.
    """
    theirs, ours = _vocabulary_files(adapter), _vocabulary_files(base)
    if not ours or all(
        file.name in ours and filecmp.cmp(file, ours[file.name], shallow=False)
        for file in theirs.values()
    ):
        return
    known, padding = own().get_vocab(), _padding(adapter)
    for token, number in _tokens(adapter).items():
        if known.get(token) != number and token != padding:
            raise UserError(
                f"{adapter}: its tokenizer has the token {brief(token)} with id {number}, but the "
                f"tokenizer of {name} does not; use a copy of that base's folder with the "
                "adapter's tokenizer files as the base (model.path, --base), or remove these files "
                "from the adapter's folder if its prompts need no such tokens"
            )


def _vocabulary_files(folder: Path) -> dict[str, Path]:
    return {file.name: file for pattern in VOCABULARY for file in folder.glob(pattern)}


def _padding(folder: Path) -> str:
    """The token that a tokenizer's settings name for padding; empty where they name none."""
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return ""
    with reading(str(file), "a tokenizer's settings"):
        found = json.loads(file.read_text("utf-8")).get("pad_token")
    return str(found.get("content", "") if isinstance(found, dict) else found or "")


def _tokens(folder: Path) -> dict[str, int]:
    """Token -> number of a tokenizer; from its file, where that is quicker than loading it."""
    file = folder / FAST
    if not file.is_file():
        return load_tokenizer(str(folder)).get_vocab()
    check_sums(folder, [FAST])
    with reading(str(file), "a tokenizer"):
        content = json.loads(file.read_text("utf-8"))
        pieces = content["model"]["vocab"]
        if isinstance(pieces, list):  # [[piece, score], ...]
            pieces = {piece: number for number, (piece, _) in enumerate(pieces)}
        return pieces | {one["content"]: one["id"] for one in content.get("added_tokens") or []}


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
        plain = "auto_map" not in said and (folder / FAST).is_file()
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
            "is not a number of tokens; correct or remove it"
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
