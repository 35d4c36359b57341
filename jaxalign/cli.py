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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxalign import __version__
from jaxalign.errors import UserError
from jaxalign.paths import check_local
from jaxalign.programs import keep_programs


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    args, rest = _parser().parse_known_args(argv)
    # Settings may stand anywhere after the command, also behind an option.
    if any(word.startswith("-") for word in rest):
        _parser().error(f"unrecognized option {next(w for w in rest if w.startswith('-'))}")
    args.settings = [*getattr(args, "settings", []), *rest]
    try:
        check_local(getattr(args, "out", ""), "--out")
        return args.run(args) or 0
    except UserError as error:
        if args.debug:
            raise
        print(f"jaxalign: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("jaxalign: interrupted; the same command goes on from the last checkpoint",
              file=sys.stderr)  # fmt: skip
        return 130


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser = argparse.ArgumentParser(
        prog="jaxalign",
        description="Fine-tuned LLMs for the languages their task data does not cover.",
        parents=[common],
    )
    parser.add_argument("--version", action="version", version=f"jaxalign {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable, text: str, group: argparse._SubParsersAction = commands):
        added = group.add_parser(name, help=text, description=text, parents=[common])
        added.set_defaults(run=run)
        return added

    def configured(added: argparse.ArgumentParser) -> argparse.ArgumentParser:
        added.add_argument("config", help="YAML file")
        added.add_argument("settings", nargs="*", metavar="key=value", help="as in align.layer=16")
        return added

    train = configured(command("train", _train, "train an adapter (or a whole model)"))
    train.add_argument("--profile", default="", metavar="START:N",
                       help="trace N updates from START on, as log.profile=[START,N]")  # fmt: skip
    data = command("data", _none, "look at the data of a run").add_subparsers(
        metavar="WHAT", required=True
    )
    show = configured(command("show", _show, "print rows, coloured by what is trained", data))
    show.add_argument("--rows", type=int, default=3, help="rows of each stream (default 3)")
    judge = configured(command("evaluate", _evaluate, "compare systems on what they write"))
    judge.add_argument("--base", action="store_true",
                       help="the bare base (and, with evaluate.shots, few-shot)")  # fmt: skip
    for name, what in (("adapter", "a PEFT folder or hub name"),
                       ("predictions", "a file of answers, scored without a model")):  # fmt: skip
        judge.add_argument(
            f"--{name}", action=_Entrant, dest="entrants", default=[], metavar="[NAME=]PATH",
            help=f"{what}; the same NAME again: another seed",
        )  # fmt: skip
    judge.add_argument("--out", default="", help="folder (default OUTPUT/evaluation)")
    write = configured(command("generate", _generate, "write answers to rows or prompts"))
    write.add_argument("--data", action="append", default=[], metavar="SOURCE",
                       help="rows to answer, gold or not (default evaluate.data)")  # fmt: skip
    write.add_argument("--prompt", action="append", default=[], metavar="TEXT",
                       help="a text to answer; printed")  # fmt: skip
    write.add_argument("--adapter", default="", metavar="PATH", help="a PEFT folder or hub name")
    write.add_argument("--out", default="", help="JSONL file (default OUTPUT/answers.jsonl)")
    look = command("probe", _probe, "which layer aligns which languages")
    look.add_argument("model", help="a folder in Hugging Face layout, a hub name, or a YAML file")
    look.add_argument("settings", nargs="*", metavar="key=value", help="as in model.dtype=float32")
    look.add_argument("--parallel", required=True, metavar="SOURCE",
                      help="LANG.txt files, FLORES folder, XX-YY.tsv, JSONL, hf:NAME")  # fmt: skip
    look.add_argument("--adapter", action=_Entrant, dest="entrants", default=[],
                      metavar="[NAME=]PATH", help="compared with the base")  # fmt: skip
    look.add_argument("--out", default="runs/probe", help="folder (default runs/probe)")
    look.add_argument("--pooling", default="mean",
                      help="of mean, last, position, first; several: mean,last")  # fmt: skip
    look.add_argument("--languages", default="", help="keep only these: en,de,cy")
    look.add_argument("--rows", type=int, default=0, help="first sentences only (default all)")
    look.add_argument("--pivot", default="en", help="language the others are compared with (en)")
    look.add_argument("--neurons", type=int, default=0, metavar="N",
                      help="NASCA and NAVCA on the first N sentences (the paper: 100)")  # fmt: skip
    look.add_argument("--items", default="", metavar="SOURCE",
                      help="task items in several languages: DALI")  # fmt: skip
    look.add_argument("--scores", default="", metavar="FILE",
                      help="report.json of evaluate, or {language: score}: correlated")  # fmt: skip
    look.add_argument("--states", default="float32", choices=("float32", "float16"),
                      help="of the vectors on disk (default float32)")  # fmt: skip
    look.add_argument("--width", type=int, default=None, metavar="N",
                      help="approximate retrieval by N principal directions")  # fmt: skip
    join = command("merge", _merge, "combine adapters of one base, or write them into it")
    join.add_argument("adapters", nargs="+", metavar="ADAPTER", help="PEFT folders or hub names")
    join.add_argument("--out", required=True, help="folder to write")
    join.add_argument("--weights", default="", metavar="W,W",
                      help="one for each adapter, as in 0.6,0.4 (or --weights=-1,1)")  # fmt: skip
    join.add_argument("--method", default="delta",
                      help="delta (exact), task_arithmetic (the same), svd, average, magnitude, "
                      "ties, dare, dare_ties")  # fmt: skip
    join.add_argument("--rank", type=int, help="of the result, for methods that cut it")
    join.add_argument("--density", type=float, help="share of entries kept: magnitude, ties, dare")
    join.add_argument("--seed", type=int, default=1, help="of what dare drops (default 1)")
    join.add_argument("--base", default="", metavar="MODEL",
                      help="the adapters' base (default: as the first one names it)")  # fmt: skip
    join.add_argument("--into-base", default="", metavar="MODEL", help="write a whole model")
    join.add_argument("--search", default="", metavar="CONFIG",
                      help="choose weights by a score; key=value as in train")  # fmt: skip
    join.add_argument("--grid", action="append", default=[], metavar="W,W",
                      help="values whose sums of 1 are tried; or one list an adapter")  # fmt: skip
    join.add_argument("--metric", default="", help="a score of the task, or loss")
    join.add_argument("--data", action="append", default=[], metavar="SOURCE",
                      help="rows to choose weights by (default task.valid)")  # fmt: skip
    join.add_argument("--force", action="store_true", help="replace what is in --out")
    out = command("export", _export, "write a run as what PyTorch, vLLM or JAX load")
    out.add_argument("source", metavar="RUN", help="output of a training, PEFT folder or hub name")
    out.add_argument("--format", default="peft", choices=("peft", "merged", "orbax"),
                     help="adapter, whole model, or tree for JAX (default peft)")  # fmt: skip
    out.add_argument("--step", default="", metavar="N", help="a number, best or latest (default: "
                     "the best, if there is one)")  # fmt: skip
    out.add_argument("--out", default="", help="folder to write (default RUN/export/FORMAT)")
    out.add_argument("--base", default="", metavar="MODEL", help="where the base is now")
    out.add_argument("--dtype", default="", help="of a model: float32, float16 or bfloat16 "
                     "(default: the base's)")  # fmt: skip
    out.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="(default 5GB)")
    out.add_argument("--verify", action="store_true", help="read it back, compare the logits")
    out.add_argument("--push", default="", metavar="NAME", help="upload to this hub repository")
    out.add_argument("--private", action="store_true", help="make that repository private")
    out.add_argument("--force", action="store_true", help="replace what is in --out")
    take = command("import", _import, "check an adapter trained elsewhere and take it in")
    take.add_argument("adapter", help="a PEFT folder or hub name")
    take.add_argument("--base", required=True, metavar="MODEL", help="what it was trained on")
    take.add_argument("--out", required=True, help="folder to write")
    take.add_argument("--force", action="store_true", help="replace what is in --out")
    plan = configured(command("plan", _plan, "compile a run for machines that are not there"))
    plan.add_argument("--topology", required=True, metavar="CHIP:SHAPE",
                      help="as in v5e:4x4, v5p:2x2x2 or h100:8")  # fmt: skip
    plan.add_argument("--slices", type=int, default=1, metavar="N",
                      help="TPU slices of that shape, or GPU nodes (default 1)")  # fmt: skip
    plan.add_argument("--phases", default="", metavar="NAME,NAME",
                      help="of task, align, update, task_eval, align_eval, prompt, token "
                      "(default all; with --search task,align)")  # fmt: skip
    plan.add_argument("--search", action="store_true",
                      help="try meshes, remat, micro-batches and an int8 base")  # fmt: skip
    plan.add_argument("--tries", type=int, default=8, metavar="N",
                      help="candidates that --search compiles (default 8)")  # fmt: skip
    plan.add_argument("--price", type=float, metavar="USD", help="dollars a chip-hour")
    plan.add_argument("--json", default="", metavar="FILE", help="everything, as JSON")
    configured(command("config", _config, "print every setting with its origin"))
    demo = command("demo", _demo, "train the embedded small model with and without alignment")
    demo.add_argument("--out", default="runs/demo", help="folder (default runs/demo)")
    demo.add_argument("settings", nargs="*", metavar="key=value", help="as in train.steps=100")
    demo.add_argument("--seeds", type=int, default=1, help="runs of each kind (default 1)")
    return parser


