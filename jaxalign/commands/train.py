"""`jaxalign train`: one run, from its configuration to its adapter."""

from __future__ import annotations

from dataclasses import dataclass

from jaxalign.arguments import Configured, option
from jaxalign.errors import UserError
from jaxalign.programs import begin
from jaxalign.terminal import say


@dataclass(frozen=True, kw_only=True)
class Train(Configured):
    """What to train."""

    profile: str = option(
        "", "trace N updates from START on, as log.profile=[START,N]", metavar="START:N"
    )

    def run(self) -> int:
        """Trains, prints the scores; 143 where a cluster is to start the run again."""
        from jaxalign.config import load

        config = load(self.config, [*self.settings, *profile_words(self.profile)]).config
        begin()
        import jaxalign

        result = jaxalign.train(config)
        for name, value in result.metrics.items():
            say(f"{name:44s} {value:10.4f}")
        say(result.sentence)
        return result.exit_code


def profile_words(given: str) -> list[str]:
    """`10:3` as the setting `log.profile`.

    Raises:
      UserError: anything but two whole numbers.
    """
    if not given:
        return []
    start, colon, number = given.partition(":")
    if not (colon and all(n.isascii() and n.isdigit() and int(n) for n in (start, number))):
        raise UserError(
            f"--profile: {given!r} should be START:N, two whole numbers of 1 or more: 10:3 traces "
            "updates 10 to 12"
        )
    return [f"log.profile=[{start},{number}]"]
