"""`jaxalign compare`: several methods on one base, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxalign.arguments import option, word, words
from jaxalign.paths import check_local
from jaxalign.programs import begin


@dataclass(frozen=True, kw_only=True)
class Compare:
    """What to compare."""

    study: str = word("the comparison, a YAML file", path=True)
    settings: Sequence[str] = words("settings of all systems, as in train.steps=20", "key=value")
    out: str = option("", "folder to write (default: what the file says)", path=True)
    only: str = option("", "systems to train and report, as in sft,lens", metavar="NAME,NAME")
    report: bool = option(False, "report what is trained already; train nothing")

    def run(self) -> None:
        """Trains what is missing, measures, prints and writes the report."""
        from jaxalign.compare.study import read_study

        study = read_study(self.study, self.settings, self.out)
        check_local(study.output, "output")
        begin()
        from jaxalign.compare.run import compare

        only = [name for name in self.only.split(",") if name]
        compare(study, "skip" if self.report else "train", only)