def _none(args: argparse.Namespace) -> None:
    raise UserError("say what: jaxalign data show CONFIG")


def _train(args: argparse.Namespace) -> int:
    from jaxalign.config import load

    config = load(args.config, [*args.settings, *_profile_words(args.profile)]).config
    from jaxalign import multihost

    multihost.start()
    keep_programs()
    from jaxalign.evaluate.during import sample_judge
    from jaxalign.settings import AUTO
    from jaxalign.train.loop import train

    if config.align.layer == AUTO:
        from jaxalign.probe.auto import choose

        choice = choose(config)
        config.align.layer = choice.layer
        if multihost.is_main():
            print(choice.sentence())
    result = train(config, judge=sample_judge(config))
    if multihost.is_main():
        for name, value in result.metrics.items():
            print(f"{name:44s} {value:10.4f}")
        how = {"finished": "finished", "patience": "stopped early", "signal": "stopped on request"}
        print(f"{how[result.stopped]} at step {result.step}; written: {result.adapter}")
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


class _Entrant(argparse.Action):
    """Collects --adapter and --predictions in the order of the command line."""

    def __call__(self, parser: Any, args: Any, value: Any, option: str | None = None) -> None:
        name, equals, path = str(value).partition("=")
        kind = str(option).lstrip("-")
        args.entrants = [
            *getattr(args, "entrants", []),
            (name if equals else "", path or name, kind),
        ]


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
    from jaxalign.probe.report import show, write
    from jaxalign.probe.run import Probed, probe
    from jaxalign.probe.tasks import read_scores, relations

    given = [Probed(name or name_of(path), path) for name, path, _ in args.entrants]
    table = probe(
        config,
        args.parallel,
        [Probed("base"), *given],
        args.out,
        poolings=args.pooling.split(","),
        languages=[name for name in args.languages.split(",") if name],
        rows=args.rows,
        pivot=args.pivot,
        dtype=args.states,
        width=args.width,
        neurons=args.neurons,
        items=args.items,
    )
    if multihost.is_main():
        related = relations(table, read_scores(args.scores, table)) if args.scores else []
        show(table, Console(), related)
        for path in write(table, Path(args.out), related=related):
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

    from jaxalign.config import load

    table = Table("setting", "value", "origin", box=None, header_style="bold")
    for key, value, origin in load(args.config, args.settings).rows():
        style = "" if origin == "default" else "bold cyan"
        table.add_row(key, str(value), origin, style=style)
    console = Console()
    # Piped into a file there is no edge to wrap at.
    (console if console.is_terminal else Console(width=400)).print(table)


def _demo(args: argparse.Namespace) -> None:
    keep_programs()
    from jaxalign.demo.run import demo

    demo(args.out, args.seeds, args.settings)


if __name__ == "__main__":
    sys.exit(main())
