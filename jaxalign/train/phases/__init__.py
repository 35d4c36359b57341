"""The phases of a training, in the order of their turns; each is a file that knows its facts.

PHASES['align'].part(config).weight              # a group of settings
facts_of(config, 'align').rows(config)           # pairs of a micro-batch
active_phases(config)                            # ('task', 'align')
"""

from __future__ import annotations

from jaxalign.errors import UserError
from jaxalign.settings import Config
from jaxalign.train.phases.align import ALIGN
from jaxalign.train.phases.facts import Facts
from jaxalign.train.phases.prompts import PROMPTS
from jaxalign.train.phases.task import TASK

PHASES: dict[str, Facts] = {facts.name: facts for facts in (TASK, ALIGN)}
ROWS: dict[str, Facts] = {"pairs": ALIGN, "prompts": PROMPTS}  # of the phase `align`


def facts_of(config: Config, name: str) -> Facts:
    """A phase with the rows that it has in this run."""
    return ROWS[config.align.rows] if name == ALIGN.name else PHASES[name]


def active_phases(config: Config) -> tuple[str, ...]:
    """The phases that are on, in their order.

    Raises:
      UserError: none is.
    """
    active = tuple(name for name, facts in PHASES.items() if facts.part(config).weight > 0)
    if not active:
        raise UserError("task.weight and align.weight are both 0: nothing would be trained")
    return active
