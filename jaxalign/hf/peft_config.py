"""What an adapter_config.json says, by PEFT's own rules: which modules, which ranks, which scales.

The rules are those of PEFT 0.17 to 0.21: `target_modules` and `exclude_modules` are lists of name
endings, or one pattern for the whole name; keys of `rank_pattern` and `alpha_pattern` are patterns
for the end of a name, and the first that fits counts.

    said = PeftConfig.read(Path('adapter/adapter_config.json'))
    said.adapts('model.layers.3.mlp.up_proj'), said.rank('model.layers.3.mlp.up_proj')
    content = write_config(Lora(r=8, targets=('q', 'v')), spec, base_name='models/llama')
    vllm_limits(adapter)                             # what vLLM would refuse or get wrong
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxalign.adapters.lora import Lora
from jaxalign.errors import UserError
from jaxalign.hf.files import read_json
from jaxalign.hf.names import adapter_rows, peft_module
from jaxalign.model.spec import ModelSpec

# Settings that change what the tensors mean. Absent or empty, they are LoRA.
_VARIANTS = (
    "modules_to_save",
    "lora_bias",
    "fan_in_fan_out",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)
# Initialisations that leave the base as it is; others (PiSSA, OLoRA, LoftQ, ...) move a part of the
# base into the adapter, which then fits only that altered base.
_INITS = (None, True, False, "gaussian", "eva", "orthogonal")

# The values that vLLM's max_lora_rank may have.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def module_name(target: str, block: int) -> str:
    """What PEFT calls one block's projection: ('q', 1) -> `model.layers.0.self_attn.q_proj`."""
    row, _ = adapter_rows(target)
    return row.name(block - 1).removeprefix("base_model.model.").removesuffix(".lora_A.weight")


@dataclass(frozen=True)
class PeftConfig:
    """A LoRA or DoRA configuration, checked."""

    file: Path
    content: Mapping[str, Any]

    @classmethod
    def read(cls, file: Path) -> PeftConfig:
        """The configuration in a file.

        Raises:
            UserError: not a LoRA, a variant that is not supported, or a value of the wrong kind.
        """
        content = read_json(file)
        _refuse_variants(file, content)
        said = cls(file, content)
        said._number("r", content.get("r"), int)
        said._number("lora_alpha", content.get("lora_alpha", 8), (int, float))
        for key, kind in (("rank_pattern", int), ("alpha_pattern", (int, float))):
            patterns = content.get(key) or {}
            if not isinstance(patterns, dict):
                raise UserError(f"{file}: {key} should map modules to numbers, found {patterns!r}")
            for pattern, value in patterns.items():
                said._number(f"{key}[{pattern!r}]", value, kind)
                said._compiled(key, rf"(.*\.)?({pattern})$")
        said._check_modules()
        return said

    @property
    def dora(self) -> bool:
        """Whether magnitudes lie beside the factors."""
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
        """Whether PEFT puts an adapter beside the module of this full name."""
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
        for pattern, value in (self.content.get(key) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return default

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
                f" found {named!r}"
            )
        excluded = self.content.get("exclude_modules")
        if isinstance(excluded, str):
            self._compiled("exclude_modules", excluded)

    def _number(self, key: str, value: Any, kind: Any) -> None:
        if not isinstance(value, kind) or isinstance(value, bool) or (kind is int and value < 1):
            what = "a positive whole number" if kind is int else "a number"
            raise UserError(f"{self.file}: {key} should be {what}, found {value!r}")

    def _compiled(self, key: str, pattern: str) -> None:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(
                f"{self.file}: {key}: {pattern!r} is no regular expression ({error})"
            ) from error


def write_config(adapter: Lora, spec: ModelSpec, base_name: str = "") -> dict[str, Any]:
    """The adapter_config.json of an adapter."""
    blocks = {target: _blocks(adapter, target, spec) for target in adapter.targets}
    layers = adapter.layers or tuple(range(1, spec.layers + 1))
    some = len(layers) < spec.layers
    # A list of names times a list of layers, where every target has the same ones.
    product = all(found == layers for found in blocks.values())
    targets = [peft_module(target) for target in adapter.targets]
    if not product:
        targets = [name for target, found in blocks.items() for name in _named(target, found, spec)]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": adapter.r,
        "lora_alpha": _whole(adapter.alpha),
        "lora_dropout": adapter.dropout,
        "target_modules": targets,
        # PEFT and HF count from 0.
        "layers_to_transform": [b - 1 for b in layers] if product and some else None,
        "rank_pattern": _pattern(adapter, blocks, adapter.r, adapter.rank_of),
        "alpha_pattern": _pattern(adapter, blocks, adapter.alpha, adapter.alpha_of),
        "use_rslora": adapter.rank_stabilised,
        "use_dora": adapter.dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }


def vllm_rank(rank: int) -> int | None:
    """The smallest of vLLM's --max-lora-rank that serves this rank; None where none does."""
    return next((served for served in VLLM_RANKS if served >= rank), None)


def vllm_limits(adapter: Lora) -> list[str]:
    """What vLLM refuses of an adapter, or gets wrong without a word; empty where it serves it.

    From vLLM's PEFTHelper and LoRAConfig (0.22): DoRA is refused, `r` must not pass max_lora_rank,
    and one scale is made of `r` and `lora_alpha` for all modules: patterns are not read.
    """
    limits = []
    if adapter.dora:
        limits.append("vLLM refuses DoRA; merge the adapter into its base to serve it")
    if not adapter.even:
        limits.append(
            "vLLM reads neither rank_pattern nor alpha_pattern and would scale every projection "
            f"by {adapter.scale:g}; merge the adapter into its base to serve it"
        )
    if adapter.r > VLLM_RANKS[-1]:
        limits.append(f"vLLM serves ranks up to {VLLM_RANKS[-1]}, and this one is {adapter.r}")
    return limits


def _refuse_variants(file: Path, content: Mapping[str, Any]) -> None:
    if content.get("peft_type") != "LORA":
        raise UserError(
            f"{file}: peft_type {content.get('peft_type')!r} is not supported; supported: LORA"
        )
    refused = {key: content[key] for key in _VARIANTS if content.get(key)}
    if content.get("bias") not in (None, "none"):
        refused["bias"] = content["bias"]
    if content.get("init_lora_weights") not in _INITS:
        refused["init_lora_weights"] = content["init_lora_weights"]
    if refused:
        settings = ", ".join(f"{key}={value!r}" for key, value in refused.items())
        raise UserError(
            f"{file}: {settings} is not supported; only LoRA and DoRA are (merge the adapter into "
            "its base in PEFT and give the merged model instead)"
        )


def _is_named(named: str | Iterable[str], module: str) -> bool:
    """Whether a pattern fits the whole name, or one of a list is the name or how it ends."""
    if isinstance(named, str):
        return re.fullmatch(named, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in named)


def _blocks(adapter: Lora, target: str, spec: ModelSpec) -> tuple[int, ...]:
    return tuple(b for b in range(1, spec.layers + 1) if adapter.rank_of(target, b))


def _named(target: str, blocks: tuple[int, ...], spec: ModelSpec) -> list[str]:
    """The shortest list of names: one for all blocks, else one for each."""
    if len(blocks) == spec.layers:
        return [peft_module(target)]
    return [module_name(target, block) for block in blocks]


def _pattern(
    adapter: Lora,
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
