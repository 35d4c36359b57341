"""What may be said on the command line: one function for the words of each command.

    build({"train": run_train, ...}).parse_args(["train", "run.yaml", "align.layer=16"])

Imports nothing that is slow, so that `--help` is instant.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from jaxalign import __version__
from jaxalign.bounds import Bounds
from jaxalign.errors import UserError

Runs = Mapping[str, Callable[[argparse.Namespace], int | None]]


class Entrant(argparse.Action):
    """Collects --adapter and --predictions in the order of the command line."""

    def __call__(self, parser: Any, args: Any, value: Any, option: str | None = None) -> None:
        name, equals, path = str(value).partition("=")
        kind = str(option).lstrip("-")
        args.entrants = [
            *getattr(args, "entrants", []),
            (name if equals else "", path or name, kind),
        ]


def _number(**bounds: Any) -> Callable[[str], Any]:
    """The type of an option that is a number within bounds."""
    rule = Bounds(number=True, **bounds)

    def read(text: str) -> Any:
        try:
            value: Any = int(text) if rule.whole else float(text)
        except ValueError:
            value = text
        try:
            rule.check("", value)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix(": ")) from error
        return value

    return read


COUNT, ANY_COUNT = _number(whole=True, lowest=1), _number(whole=True, lowest=0)


def _configured(to: argparse.ArgumentParser) -> None:
    to.add_argument("config", help="YAML file")
    to.add_argument("settings", nargs="*", metavar="key=value", help="as in align.layer=16")


def _config(to: argparse.ArgumentParser) -> None:
    to.add_argument("config", nargs="?", help="YAML file")
    to.add_argument("settings", nargs="*", metavar="key=value", help="as in align.layer=16")
    to.add_argument(
        "--explain", default="", metavar="KEY", help="what a setting or a group of them is for"
    )


def _train(to: argparse.ArgumentParser) -> None:
    _configured(to)
    to.add_argument(
        "--profile",
        default="",
        metavar="START:N",
        help="trace N updates from START on, as log.profile=[START,N]",
    )


def _show(to: argparse.ArgumentParser) -> None:
    _configured(to)
    to.add_argument("--rows", type=ANY_COUNT, default=3, help="rows of each stream (default 3)")


def _evaluate(to: argparse.ArgumentParser) -> None:
    _configured(to)
    to.add_argument(
        "--base", action="store_true", help="the bare base (and, with evaluate.shots, few-shot)"
    )
    for name, what in (
        ("adapter", "a PEFT folder or hub name"),
        ("predictions", "a file of answers, scored without a model"),
    ):
        to.add_argument(
            f"--{name}",
            action=Entrant,
            dest="entrants",
            default=[],
            metavar="[NAME=]PATH",
            help=f"{what}; the same NAME again: another seed",
        )
    to.add_argument("--out", default="", help="folder (default OUTPUT/evaluation)")


def _generate(to: argparse.ArgumentParser) -> None:
    _configured(to)
    to.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="SOURCE",
        help="rows to answer, gold or not (default evaluate.data)",
    )
    to.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="a text to answer; printed"
    )
    to.add_argument("--adapter", default="", metavar="PATH", help="a PEFT folder or hub name")
    to.add_argument("--out", default="", help="JSONL file (default OUTPUT/answers.jsonl)")


def _probe(to: argparse.ArgumentParser) -> None:
    to.add_argument("model", help="a folder in Hugging Face layout, a hub name, or a YAML file")
    to.add_argument("settings", nargs="*", metavar="key=value", help="as in model.dtype=float32")
    to.add_argument(
        "--parallel",
        required=True,
        metavar="SOURCE",
        help="LANG.txt files, FLORES folder, XX-YY.tsv, JSONL, hf:NAME",
    )
    to.add_argument(
        "--adapter",
        action=Entrant,
        dest="entrants",
        default=[],
        metavar="[NAME=]PATH",
        help="compared with the base",
    )
    to.add_argument("--out", default="runs/probe", help="folder (default runs/probe)")
    to.add_argument(
        "--pooling",
        default="mean",
        help="of mean, mean_rest (all but the first token), last, position, first; several: "
        "mean,last",
    )
    to.add_argument(
        "--states-as",
        default="raw,standardised",
        metavar="FORM,FORM",
        help="how states are compared: raw, standardised, all_but_top (default raw,standardised)",
    )
    to.add_argument("--languages", default="", help="keep only these: en,de,cy")
    to.add_argument("--rows", type=ANY_COUNT, default=0, help="first sentences only (default all)")
    to.add_argument("--pivot", default="en", help="language the others are compared with (en)")
    to.add_argument(
        "--neurons",
        type=ANY_COUNT,
        default=0,
        metavar="N",
        help="NASCA and NAVCA on the first N sentences (the paper: 100)",
    )
    to.add_argument(
        "--items", default="", metavar="SOURCE", help="task items in several languages: DALI"
    )
    to.add_argument(
        "--scores",
        default="",
        metavar="FILE",
        help="report.json of evaluate, or {language: score}: correlated",
    )
    to.add_argument(
        "--states",
        default="float32",
        choices=("float32", "float16"),
        help="of the vectors on disk (default float32)",
    )
    to.add_argument(
        "--width",
        type=COUNT,
        default=None,
        metavar="N",
        help="approximate retrieval by N principal directions",
    )


def _merge(to: argparse.ArgumentParser) -> None:
    to.add_argument("adapters", nargs="+", metavar="ADAPTER", help="PEFT folders or hub names")
    to.add_argument("--out", required=True, help="folder to write")
    to.add_argument(
        "--weights",
        default="",
        metavar="W,W",
        help="one for each adapter, as in 0.6,0.4 (or --weights=-1,1)",
    )
    to.add_argument(
        "--method",
        default="delta",
        help="delta (exact), task_arithmetic (the same), svd, average, magnitude, "
        "ties, dare, dare_ties",
    )
    to.add_argument("--rank", type=COUNT, help="of the result, for methods that cut it")
    to.add_argument(
        "--density",
        type=_number(above=0, highest=1),
        help="share of entries kept: magnitude, ties, dare",
    )
    to.add_argument(
        "--seed",
        type=_number(whole=True, lowest=0, highest=2**32 - 1),
        default=1,
        help="of what dare drops (default 1)",
    )
    to.add_argument(
        "--base",
        default="",
        metavar="MODEL",
        help="the adapters' base (default: as the first one names it)",
    )
    to.add_argument("--into-base", default="", metavar="MODEL", help="write a whole model")
    to.add_argument(
        "--search",
        default="",
        metavar="CONFIG",
        help="choose weights by a score; key=value as in train",
    )
    to.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="W,W",
        help="values whose sums of 1 are tried; or one list an adapter",
    )
    to.add_argument("--metric", default="", help="a score of the task, or loss")
    to.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="SOURCE",
        help="rows to choose weights by (default task.valid)",
    )
    to.add_argument("--force", action="store_true", help="replace what is in --out")


def _export(to: argparse.ArgumentParser) -> None:
    to.add_argument("source", metavar="RUN", help="output of a training, PEFT folder or hub name")
    to.add_argument(
        "--format",
        default="peft",
        choices=("peft", "merged", "orbax"),
        help="adapter, whole model, or tree for JAX (default peft)",
    )
    to.add_argument(
        "--step",
        default="",
        metavar="N",
        help="a number, best or latest (default: the best, if there is one)",
    )
    to.add_argument("--out", default="", help="folder to write (default RUN/export/FORMAT)")
    to.add_argument("--base", default="", metavar="MODEL", help="where the base is now")
    to.add_argument(
        "--dtype", default="", help="of a model: float32, float16 or bfloat16 (default: the base's)"
    )
    to.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="(default 5GB)")
    to.add_argument("--verify", action="store_true", help="read it back, compare the logits")
    to.add_argument("--push", default="", metavar="NAME", help="upload to this hub repository")
    to.add_argument("--private", action="store_true", help="make that repository private")
    to.add_argument("--force", action="store_true", help="replace what is in --out")


def _import(to: argparse.ArgumentParser) -> None:
    to.add_argument("adapter", help="a PEFT folder or hub name")
    to.add_argument("--base", required=True, metavar="MODEL", help="what it was trained on")
    to.add_argument("--out", required=True, help="folder to write")
    to.add_argument("--force", action="store_true", help="replace what is in --out")


def _plan(to: argparse.ArgumentParser) -> None:
    _configured(to)
    to.add_argument(
        "--topology", required=True, metavar="CHIP:SHAPE", help="as in v5e:4x4, v5p:2x2x2 or h100:8"
    )
    to.add_argument(
        "--slices",
        type=int,
        default=1,
        metavar="N",
        help="TPU slices of that shape, or GPU nodes (default 1)",
    )
    to.add_argument(
        "--phases",
        default="",
        metavar="NAME,NAME",
        help="of task, align, update, task_eval, align_eval, prompt, token "
        "(default all; with --search task,align)",
    )
    to.add_argument(
        "--search", action="store_true", help="try meshes, remat, micro-batches and an int8 base"
    )
    to.add_argument(
        "--tries",
        type=int,
        default=8,
        metavar="N",
        help="candidates that --search compiles (default 8)",
    )
    to.add_argument("--price", type=_number(lowest=0), metavar="USD", help="dollars a chip-hour")
    to.add_argument("--json", default="", metavar="FILE", help="everything, as JSON")


def _demo(to: argparse.ArgumentParser) -> None:
    to.add_argument("--out", default="runs/demo", help="folder (default runs/demo)")
    to.add_argument("settings", nargs="*", metavar="key=value", help="as in train.steps=100")
    to.add_argument("--seeds", type=COUNT, default=1, help="runs of each kind (default 1)")


# What each command is for, and its words.
COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "train": ("train an adapter (or a whole model)", _train),
    "data show": ("print rows, coloured by what is trained", _show),
    "evaluate": ("compare systems on what they write", _evaluate),
    "generate": ("write answers to rows or prompts", _generate),
    "probe": ("which layer aligns which languages", _probe),
    "merge": ("combine adapters of one base, or write them into it", _merge),
    "export": ("write a run as what PyTorch, vLLM or JAX load", _export),
    "import": ("check an adapter trained elsewhere and take it in", _import),
    "plan": ("compile a run for machines that are not there", _plan),
    "config": ("print every setting with its origin", _config),
    "demo": ("train the embedded small model with and without alignment", _demo),
}
GROUPS = {"data": "look at the data of a run"}  # of commands of two words


def build(run: Runs) -> argparse.ArgumentParser:
    """The parser; `run` has the function of every command, which becomes `args.run`."""
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

    for name, (text, words) in COMMANDS.items():
        group, _, last = name.rpartition(" ")
        if group not in within:
            within[group] = add("", group, GROUPS[group]).add_subparsers(
                metavar="WHAT", required=True
            )
        command = add(group, last, text)
        command.set_defaults(run=run[name])
        words(command)
    return parser
