"""Where a model or an adapter lies: a folder, a repository of the hub, or a folder in a bucket.

folder = locate('meta-llama/Llama-3.2-1B')       # or a local folder, returned as it is
folder = small_files('meta-llama/Llama-3.2-1B')  # for config and tokenizer alone
folder = locate('gs://bucket/llama')             # small files copied, weights left there
"""

from __future__ import annotations

import re
from pathlib import Path

from jaxalign.bucket import SMALL, copied
from jaxalign.errors import UserError
from jaxalign.paths import is_remote

_ALL = (*SMALL, "*.safetensors")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def locate(path: str | Path, revision: str | None = None) -> Path:
    """The local folder of a model: `path` itself, or the snapshot of that hub name.

    Args:
        path: folder in Hugging Face layout, a hub name such as `meta-llama/Llama-3.2-1B`, or
            gs://BUCKET/FOLDER, whose weights are read where they are.
        revision: hub branch, tag or commit; ignored for others.

    Raises:
        UserError: no such folder, and the hub cannot give it either.
    """
    return _found(path, revision, _ALL)


def small_files(path: str | Path, revision: str | None = None) -> Path:
    """As `locate`, for configuration and tokenizer: weights are there only where they lie already.

    Raises:
        UserError: as `locate`.
    """
    return _found(path, revision, SMALL)


def _found(path: str | Path, revision: str | None, wanted: tuple[str, ...]) -> Path:
    if is_remote(path):
        return copied(str(path))
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{path}: is a file; give the folder that holds it")
    if not _HUB_NAME.fullmatch(str(path)) or str(path).startswith("."):
        raise UserError(f"{path}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(
            snapshot_download(
                str(path), revision=revision, allow_patterns=list(wanted), ignore_patterns=["*/*"]
            )
        )
    except GatedRepoError as error:
        raise UserError(
            f"{path}: this hub repository asks for consent; accept its terms on its page, then run "
            "`hf auth login`, or give a local folder"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{path}: neither a local folder nor a hub repository that can be read; check the "
            "spelling, or run `hf auth login` for a private one"
        ) from error
    except Exception as error:
        raise UserError(
            f"{path}: no local folder of that name, and the hub did not give it "
            f"({type(error).__name__}); without network, give the path of a downloaded folder"
        ) from error
