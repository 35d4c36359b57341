"""`jaxalign probe`: which layer aligns which languages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxalign.arguments import Named, named, needed, option, word, words
from jaxalign.errors import UserError
from jaxalign.programs import begin
from jaxalign.terminal import console, say


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What to probe, and how."""

    model: str = word("a folder in Hugging Face layout, a hub name, or a YAML file", path=True)
    settings: Sequence[str] = words("settings, as in model.dtype=float32", "key=value")
    parallel: str = needed(
        "the same sentences in several languages: LANG.txt files, FLORES folder, "
        "XX-YY.tsv, JSONL, hf:NAME",
        "SOURCE",
        path=True,
    )
    entrants: Sequence[Named] = named(adapter="a PEFT folder or hub name, compared with the base")
    out: str = option("runs/probe", "folder to write", path=True)
    pooling: str = option(
        "mean",
        "how token states become one vector: mean, mean_rest (all but the first token), last, "
        "position, first; several: mean,last",
    )
    states_as: str = option(
        "raw,standardised",
        "how states are compared: raw, standardised, centred, trimmed, all_but_top",
        metavar="FORM,FORM",
    )
    languages: str = option("", "keep only these languages, as in en,de,cy")
    rows: int = option(0, "use only the first N sentences (default all)", metavar="N", lowest=0)
    pivot: str = option("en", "the language the others are compared with")
    neurons: int = option(
        0, "NASCA and NAVCA on the first N sentences (the paper: 100)", metavar="N", lowest=0
    )
    items: str = option(
        "", "task items in several languages, for DALI", metavar="SOURCE", path=True
    )
    scores: str = option(
        "",
        "task scores to correlate with: report.json of evaluate, or {system: {language: score}}",
        metavar="FILE",
        path=True,
    )
    states: str = option(
        "float32", "number format of the vectors on disk", choices=("float32", "float16")
    )
    width: int | None = option(
        None,
        "approximate retrieval by N principal directions (default exact)",
        metavar="N",
        whole=True,
        lowest=1,
    )

    def run(self) -> None:
        """Measures, writes the report, prints its tables and files."""
        from jaxalign.config import load

        if any(word.partition("=")[0].strip() == "output" for word in self.settings):
            raise UserError("output is the folder of a run; name that of the report with --out")
        named = self.model.endswith((".yaml", ".yml"))
        given = self.settings if named else [f"model.path={self.model}", *self.settings]
        config = load(self.model if named else None, given).config
        begin()
        from jaxalign.evaluate.entrants import name_of
        from jaxalign.multihost import is_main
        from jaxalign.probe.heap import keep_freed_memory
        from jaxalign.probe.report import show, write
        from jaxalign.probe.run import Probed, probe
        from jaxalign.probe.tasks import read_scores, relations

        adapters = [Probed(one.name or name_of(one.path), one.path) for one in self.entrants]
        keep_freed_memory()
        table = probe(
            config,
            self.parallel,
            [Probed("base"), *adapters],
            self.out,
            poolings=self.pooling.split(","),
            states_as=self.states_as.split(","),
            languages=[name for name in self.languages.split(",") if name],
            rows=self.rows,
            pivot=self.pivot,
            dtype=self.states,
            width=self.width,
            neurons=self.neurons,
            items=self.items,
            scores=self.scores,
        )
        if is_main():
            # On disk before anything is printed or related to scores: neither can lose the numbers.
            written = write(table, Path(self.out))
            related = []
            if self.scores:
                related = relations(table, read_scores(self.scores, table))
                written = write(table, Path(self.out), related=related)
            show(table, console(), related)
            for path in written:
                say(path)
