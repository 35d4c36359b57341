"""One system with one seed: where it is kept, and how its stages are trained.

trial = Trial('lens', 2, ('optim.learning_rate=0.001',))
trial.place('runs/compare/runs')         # runs/compare/runs/lens/optim.learning_rate=0.001/seed_2
outcome = train(study, trial, bases)     # goes on where it was stopped
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import jaxalign
from jaxalign.base import Base, open_base
from jaxalign.checksums import read_sealed, text_digest
from jaxalign.compare.study import Study
from jaxalign.errors import UserError
from jaxalign.merge.methods import Recipe
from jaxalign.merge.record import difference
from jaxalign.merge.run import merge
from jaxalign.paths import RECORD
from jaxalign.prepare.run import is_of_other_text, subspace
from jaxalign.settings import AUTO, Config
from jaxalign.terminal import say
from jaxalign.train.finish import ENDS
from jaxalign.train.record import saved
from jaxalign.train.resume import check_settings
from jaxalign.train.same import changes, other_inputs

CLOCK = 0.5  # seconds that a clock of the log may differ from a run's own
START = "adapter.start"  # what a later stage goes on from
LONGEST = 255  # bytes of a name in most file systems
# What decides when a run ends. `jaxalign train` may go on for longer; a comparison may not, as it
# keeps answers and mixtures of the adapter that was handed over.
LENGTH = ("train.steps", "train.epochs", "train.patience")


class Diverged(SystemExit):
    """A trial has no adapter, as its loss or weights became infinite; with its sentence."""


@dataclass(frozen=True)
class Trial:
    """One system, one seed, one candidate of the grid."""

    system: str
    seed: int
    candidate: tuple[str, ...] = ()

    def place(self, root: str | Path) -> Path:
        """Its folder; a candidate whose words cannot name one goes by their digest."""
        label = ",".join(self.candidate)
        if "/" in label or len(label.encode()) > LONGEST:
            label = f"{label[:40].replace('/', '_')}_{text_digest(label)[:8]}"
        return Path(root, self.system, label, f"seed_{self.seed}")

    def __str__(self) -> str:
        return ", ".join([self.system, *self.candidate, f"seed {self.seed}"])


@dataclass(frozen=True)
class Outcome:
    """What a trial left behind."""

    trial: Trial
    speaker: Trial  # by whose settings it is asked: itself; of a mixture the first of its parts
    config: Config  # of the speaker's last stage
    adapter: str
    outputs: tuple[Path, ...]  # of its stages; of a mixture those of its parts
    layer: int | None  # that its last aligned stage aligned
    # Trained ones of its last stage, with those of heads; None: a mixture, or an older run.
    parameters: int | None = None


@dataclass
class Bases:
    """The base that is in memory; another configuration of it is opened in its place."""

    opened: Base | None = None
    key: Any = None

    def under(self, config: Config) -> Base:
        """The base of this configuration."""
        model = config.model
        key = (model.path, model.revision, model.dtype, model.quantize, config.mesh)
        if self.opened is None or self.key != key:
            self.opened, self.key = None, key  # the other one's weights are let go first
            self.opened = open_base(config)
        return self.opened.under(config)


def configs(study: Study, trial: Trial) -> list[Config]:
    """The settings of its stages, each going on from the adapter of the one before."""
    place, found, start = trial.place(Path(study.output, "runs")), [], ""
    stages = study.systems[trial.system]
    for number, stage in enumerate(stages, 1):
        output = place if len(stages) == 1 else place / f"stage_{number}"
        words = [*trial.candidate, f"seed={trial.seed}", f"output={json.dumps(str(output))}"]
        if start:
            words.append(f"{START}={json.dumps(start)}")
        found.append(stage.config(words))
        start = f"{output}/adapter"
    return found


def prepare(study: Study, name: str, bases: Bases) -> None:
    """Writes what is missing of the files that a system's runs read, or is of another text.

    Raises:
      UserError: as of `jaxalign prepare subspace`.
    """
    for stage in study.systems[name]:
        if not (made := stage.subspace):
            continue
        config = stage.config()
        base = bases.under(config)
        if made.file.exists():
            if not is_of_other_text(made.file, base, **made.options):
                continue
            say(f"{name}: {made.file} was measured on other sentences")
        say(f"{name}: measuring {made.file}")
        subspace(config, out=str(made.file), base=base, **made.options)


def check_prepared(study: Study, name: str, bases: Bases) -> None:
    """Refuses to report a system whose prepared file is of other sentences than there are now.

    Raises:
      UserError: naming the file. Where base or sentences are gone, nothing is compared.
    """
    for stage in study.systems[name]:
        if not (made := stage.subspace) or not made.file.exists():
            continue
        other = False
        with contextlib.suppress(UserError):
            other = is_of_other_text(made.file, bases.under(stage.config()), **made.options)
        if other:
            raise UserError(
                f"{name}: {made.file} was measured on other sentences than "
                f"{made.options['parallel']} has now; set them back, or leave out --report: then "
                "it is measured again"
            )


def check_length(study: Study, trial: Trial) -> None:
    """Refuses a trial that was begun with another length than it should have now.

    Raises:
      UserError: naming the folder and both lengths.
    """
    if trial.place(Path(study.output, "runs")).exists():  # reading settings takes its time
        _check_length(configs(study, trial))


def _check_length(stages: Sequence[Config]) -> None:
    for config in stages:
        if others := _other_length(config, saved(config.output)):
            was, now = (", ".join(f"{one[0]}={one[side]}" for one in others) for side in (1, 2))
            raise UserError(
                f"{config.output} holds a run with {was}, but now {now} is asked for; set that "
                "back, or give another --out"
            )


def _other_length(config: Config, left: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, was, is) of what decides when a run ends and is not as in what it left."""
    if not left:
        return []
    found = changes(left["config"], dataclasses.asdict(config))
    return [one for one in found if one[0] in LENGTH]


