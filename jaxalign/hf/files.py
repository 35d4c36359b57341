"""JSON files of a Hugging Face folder.

config = read_json(folder / 'config.json')
write_json(folder / 'config.json', config | {'use_cache': True})
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxalign.errors import UserError, reading

MAX_JSON = 256 << 20  # bytes: many times the largest index there is


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; UserError naming the file where there is none or it is broken."""
    with reading(str(file), "JSON"):
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
