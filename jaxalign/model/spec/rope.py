"""Rotary positions in a `config.json`, as transformers 4 and 5 spell them.

Transformers 4 keeps `rope_theta` and `rope_scaling` apart at the top level; transformers 5 keeps
both in `rope_parameters`, by layer type where layers differ. A file with both must say the same in
both: versions of transformers differ in which one counts.

    theta, scaling = read_rope(config)        # 500000.0, RopeScaling('llama3', 8.0, ...)
    read_local_theta(config)                  # Gemma 3: 10000.0 in layers with a window
    rope_to_hf(scaling)                       # {'rope_type': 'llama3', 'factor': 8.0, ...}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxalign.errors import UserError
from jaxalign.model.spec.keys import positive, positive_or, table

ROPES = ("default", "linear", "llama3")
_SPELLINGS = ("rope_parameters", "rope_scaling")  # of transformers 5 and of 4


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than the pre-training ones."""

    kind: str  # linear | llama3
    factor: float
    low_freq_factor: float = 0.0  # llama3 only, as are the next two
    high_freq_factor: float = 0.0
    original_max_position: int = 0


def read_rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Theta and scaling; of the layers that see everything, where layers differ.

    Raises:
        UserError: a scaling that is not supported, one that lacks a number, or two that differ.
    """
    spelled = {key: facts for key in _SPELLINGS if (facts := table(config, key))}
    found = {key: _read(config, facts) for key, facts in (spelled or {"": {}}).items()}
    if len(set(found.values())) > 1:
        said = "; ".join(f"{key} gives {_told(*rope)}" for key, rope in found.items())
        raise UserError(
            f"config.json: {' and '.join(found)} differ ({said}), and it depends on the version of "
            "transformers which one counts; put what the model needs into one of them and remove "
            "the other"
        )
    return next(iter(found.values()))


def read_local_theta(config: Mapping[str, Any]) -> float:
    """Theta of the layers with a window, which stretch nothing.

    Raises:
        UserError: they do.
    """
    facts = table(table(config, "rope_parameters"), "sliding_attention")
    _kind(facts, ("default",))
    return positive_or(facts, "rope_theta", positive(config, "rope_local_base_freq"))


def rope_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """`rope_scaling`."""
    if scaling is None:
        return None
    facts: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        facts |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position,
        }
    return facts


def _read(config: Mapping[str, Any], facts: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Theta and scaling of one spelling; what it does not say stands at the top level."""
    facts = table(facts, "full_attention") or facts
    theta = positive_or(facts, "rope_theta", positive_or(config, "rope_theta", 10000.0))
    kind = _kind(facts, ROPES)
    whole = positive_or(config, "partial_rotary_factor", 1.0)
    partial = positive_or(facts, "partial_rotary_factor", whole)
    if partial != 1.0:
        raise UserError(
            f"config.json: partial_rotary_factor {partial} is not supported; supported: 1.0"
        )
    if kind == "default":
        return theta, None
    scaling = RopeScaling(kind, _number(facts, "factor"))
    if kind == "llama3":
        scaling = RopeScaling(
            kind,
            scaling.factor,
            low_freq_factor=_number(facts, "low_freq_factor"),
            high_freq_factor=_number(facts, "high_freq_factor"),
            original_max_position=int(_number(facts, "original_max_position_embeddings")),
        )
    return theta, scaling


def _told(theta: float, scaling: RopeScaling | None) -> str:
    facts = {"rope_theta": theta, **(rope_to_hf(scaling) or {"rope_type": "default"})}
    return ", ".join(f"{key} {value}" for key, value in facts.items())


def _kind(facts: Mapping[str, Any], supported: tuple[str, ...]) -> str:
    kind = facts.get("rope_type") or facts.get("type") or "default"
    if not isinstance(kind, str) or kind not in supported:
        raise UserError(
            f"config.json: rope type {str(kind)[:60]!r} is not supported; supported: "
            f"{', '.join(supported)}"
        )
    return kind


def _number(facts: Mapping[str, Any], key: str) -> float:
    return positive(facts, key, of="rope scaling ")
