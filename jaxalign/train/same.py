"""Is this the run that was saved? Every setting must be as it was, but for those named here.

sentence = differences(then, now, judged=True)      # '' where it is the same run
digest_of(stream)                                   # the rows themselves, not their file names
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from jaxalign.base import Base
from jaxalign.bounds import from_home
from jaxalign.checksums import text_digest
from jaxalign.data import sources
from jaxalign.data.tokenizer import tokenizer_digest
from jaxalign.errors import UserError
from jaxalign.hf.find import holds_weights, small_files
from jaxalign.hf.load import fingerprint
from jaxalign.hf.peft import weights_digest
from jaxalign.named import code_digest
from jaxalign.paths import is_remote
from jaxalign.settings import Config, flatten, renamed
from jaxalign.train.phases import PHASES
from jaxalign.train.phases.measured import FILE, is_file

# A group ends in a dot. What is not here must not change.
FREE = {
    "output": "a run's folder may move",
    "model.path": "the base is compared by content, its folder may move",
    "model.revision": "the base is compared by content",
    "model.remat": "computes the same with other memory",
    "model.attention": "computes the same with another kernel",
    "task.train": "rows are compared by content, files may move",
    "task.columns": "as task.train",
    "task.languages": "as task.train",
    "task.transforms": "as task.train",
    "evaluate.groups": "for `jaxalign evaluate` alone, as are the next",
    "evaluate.rows": "",
    "evaluate.shots": "",
    "evaluate.draws": "",
    "align.train": "as task.train",
    "align.columns": "as task.train",
    "align.languages": "as task.train",
    "align.transforms": "as task.train",
    "train.steps": "going on for longer; see `resume.py` for learning rates that depend on it",
    "train.epochs": "as train.steps",
    "train.eval_every": "when to look changes nothing that is seen",
    "train.patience": "when to stop",
    "train.max_skipped": "when to stop",
    "train.log_every": "logging",
    "train.cosine_every": "logging",
    "train.warm_up": "when programs are compiled",
    "checkpoint.": "what is kept",
    "mesh.": "where arrays are; the rows of an update stay the same",
    "log.": "logging",
}
# Free until something was judged: numbers measured otherwise say nothing about the best so far.
JUDGE = {
    "task.valid": "rows are compared by content",
    "align.valid": "as task.valid",
    "train.eval_batches": "another part of the validation rows",
    "train.metric": "another number",
    "train.goal": "another direction",
}
# As JUDGE where answers are written during training (evaluate.sample), else free.
SAMPLE = {
    "evaluate.": "what answers are judged by",
    "generate.": "how they are written",
}
# Of a row: they follow from the rest, or from a setting.
NOT_READ = ("origin", "whole", "text", "languages", "everything")
BY_CONTENT = ("task.valid", "align.valid")  # once rows are read, their digests are compared
# Of task and align: what makes rows.
FILES = ("train", "valid")
MADE = ("columns", "languages", "transforms")
SAMPLED = "evaluate.data"  # read by a run with evaluate.sample
CODE = "code of "  # before a setting that names a function of one's own


def differences(
    then: dict[str, Any], now: dict[str, Any], judged: bool
) -> list[tuple[str, Any, Any]]:
    """(key, was, is) of every setting in which a run differs from what was saved.

    Args:
      then: the saved configuration as nested dicts; what an older version did not save was at its
        default.
      now: the one that is asked for.
      judged: whether a best checkpoint was chosen already.
    """
    sampled = any(side.get("evaluate", {}).get("sample", 0) for side in (then, now))
    free = [*FREE, *BY_CONTENT]
    free += [] if judged else [*JUDGE]
    free += [] if judged and sampled else [*SAMPLE]
    return [one for one in changes(then, now) if not any(_covers(name, one[0]) for name in free)]


def changes(then: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, was, is) of every setting that is not as it was saved, free ones too.

    Args:
      then, now: as of `differences`.
    """
    defaults = dict(flatten(dataclasses.asdict(Config())))
    old, new = (dict(flatten(_nameless(side))) for side in (renamed(then), now))
    found = []
    for key in old | new:
        was, wanted = (side.get(key, defaults.get(key, "nothing")) for side in (old, new))
        was = from_home(was)  # earlier versions saved the `~` of a path
        if was != wanted:
            found.append((key, was, wanted))
    return found


def inputs_of(config: Config, base: Base | None = None) -> dict[str, str]:
    """{'task.train': SHA-256, 'model.path': ..., ...}: what a run reads, known by what is in it.

    What is gone, or cannot be reached, is not there.

    Args:
      config: the run.
      base: its base, where it is opened: it knows its fingerprint.
    """
    place = (config.model.path, config.model.revision)
    reads: dict[str, Callable[[], str]] = {
        "model.path": lambda: base.fingerprint if base else _fingerprint_at_hand(*place),
        "tokenizer": partial(tokenizer_digest, *place),
    }
    reads |= {key: partial(sources.digest_of, named) for key, named in _sources(config).items()}
    for key, name in (_objectives(config) | _transforms(config)).items():
        reads[CODE + key] = partial(code_digest, name)
    found = {}
    for key, read in reads.items():
        with contextlib.suppress(UserError):
            found[key] = read()
    return {key: digest for key, digest in found.items() if digest}


def _sources(config: Config) -> dict[str, list[str]]:
    """Key of an input -> the sources that it is read from."""
    found = {"options": _files_in(dataclasses.asdict(config))}
    for part in ("task", "align"):
        for name in FILES if getattr(config, part).weight else ():
            found[f"{part}.{name}"] = getattr(getattr(config, part), name)
    return found | ({SAMPLED: config.evaluate.data} if config.evaluate.sample else {})