def train(study: Study, trial: Trial, bases: Bases) -> Outcome:
    """Trains what is missing of a trial.

    Raises:
      UserError: as `jaxalign.train`; a folder that holds a run with other settings, or of another
        length.
      Diverged: a stage did.
      SystemExit: training was stopped on request; the exit code is the command's.
    """
    stages = configs(study, trial)
    _check_length(stages)  # another process may have trained it since the comparison began
    for config in stages:
        result = jaxalign.train(config, base=bases.under(config), title=str(trial))
        if result.stopped == "diverged":
            raise Diverged(f"{trial}: {result.sentence}")
        if not result.complete:  # half a run is nothing to compare
            raise SystemExit(result.exit_code)
    return outcome(study, trial)


def outcome(study: Study, trial: Trial) -> Outcome:
    """What a finished trial left behind."""
    stages = configs(study, trial)
    outputs = tuple(Path(config.output) for config in stages)
    layer = None
    for config in stages:
        if config.align.weight:
            said = config.align.layer
            layer = int(said if said != AUTO else _record(config)["config"]["align"]["layer"])
    parameters = _record(stages[-1]).get("parameters")
    return Outcome(trial, trial, stages[-1], f"{outputs[-1]}/adapter", outputs, layer, parameters)


def finished(study: Study, trial: Trial) -> bool:
    """Whether nothing of it is left to train, as far as its records say."""
    for config in configs(study, trial):
        record = _record(config)
        over = ENDS.get(record.get("stopped", ""), (1,))[0] == 0
        if not over or not Path(config.output, "adapter").is_dir():
            return False
        if _other_length(config, record):
            return False
    return True


def check_report(study: Study, trial: Trial) -> None:
    """Refuses a finished trial that was trained by other settings than the file has now.

    No rows are made: their files are compared by content, what else makes them by its words.

    Raises:
      UserError: naming the folder, the setting, and both values.
    """
    for config in configs(study, trial):
        record = _record(config)
        if config.align.layer == AUTO:  # the record has the one that was chosen
            config.align.layer = record["config"]["align"]["layer"]
        judged = record["best_step"] is not None
        check_settings(config, record, judged)
        if others := other_inputs(record, config, judged):
            key, was, now = others[0]
            raise UserError(
                f"{config.output} was trained with {key}={was}, now it is {now}; set it back, give "
                "the system another name, or leave out --report: then the rows are compared"
            )


