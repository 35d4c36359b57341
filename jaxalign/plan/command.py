"""The command `jaxalign plan`: from words to a verdict and an exit code.

run(Order(config, 'v5e:4x4'))                    # 0: it fits, 1: it does not
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from jaxalign.errors import UserError
from jaxalign.settings import Config


@dataclass(frozen=True)
class Order:
    """What is asked for."""

    config: Config
    topology: str
    slices: int = 1
    phases: tuple[str, ...] = ()  # empty: all
    search: bool = False
    tries: int = 8  # candidates of a search
    price: float | None = None  # dollars a chip-hour
    json: str = ""  # file to write


def run(order: Order) -> int:
    """Prints the plan; 0 where the run fits (in a search: where something does), else 1.

    Raises:
      UserError: words that cannot be planned.
    """
    from jaxalign.plan.topology import parse

    if order.tries < 1:
        raise UserError(f"--tries: {order.tries} should be 1 or more")
    place = parse(order.topology, order.slices)
    if place.tpu:
        # Nothing runs on an accelerator, and none that is here should be taken for it.
        os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    if place.tpu:
        jax.config.update("jax_platforms", "cpu")
    from rich.console import Console

    from jaxalign.plan import report
    from jaxalign.plan.advice import advise
    from jaxalign.plan.run import plan_run
    from jaxalign.plan.search import search

    phases = _phases(order)
    console, progress = Console(), Console(stderr=True)
    # Piped into a file there is no edge to wrap at.
    console = console if console.is_terminal else Console(width=200)
    with progress.status(f"compiling for {place.name} (a large model: minutes a program)"):
        if order.search:
            found = search(
                order.config,
                place,
                phases,
                order.tries,
                lambda text, number, of: progress.print(
                    f"{number}/{of} {text or 'as configured'}", highlight=False, markup=False
                ),
            )
        else:
            plan = plan_run(
                order.config,
                place,
                phases,
                lambda program: progress.print(report.line(program), highlight=False, markup=False),
            )
    if order.search:
        report.show_search(found, console)
        values: object = report.search_json(found)
        fits = any(one.plan.fits for one in found)
    else:
        advices = [] if plan.fits else advise(plan)
        report.show(plan, console, advices, order.price)
        values, fits = report.as_json(plan, advices, order.price), plan.fits
    if order.json:
        try:
            Path(order.json).write_text(json.dumps(values, indent=1) + "\n", "utf-8")
        except OSError as error:
            raise UserError(f"--json: {order.json} cannot be written ({error})") from error
    return 0 if fits else 1


def _phases(order: Order) -> tuple[str, ...]:
    """The programs to compile."""
    from jaxalign.plan.programs import ALWAYS, PROGRAMS
    from jaxalign.train.design import active_phases

    unknown = next((name for name in order.phases if name not in PROGRAMS), None)
    if unknown:
        raise UserError(f"--phases: {unknown!r} is not among {', '.join(PROGRAMS)}")
    active = active_phases(order.config)
    if order.phases and not any(name.split("_")[0] in (*active, *ALWAYS) for name in order.phases):
        raise UserError(
            f"none of --phases is a phase of this run, which trains {' and '.join(active)}"
        )
    return order.phases or (active if order.search else PROGRAMS)
