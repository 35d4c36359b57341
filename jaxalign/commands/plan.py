"""`jaxalign plan`: what a run needs on machines that are not there.

Plan(config='run.yaml', topology='v5e:4x4').run()      # 0: it fits, 1: it does not
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from jaxalign.arguments import Configured, needed, option
from jaxalign.errors import UserError
from jaxalign.settings import Config
from jaxalign.terminal import console


@dataclass(frozen=True, kw_only=True)
class Plan(Configured):
    """Which machines, and what to compile for them."""

    topology: str = needed("the hardware, as in v5e:4x4, v5p:2x2x2 or h100:8", "CHIP:SHAPE")
    slices: int = option(1, "TPU slices of that shape, or GPU nodes", metavar="N")
    phases: str = option(
        "",
        "programs to compile, of task, align, update, task_eval, align_eval, prompt, token "
        "(default all; with --search task,align)",
        metavar="NAME,NAME",
    )
    data: bool = option(
        False, "read the run's rows and tokenizer, and plan the batches that they make"
    )
    search: bool = option(False, "try meshes, remat, micro-batches and an int8 base")
    tries: int | None = option(
        None, "candidates that --search compiles (default 8)", metavar="N", whole=True, lowest=1
    )
    price: float | None = option(
        None, "price of a chip-hour in dollars", metavar="USD", number=True, lowest=0
    )
    json: str = option("", "write everything to this file, as JSON", metavar="FILE", path=True)

    def run(self) -> int:
        """Prints the plan; 0 where the run fits (in a search: where something does), else 1.

        Raises:
          UserError: words that cannot be planned.
        """
        config = self.load()
        if self.data and self.search:
            raise UserError("--search tries settings without rows; leave out --data or --search")
        if self.search and self.price is not None:
            raise UserError(
                "--price: --search counts no cost; leave it out, and give it to a plan of the "
                "settings that are found"
            )
        if self.tries is not None and not self.search:
            raise UserError("--tries: only --search tries anything; add it, or leave out --tries")
        from jaxalign.plan.topology import parse

        place = parse(self.topology, self.slices)
        if place.tpu:
            # Nothing runs on an accelerator, and none that is here should be taken for it.
            os.environ["JAX_PLATFORMS"] = "cpu"
        import jax

        if place.tpu:
            jax.config.update("jax_platforms", "cpu")
        from jaxalign.plan import report
        from jaxalign.plan.advice import advise
        from jaxalign.plan.run import plan_run
        from jaxalign.plan.search import search

        phases = _phases(config, tuple(filter(None, self.phases.split(","))), self.search)
        progress = console(stderr=True)
        with progress.status(f"compiling for {place.name} (a large model: minutes a program)"):
            if self.search:
                found = search(
                    config, place, phases, self.tries or 8,
                    lambda text, number, of: progress.print(
                        f"{number}/{of} {text or 'as configured'}"
                    ),
                )  # fmt: skip
            else:
                plan = plan_run(
                    config,
                    place,
                    phases,
                    lambda program: progress.print(report.line(program)),
                    data=self.data,
                )
        if self.search:
            report.show_search(found, console())
            values: object = report.search_json(found)
            fits = any(one.plan.fits for one in found)
        else:
            advices = [] if plan.fits else advise(plan)
            report.show(plan, console(), advices, self.price)
            values, fits = report.as_json(plan, advices, self.price), plan.fits
        if self.json:
            try:
                Path(self.json).write_text(json.dumps(values, indent=1) + "\n", "utf-8")
            except OSError as error:
                raise UserError(f"--json: {self.json} cannot be written ({error})") from error
        return 0 if fits else 1


def _phases(config: Config, named: tuple[str, ...], search: bool) -> tuple[str, ...]:
    """The programs to compile."""
    from jaxalign.plan.programs import ALWAYS, PROGRAMS
    from jaxalign.train.phases import active_phases

    unknown = next((name for name in named if name not in PROGRAMS), None)
    if unknown:
        raise UserError(f"--phases: {unknown!r} is not among {', '.join(PROGRAMS)}")
    active = active_phases(config)
    if named and not any(name.split("_")[0] in (*active, *ALWAYS) for name in named):
        raise UserError(
            f"none of --phases is a phase of this run, which trains {' and '.join(active)}"
        )
    return named or (active if search else PROGRAMS)
