"""A run that is over leaves a record; the same command finds it and leaves everything as it is.

result = over(config, desk)          # None: there is something to train
write(desk, run, start, progress, result)
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxalign.checksums import check_sums, read_sealed, seal, seal_holds
from jaxalign.errors import UserError
from jaxalign.multihost import is_main, text_from_main
from jaxalign.paths import RECORD, Desk, whole_file
from jaxalign.settings import Config
from jaxalign.train.finish import Result, product
from jaxalign.train.resume import Progress, Start, check_settings
from jaxalign.train.same import other_inputs
from jaxalign.train.setup import Run
from jaxalign.train.stored import Damaged, Place, local_places, read_meta


def over(config: Config, desk: Desk) -> Result | None:
    """The result of a run that has ended, where this command would only repeat it.

    Nothing heavy is read: settings of another run are refused before any weight is loaded.

    Raises:
      UserError: the output holds a run with other settings, or it may not be resumed.
    """
    answer = {}
    if is_main():
        try:
            answer = _look(config, desk)
        except UserError as error:
            answer = {"error": str(error)}
    answer = json.loads(text_from_main(json.dumps(answer)))
    if "error" in answer:
        raise UserError(answer["error"])
    return Result(**answer["result"], repeated=True) if answer else None


def write(desk: Desk, run: Run, start: Start, progress: Progress, result: Result) -> None:
    """Records a run that is over; process 0 writes."""
    if not is_main():
        return
    content = {
        "run": start.identity,
        "began_from": start.began_from,
        "stopped": result.stopped,
        "step": result.step,
        "best_step": result.best_step,
        "metrics": result.metrics,
        "waited": progress.waited,
        "parameters": run.trained_count,
        "config": dataclasses.asdict(run.config),
        "inputs": run.inputs,
    }
    text = json.dumps(seal(content), indent=1, ensure_ascii=False)
    with whole_file(Path(desk.folder, RECORD)) as file:
        file.write_text(text + "\n", "utf-8")


def chosen_layer(output: str) -> int | None:
    """The `align.layer` of the run in this output, if one is there; every process calls it."""
    meta = _furthest(local_places(output)) if is_main() else {}
    found = text_from_main(str(int(meta["config"]["align"]["layer"])) if meta else "")
    return int(found) if found else None


def saved(output: str) -> dict[str, Any]:
    """What a run in this folder left with its settings as `config`: the record of one that is
    over, else the meta of its furthest checkpoint; {} where there is neither."""
    return read_sealed(Path(output, RECORD)) or _furthest(local_places(output))


def _furthest(places: Sequence[Place]) -> dict[str, Any]:
    """The meta of the first of these checkpoints that has one as it was written; else {}."""
    for place in places:
        with contextlib.suppress(Damaged):  # whoever reads its arrays says so
            return read_meta(place)
    return {}


def _look(config: Config, desk: Desk) -> dict[str, Any]:
    record = _read(desk)
    known = local_places(desk.output)
    if config.checkpoint.resume == "never" and (record or known):
        step = record["step"] if record else known[0].step
        raise UserError(
            f"{desk.output} holds a run at step {step}; choose another output, or "
            "checkpoint.resume=auto to go on with it"
        )
    if not record:
        if meta := _furthest(known):
            check_settings(config, meta, meta["progress"].get("best") is not None)
        return {}
    check_settings(config, record, record["best_step"] is not None)
    if _goes_on(config, record):
        if not known:
            raise UserError(
                f"{desk.output} holds a run that ended at step {record['step']} and no checkpoint "
                "to go on from; choose another output"
            )
        return {}
    if others := other_inputs(record, config, record["best_step"] is not None):
        if not known:
            key, was, now = others[0]
            raise UserError(
                f"{desk.output} was trained with {key}={was}, now it is {now}, and no checkpoint "
                "is left to compare with; set it back, or choose another output"
            )
        return {}  # base and rows are compared with the checkpoint's
    name = product(config)
    if not _whole(desk, name):
        return {}  # handed over once more, from the checkpoints
    result = Result(
        adapter=f"{desk.output}/{name}",
        step=record["step"],
        best_step=record["best_step"],
        metrics=record["metrics"],
        stopped=record["stopped"],
    )
    answer = dataclasses.asdict(result)
    del answer["repeated"]
    return {"result": answer}


def _goes_on(config: Config, record: dict[str, Any]) -> bool:
    """Whether this command asks for more than what was done."""
    then, now = record["config"]["train"], config.train
    if record["stopped"] == "patience":
        return not now.patience or now.patience > record["waited"]
    return (then["steps"], then["epochs"]) != (now.steps, now.epochs)


def _read(desk: Desk) -> dict[str, Any] | None:
    """The record; one that is damaged says nothing."""
    try:
        content = json.loads(desk.read(RECORD) or b"")
    except ValueError:
        return None
    return content if isinstance(content, dict) and seal_holds(content) else None


def _whole(desk: Desk, name: str) -> bool:
    """Whether what the run handed over is still there and as it was written."""
    marker = "adapter_config.json" if name == "adapter" else "config.json"
    if desk.read(f"{name}/{marker}") is None:
        return False
    try:
        check_sums(desk.folder / name)
    except UserError:
        return False
    return True
