"""The phases of a training, in the order of their turns; each is a file that knows its facts.

PHASES['align'].rows(config)                     # pairs of a micro-batch
active_phases(config)                            # ('task', 'align')
"""

from __future__ import annotations

from jaxalign.errors import UserError
from jaxalign.settings import Config
from jaxalign.train.phases.align import ALIGN
from jaxalign.train.phases.facts import Facts
from jaxalign.train.phases.task import TASK

PHASES: dict[str, Facts] = {facts.name: facts for facts in (TASK, ALIGN)}


def active_phases(config: Config) -> tuple[str, ...]:
    """The phases that are on, in their order.

    Raises:
      UserError: none is.
    """
    active = tuple(name for name, facts in PHASES.items() if facts.part(config).weight > 0)
    if not active:
        raise UserError("task.weight and align.weight are both 0: nothing would be trained")
    return active
