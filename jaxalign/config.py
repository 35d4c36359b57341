"""One run's settings: defaults, then a sparse YAML file, then `key=value` words.

The defaults are those of `settings`; OmegaConf merges the layers and checks the types.

    loaded = load('configs/demo.yaml', ['align.layer=2', 'optim.learning_rate=1e-3'])
    loaded.config.align.layer     # 2
    loaded.rows()                 # every value with its origin: default, file or command line

A file may go on from another one: `extends: ../demo.yaml`, counted from its own folder.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from jaxalign.bounds import check_text, from_home
from jaxalign.errors import UserError, brief, first_line, reading
from jaxalign.numerals import check_numerals
from jaxalign.settings import MOVED, Config, abouts, check, flatten, renamed, settle_paths

LARGEST = 1 << 20  # bytes of a configuration
# `${demo:data/train.en.jsonl}`: a file of the demo, wherever the package is installed.
OmegaConf.register_resolver(
    "demo", lambda name: str(Path(__file__).parent / "demo" / "assets" / name), replace=True
)


def load(path: str | Path | None, words: Sequence[str] = ()) -> Loaded:
    """Defaults, then the YAML file (behind what it extends), then `key=value` words, checked.

    Raises:
      UserError: a file that is not there or not YAML, an unknown key (the nearest is named), a
        value of the wrong type or outside its choices, settings that contradict each other.
    """
    layers = [] if path is None else [(*one, _whole(one[1])) for one in _read_files(Path(path))]
    wrong = [word for word in words if "=" not in word or word.startswith(("=", "-"))]
    if wrong:
        raise UserError(
            f"{brief(wrong[0])} is not a setting; write key=value, as in align.layer=16"
        )
    layers.append(("command line", *_read_words(words)))
    merged = copy.deepcopy(_defaults())
    origins: dict[str, str] = {}
    for origin, layer, whole in layers:
        with reading(origin, "settings"):
            keys = _check_keys(layer, origin)
            for mapping in whole:  # another one replaces it, they do not join
                OmegaConf.update(merged, mapping, {}, merge=False)
                for key in [one for one in origins if f"{one}.".startswith(f"{mapping}.")]:
                    del origins[key]
            for key in keys:
                origins[key] = origin
                if key in _switches() and OmegaConf.select(layer, key) is False:
                    OmegaConf.update(layer, key, "off")
            try:
                merged.merge_with(layer)
            except OmegaConfBaseException as error:
                raise _wrong_value(error, origin) from error
    with reading(str(path or "command line"), "settings"):
        try:
            config = cast(Config, OmegaConf.to_object(merged))
        except OmegaConfBaseException as error:  # ${...} that leads nowhere
            origin = origins.get(str(getattr(error, "full_key", "")), str(path or "command line"))
            raise _wrong_value(error, origin) from error
    check(config)
    settle_paths(config)
    return Loaded(config, origins)


@dataclass
class Loaded:
    """A configuration and where its values come from (keys absent here are defaults)."""

    config: Config
    origins: dict[str, str]

    def rows(self) -> list[tuple[str, Any, str]]:
        """(key, value, origin) of every setting."""
        return [
            (key, value, self._origin(key))
            for key, value in flatten(dataclasses.asdict(self.config))
        ]

    def _origin(self, key: str) -> str:
        named = [k for k in self.origins if key == k or key.startswith(k + ".")]
        return self.origins[max(named, key=len)] if named else "default"


def saved(settings: dict[str, Any]) -> Config:
    """The configuration that a run saved, as nested dicts.

    Settings of another version of this package, which mean nothing here, are passed over.
    """

    def known(given: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
        return {
            key: known(value, default[key]) if isinstance(value, dict) and default[key] else value
            for key, value in given.items()
            if key in default
        }

    merged = OmegaConf.merge(_defaults(), known(renamed(settings), dataclasses.asdict(Config())))
    return cast(Config, OmegaConf.to_object(merged))


def saved_in(file: Path) -> Config:
    """The configuration that a run wrote into its folder, where all of it means something here.

    Raises:
      UserError: a file that is not one.
    """
    with reading(str(file), "a configuration"):
        layer = renamed(_plain(_read_yaml(file)))
        _check_keys(cast(DictConfig, OmegaConf.create(layer)), str(file))
        try:
            return saved(layer)
        except OmegaConfBaseException as error:
            raise _wrong_value(error, str(file)) from error


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML, which `load` reads as the same again."""
    return as_yaml(dataclasses.asdict(config))


