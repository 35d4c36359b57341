"""Evaluation prompts whose start is computed once, against whole ones and transformers' `generate`.

Prompts of slot filling over xSID's test rows, the first of each of its 13 languages, as `jaxalign
evaluate` asks them: our instruction, the instruction of the paper's layout, and solved examples
in front (about 1,000 tokens). Greedy answers of a fixed length, float32, the CPU.

    python benchmarks/shared_prompts.py --model SmolLM2-135M
    python benchmarks/shared_prompts.py --model gemma-3-270m-it --prompts shots

Sharing must not change a token, or the run ends; rows for which transformers writes the same are
counted. After a round that compiles, the three sides take turns (A B C A B C), in batches of the
same rows, and the table shows medians and ratios of neighbouring runs. `--count` only counts
tokens, of all test rows.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

BATCH = 32
# Settings of each kind of prompt, and rows of each language that are answered.
PROMPTS: dict[str, tuple[list[str], int]] = {
    "ours": ([], 5),
    "paper": (["prompt.system={instruction}"], 5),
    "shots": (["evaluate.shots=32"], 1),
}


def ask(options: argparse.Namespace, kind: str, rows: int) -> tuple[Any, list[list[int]]]:
    """A base and the prompts that are asked of it."""
    from jaxalign.base import open_base
    from jaxalign.config import load
    from jaxalign.evaluate.gold import read_golds, solved_examples, with_shots

    xsid = Path(options.data, "xsid")
    words = [word.format(instruction=instruction(options.data)) for word in PROMPTS[kind][0]]
    config = load(
        None,
        [f"model.path={options.model}", "model.dtype=float32", "task.kind=slots", "mesh.fsdp=1",
         f"task.train=[{xsid}/train.en.jsonl]", f"evaluate.data=[{xsid}/test.*.jsonl]",
         f"evaluate.rows={rows}", *words],
    ).config  # fmt: skip
    base, golds = open_base(config), read_golds(config)
    if config.evaluate.shots:
        golds = with_shots(golds, solved_examples(config))
    prompts, _ = base.encode([gold.example for rows in golds.values() for gold in rows])
    return base, prompts


def instruction(data: str) -> str:
    """The system turn of the rows in the paper's layout, in quotes."""
    with Path(data, "slotfill_format", "train_baseline.jsonl").open(encoding="utf-8") as lines:
        prefix = json.loads(next(lines))["prefix"]
    return json.dumps(prefix.partition("\n\n")[2].partition("<|eot_id|>")[0])


def ours(base: Any, prompts: list[list[int]], new: int, share: bool) -> Callable[[], Any]:
    """Our `generate` with and without sharing."""
    from jaxalign.generate import Decoding, generate

    system = base.bare()
    settings: dict[str, Any] = {"stop_ids": (), "batch_size": BATCH, "share_prefix": share}
    return lambda: generate(system.decoder, system.params, None, prompts, Decoding(new), **settings)


def theirs(options: argparse.Namespace, prompts: list[list[int]]) -> Callable[[], Any]:
    """transformers' `generate` on the same batches, padded on the left."""
    import torch
    from transformers import AutoModelForCausalLM

    from jaxalign.generate import chunks

    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    groups = chunks([len(prompt) for prompt in prompts], BATCH)

    def run() -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in prompts]
        for group in groups:
            width = len(prompts[group[0]])
            short = [width - len(prompts[row]) for row in group]
            tokens = [[0] * n + prompts[row] for n, row in zip(short, group, strict=True)]
            mask = [[0] * n + [1] * (width - n) for n in short]
            with torch.inference_mode():
                out = model.generate(
                    input_ids=torch.tensor(tokens),
                    attention_mask=torch.tensor(mask),
                    max_new_tokens=options.new,
                    do_sample=False,
                    pad_token_id=0,
                )
            for row, found in zip(group, out[:, width:].tolist(), strict=True):
                answers[row] = found
        return answers

    return run


def measure(options: argparse.Namespace, kind: str) -> None:
    """Prints tokens computed and seconds of the three sides."""
    from jaxalign.generate import lay_out

    base, prompts = ask(options, kind, options.rows or PROMPTS[kind][1])
    layout, whole = (lay_out(prompts, BATCH, share) for share in (True, False))
    padded = sum(len(group) * max(len(prompts[row]) for row in group) for group in whole.groups)
    sides = {
        "shared": (ours(base, prompts, options.new, True), layout.computed),
        "whole": (ours(base, prompts, options.new, False), whole.computed),
        "transformers": (theirs(options, prompts), padded),
    }
    written = {name: run() for name, (run, _) in sides.items()}
    if written["shared"] != written["whole"]:
        sys.exit("sharing changes a token")
    pairs = zip(written["shared"], written["transformers"], strict=True)
    same = sum(ours == theirs for ours, theirs in pairs)
    print(f"{Path(options.model).name}, {kind}: {layout}", flush=True)
    print(f"  transformers writes the same for {same} of {len(prompts)} rows")
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, (run, _) in sides.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    for name, (_, computed) in sides.items():
        ratios = [b / a for a, b in zip(seconds["shared"], seconds[name], strict=True)]
        print(
            f"  {name:12} {computed:8,} prompt tokens {statistics.median(seconds[name]):7.2f} s, "
            f"{statistics.median(ratios):.2f} times ({min(ratios):.2f} to {max(ratios):.2f})",
            flush=True,
        )


def count(options: argparse.Namespace, kind: str) -> None:
    """Prints how many tokens of all rows are computed."""
    from jaxalign.generate import lay_out

    _, prompts = ask(options, kind, 0)
    print(f"{Path(options.model).name}, {kind}: {lay_out(prompts, BATCH)}")
    print(f"  whole {lay_out(prompts, BATCH, share=False).computed:,}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of a base with its tokenizer")
    parser.add_argument("--data", default=str(ROOT.parent / "shared" / "data"))
    parser.add_argument("--prompts", choices=PROMPTS, nargs="*", default=list(PROMPTS))
    parser.add_argument("--rows", type=int, default=0, help="of each language")
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--count", action="store_true")
    options = parser.parse_args()
    # XLA takes as many threads as it may run on cores, so the affinity binds it; torch is told.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    for kind in options.prompts:
        (count if options.count else measure)(options, kind)


if __name__ == "__main__":
    main()
