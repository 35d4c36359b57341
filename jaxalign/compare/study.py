"""A comparison as it is written down: one YAML file that names systems, seeds and measurements.

base: demo.yaml                              # what all systems share, counted from this file
output: runs/compare
seeds: [1, 2, 3]
systems:
  sft: {align.weight: 0}                     # settings over the base; the first is the baseline
  aligned: {}
  afp: {extends: methods/afp.yaml}           # another file in place of the base
  lens: {extends: methods/lens.yaml, prepare: {subspace: {parallel: "dev.*.jsonl"}}}
  xsgd:                                      # stages: each goes on from the one before it
    - {extends: methods/xsgd_align.yaml}
    - {extends: methods/xsgd_task.yaml}
  align_alone: {task.weight: 0}
  merged: {merge: [sft, align_alone], weights: [0.5, 0.5], method: svd, rank: 8}
choose: {grid: {optim.learning_rate: [1.0e-3, 3.0e-3]}, evaluate.data: ["dev.*.jsonl"]}
evaluations: {intents: {}}                   # name -> settings over the system's own
probe: {parallel: "dev.*.jsonl", rows: 200}

study = read_study('compare.yaml', ['train.steps=20'])
study.systems['xsgd'][1].config(['seed=2'])  # the settings of its second stage
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from jaxalign.bounds import from_home
from jaxalign.checksums import text_digest
from jaxalign.config import LARGEST, load
from jaxalign.errors import UserError, brief, first_line, reading
from jaxalign.evaluate.entrants import check_name
from jaxalign.merge.check import check_recipe
from jaxalign.merge.methods import Recipe
from jaxalign.numerals import check_numerals
from jaxalign.settings import Config

KEYS = ("base", "output", "seeds", "systems", "choose", "evaluations", "probe")
TEXTS = ("base", "output")
PROBE = ("parallel", "rows", "languages", "pooling", "layer")
SUBSPACE = ("parallel", "rows", "languages", "pivot", "rank")
RECIPE = {"method": str, "rank": int, "density": float, "blocks": str, "transition": int}
MERGE = ("merge", "weights", *RECIPE)
GROUPS = tuple(
    one.name for one in dataclasses.fields(Config)
    if dataclasses.is_dataclass(one.default_factory)
)  # fmt: skip


@dataclass(frozen=True)
class Subspace:
    """A file that `jaxalign prepare subspace` writes before a stage is trained."""

    file: Path
    options: Mapping[str, Any]

    @classmethod
    def of(cls, options: Mapping[str, Any], output: str) -> Subspace:
        """Its name depends on its options: with others it is another file."""
        name = f"subspace_{text_digest(json.dumps(options, sort_keys=True))[:8]}.npz"
        return cls(Path(output, "prepared", name), options)

    @property
    def word(self) -> str:
        """The setting by which the stage finds it."""
        return f"align.options.subspace.file={json.dumps(str(self.file))}"


@dataclass(frozen=True)
class Stage:
    """One run of a system: a file and what is set over it."""

    file: Path
    words: tuple[str, ...] = ()
    subspace: Subspace | None = None

    def config(self, more: Sequence[str] = ()) -> Config:
        """The settings; UserError where they cannot be."""
        return load(self.file, [*self.words, *more]).config


@dataclass(frozen=True)
class Mixture:
    """A system that is not trained: the adapters of others, merged seed by seed."""

    systems: tuple[str, ...]
    weights: tuple[float, ...]
    recipe: Recipe = field(default_factory=Recipe)  # its seed is that of the adapters


@dataclass(frozen=True)
class Choice:
    """What is chosen for each system, and on which rows."""

    candidates: tuple[tuple[str, ...], ...] = ((),)  # of each: words such as lora.r=8
    words: tuple[str, ...] = ()  # over the first evaluation


@dataclass(frozen=True)
class Texts:
    """Parallel text by which states are measured."""

    parallel: str
    rows: int = 0
    languages: tuple[str, ...] = ()
    pooling: str = "mean"
    layer: int | None = None  # of systems that align none; None: what the base aligns


@dataclass(frozen=True)
class Study:
    """All that is compared; the first system is the baseline."""

    file: Path
    base: Stage
    output: str
    seeds: tuple[int, ...]
    systems: dict[str, tuple[Stage, ...]]
    mixtures: dict[str, Mixture] = field(default_factory=dict)
    choice: Choice = field(default_factory=Choice)
    evaluations: dict[str, tuple[str, ...]] = field(default_factory=dict)
    texts: Texts | None = None

    @property
    def names(self) -> list[str]:
        """All systems, the baseline first."""
        return [*self.systems, *self.mixtures]


def read_study(path: str | Path, words: Sequence[str] = (), out: str = "") -> Study:
    """The study of a YAML file.

    Args:
      path: the file.
      words: settings for all systems, over what the file says of each and of its evaluations.
      out: another output.

    Raises:
      UserError: a file or key that is not what it should be; the sentence names it. Settings are
        read too, so that those of the last system are found before the first is trained.
    """
    file = Path(path)
    content = _read_yaml(file)
    _check_keys(content, KEYS, str(file), "")
    base = Stage(file.parent / from_home(_a(str, content, "base", file)), tuple(words))
    output = out or from_home(content.get("output")) or f"runs/{file.stem}"
    systems, mixtures = _systems(content, file, base.file, words, output)
    choice = _choice(content.get("choose") or {}, file)
    _check_words(words, choice, file)
    evaluations = _mapping(content.get("evaluations") or {"task": {}}, f"{file}: evaluations")
    for name in evaluations:
        check_name(name)
    texts = None
    if given := content.get("probe"):
        texts = _texts(_mapping(given, f"{file}: probe"), file)
    study = Study(
        file=file,
        base=base,
        output=output,
        seeds=_seeds(content.get("seeds", [1]), file),
        systems=systems,
        mixtures=mixtures,
        choice=choice,
        evaluations={
            name: (*words_of(_mapping(one or {}, f"{file}: evaluations.{name}")), *words)
            for name, one in evaluations.items()
        },
        texts=texts,
    )
    _check_settings(study)
    return study


def words_of(settings: Mapping[str, Any], prefix: str = "") -> tuple[str, ...]:
    """Nested or dotted settings as the words of a command line."""
    words: list[str] = []
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if key in GROUPS and isinstance(value, Mapping):
            words += words_of(value, f"{key}.")
        else:
            words.append(f"{key}={json.dumps(value, ensure_ascii=False)}")
    return tuple(words)


def _read_yaml(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise UserError(f"{file}: no such comparison file")
    with reading(str(file), "a comparison"):
        if file.stat().st_size > LARGEST:
            raise UserError(f"{file}: larger than {LARGEST} bytes; a comparison is a short file")
        try:
            content = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
            check_numerals(file.read_text("utf-8"), content, str(file), TEXTS)
        except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
            raise UserError(f"{file}: not valid YAML: {first_line(error)}") from error
    return _mapping(content, str(file))


def _systems(
    content: Mapping[str, Any], file: Path, base: Path, words: Sequence[str], output: str
) -> tuple[dict[str, tuple[Stage, ...]], dict[str, Mixture]]:
    given = _mapping(content.get("systems"), f"{file}: systems")
    systems: dict[str, tuple[Stage, ...]] = {}
    mixtures: dict[str, Mixture] = {}
    for name, one in given.items():
        check_name(name)
        where = f"{file}: systems.{name}"
        if isinstance(one, Mapping) and "merge" in one:
            mixtures[name] = _mixture(one, where, given)
            continue
        stages = one if isinstance(one, list) else [one]
        if not stages:
            raise UserError(f"{where}: a list of stages is empty; write {{}} for the base alone")
        systems[name] = tuple(_stage(part, where, base, words, output) for part in stages)
    if not systems:
        raise UserError(f"{file}: systems: no system is trained; name at least one")
    return systems, mixtures


def _stage(given: Any, where: str, base: Path, words: Sequence[str], output: str) -> Stage:
    given = dict(_mapping(given or {}, where))
    other = given.pop("extends", None)
    subspace = _prepared(given.pop("prepare", None), where, output)
    if other is not None and (not isinstance(other, str) or not other):
        raise UserError(f"{where}: extends: {brief(other)} should be the name of a file")
    file = Path(where.partition(": ")[0]).parent / from_home(other) if other else base
    own = (*words_of(given), subspace.word) if subspace else words_of(given)
    return Stage(file, (*own, *words), subspace)


def _prepared(given: Any, where: str, output: str) -> Subspace | None:
    if given is None:
        return None
    where = f"{where}: prepare"
    given = _mapping(given, where)
    _check_keys(given, ("subspace",), where, "prepare.")
    options = _mapping(given.get("subspace"), f"{where}.subspace")
    _check_keys(options, SUBSPACE, f"{where}.subspace", "")
    parallel = from_home(_a(str, options, "parallel", f"{where}.subspace"))
    return Subspace.of({**options, "parallel": parallel}, output)


def _mixture(given: Mapping[str, Any], where: str, systems: Mapping[str, Any]) -> Mixture:
    _check_keys(given, MERGE, where, "")
    parts = given["merge"]
    if not isinstance(parts, list) or len(parts) < 2:
        raise UserError(f"{where}: merge: {brief(parts)} should be a list of two systems or more")
    for part in parts:
        known = isinstance(part, str) and part in systems
        if not known or "merge" in (systems[part] or {}):
            raise UserError(f"{where}: merge: {brief(part)} is not a system that is trained here")
    weights = given.get("weights", [1.0] * len(parts))
    right = isinstance(weights, list) and all(type(one) in (int, float) for one in weights)
    if not right or len(weights) != len(parts):
        raise UserError(f"{where}: weights: {brief(weights)} should have a number for each system")
    options = {key: given[key] for key in RECIPE if given.get(key) is not None}
    recipe = Recipe(**{key: _option(value, key, where) for key, value in options.items()})
    try:  # now: the adapters may take hours
        check_recipe(recipe, list(zip(parts, weights, strict=True)))
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix('--')}") from error
    return Mixture(tuple(parts), tuple(map(float, weights)), recipe)


def _option(value: Any, key: str, where: str) -> Any:
    kind = RECIPE[key]
    if type(value) is not kind and type(value) is not int:  # blocks: 3, density: 1
        raise UserError(
            f"{where}: {key}: {brief(value)} should be {'an' if kind is int else 'a'} "
            f"{kind.__name__}"
        )
    return kind(value)


def _choice(given: Any, file: Path) -> Choice:
    given = dict(_mapping(given, f"{file}: choose"))
    grid = _mapping(given.pop("grid", {}), f"{file}: choose.grid")
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(
                f"{file}: choose.grid.{key}: {brief(values)} should be a list of values"
            )
    each = [words_of({key: value})[0] for key, values in grid.items() for value in values]
    by_key = [[word for word in each if word.startswith(f"{key}=")] for key in grid]
    # Judged by all languages alike; the groups of the evaluation may name others.
    return Choice(tuple(itertools.product(*by_key)), ("evaluate.groups={}", *words_of(given)))


def _check_words(words: Sequence[str], choice: Choice, file: Path) -> None:
    """Refuses words of the command line that would be lost: what the comparison itself decides."""
    decided = {"seed": "seeds", "output": "output"}
    decided |= dict.fromkeys(map(_key, choice.candidates[0]), "choose.grid")
    for key in map(_key, words):
        if key in decided:
            raise UserError(
                f"{key} is set for each run by {decided[key]} of {file}; change it there"
            )


def _key(word: str) -> str:
    return word.partition("=")[0].strip()


def _texts(given: Mapping[str, Any], file: Path) -> Texts:
    _check_keys(given, PROBE, f"{file}: probe", "probe.")
    rest = {key: given[key] for key in PROBE[1:] if key in given}
    if "languages" in rest:
        rest["languages"] = tuple(rest["languages"])
    return Texts(from_home(_a(str, given, "parallel", f"{file}: probe")), **rest)


def _seeds(given: Any, file: Path) -> tuple[int, ...]:
    right = isinstance(given, list) and given and all(type(one) is int for one in given)
    if not right or len(set(given)) < len(given):
        raise UserError(
            f"{file}: seeds: {brief(given)} should be a list of different whole numbers"
        )
    return tuple(given)


def _check_settings(study: Study) -> None:
    for name, stages in study.systems.items():
        for candidate in study.choice.candidates:
            for stage in stages:
                try:
                    config = stage.config(candidate)
                except UserError as error:
                    raise UserError(f"{study.file}: systems.{name}: {error}") from error
                if config.trainable == "full":
                    raise UserError(
                        f"{study.file}: systems.{name}: trainable=full writes a whole model, and "
                        "all systems share one base; compare adapters"
                    )
    for key, words in study.evaluations.items():
        for more in ((), study.choice.words):
            try:
                study.base.config([*words, *more])
            except UserError as error:
                raise UserError(f"{study.file}: evaluations.{key}: {error}") from error


def _check_keys(given: Mapping[str, Any], known: Sequence[str], where: str, prefix: str) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1, 0.0)[0]
            raise UserError(
                f"{where}: unknown key {brief(f'{prefix}{key}')}; did you mean {near!r}?"
            )


def _mapping(given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        raise UserError(f"{where}: {brief(given)} should be a mapping of names to values")
    return dict(given)


def _a(kind: type, given: Mapping[str, Any], key: str, where: Any) -> Any:
    value = given.get(key)
    if not isinstance(value, kind) or not value:
        raise UserError(f"{where}: {key}: {brief(value)} should be a {kind.__name__}")
    return value