def as_yaml(settings: dict[str, Any]) -> str:
    """Some settings, as nested dicts, as YAML; what looks like a reference stays the text it is."""
    return OmegaConf.to_yaml(OmegaConf.create(_escaped(settings)))


def _escaped(value: Any) -> Any:
    """The value with `${` as the text that it is, not as a reference."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    if isinstance(value, dict):
        return {_escaped(name): _escaped(item) for name, item in value.items()}
    return value


def _read_files(path: Path) -> list[tuple[str, DictConfig]]:
    """(name, what it sets) of a file and of those that it goes on from, the first one in front.

    Raises:
      UserError: as `_read_yaml`; a file that comes back to itself.
    """
    layers: list[tuple[str, DictConfig]] = []
    seen: list[Path] = []
    while True:
        layer = _read_yaml(path)
        layers.insert(0, (str(path), layer))
        seen.append(path.resolve())
        with reading(str(path), "settings"):
            other = layer.pop("extends", None)
        if other is None:
            return layers
        if not isinstance(other, str) or not other:
            raise UserError(f"{path}: extends: {brief(other)} should be the name of a file")
        path = path.parent / from_home(other)
        if path.resolve() in seen:
            raise UserError(f"{seen[-1]}: extends: {other} comes back to itself; remove the line")


def _read_yaml(path: Path) -> DictConfig:
    import yaml

    if not path.is_file():
        raise UserError(f"{path}: no such configuration file")
    with reading(str(path), "a configuration"):
        if path.stat().st_size > LARGEST:
            raise UserError(f"{path}: larger than {LARGEST} bytes; a configuration is a short file")
        try:
            found = OmegaConf.load(path)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f":{mark.line + 1}" if mark else ""
            problem = getattr(error, "problem", None) or first_line(error)
            raise UserError(f"{path}{line}: not valid YAML: {problem}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not text in UTF-8; save it as UTF-8") from error
        except OmegaConfBaseException as error:
            raise _wrong_value(error, str(path)) from error
        if not isinstance(found, DictConfig):
            raise UserError(f"{path}: a configuration is a mapping of keys to values")
        check_numerals(path.read_text("utf-8"), _plain(found), str(path), _texts())
    return found


def _read_words(words: Sequence[str]) -> tuple[DictConfig, list[str]]:
    """What the words set together, and the free mappings that one of them writes whole."""
    layer, whole = OmegaConf.create(), list[str]()
    for word in words:
        check_text("command line", word, nul="refused")
        key, _, value = word.partition("=")
        if not value and key in _texts():  # a shell takes the quotes of key="" away
            word = f"{key}=''"
        try:
            one = OmegaConf.from_dotlist([word])
            found = _plain(OmegaConf.from_dotlist([f"value={value}"]))["value"]
            if key in _texts() and _is_number(found):
                # 2026_11 is a name here, not the number 202611.
                one = OmegaConf.from_dotlist([f"{key}={json.dumps(value)}"])
            else:
                check_numerals(value, found, "command line", key=key)
            for mapping in _whole(one, key):
                whole.append(mapping)
                OmegaConf.update(layer, mapping, {}, merge=False)
            # Two mappings give a mapping; the signature covers lists, too.
            layer = cast(DictConfig, OmegaConf.merge(layer, one))
        except UserError:
            raise
        except Exception as error:  # of YAML, of OmegaConf, of Python's numbers
            raise UserError(f"command line: cannot read {brief(word)}; quote the value") from error
    return layer, whole


def _whole(layer: DictConfig, word: str = "") -> list[str]:
    """The free mappings (`task.columns`) that a layer writes from brace to brace.

    Args:
      word: the key of a word: that of `task.columns.text=utterance` sets one name of a mapping.
    """
    tree = _plain(layer)
    found = []
    for key, default in _known().items():
        group, _, name = key.partition(".")
        part = tree.get(group)
        if default == {} and isinstance(part, dict) and isinstance(part.get(name), dict):
            found += [] if word.startswith(f"{key}.") else [key]
    return found


def _wrong_value(error: OmegaConfBaseException, origin: str) -> UserError:
    key = getattr(error, "full_key", None) or "a value"
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(_known().get(key), list):
        reason = f"not a list; write {key}=[one,two]"
    return UserError(f"{origin}: {key}: {reason[:200]}")


def _check_keys(layer: DictConfig, origin: str) -> list[str]:
    """The keys that a layer sets; each is a text and known."""
    keys = []
    for key, value in _walk(_plain(layer), origin):
        _check_known(key, origin)
        wanted = _known().get(key)
        if isinstance(wanted, dict) and isinstance(value, list):
            raise UserError(f"{origin}: {key}: not a mapping; write {{name: value}}")
        # YAML 1.1 reads no, off and y, all of them codes of languages, as true or false.
        codes = isinstance(wanted, list) or key.startswith("evaluate.groups.")
        if codes and isinstance(value, list) and any(map(_is_bool, value)):
            raise UserError(
                f"{origin}: {key}: YAML reads a word of this list as true or false; put it into "
                "quotes, as in 'no'"
            )
        if isinstance(value, bool) and key in _texts() - _switches():
            raise UserError(
                f"{origin}: {key} is text, and YAML reads this word as {str(value).lower()}; "
                "put it into quotes, as in 'no' (a shell needs \"'no'\"), or write null for none"
            )
        keys.append(key)
    return keys


def _walk(tree: dict[Any, Any], origin: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of nested dicts, as `flatten` does it, for what a user wrote."""
    for name, value in tree.items():
        if not isinstance(name, str):
            shown = "null" if name is None else str(name)
            if not prefix:
                _check_known(shown, origin)
            raise UserError(f"{origin}: {prefix}{shown}: this key is not text; put it into quotes")
        if isinstance(value, dict) and value:
            yield from _walk(value, origin, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _plain(layer: DictConfig) -> dict[Any, Any]:
    return cast(dict, OmegaConf.to_container(layer))


@cache
def _defaults() -> DictConfig:
    """Every setting with its type, to be copied: making it takes five times as long."""
    return cast(DictConfig, OmegaConf.structured(Config))


@cache
def _known() -> dict[str, Any]:
    return dict(flatten(dataclasses.asdict(Config())))


@cache
def _texts() -> set[str]:
    """The keys whose value is text, which may be empty; null is what is not given."""
    return {key for key, value in _known().items() if value is None or isinstance(value, str)}


@cache
def _switches() -> set[str]:
    """The keys that may be `off`, which YAML 1.1 reads as false."""
    return {key for key, about in abouts() if "off" in about.bounds.choices}


def is_known(key: str) -> bool:
    """Whether a key is a setting, or a name within one such as `task.columns.text`."""
    known = _known()
    # Free-form dictionaries (columns, options) are known by their own key alone.
    return key in known or any(key.startswith(f"{k}.") and v == {} for k, v in known.items())


def _check_known(key: str, origin: str) -> None:
    if key in MOVED:
        raise UserError(f"{origin}: {key} is called {MOVED[key]} now; change its name")
    if is_known(key):
        return
    known = _known()
    if any(k.startswith(key + ".") for k in known):
        raise UserError(f"{origin}: {key} is a group of settings; set one of its keys")
    near = difflib.get_close_matches(key[:60], known, 1, 0.0)[0]
    raise UserError(f"{origin}: unknown setting {brief(key)}; did you mean {near!r}?")
