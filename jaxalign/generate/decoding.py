"""How the next token is chosen: the words and numbers of transformers' `generate`.

Decoding(max_new_tokens=128)                                      # greedy
Decoding(128, method="sample", temperature=0.7, top_p=0.9, seed=3)
Decoding(128, method="beam", beams=4, length_penalty=1.0)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxalign.errors import UserError

METHODS = ("greedy", "sample", "beam")


@dataclass(frozen=True)
class Decoding:
    """The choice of tokens.

    Attributes:
        max_new_tokens: longest answer.
        method: greedy, sample or beam.
        temperature: of `sample`; divides the logits before anything else.
        top_k: of `sample`; only the k best tokens can be drawn; 0: all.
        top_p: of `sample`; after top_k, only the best tokens that together hold this probability.
        seed: of `sample`; a draw depends on it, the row's number and the place of the token alone.
        beams: of `beam`; hypotheses of each prompt.
        length_penalty: of `beam`; a finished one scores sum(log p) / tokens^length_penalty.

    Raises:
        UserError: a value out of its bounds.
    """

    max_new_tokens: int = 128
    method: str = "greedy"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1
    beams: int = 4
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"method: {self.method!r} should be one of {', '.join(METHODS)}")
        for name, least in (("max_new_tokens", 1), ("top_k", 0), ("beams", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name}: {getattr(self, name)} should be {least} or more")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise UserError(
                f"temperature: {self.temperature} should be above 0; for the best token every "
                "time use the method greedy"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p: {self.top_p} should be in (0, 1]")
        if not math.isfinite(self.length_penalty):
            raise UserError(f"length_penalty: {self.length_penalty} should be a finite number")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Decoding:
        """Those of these settings that are about the choice of tokens, such as `generate.*`."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in settings.items() if name in names})

    def call(self) -> dict[str, Any]:
        """The arguments of transformers' `generate` that decode so, whatever a base's settings are.

        What a call leaves out comes from generation_config.json: many instruction-tuned models
        sample by it, some with a penalty that works against words copied from the prompt.
        """
        own: dict[str, dict[str, Any]] = {
            "greedy": {"do_sample": False},
            "sample": {"do_sample": True, **self._sampling},
            "beam": {
                "do_sample": False,
                "num_beams": self.beams,
                "length_penalty": self.length_penalty,
                "early_stopping": False,
            },
        }
        always = {"repetition_penalty": 1.0, "max_new_tokens": self.max_new_tokens}
        return own[self.method] | always

    def request(self) -> dict[str, Any]:
        """The same in a request to vLLM; nothing for beams, which it decodes by its own rules."""
        own: dict[str, dict[str, Any]] = {"greedy": {"temperature": 0}, "sample": self._sampling}
        if self.method not in own:
            return {}
        return own[self.method] | {"repetition_penalty": 1.0, "max_tokens": self.max_new_tokens}

    @property
    def _sampling(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}

    @property
    def rows(self) -> int:
        """Rows of the model's batch that one prompt takes."""
        return self.beams if self.method == "beam" else 1

    @property
    def rule(self) -> Decoding:
        """What a compiled program depends on: the method with its own settings, no seed."""
        own = {"sample": ("temperature", "top_k", "top_p"), "beam": ("beams", "length_penalty")}
        kept = {name: getattr(self, name) for name in own.get(self.method, ())}
        return Decoding(method=self.method, **kept)