def _fingerprint_at_hand(path: str, revision: str | None) -> str:
    """A base's fingerprint; '' where the hub has its weights: none are fetched to be compared."""
    here = is_remote(path) or holds_weights(small_files(path, revision))
    return fingerprint(path, revision) if here else ""


def other_inputs(saved: dict[str, Any], now: Config, judged: bool) -> list[tuple[str, Any, Any]]:
    """(key, was, is) of what is read and is not what a run that is over has read.

    It is compared by content, and by its name where one side has no digest. A record of an earlier
    version, whose digests say nothing of names, holds for the names in its settings.

    Args:
      saved: the run's record: its `config`, and `inputs` as of `inputs_of`.
      judged: as of `differences`; else validation rows may be others.
    """
    then, asked = renamed(saved["config"]), dataclasses.asdict(now)
    old, new, found = saved.get("inputs", {}), inputs_of(now), []
    read_from = _sources(now)

    def nameless(key: str) -> bool:
        return old[key] == sources.digest_of(read_from.get(key, []), names=False)

    keys = ["model.path", "tokenizer", "options"]
    for part in ("task", "align"):
        keys += [f"{part}.{name}" for name in (*FILES, *MADE) if getattr(now, part).weight]
    keys += [SAMPLED] if now.evaluate.sample and judged else []
    keys += [key for key in new if key in old and key.startswith(CODE)]
    for key in keys:
        was, wanted = _named(then, key), _named(asked, key)
        if key in old and key in new:
            if old[key] == new[key] or (was == wanted and nameless(key)):
                continue
            was, wanted = (f"content of SHA-256 {side[key][:12]}..." for side in (old, new))
        if was != wanted and (judged or not key.endswith(".valid")):
            found.append((key, was, wanted))
    return found


def _named(tree: dict[str, Any], key: str) -> Any:
    """What a configuration calls an input; a tokenizer goes by the base's name."""
    if key == "options":
        return _files_in(tree)
    part, _, name = key.partition(".")
    if not name or key.startswith(CODE):
        return ""
    default = getattr(getattr(Config(), part), name)
    return tree.get(part, {}).get(name, default)


def code_of(config: Config) -> dict[str, str]:
    """Setting -> digest of the code of an objective of one's own; transforms make rows, which
    are compared themselves."""
    digests = {key: code_digest(name) for key, name in _objectives(config).items()}
    return {key: digest for key, digest in digests.items() if digest}


def _objectives(config: Config) -> dict[str, str]:
    """Setting -> the objective that it names, of phases that are on."""
    return {
        f"{key}.objective": part.objective
        for facts in PHASES.values() if facts.part(config).weight
        for key, part in facts.objectives(config)
    }  # fmt: skip


def _transforms(config: Config) -> dict[str, str]:
    """Setting -> the transform that it names, of phases that are on."""
    return {
        f"{name}.transforms[{number}]": str(one.get("name") if isinstance(one, dict) else one)
        for name, facts in PHASES.items() if facts.part(config).weight
        for number, one in enumerate(facts.part(config).transforms)
    }  # fmt: skip


def _files_in(value: Any) -> list[str]:
    """The files that options of objectives name, `{file: x.npz}`, in their order."""
    if is_file(value):
        return [str(value[FILE])]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [file for one in inner for file in _files_in(one)]


def digest_of(stream: Any) -> str:
    """SHA-256 of a stream's rows as tokens, in their order; their files' names do not matter."""
    digest = hashlib.sha256()
    for row in stream.rows:
        for name, value in vars(row).items():
            if name not in NOT_READ:
                content = value.tobytes() if isinstance(value, np.ndarray) else str(value).encode()
                digest.update(f"{name}:{len(content)}:".encode())
                digest.update(content)
    return digest.hexdigest()


def began_from(config: Config) -> str:
    """Digest of the adapter that a run begins from; '' of one that begins anew or is gone."""
    try:
        return weights_digest(config.adapter.start) if config.adapter.start else ""
    except UserError:
        return ""


def same_start(saved: dict[str, Any], config: Config) -> bool | None:
    """Whether `adapter.start` holds the adapter that a run began from; None where it is not known.

    Args:
      saved: a checkpoint's meta or a run's record.
    """
    known, now = saved.get("began_from"), began_from(config)
    return known == now if known and now else None


def digests(run: Any) -> dict[str, str]:
    """Of a run's rows, `train/task`, `valid/align`, ..., `sample/evaluate.data`, files,
    `options/lens.subspace`, of how rows are packed, `packed/task`, and of objectives of one's own,
    `code/align.objective`."""
    parts = {"train": run.train, "valid": run.valid}
    found = {f"options/{name}": one.digest for name, (_, one) in run.measured.items()}
    found |= {f"code/{key}": digest for key, digest in code_of(run.config).items()}
    if run.sample:
        found[f"sample/{SAMPLED}"] = run.sample
    for name, stream in run.train.items():
        if stream.packed:
            found[f"packed/{name}"] = text_digest(repr(stream.packed))
    return found | {
        f"{part}/{name}": digest_of(stream)
        for part, streams in parts.items()
        for name, stream in streams.items()
    }


def _nameless(value: Any) -> Any:
    """Settings without the names of objectives' files: their digests are compared."""
    if isinstance(value, list):
        return [_nameless(one) for one in value]
    if is_file(value):
        return {FILE: ""}
    if isinstance(value, dict):
        return {name: _nameless(one) for name, one in value.items()}
    return value


def _covers(name: str, key: str) -> bool:
    return key.startswith(name) if name.endswith(".") else key == name or key.startswith(name + ".")
