"""The command line: `jaxalign COMMAND ...`, the commands, and the net under them.

    jaxalign train configs/llama3_8b_slots_align.yaml align.layer=16
    jaxalign evaluate configs/demo.yaml --adapter sft=A --adapter aligned=B
    jaxalign generate configs/demo.yaml --adapter A --prompt 'wake me up at nine'
    jaxalign probe meta-llama/Meta-Llama-3-8B --parallel data/ntrex --adapter A
    jaxalign compare configs/compare_methods.yaml
    jaxalign prepare clusters meta-llama/Meta-Llama-3-8B --parallel data/ntrex --out clusters.json
    jaxalign merge A B --weights 0.6,0.4 --out merged
    jaxalign export runs/demo --format merged --verify
    jaxalign import HUB_NAME --base MODEL --out runs/theirs
    jaxalign plan configs/llama3_8b_slots_align.yaml --topology v5e:4x4
    jaxalign data show configs/demo.yaml
    jaxalign config configs/demo.yaml
    jaxalign demo

Each command is a dataclass in `commands`; only the one that was asked for is imported. A user's
mistake becomes one sentence and exit code 2; `--debug` shows where it arose.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from jaxalign import __version__, commands
from jaxalign.arguments import Command, declare, read, without_dashes
from jaxalign.bounds import check_text
from jaxalign.errors import UserError
from jaxalign.interrupts import heard_interrupts
from jaxalign.terminal import complain, steady_output

# What each command is for, and the dataclass of its options.
COMMANDS = {
    "train": ("train an adapter (or a whole model)", "train.Train"),
    "data show": ("print rows, coloured by what is trained", "show.Show"),
    "evaluate": ("compare systems on what they write", "evaluate.Evaluate"),
    "generate": ("write answers to rows or prompts", "evaluate.Generate"),
    "probe": ("which layer aligns which languages", "probe.Probe"),
    "compare": ("train several methods on one base and compare them", "compare.Compare"),
    "prepare subspace": ("find the directions in which languages differ", "prepare.Subspace"),
    "prepare clusters": ("group languages, and find the middle of each group", "prepare.Clusters"),
    "merge": ("combine adapters of one base, or write them into it", "merge.Merge"),
    "export": ("write a run in a form that PyTorch, vLLM or JAX can load", "export.Export"),
    "import": ("check and import an adapter trained elsewhere", "export.Import"),
    "plan": ("compile a run for hardware that you do not have", "plan.Plan"),
    "config": ("print every setting with its origin", "config.Settings"),
    "demo": ("train the embedded small model with and without alignment", "demo.Demo"),
}
# Of commands of two words.
GROUPS = {
    "data": "look at the data of a run",
    "prepare": "measure what a method needs before a run of it begins",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    # transformers, which reads our tokenizers, says that without PyTorch no model is available.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    with steady_output(), heard_interrupts():
        return _run(sys.argv[1:] if argv is None else argv)


def parser_for(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser: all commands, and the options of the one that these words name."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser = argparse.ArgumentParser(
        prog="jaxalign",
        description="Fine-tuned LLMs for the languages their task data does not cover.",
        parents=[common],
    )
    parser.add_argument("--version", action="version", version=f"jaxalign {__version__}")
    within = {"": parser.add_subparsers(metavar="COMMAND", required=True)}

    def add(group: str, name: str, text: str) -> argparse.ArgumentParser:
        return within[group].add_parser(name, help=text, description=text, parents=[common])

    asked = [word for word in words if not word.startswith("-")]
    for name, (text, _) in COMMANDS.items():
        *group, last = parts = name.split()
        if group and group[0] not in within:
            within[group[0]] = add("", group[0], GROUPS[group[0]]).add_subparsers(
                metavar="WHAT", required=True
            )
        command = add(" ".join(group), last, text)
        if asked[: len(parts)] == parts:
            options = options_of(name)
            command.set_defaults(options=options)
            declare(command, options)
    return parser


def options_of(name: str) -> type[Command]:
    """The options of a command, which run it."""
    module, _, kind = COMMANDS[name][1].rpartition(".")
    return getattr(importlib.import_module(f"{commands.__name__}.{module}"), kind)


def _run(words: Sequence[str]) -> int:
    parser = parser_for(words)
    args, rest = parser.parse_known_args(words)
    # Settings may stand anywhere after the command, also behind an option.
    if wrong := next((word for word in rest if word.startswith("-")), None):
        if meant := without_dashes(wrong, args.options):
            return _refuse(f"{wrong} is a setting; write {meant}")
        parser.error(f"unrecognized option {wrong}")
    try:
        for word in words:
            check_text("command line", word, nul="refused")
        options: Any = read(args.options, vars(args), rest)
        if out := getattr(options, "out", ""):
            from jaxalign.paths import check_local

            check_local(out, "--out")
        return options.run() or 0
    except UserError as error:
        if args.debug:
            raise
        return _refuse(error)
    except OSError as error:
        # A full disk, a folder that nobody may write: of the machine, not of this package.
        if args.debug or not error.strerror:
            raise
        where = f"{error.filename}: " if error.filename else ""
        return _refuse(f"{where}{error.strerror} (--debug shows where)")
    except KeyboardInterrupt:
        complain("interrupted; the same command goes on from the last checkpoint")
        return 130
    except Exception as error:
        from jaxalign import multihost

        sentence = multihost.lost(error)
        if args.debug or sentence is None:
            raise
        complain(sentence)
        sys.stdout.flush()
        os._exit(multihost.LOST)  # JAX would wait for the other process to end in good order


def _refuse(sentence: object) -> int:
    complain(sentence)
    return 2


if __name__ == "__main__":
    sys.exit(main())
