"""One run's settings: defaults, then a sparse YAML file, then `key=value` words.

The defaults are those of `settings`; OmegaConf merges the layers and checks the types.

    loaded = load('configs/demo.yaml', ['align.layer=2', 'optim.learning_rate=1e-3'])
    loaded.config.align.layer     # 2
    loaded.rows()                 # every value with its origin: default, file or command line
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from jaxalign.bounds import check_text
from jaxalign.errors import UserError
from jaxalign.settings import Config, check, flatten

# `${demo:data/train.en.jsonl}`: a file of the demo, wherever the package is installed.
OmegaConf.register_resolver(
    "demo", lambda name: str(Path(__file__).parent / "demo" / "assets" / name), replace=True
)


def load(path: str | Path | None, words: Sequence[str] = ()) -> Loaded:
    """Defaults, then the YAML file, then `key=value` words, merged and checked.

    Raises:
      UserError: a file that is not there or not YAML, an unknown key (the nearest is named), a
        value of the wrong type or outside its choices, settings that contradict each other.
    """
    layers = []
    if path is not None:
        layers.append((str(path), _read_yaml(Path(path))))
    wrong = [word for word in words if "=" not in word or word.startswith(("=", "-"))]
    if wrong:
        raise UserError(f"{wrong[0]!r} is no setting; write key=value, as in align.layer=16")
    layers.append(("command line", _read_words(words)))
    merged = OmegaConf.structured(Config)
    origins: dict[str, str] = {}
    for origin, layer in layers:
        for key in _leaves(layer):
            _check_known(key, origin)
            origins[key] = origin
        if "groups" in (_plain(layer).get("evaluate") or {}):
            merged.evaluate.groups = {}  # other groups replace these, they do not join them
        try:
            merged = OmegaConf.merge(merged, layer)
        except OmegaConfBaseException as error:
            raise _wrong_value(error, origin) from error
    try:
        config = cast(Config, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:  # ${...} that leads nowhere
        origin = origins.get(str(getattr(error, "full_key", "")), str(path))
        raise _wrong_value(error, origin) from error
    check(config)
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
        return self.origins[named[0]] if named else "default"


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _read_yaml(path: Path) -> DictConfig:
    import yaml

    if not path.is_file():
        raise UserError(f"{path}: no such configuration file")
    try:
        found = OmegaConf.load(path)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not readable"
        raise UserError(f"{path}{line}: not valid YAML: {problem}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not text in UTF-8; save it as UTF-8") from error
    if not isinstance(found, DictConfig):
        raise UserError(f"{path}: a configuration is a mapping of keys to values")
    return found


def _read_words(words: Sequence[str]) -> DictConfig:
    import yaml

    layer = OmegaConf.create()
    for word in words:
        check_text("command line", word)
        try:
            # Two mappings give a mapping; the signature covers lists, too.
            layer = cast(DictConfig, OmegaConf.merge(layer, OmegaConf.from_dotlist([word])))
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise UserError(f"command line: cannot read {word!r}; quote the value") from error
    return layer


def _wrong_value(error: OmegaConfBaseException, origin: str) -> UserError:
    key = getattr(error, "full_key", None) or "a value"
    reason = str(error).splitlines()[0]
    if isinstance(_known().get(key), list):
        reason = f"not a list; write {key}=[one,two]"
    return UserError(f"{origin}: {key}: {reason}")


def _leaves(layer: DictConfig) -> list[str]:
    return [key for key, _ in flatten({str(k): v for k, v in _plain(layer).items()})]


def _plain(layer: DictConfig) -> dict[Any, Any]:
    return cast(dict, OmegaConf.to_container(layer))


def _known() -> dict[str, Any]:
    return dict(flatten(dataclasses.asdict(Config())))


def _check_known(key: str, origin: str) -> None:
    known = _known()
    # Free-form dictionaries (columns, options) are known by their own key alone.
    if key in known or any(key.startswith(k + ".") and v == {} for k, v in known.items()):
        return
    if any(k.startswith(key + ".") for k in known):
        raise UserError(f"{origin}: {key} is a group of settings; set one of its keys")
    near = difflib.get_close_matches(key, known, 1, 0.0)[0]
    raise UserError(f"{origin}: unknown setting {key!r}; did you mean {near!r}?")
