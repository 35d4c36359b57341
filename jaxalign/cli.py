"""The command line: `jaxalign COMMAND ...`, one function a command, heavy imports inside.

    jaxalign train configs/llama3_8b_slots_align.yaml align.layer=16
    jaxalign evaluate configs/demo.yaml --adapter sft=A --adapter aligned=B
    jaxalign generate configs/demo.yaml --adapter A --prompt 'wake me up at nine'
    jaxalign probe meta-llama/Meta-Llama-3-8B --parallel data/ntrex --adapter A
    jaxalign merge A B --weights 0.6,0.4 --out merged
    jaxalign export runs/demo --format merged --verify
    jaxalign import HUB_NAME --base MODEL --out runs/theirs
    jaxalign plan configs/llama3_8b_slots_align.yaml --topology v5e:4x4
    jaxalign data show configs/demo.yaml
    jaxalign config configs/demo.yaml
    jaxalign demo

A mistake in what was given is told in one sentence, with exit code 2; `--debug` shows where it
arose.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxalign import arguments
from jaxalign.bounds import check_text
from jaxalign.errors import UserError
from jaxalign.interrupts import heard_interrupts
from jaxalign.paths import check_local
from jaxalign.programs import keep_programs
from jaxalign.terminal import steady_output, visible


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    with steady_output(), heard_interrupts():
        return _run(sys.argv[1:] if argv is None else argv)


def _run(words: Sequence[str]) -> int:
    parser = arguments.build(COMMANDS)
    args, rest = parser.parse_known_args(words)
    # Settings may stand anywhere after the command, also behind an option.
    if any(word.startswith("-") for word in rest):
        parser.error(f"unrecognized option {next(w for w in rest if w.startswith('-'))}")
    args.settings = [*getattr(args, "settings", []), *rest]
    try:
        for word in words:
            check_text("command line", word, nul="refused")
        check_local(getattr(args, "out", ""), "--out")
        return args.run(args) or 0
    except UserError as error:
        if args.debug:
            raise
        return _told(error)
    except OSError as error:
        # A full disk, a folder that nobody may write: of the machine, not of this package.
        if args.debug or not error.strerror:
            raise
        where = f"{error.filename}: " if error.filename else ""
        return _told(f"{where}{error.strerror} (--debug shows where)")
    except KeyboardInterrupt:
        print("jaxalign: interrupted; the same command goes on from the last checkpoint",
              file=sys.stderr)  # fmt: skip
        return 130
    except Exception as error:
        from jaxalign import multihost

        sentence = multihost.lost(error)
        if args.debug or sentence is None:
            raise
        print(f"jaxalign: {visible(sentence)}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(multihost.LOST)  # JAX would wait for the other process to end in good order


def _told(sentence: object) -> int:
    print(f"jaxalign: {visible(sentence)}", file=sys.stderr)
    return 2


def _train(args: argparse.Namespace) -> int:
    from jaxalign.config import load

    config = load(args.config, [*args.settings, *_profile_words(args.profile)]).config
    from jaxalign import multihost

    multihost.start()
    keep_programs()
    import jaxalign

    result = jaxalign.train(config)
    if multihost.is_main():
        for name, value in result.metrics.items():
            print(f"{name:44s} {value:10.4f}")
        print(result.sentence)
    return result.exit_code


def _profile_words(given: str) -> list[str]:
    if not given:
        return []
    start, colon, number = given.partition(":")
    if not (colon and all(n.isascii() and n.isdigit() and int(n) for n in (start, number))):
        raise UserError(
            f"--profile: {given!r} should be START:N, two whole numbers of 1 or more: 10:3 traces "
            "the updates 10 to 12"
        )
    return [f"log.profile=[{start},{number}]"]


def _evaluate(args: argparse.Namespace) -> None:
    from jaxalign.config import load

    config = load(args.config, args.settings).config
    out = check_local(args.out or f"{config.output}/evaluation", "--out")
    from jaxalign import multihost

    multihost.start()
    keep_programs()
    from jaxalign.base import name_of
    from jaxalign.evaluate.run import Entrant, evaluate

    bare = [Entrant("base", kind="base")] if args.base else []
    if args.base and config.evaluate.shots:
        bare.append(Entrant(f"base {config.evaluate.shots}-shot", kind="few_shot"))
    given = [Entrant(name or name_of(path), path, kind) for name, path, kind in args.entrants]
    # What comes first is what the rest is compared with: one fine-tuned model with another, or
    # a single one with the base it came from.
    entrants = given + bare if len({entrant.name for entrant in given}) > 1 else bare + given
    evaluate(config, entrants, out)


def _generate(args: argparse.Namespace) -> None:
    from jaxalign.config import load

    config = load(args.config, args.settings).config
    if not args.prompt:  # whose answers are printed
        check_local(args.out or config.output, "--out")
    from jaxalign import multihost

    multihost.start()
    keep_programs()
    from jaxalign.evaluate.write import write

    write(config, args.adapter, args.prompt, args.data, args.out)


def _probe(args: argparse.Namespace) -> None:
    from jaxalign.config import load

    named = args.model.endswith((".yaml", ".yml"))
    words = args.settings if named else [f"model.path={args.model}", *args.settings]
    config = load(args.model if named else None, words).config
    from jaxalign import multihost

    multihost.start()
    keep_programs()
    from rich.console import Console

    from jaxalign.base import name_of
    from jaxalign.probe.heap import keep_freed_memory
    from jaxalign.probe.report import show, write
    from jaxalign.probe.run import Probed, probe
    from jaxalign.probe.tasks import read_scores, relations

    given = [Probed(name or name_of(path), path) for name, path, _ in args.entrants]
    keep_freed_memory()
    table = probe(
        config,
        args.parallel,
        [Probed("base"), *given],
        args.out,
        poolings=args.pooling.split(","),
        states_as=args.states_as.split(","),
        languages=[name for name in args.languages.split(",") if name],
        rows=args.rows,
        pivot=args.pivot,
        dtype=args.states,
        width=args.width,
        neurons=args.neurons,
        items=args.items,
        scores=args.scores,
    )
    if multihost.is_main():
        # On disk before anything is printed or related to scores: neither can lose the numbers.
        written = write(table, Path(args.out))
        related = []
        if args.scores:
            related = relations(table, read_scores(args.scores, table))
            written = write(table, Path(args.out), related=related)
        show(table, Console(), related)
        for path in written:
            print(path)


def _merge(args: argparse.Namespace) -> None:
    words = [*args.adapters, *args.settings]
    settings = [word for word in words if "=" in word and not Path(word).exists()]
    adapters = [word for word in words if word not in settings]
    existing = "replace" if args.force else "refuse"
    if args.search and (args.weights or args.base or args.into_base):
        raise UserError("--search finds the weights for the base of its CONFIG and writes an "
                        "adapter; leave out --weights, --base and --into-base")  # fmt: skip
    if not args.search and (settings or args.grid or args.metric or args.data):
        raise UserError("--grid, --metric, --data and key=value belong to --search CONFIG")
    from jaxalign import multihost

    if args.search:
        from jaxalign.config import load

        config = load(args.search, settings).config
        multihost.start()
        from jaxalign.merge.algebra import Recipe
        from jaxalign.merge.run import parse_numbers
        from jaxalign.merge.search import search

        recipe = Recipe(args.method, args.rank, args.density, args.seed)
        grids = [parse_numbers(text, "--grid") for text in args.grid or ["0,0.25,0.5,0.75,1"]]
        search(config, adapters, recipe, grids, args.out,
               metric=args.metric, data=args.data, existing=existing)  # fmt: skip
        return
    multihost.start()
    from jaxalign.merge.algebra import Recipe
    from jaxalign.merge.run import merge, parse_numbers

    if not args.weights and len(adapters) > 1:
        raise UserError("--weights is missing: 1,1 adds two updates, 0.5,0.5 averages them")
    merge(adapters, parse_numbers(args.weights or "1", "--weights"),
          Recipe(args.method, args.rank, args.density, args.seed), args.out,
          base=args.base, into=args.into_base, existing=existing)  # fmt: skip


def _export(args: argparse.Namespace) -> None:
    _no_words(args)
    if args.private and not args.push:
        raise UserError("--private is for --push NAME")
    _on_this_host()
    from jaxalign.export.run import Order, export

    export(
        Order(
            args.source,
            form=args.format,
            step=args.step,
            out=args.out,
            base=args.base,
            dtype=args.dtype,
            max_shard_size=args.max_shard_size,
            existing="replace" if args.force else "refuse",
            verify="yes" if args.verify else "no",
            push=args.push,
            visibility="private" if args.private else "default",
        )
    )


def _import(args: argparse.Namespace) -> None:
    _no_words(args)
    _on_this_host()
    from jaxalign.export.incoming import import_adapter

    existing = "replace" if args.force else "refuse"
    import_adapter(args.adapter, args.base, args.out, existing)


def _no_words(args: argparse.Namespace) -> None:
    if args.settings:
        raise UserError(f"{args.settings[0]!r}: this command takes no further words")


def _on_this_host() -> None:
    # Files in, files out: no accelerator is needed, and one host of a pod would wait for the rest.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")


def _show(args: argparse.Namespace) -> None:
    from jaxalign.config import load

    config = load(args.config, args.settings).config
    from jaxalign.data.chat import load_tokenizer, show
    from jaxalign.data.loader import pair_stream, task_stream

    tokenizer = load_tokenizer(config.model.path, config.model.revision)
    for part, stream in ((config.task, task_stream), (config.align, pair_stream)):
        if part.weight > 0 and part.train:
            found = stream(config, tokenizer)
            print(f"{found.report}; padded lengths {list(found.buckets)}")
            show(found.rows[: args.rows], tokenizer)


def _plan(args: argparse.Namespace) -> int:
    from jaxalign.config import load

    config = load(args.config, args.settings).config
    from jaxalign.plan.command import Order, run

    return run(
        Order(
            config=config,
            topology=args.topology,
            slices=args.slices,
            phases=tuple(name for name in args.phases.split(",") if name),
            search=args.search,
            tries=args.tries,
            price=args.price,
            json=args.json,
        )
    )


def _config(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold")
    rows: list[tuple[tuple[Any, ...], str]]
    if args.explain:
        from jaxalign.settings.explain import explain

        columns: tuple[str, ...] = ("setting", "default", "may be", "what it is for")
        rows = [(row, "") for row in explain(args.explain)]
    else:
        from jaxalign.config import load

        columns = ("setting", "value", "origin")
        words = [args.config, *args.settings] if args.config else []
        file = (
            words.pop(0)
            if words and not ("=" in words[0] and not Path(words[0]).exists())
            else None
        )
        rows = [
            ((key, value, origin), "" if origin == "default" else "bold cyan")
            for key, value, origin in load(file, words).rows()
        ]
    for name in columns:
        table.add_column(name)
    for row, style in rows:
        # As text: [a] in a value is not markup.
        table.add_row(*(Text(visible(cell)) for cell in row), style=style)
    console = Console()
    # Piped into a file there is no edge to wrap at.
    (console if console.is_terminal else Console(width=400)).print(table)


def _demo(args: argparse.Namespace) -> None:
    from jaxalign import multihost

    multihost.settle_platform()
    keep_programs()
    from jaxalign.demo.run import demo

    demo(args.out, args.seeds, args.settings)


COMMANDS: arguments.Runs = {
    "train": _train,
    "evaluate": _evaluate,
    "generate": _generate,
    "probe": _probe,
    "merge": _merge,
    "export": _export,
    "import": _import,
    "plan": _plan,
    "data show": _show,
    "config": _config,
    "demo": _demo,
}


if __name__ == "__main__":
    sys.exit(main())
