"""Files of a Hugging Face folder: JSON in and out, and one net under whatever reads a file.

config = read_json(folder / 'config.json')
with reading(file): ...                          # any error in here is a UserError that names it
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxalign.errors import UserError, first_line

MAX_JSON = 256 << 20  # bytes: many times the largest index there is


@contextmanager
def reading(file: object) -> Iterator[None]:
    """The net under what reads a file: whatever a parser raises becomes one sentence.

    Raises:
        UserError: as it was raised inside, or naming the file and what went wrong.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise UserError(f"{file}: cannot be read ({reason})") from error
    except Exception as error:
        raise UserError(
            f"{file}: damaged, or not what it should be ({first_line(error)}); download or copy "
            "it again"
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; UserError naming the file where there is none or it is broken."""
    with reading(file):
        try:
            if file.stat().st_size > MAX_JSON:
                raise UserError(f"{file}: is too large for such a file; download it again")
            content = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(f"{file}: no such file; is this a Hugging Face folder?") from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: not valid JSON ({error}); download the file again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: should hold a JSON object, found {type(content).__name__}")
    return content


def write_json(file: Path, content: dict[str, Any]) -> None:
    """`content` as indented JSON with a final newline."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
