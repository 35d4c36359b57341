"""The command line: `jaxalign COMMAND ...`, one function a command, heavy imports inside.

    jaxalign train configs/llama3_8b_slots_align.yaml align.layer=16
    jaxalign data show configs/demo.yaml
    jaxalign config configs/demo.yaml
    jaxalign demo

A mistake in what was given is told in one sentence, with exit code 2; `--debug` shows where it
arose.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from jaxalign import __version__
from jaxalign.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    args, rest = _parser().parse_known_args(argv)
    # Settings may stand anywhere after the command, also behind an option.
    if any(word.startswith("-") for word in rest):
        _parser().error(f"unrecognized option {next(w for w in rest if w.startswith('-'))}")
    args.settings = [*getattr(args, "settings", []), *rest]
    try:
        args.run(args)
    except UserError as error:
        if args.debug:
            raise
        print(f"jaxalign: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("jaxalign: interrupted; the same command goes on from the last checkpoint",
              file=sys.stderr)  # fmt: skip
        return 130
    return 0


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

    configured(command("train", _train, "train an adapter (or a whole model)"))
    data = command("data", _none, "look at the data of a run").add_subparsers(
        metavar="WHAT", required=True
    )
    show = configured(command("show", _show, "print rows, coloured by what is trained", data))
    show.add_argument("--rows", type=int, default=3, help="rows of each stream (default 3)")
    configured(command("config", _config, "print every setting with its origin"))
    demo = command("demo", _demo, "train the embedded small model with and without alignment")
    demo.add_argument("--out", default="runs/demo", help="folder (default runs/demo)")
    demo.add_argument("settings", nargs="*", metavar="key=value", help="as in train.steps=100")
    demo.add_argument("--seeds", type=int, default=1, help="runs of each kind (default 1)")
    return parser


def _none(args: argparse.Namespace) -> None:
    raise UserError("say what: jaxalign data show CONFIG")


def _train(args: argparse.Namespace) -> None:
    from jaxalign.config import load

    config = load(args.config, args.settings).config
    from jaxalign import multihost

    multihost.start()
    from jaxalign.train.loop import train

    result = train(config)
    if multihost.is_main():
        for name, value in result.metrics.items():
            print(f"{name:44s} {value:10.4f}")
        how = {"finished": "finished", "patience": "stopped early", "signal": "stopped on request"}
        print(f"{how[result.stopped]} at step {result.step}; written: {result.adapter}")


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
    from jaxalign.demo.run import demo

    demo(args.out, args.seeds, args.settings)


if __name__ == "__main__":
    sys.exit(main())
