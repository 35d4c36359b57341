"""`jaxalign evaluate` and `jaxalign generate`: who answers which questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxalign.arguments import Configured, Named, named, option
from jaxalign.paths import check_local
from jaxalign.programs import begin

SEEDS = "the same NAME again: another seed"


@dataclass(frozen=True, kw_only=True)
class Evaluate(Configured):
    """Which systems to compare."""

    base: bool = option(False, "the base without an adapter (with evaluate.shots also few-shot)")
    entrants: Sequence[Named] = named(
        adapter=f"a PEFT folder or hub name; {SEEDS}",
        predictions=f"a file of answers, scored without a model; {SEEDS}",
    )
    out: str = option("", "folder to write (default OUTPUT/evaluation)", path=True)

    def run(self) -> None:
        """Evaluates; what comes first is what the rest is compared with.

        That is one fine-tuned model for another, and the base for a single one.
        """
        config = self.load()
        out = check_local(self.out or f"{config.output}/evaluation", "--out")
        begin()
        from jaxalign.evaluate.entrants import name_of
        from jaxalign.evaluate.run import Entrant, evaluate

        bare = [Entrant("base", kind="base")] if self.base else []
        if self.base and config.evaluate.shots:
            bare.append(Entrant(f"base {config.evaluate.shots}-shot", kind="few_shot"))
        given = [
            Entrant(one.name or name_of(one.path), one.path, one.kind, guessed=not one.name)
            for one in self.entrants
        ]
        several = len({entrant.name for entrant in given}) > 1
        evaluate(config, given + bare if several else bare + given, out)


@dataclass(frozen=True, kw_only=True)
class Generate(Configured):
    """What to answer, and with which weights."""

    data: Sequence[str] = option(
        [],
        "rows to answer, with or without gold answers (default evaluate.data)",
        metavar="SOURCE",
        path=True,
    )
    prompt: Sequence[str] = option([], "a text to answer; the answer is printed", metavar="TEXT")
    adapter: str = option(
        "", "a PEFT folder or hub name (default: the base answers)", metavar="PATH", path=True
    )
    out: str = option(
        "",
        "JSONL file to write (default OUTPUT/answers.jsonl; prompts: answers are only printed)",
        path=True,
    )

    def run(self) -> None:
        """Prints the answers to prompts, writes those to rows, or all where --out is given."""
        config = self.load()
        if self.out or not self.prompt:  # whose answers are printed
            check_local(self.out or config.output, "--out")
        begin()
        from jaxalign.evaluate.write import write

        write(config, self.adapter, self.prompt, self.data, self.out)
