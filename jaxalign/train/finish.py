"""How a run ends: the weights that it hands over, and what it says to the shell.

result = finish(run, desk, store, start, state, step, progress, 'finished')
result.adapter, result.exit_code, result.sentence
"""

from __future__ import annotations

import signal
from dataclasses import dataclass, field

from jaxalign.data.template import TOKENIZER_FILE, template_files, trained_with
from jaxalign.generate.stops import taught_stops
from jaxalign.hf.find import pinned
from jaxalign.hf.generation import GENERATION_FILE, generation_files
from jaxalign.hf.peft import save_peft
from jaxalign.hf.save import save_base
from jaxalign.multihost import barrier
from jaxalign.paths import Desk
from jaxalign.settings import Config
from jaxalign.train.checkpoint import Checkpoints
from jaxalign.train.resume import Progress, Start
from jaxalign.train.setup import Run
from jaxalign.train.state import TrainState, without_heads

# What a run may end with: the exit code, and how a sentence begins. A cluster takes 0 for a run
# that is over and starts no other try, hence the codes of a program that a signal ended.
ENDS = {
    "finished": (0, "finished"),
    "patience": (0, "stopped early"),
    "signal": (128 + signal.SIGTERM, "stopped on request"),
    "interrupt": (128 + signal.SIGINT, "stopped on request"),
    "diverged": (1, "diverged"),
}


@dataclass
class Result:
    """What a run leaves behind."""

    adapter: str  # PEFT folder, or under full fine-tuning a model folder
    step: int  # updates done
    best_step: int | None  # of the exported weights, where validation chose them
    metrics: dict[str, float] = field(default_factory=dict)  # the last (or best) validation
    stopped: str = "finished"  # a key of ENDS
    repeated: bool = False  # the run was over before: nothing was done
    why: str = ""  # of a run that diverged

    @property
    def complete(self) -> bool:
        """Whether the run is over, and `adapter` holds what it was for."""
        return self.exit_code == 0

    @property
    def exit_code(self) -> int:
        """Of the command."""
        return ENDS[self.stopped][0]

    @property
    def sentence(self) -> str:
        """For the reader."""
        if self.why:
            return self.why
        how = f"{ENDS[self.stopped][1]} at step {self.step}"
        if not self.complete:
            return f"{how}; the same command goes on from there"
        if not self.repeated:
            return f"{how}; written: {self.adapter}"
        more = "train.steps" if self.stopped == "finished" else "train.patience"
        return (
            f"{how} before, nothing was trained or changed: {self.adapter}; raise {more} to "
            "continue, or choose another output to start over"
        )


def product(config: Config) -> str:
    """The folder of what a run hands over."""
    return "model" if config.trainable == "full" else "adapter"


def finish(
    run: Run,
    desk: Desk,
    store: Checkpoints,
    start: Start,
    state: TrainState,
    step: int,
    progress: Progress,
    stopped: str,
) -> Result:
    """Exports the best weights (the last ones where nothing was validated).

    A run that was stopped on request exports nothing: a machine that goes away gives seconds, and
    half a run must not look like a whole one. `jaxalign export` takes its checkpoint.

    Raises:
      UserError: the best weights are not intact.
    """
    name = product(run.config)
    result = Result(f"{desk.output}/{name}", step, progress.best_step, progress.metrics, stopped)
    if not result.complete:
        return result
    if progress.best_step is not None and progress.best_step != step:
        state = store.best_weights(run.abstract_state, progress.best_step, start.identity).state
    folder = desk.folder / name
    # Prompts must look as they did in training, whoever builds them.
    template = trained_with(run.base.tokenizer, run.config)
    if run.adapter:
        save_peft(
            folder,
            without_heads(state.trained),
            run.spec,
            run.adapter,
            base_name=pinned(run.config.model.path, run.config.model.revision),
            texts=template_files(template),
        )
    else:
        base = run.base.opened.files
        taught = taught_stops(run.base.tokenizer, template.text)
        save_base(
            folder,
            without_heads(state.trained),
            run.spec,
            tokenizer_from=base,
            texts=template_files(template, base / TOKENIZER_FILE)
            | generation_files(base / GENERATION_FILE, run.spec, taught),
        )
    barrier("exported")
    return result