def mix(study: Study, name: str, parts: list[Outcome]) -> Outcome:
    """The mixture of these outcomes, which share a seed; it is merged where it is not there.

    Raises:
      UserError: as of `mixed`.
    """
    trial = Trial(name, parts[0].trial.seed)
    adapter, paths, weights, recipe = _due(study, trial, parts)
    if not mixed(study, name, parts):
        merge(paths, weights, recipe, str(adapter), base=parts[0].config.model.path)
    outputs = tuple(output for part in parts for output in part.outputs)
    layer = next((part.layer for part in parts if part.layer is not None), None)
    return Outcome(trial, parts[0].speaker, parts[0].config, str(adapter), outputs, layer)


def mixed(study: Study, name: str, parts: list[Outcome]) -> bool:
    """Whether the mixture of these outcomes is merged already.

    Raises:
      UserError: what is there was made by another recipe, or of other adapters.
    """
    due = _due(study, Trial(name, parts[0].trial.seed), parts)
    adapter = due[0]
    if not (adapter / "adapter_config.json").exists():
        return False
    if other := difference(*due):
        raise UserError(
            f"{adapter} was merged with {other}; give the mixture {name!r} another name, or remove "
            f"that folder and its answers in {study.output}/answers"
        )
    return True


def _due(
    study: Study, trial: Trial, parts: list[Outcome]
) -> tuple[Path, list[str], tuple[float, ...], Recipe]:
    """The folder of a mixture, the adapters it is made of, their weights, how."""
    mixture = study.mixtures[trial.system]
    adapter = trial.place(Path(study.output, "runs")) / "adapter"
    recipe = dataclasses.replace(mixture.recipe, seed=trial.seed)
    return adapter, [part.adapter for part in parts], mixture.weights, recipe


def log_rows(output: Path, event: str) -> Iterator[dict[str, Any]]:
    """The lines of a run's log that tell of this event."""
    file = output / "log.jsonl"
    for line in file.read_text("utf-8").splitlines() if file.exists() else ():
        row = json.loads(line)
        if row["event"] == event:
            yield row


def cost(outputs: tuple[Path, ...]) -> dict[str, float | None]:
    """What the runs of these folders took.

    Returns:
      `flops`: at least, of all updates; `seconds`: of updates, without compilation, validation and
      saves; `wall_seconds`: with them; `gradient_cosine`: of task and alignment, mean over the
      updates that measured it. None where the log does not say it.
    """
    flops: list[float | None] = []
    seconds, wall, cosines = 0.0, 0.0, []
    for output in outputs:
        before = 0
        for row in log_rows(output, "train"):
            each = row.get("flops_per_step")
            flops.append(None if each is None else each * (row["step"] - before))
            before = row["step"]
            if row.get("gradient_cosine") is not None:
                cosines.append(row["gradient_cosine"])
        for row in _ends(log_rows(output, "goodput")):
            wall += row["goodput/seconds"]
            seconds += row["goodput/step"] * row["goodput/seconds"]
    return {
        "flops": sum(flops) if flops and None not in flops else None,  # type: ignore[arg-type]
        "seconds": seconds or None,
        "wall_seconds": wall or None,
        "gradient_cosine": float(np.mean(cosines)) if cosines else None,
    }


def _ends(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Of each process that worked at a run, the last line about its time."""
    last: dict[str, Any] = {}
    for row in rows:
        # A process counts from its start, and starts after the last line of the one before it.
        if last and row["time"] - row["goodput/seconds"] > last["time"] - CLOCK:
            yield last
        last = row
    if last:
        yield last


def _record(config: Config) -> dict[str, Any]:
    """What a run that is over recorded; {} of one that is not."""
    return read_sealed(Path(config.output, RECORD))
