"""How a run ends: the weights that it hands over, and what it says to the shell.

result = finish(run, desk, store, state, step, progress, 'finished')
result.adapter, result.exit_code
"""

from __future__ import annotations

import signal
from dataclasses import dataclass, field

from jaxalign.data.template import TOKENIZER_FILE, template_files, trained_with
from jaxalign.hf.find import small_files
from jaxalign.hf.peft import save_peft
from jaxalign.hf.save import save_base
from jaxalign.multihost import barrier
from jaxalign.paths import Desk
from jaxalign.train.checkpoint import Checkpoints
from jaxalign.train.resume import Progress
from jaxalign.train.setup import Run
from jaxalign.train.state import TrainState


@dataclass
class Result:
    """What a run leaves behind."""

    adapter: str  # PEFT folder, or under full fine-tuning a model folder
    step: int  # updates done
    best_step: int | None  # of the exported weights, where validation chose them
    metrics: dict[str, float] = field(default_factory=dict)  # the last (or best) validation
    stopped: str = "finished"  # finished | patience | signal

    @property
    def exit_code(self) -> int:
        """143 after a stop on request, as of a program that SIGTERM ended: a cluster takes 0 for a
        finished run and starts no other try."""
        return 128 + signal.SIGTERM if self.stopped == "signal" else 0


def finish(
    run: Run,
    desk: Desk,
    store: Checkpoints,
    state: TrainState,
    step: int,
    progress: Progress,
    stopped: str,
) -> Result:
    """Exports the best weights (the last ones where nothing was validated)."""
    best = store.best if progress.best is not None else None
    if best is not None and best != step:
        state, _ = store.restore(run.abstract_state, best=True)
    name = "adapter" if run.adapter else "model"
    folder = desk.folder / name
    # Prompts must look as they did in training, whoever builds them.
    template = trained_with(run.tokenizer, run.config)
    if run.adapter:
        save_peft(
            folder,
            state.trained,
            run.spec,
            run.adapter,
            base_name=run.config.model.path,
            texts=template_files(template),
        )
    else:
        base = small_files(run.config.model.path, run.config.model.revision)
        save_base(
            folder,
            state.trained,
            run.spec,
            tokenizer_from=base,
            texts=template_files(template, base / TOKENIZER_FILE),
        )
    barrier("exported")
    return Result(f"{desk.output}/{name}", step, best, progress.metrics, stopped)
