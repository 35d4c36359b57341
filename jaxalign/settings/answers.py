"""The settings of what a model writes and how that is judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxalign.bounds import setting
from jaxalign.settings.data import KINDS, UNJUDGED


@dataclass
class GenerateConfig:
    """How answers are written; names are those of transformers."""

    max_new_tokens: int = setting(128, "the paper's for slots; 512 for translation", lowest=1)
    batch: int = setting(32, "prompts decoded together", lowest=1)
    share_prefix: str = setting(
        "auto",
        "`auto`: the first tokens that all prompts have in common are computed once",
        choices=("auto", "off"),
    )
    method: str = setting("greedy", "the paper's is `greedy`", choices=("greedy", "sample", "beam"))
    temperature: float = setting(1.0, "for `sample`", above=0)
    top_k: int = setting(0, "for `sample`; 0: off", lowest=0)
    top_p: float = setting(1.0, "for `sample`", above=0, highest=1)
    seed: int = setting(
        1,
        "for `sample`; draws depend on this, the prompt and how many equal prompts come before it",
        lowest=0,
        highest=2**32 - 1,
    )
    beams: int = setting(4, "for `beam`", lowest=1)
    length_penalty: float = setting(1.0, "for `beam`: the exponent of the length")
    adapter: str = setting(
        "unmerged", "`merged`: first added to the base's weights", choices=("unmerged", "merged")
    )
    long: str = setting(
        "refuse",
        "prompts that leave no room for an answer; `cut`: from the left",
        choices=("refuse", "cut"),
    )


@dataclass
class EvaluateConfig:
    """What a model is judged by (`jaxalign evaluate`, and a sample of it during training)."""

    data: list[str] = setting([], "sources as in `task.train`", path=True, see="evaluate.md")
    kind: str = setting(
        "task",
        "as `task.kind`; `task`: the same",
        choices=("task", *(kind for kind in KINDS if kind not in UNJUDGED)),
    )
    columns: dict[str, str] = setting({}, "our field name: the data's")
    transforms: list[Any] = setting(
        [], "as `task.transforms`, of the rows and of the solved rows that are shown", free=True,
        see="objectives.md#transforms",
    )  # fmt: skip
    languages: list[str] = setting([], "keep only these (of a translation: `en-de`); empty: all")
    groups: dict[str, list[str]] = setting(
        {},
        "groups of languages, each with its own mean: `{aligned: [de]}`",
        free=True,
    )
    rows: int = setting(0, "rows of each language, the first ones; 0: all", lowest=0)
    shots: int = setting(
        0,
        "solved rows of `task.train` shown to the bare base in a run of its own; 0: none",
        lowest=0,
    )
    draws: int = setting(1000, "resamples of the paired bootstrap", lowest=1, highest=10**6)
    options: dict[str, Any] = setting({}, "options of the scorer: `comet`, `tokenize`", free=True)
    sample: int = setting(
        0, "rows of each language answered at every validation of a training; 0: none", lowest=0
    )
