"""generation_config.json: the tokens at which others stop, and those that training adds.

file = base.files / GENERATION_FILE
unsaid_stops(file, spec, taught)             # () where others stop at every token that was taught
generation_files(file, spec, taught)         # {} likewise, else the file's new content by name
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from jaxalign.hf.files import read_json
from jaxalign.model.spec import ModelSpec
from jaxalign.model.spec.keys import ids

GENERATION_FILE = "generation_config.json"


def unsaid_stops(file: Path, spec: ModelSpec, taught: Sequence[int]) -> tuple[int, ...]:
    """All tokens that end an answer, where others would continue after one that training taught.

    Transformers and vLLM stop by generation_config.json alone where it is there, and by config.json
    where it is not; here answers end by the tokens of both.

    Args:
        file: the base's generation_config.json; it need not be there.
        spec: the model.
        taught: see `jaxalign.generate.stops.taught_stops`.

    Returns:
        Those that others know first; nothing where they know what was taught.

    Raises:
        UserError: the file is not JSON, or what it calls ends are no tokens.
    """
    said = ids(read_json(file), "eos_token_id", str(file)) if file.is_file() else spec.eos_ids
    if set(taught) <= set(said):
        return ()
    return tuple(dict.fromkeys((*said, *spec.eos_ids, *taught)))


def generation_files(file: Path, spec: ModelSpec, taught: Sequence[int]) -> dict[str, str]:
    """The generation_config.json of a model that learned to end its answers, by name.

    Whoever generates from the files reads there where to stop. A base that is no chat model names
    the end of texts alone, and would continue after the end of the turn that training taught.

    Args:
        file: the base's, whose other settings stay; it need not be there.
        spec: as `unsaid_stops`.
        taught: as `unsaid_stops`.

    Returns:
        Nothing where the base's settings end answers there already.

    Raises:
        UserError: as `unsaid_stops`.
    """
    stops = unsaid_stops(file, spec, taught)
    if not stops:
        return {}
    own = {"bos_token_id": spec.bos_id, "pad_token_id": spec.pad_id}
    said = read_json(file) if file.is_file() else own
    content = {key: value for key, value in said.items() if value is not None}
    content["eos_token_id"] = list(stops)
    return {GENERATION_FILE: json.dumps(content, indent=2) + "\n"}
