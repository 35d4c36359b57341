"""The model card of an export or a merge: README.md with the front matter that the hub reads.

Only what is known is written: a field that is empty leaves no line, no heading and no guess. The
licence is the user's to choose.

    facts = Facts('slots-cy', 'adapter', base='meta-llama/Meta-Llama-3-8B-Instruct')
    (folder / 'README.md').write_text(model_card(facts), 'utf-8')
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxalign.hf.find import pinned, unpinned

TEMPLATE = Path(__file__).with_name("card.md")
LIBRARIES = {"adapter": "peft", "model": "transformers", "tree": "jaxalign"}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Data:
    """One stream of the training."""

    part: str  # what it was for: task, pairs
    files: tuple[str, ...]
    languages: str = ""  # 'en 1200, de 300' or 'en, de'


@dataclass(frozen=True)
class Merge:
    """How several adapters became one, or went into their base."""

    adapters: tuple[tuple[str, str, str], ...]  # name, weight, rank
    settings: tuple[tuple[str, str], ...]  # rows of a table


@dataclass(frozen=True)
class Scores:
    """A table of an evaluation, finished for print."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    decoding: Mapping[str, Any] = field(default_factory=dict)  # of the answers that were scored


@dataclass(frozen=True)
class Facts:
    """What is known about an export."""

    title: str
    kind: str  # adapter | model | tree (of a model, for JAX alone)
    path: str = "."  # what a loader calls it: a folder or hub name
    base: str = ""  # hub name; empty where the base is a local folder
    revision: str = ""  # of the base on the hub, where it is not the newest
    base_folder: str = ""  # name of that folder
    languages: tuple[str, ...] = ()  # two- or three-letter codes
    datasets: tuple[str, ...] = ()  # on the hub
    tags: tuple[str, ...] = ()
    summary: str = ""  # the sentence after 'A LoRA adapter for BASE'
    training: tuple[tuple[str, str], ...] = ()  # rows of a table
    data: tuple[Data, ...] = ()
    merge: Merge | None = None
    scores: Scores | None = None
    prompts: str = ""  # how prompts looked in training
    system: str = ""  # the instruction that all of them had
    asked: str = "turns"  # turns | joined (the instruction is in the user's) | text (no template)
    call: Mapping[str, Any] = field(default_factory=dict)  # how transformers' generate is to decode
    request: Mapping[str, Any] = field(default_factory=dict)  # the same for vLLM
    template: str = "none"  # the chat template of the weights: base (the base's) | own | none
    stops: tuple[int, ...] = ()  # tokens that end answers, where the base does not say them all
    served_rank: int | None = None  # vLLM's --max-lora-rank
    limits: tuple[str, ...] = ()  # why vLLM does not serve the adapter; see `vllm_limits`
    dtype: str = ""  # of the weights of a model
    what: str = "LoRA adapter"  # what an adapter is
    in_peft: bool = True  # whether PEFT loads it
    aligned: str = "no"  # whether the paper's objective was trained: yes | no

    @property
    def data_rows(self) -> list[tuple[str, str, str]]:
        """The streams as rows of a table."""
        return [(d.part, ", ".join(f"`{file}`" for file in d.files), d.languages)
                for d in self.data]  # fmt: skip


def model_card(facts: Facts) -> str:
    """README.md: front matter, then the body in Markdown, as `card.md` lays it out."""
    from huggingface_hub import ModelCard, ModelCardData

    about = ModelCardData(
        base_model=facts.base or None,
        library_name=LIBRARIES[facts.kind] if facts.in_peft else "jaxalign",
        pipeline_tag="text-generation",
        language=list(facts.languages) or None,
        datasets=list(facts.datasets) or None,
        tags=[*facts.tags, "jaxalign"],
        # The hub draws the tree of models by it; adapters it knows by their library.
        base_model_relation="finetune" if facts.base and facts.kind != "adapter" else None,
    )
    base = facts.base or "PATH/TO/THE/BASE"
    card = ModelCard.from_template(
        about,
        str(TEMPLATE),
        facts=facts,
        base=base,
        table=table,
        call=", ".join(f"{name}={value!r}" for name, value in facts.call.items()),
        request=json.dumps(facts.request).strip("{}"),
    )
    return f"{card}\n"


def hub_name(base: str) -> str:
    """The base as the hub calls it; empty where it is a folder of this machine."""
    return base if _HUB_NAME.fullmatch(base) and not Path(base).exists() else ""


def base_facts(base: str, revision: str | None = None) -> dict[str, Any]:
    """What `Facts` says of a base, given by folder or hub name, which may have an @REVISION."""
    name, revision = unpinned(pinned(base, revision))
    if hub := hub_name(name):
        return {"base": hub, "revision": revision or ""}
    return {"base_folder": Path(base).name}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; what stands in the cells is shown as it is."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)])
