"""A finished folder goes to the hub: a repository is made where there is none, files are uploaded.

check_hub('me/slots-cy')                   # a token, a network, a name: before the long work
push(folder, 'me/slots-cy', 'private')     # the page of the repository
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxalign.errors import UserError


def check_hub(name: str) -> None:
    """Fails early where a push would fail late.

    Raises:
        UserError: no token, no network, or a name that the hub does not take.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    with _telling(name):
        validate_repo_id(name)
        HfApi().whoami()


def push(folder: Path, name: str, visibility: str = "default") -> str:
    """The address of the repository after the folder's files have gone there.

    Args:
        folder: what to upload.
        name: of the repository, `user/name`.
        visibility: private, or default: what the account makes of new repositories.

    Raises:
        UserError: the hub does not take it.
    """
    from huggingface_hub import HfApi

    with _telling(name):
        api = HfApi()
        made = api.create_repo(name, private=visibility == "private" or None, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id, folder_path=folder, commit_message="Exported by jaxalign"
        )
        return str(made)


@contextmanager
def _telling(name: str) -> Iterator[None]:
    """Every failure of the hub as one sentence."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        yield
    except HFValidationError as error:
        raise UserError(
            f"--push {name}: not a hub name ({_first(error)}); as in me/slots"
        ) from error
    except LocalTokenNotFoundError as error:
        raise UserError(
            f"--push {name}: no token to write with; run `hf auth login` or set HF_TOKEN"
        ) from error
    except OfflineModeIsEnabled as error:
        raise UserError(f"--push {name}: HF_HUB_OFFLINE is set; unset it to push") from error
    except HfHubHTTPError as error:
        raise UserError(
            f"--push {name}: the hub refuses ({_first(error)}); `hf auth whoami` shows who you are "
            "there"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"--push {name}: the hub cannot be reached ({_first(error)})") from error
    except Exception as error:
        # Errors of the transport are those of whichever HTTP library the hub's client uses.
        if not type(error).__module__.startswith("http"):
            raise
        raise UserError(f"--push {name}: the hub cannot be reached ({_first(error)})") from error


def _first(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:200]
