"""What an adapter_config.json says, by PEFT's own rules: which modules, which ranks, which scales.

The rules are those of PEFT 0.17 to 0.21: `target_modules` and `exclude_modules` are lists of name
endings, or one pattern for the whole name; keys of `rank_pattern` and `alpha_pattern` are patterns
for the end of a name, and the first that fits counts.

    file = Path('adapter/adapter_config.json')
    said = PeftConfig.of(file, read_json(file))
    said.adapts('model.layers.3.mlp.up_proj'), said.rank('model.layers.3.mlp.up_proj')
    content = write_config(Ranks(r=8, targets=('q', 'v')), spec, 'models/llama')
    vllm_limits(ranks)                             # what vLLM would refuse or get wrong
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxalign.adapters.peft_options import check_lora
from jaxalign.adapters.ranks import Ranks
from jaxalign.errors import UserError, brief
from jaxalign.hf.find import unpinned
from jaxalign.model.spec import ModelSpec
from jaxalign.model.spec.tensors import TARGETS

_MAX_RANK = 1 << 16
_MAX_PATTERNS = 1 << 14  # each is tried on every module
_MAX_PATTERN = 2000  # characters
_MAX_REPEATS = 12  # of one pattern, each of which may have no end


# The values that vLLM's max_lora_rank may have.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def peft_module(target: str) -> str:
    """What PEFT calls the projection: `'q'` -> `'q_proj'`."""
    return TARGETS[target].hf.split(".")[-2]


def module_name(target: str, block: int) -> str:
    """What PEFT calls one block's projection: ('q', 1) -> `model.layers.0.self_attn.q_proj`."""
    return TARGETS[target].name(block - 1).removesuffix(".weight")


@dataclass(frozen=True)
class PeftConfig:
    """A LoRA or DoRA configuration, checked."""

    file: Path
    content: Mapping[str, Any]

    @classmethod
    def of(cls, file: Path, content: Mapping[str, Any]) -> PeftConfig:
        """The configuration that a file was found to hold.

        Raises:
            UserError: not a LoRA, a variant that is not supported, an option that is not known, or
                a value of the wrong kind.
        """
        check_lora(file, content)
        said = cls(file, content)
        said._rank("r", content.get("r"))
        said._alpha("lora_alpha", content.get("lora_alpha", 8))
        for key, check in (("rank_pattern", said._rank), ("alpha_pattern", said._alpha)):
            patterns = content.get(key) or {}
            if not isinstance(patterns, dict) or len(patterns) > _MAX_PATTERNS:
                raise UserError(
                    f"{file}: {key} should map modules to numbers, found {brief(patterns)}"
                )
            for pattern, value in patterns.items():
                check(f"{key}[{brief(pattern)}]", value)
        said._check_modules()
        said._patterns  # noqa: B018 - compiles every pattern, or says which is wrong
        return said

    @property
    def dora(self) -> bool:
        """Whether magnitudes are stored with the factors."""
        return bool(self.content.get("use_dora"))

    @property
    def rank_stabilised(self) -> bool:
        """Whether alpha is divided by the root of the rank."""
        return bool(self.content.get("use_rslora"))

    @property
    def dropout(self) -> float:
        """The rate in training."""
        return float(self.content.get("lora_dropout") or 0.0)

    def rank(self, module: str) -> int:
        """The rank of a module: the first of `rank_pattern` that it ends in, else `r`."""
        return self._own("rank_pattern", module, self.content["r"])

    def alpha(self, module: str) -> float:
        """The numerator of a module's scale, found as its rank is."""
        return float(self._own("alpha_pattern", module, self.content.get("lora_alpha", 8)))

    def adapts(self, module: str) -> bool:
        """Whether PEFT adds an adapter to the module of this full name."""
        excluded, named = self.content.get("exclude_modules"), self.content["target_modules"]
        if excluded and _is_named(excluded, module):
            return False
        if isinstance(named, str) and named.lower() == "all-linear":
            return True  # all that we know are linear, and none is the head
        # A full name is adapted whatever layers_to_transform says.
        whole = isinstance(named, str) or module in named
        return _is_named(named, module) and (whole or self._in_layers(module))

    @property
    def selection(self) -> str:
        """The settings that choose modules, for a message."""
        keys = ("target_modules", "layers_to_transform", "layers_pattern", "exclude_modules")
        return ", ".join(f"{k}={self.content[k]!r}" for k in keys if self.content.get(k))

    def _own(self, key: str, module: str, default: Any) -> Any:
        for pattern, value in self._patterns[key]:
            if pattern.match(module):
                return value
        return default

    @cached_property
    def _patterns(self) -> dict[str, list[tuple[re.Pattern[str], Any]]]:
        """Of ranks and alphas, in the order of the file."""
        return {
            key: [
                (self._compiled(key, pattern, rf"(.*\.)?({pattern})$"), value)
                for pattern, value in (self.content.get(key) or {}).items()
            ]
            for key in ("rank_pattern", "alpha_pattern")
        }

    def _in_layers(self, module: str) -> bool:
        chosen = self.content.get("layers_to_transform")
        if chosen is None or chosen == []:
            return True
        patterns = self.content.get("layers_pattern") or [r"[^.]*"]
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            # The first number of the name is the layer; later ones may count experts.
            found = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module)
            if found:
                return int(found[1]) in ([chosen] if isinstance(chosen, int) else chosen)
        return False

    def _check_modules(self) -> None:
        named = self.content.get("target_modules")
        if isinstance(named, str):
            if self.content.get("layers_to_transform") is not None:
                raise UserError(
                    f"{self.file}: layers_to_transform goes with a list of target_modules, not "
                    f"with the pattern {named!r}; put the layers into the pattern"
                )
            self._compiled("target_modules", named)
        elif not isinstance(named, list) or not all(isinstance(name, str) for name in named):
            raise UserError(
                f"{self.file}: target_modules should be a list of modules, a pattern or all-linear,"
                f" found {brief(named)}"
            )
        excluded = self.content.get("exclude_modules")
        if isinstance(excluded, str):
            self._compiled("exclude_modules", excluded)
        patterns = self.content.get("layers_pattern") or []
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            self._compiled("layers_pattern", pattern)

    def _rank(self, key: str, value: Any) -> None:
        if type(value) is not int or not 1 <= value <= _MAX_RANK:
            raise UserError(
                f"{self.file}: {key} should be a positive whole number up to {_MAX_RANK}, found "
                f"{brief(value)}"
            )

    def _alpha(self, key: str, value: Any) -> None:
        number = type(value) in (int, float) and abs(value) < 1e12  # false of nan, too
        if not number or not math.isfinite(value):
            raise UserError(f"{self.file}: {key} should be a number, found {brief(value)}")
        if not value:
            raise UserError(f"{self.file}: {key} is 0, which switches the adapter off")

    def _compiled(self, key: str, pattern: str, whole: str = "") -> re.Pattern[str]:
        """The pattern that PEFT would match, which may be anyone's: some of them take years."""
        endless = len(re.findall(r"[*+]|\{\d*,\}", pattern))
        nested = re.search(r"\)\s*(?:[*+]|\{\d*,\d*\})", pattern)
        if len(pattern) > _MAX_PATTERN or endless > _MAX_REPEATS or nested:
            raise UserError(
                f"{self.file}: {key}: {brief(pattern)} is too long, or repeats a group or too "
                "many things, which can take for ever to match; write a simpler pattern, or list "
                "the modules"
            )
        try:
            return re.compile(whole or pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise UserError(
                f"{self.file}: {key}: {brief(pattern)} is not a regular expression ({error})"
            ) from error


def write_config(ranks: Ranks, spec: ModelSpec, base_name: str = "") -> dict[str, Any]:
    """The adapter_config.json of an adapter."""
    name, revision = unpinned(base_name)
    blocks = {target: _blocks(ranks, target, spec) for target in ranks.targets}
    layers = ranks.layers or tuple(range(1, spec.layers + 1))
    some = len(layers) < spec.layers
    # A list of names times a list of layers, where every target has the same ones.
    product = all(found == layers for found in blocks.values())
    targets = [peft_module(target) for target in ranks.targets]
    if not product:
        targets = [name for target, found in blocks.items() for name in _named(target, found, spec)]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        **({"revision": revision} if revision else {}),
        "r": ranks.r,
        "lora_alpha": _whole(ranks.alpha),
        "lora_dropout": ranks.dropout,
        "target_modules": targets,
        # PEFT and HF count from 0.
        "layers_to_transform": [b - 1 for b in layers] if product and some else None,
        "rank_pattern": _pattern(blocks, ranks.r, ranks.rank_of),
        "alpha_pattern": _pattern(blocks, ranks.alpha, ranks.alpha_of),
        "use_rslora": ranks.rank_stabilised,
        "use_dora": ranks.dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }


def vllm_rank(rank: int) -> int | None:
    """The smallest of vLLM's --max-lora-rank that serves this rank; None where none does."""
    return next((served for served in VLLM_RANKS if served >= rank), None)


def vllm_limits(ranks: Ranks) -> list[str]:
    """What vLLM refuses of an adapter, or gets wrong without a word; empty where it serves it.

    From vLLM's PEFTHelper and LoRAConfig (0.22): DoRA is refused, `r` must not pass max_lora_rank,
    and one scale is made of `r` and `lora_alpha` for all modules: patterns are not read.
    """
    limits = []
    if ranks.dora:
        limits.append("vLLM refuses DoRA; merge the adapter into its base to serve it")
    if not ranks.even:
        limits.append(
            "vLLM reads neither rank_pattern nor alpha_pattern and would scale every projection "
            f"by {ranks.scale:g}; merge the adapter into its base to serve it"
        )
    if ranks.r > VLLM_RANKS[-1]:
        limits.append(f"vLLM serves ranks up to {VLLM_RANKS[-1]}, and this one is {ranks.r}")
    return limits


def _is_named(named: str | Iterable[str], module: str) -> bool:
    """Whether a pattern fits the whole name, or one of a list is the name or how it ends."""
    if isinstance(named, str):
        return re.fullmatch(named, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in named)


def _blocks(ranks: Ranks, target: str, spec: ModelSpec) -> tuple[int, ...]:
    return tuple(b for b in range(1, spec.layers + 1) if ranks.rank_of(target, b))


def _named(target: str, blocks: tuple[int, ...], spec: ModelSpec) -> list[str]:
    """The shortest list of names: one for all blocks, else one for each."""
    if len(blocks) == spec.layers:
        return [peft_module(target)]
    return [module_name(target, block) for block in blocks]


def _pattern(
    blocks: Mapping[str, tuple[int, ...]],
    usual: float,
    own: Callable[[str, int], float],
) -> dict[str, float]:
    """Module -> number, wherever it is not the usual one; PEFT takes the first key that fits."""
    pattern: dict[str, float] = {}
    for target, found in blocks.items():
        values = {own(target, block) for block in found}
        if values == {usual}:
            continue
        if len(values) == 1:
            pattern[peft_module(target)] = _whole(values.pop())
            continue
        for block in found:
            if own(target, block) != usual:
                # Older PEFT wants something before the key; "model." remains.
                name = module_name(target, block).split(".", 1)[1]
                pattern[name] = _whole(own(target, block))
    return pattern


def _whole(number: float) -> float:
    """PEFT and vLLM type alpha as a whole number."""
    return int(number) if number == int(number) else number
