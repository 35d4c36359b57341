"""Where a model or an adapter is: a folder, a repository of the hub, or a folder in a bucket.

folder = locate('meta-llama/Llama-3.2-1B')       # or a local folder, returned as it is
folder = locate('me/adapters:slots/cy@v2')       # a folder in a repository, at a tag
folder = small_files('meta-llama/Llama-3.2-1B')  # for config and tokenizer alone
folder = locate('gs://bucket/llama')             # small files copied, weights left there
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from jaxalign.bucket import SMALL, copied
from jaxalign.errors import UserError
from jaxalign.paths import is_remote

# NAME or OWNER/NAME, then :FOLDER/IN/IT, then @REVISION (a branch, a tag, refs/pr/1 or a commit).
_HUB_NAME = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?::([\w./-]+))?(?:@([\w./-]+))?")
# What a tokenizer may consist of.
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
)
# The weights of a model and of an adapter, which may be in shards that an index names.
STEMS = ("model", "adapter_model")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def locate(path: str | Path, revision: str | None = None) -> Path:
    """The local folder of a model: `path` itself, or the snapshot of that hub name.

    Of a repository only the weights that are read come along, not the copies in other formats that
    some have next to them.

    Args:
        path: folder in Hugging Face layout, a hub name such as `meta-llama/Llama-3.2-1B` or
            `NAME:FOLDER@REVISION`, or gs://BUCKET/FOLDER, whose weights are read where they are.
            A folder of this machine comes first, whatever its name.
        revision: hub branch, tag or commit, where the name has none; ignored for others.

    Raises:
        UserError: no such folder, and the hub cannot give it either.
    """
    return _found(path, revision, weights=True)


def small_files(path: str | Path, revision: str | None = None) -> Path:
    """As `locate`, for configuration and tokenizer: weights are there only where they were already.

    Raises:
        UserError: as `locate`.
    """
    return _found(path, revision, weights=False)


def hub_parts(path: str) -> tuple[str, str, str | None] | None:
    """Repository, folder in it and revision of a hub name; None where it is not one."""
    found = _HUB_NAME.fullmatch(path)
    if not found or path.startswith((".", "/")):
        return None
    name, folder, revision = found.groups()
    if any(part in ("", ".", "..") for part in (folder or "x").split("/")):
        return None
    return name, folder or "", revision


def on_hub(path: str) -> tuple[str, str, str | None] | None:
    """As `hub_parts`; None also where a folder of this machine, which comes first, has the name."""
    return None if Path(path).expanduser().exists() else hub_parts(path)


def holds_weights(folder: Path) -> bool:
    """Whether a model's folder has weights in it, not only an index of them."""
    return any(folder.glob("model*.safetensors"))


def pinned(path: str, revision: str | None) -> str:
    """`NAME@REVISION` of a hub name without a revision of its own; anything else as it is."""
    parts = on_hub(path)
    if not revision or parts is None or parts[2]:
        return path
    return f"{path}@{revision}"


def unpinned(path: str) -> tuple[str, str | None]:
    """The name before the @ and the revision behind it; None where it has none."""
    parts = on_hub(path)
    if parts is None or not parts[2]:
        return path, None
    return path.removesuffix(f"@{parts[2]}"), parts[2]


def may_be_same(one: str, other: str) -> bool:
    """Whether two names can be of one model.

    They are one folder, or one hub name, of which a revision may be missing, or a folder of this
    machine is called like a name that is not one.
    """
    (one, first), (other, second) = unpinned(one), unpinned(other)
    if first and second and first != second:
        return False
    places = [Path(name).expanduser() for name in (one, other)]
    if all(place.is_dir() for place in places):
        return places[0].resolve() == places[1].resolve()
    return one == other or places[0].name.casefold() == places[1].name.casefold()


def _found(path: str | Path, revision: str | None, weights: bool) -> Path:
    if is_remote(path):
        return copied(str(path))
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{path}: is a file; give the folder that holds it")
    parts = hub_parts(str(path))
    if parts is None:
        raise UserError(f"{path}: no such folder")
    name, inner, pinned = parts
    if pinned and revision and pinned != revision:
        raise UserError(f"{path}: the revision is given twice, as {pinned} and as {revision}")
    revision = pinned or revision or None  # an empty one is none
    snapshot = _download(path, name, revision, inner, SMALL)
    if weights:
        # The same commit again, though the branch may have moved on.
        same = snapshot.name if _COMMIT.fullmatch(snapshot.name) else revision
        wanted = (*SMALL, *_weights_of(snapshot / inner))
        snapshot = _download(path, name, same, inner, wanted)
    if not (snapshot / inner).is_dir():
        raise UserError(f"{path}: the hub repository {name} has no folder {inner}")
    return snapshot / inner


def _weights_of(folder: Path) -> list[str]:
    """The files that hold the weights, by the index where there is one."""
    found: list[str] = []
    for stem in STEMS:
        file = folder / f"{stem}.safetensors.index.json"
        shards: Any = []
        # There may be none; whoever reads it next says what is wrong with it.
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            shards = json.loads(file.read_text("utf-8"))["weight_map"].values()
        # An index is a stranger's: its names are names here, not patterns or paths.
        names = sorted({one for one in shards if isinstance(one, str) and _plain(one)})
        found += names or [f"{stem}.safetensors"]
    return found


def _plain(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+\.safetensors", name) is not None


def _download(
    path: str | Path, name: str, revision: str | None, inner: str, wanted: Sequence[str]
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    prefix = f"{inner}/" if inner else ""
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=[prefix + pattern for pattern in wanted],
                ignore_patterns=[f"{prefix}*/*"],
            )
        )
    except GatedRepoError as error:
        raise UserError(
            f"{path}: this hub repository asks for consent; accept its terms on its page, then run "
            "`hf auth login`, or give a local folder"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(
            f"{path}: the hub repository {name} has no revision {revision}; give a branch, a tag "
            "or a commit of it"
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
