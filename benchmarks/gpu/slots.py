"""Short rows: what padding and a shared instruction cost, and the same rows by PEFT.

One update of Llama 3 8B with LoRA on 64 rows as slot filling has them (an instruction of 90 tokens
that all share, then 20 to 36 of their own; a third of those is the answer), and one on 128 sentence
pairs of 10 to 24 tokens a side. Ours: padded rows (`batch.pack=none`) against what
`batch.pack=auto` makes of them. PEFT: padded to the longest, gradient checkpointing off where that
fits. Tokens are random; those of a row count once, padding does not. `--model FOLDER` takes the
weights of a real model.

    python benchmarks/gpu/slots.py --seconds 100
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from part import Part, Row, median_seconds, need_gpu
from shapes import LLAMA, Work, hf_config, spec_of

ROWS, PAIRS, SHARED = 64, 128, 90
OWN, SIDE = (20, 37), (10, 25)  # tokens: from, below
LONGEST = {"task": SHARED + OWN[1], "align": SIDE[1]}
WORK = {
    "task": Work("64 rows behind an instruction", "task", 1, ROWS, LONGEST["task"]),
    "align": Work("128 short pairs", "align", 1, PAIRS, LONGEST["align"]),
}
LAYOUTS = ("end to end", "padded")
PAD = 0


def main() -> None:
    part = Part(__doc__, lambda parser: parser.add_argument("--side"))
    if part.options.side == "ours":
        need_gpu(part)
        ours_of(part)
    elif part.options.side == "PEFT":
        theirs_of(part)
    else:  # this process leaves the GPU alone: it belongs to one of the others at a time
        for side, share in (("ours", 0.65), ("PEFT", 1.0)):
            apart(part, side, share * part.left - 3)


def apart(part: Part, side: str, seconds: float) -> None:
    """The rows of one side, measured by a process of its own; those it has if it is too slow."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "rows.json")
        command = [sys.executable, __file__, "--side", side, "--out", str(out)]
        command += ["--seconds", str(seconds)] + (["--rehearse"] if part.rehearse else [])
        command += ["--model", str(part.options.model)] if part.options.model else []
        error = ""
        try:
            shown = subprocess.DEVNULL  # `keep` prints the rows
            if code := subprocess.run(command, timeout=max(seconds, 1), stdout=shown).returncode:
                error = f"exit code {code}; the log says why"
        except subprocess.TimeoutExpired:
            error = f"not finished after {seconds:.0f} s"
        for row in json.loads(out.read_text("utf-8")) if out.exists() else []:
            part.keep(row)
    if error:
        part.keep({"what": side, "error": error})


def texts(phase: str, vocab: int) -> list[list[np.ndarray]]:
    """The texts of each row, one of a task and two of a pair."""
    numbers = np.random.default_rng(0)
    draw = lambda count: numbers.integers(3, vocab, count).astype(np.int32)  # noqa: E731
    if phase == "align":
        return [[draw(numbers.integers(*SIDE)) for _ in range(2)] for _ in range(PAIRS)]
    shared = draw(SHARED)
    return [[np.concatenate([shared, draw(numbers.integers(*OWN))])] for _ in range(ROWS)]


def prompt_of(text: np.ndarray) -> int:
    """Tokens of a task row before its answer."""
    return SHARED + 2 * (len(text) - SHARED) // 3


def facts(rows: list[list[np.ndarray]]) -> Row:
    """What is the same however the rows are laid."""
    return {"texts": len(rows), "tokens": sum(len(text) for row in rows for text in row)}


# --- ours -----------------------------------------------------------------------------------------


def ours_of(part: Part) -> None:
    """Both phases, laid either way."""
    import jax.numpy as jnp
    import ours

    from jaxalign.hf.load import load_params, load_spec

    folder, made = part.options.model, []
    spec = load_spec(folder) if folder else spec_of(hf_config(LLAMA, part.rehearse))
    for phase, work in WORK.items():
        for layout in LAYOUTS:

            def measure(phase: str = phase, work: Work = work, layout: str = layout) -> Row:
                if not made:
                    random = ours.random_weights
                    made.append(load_params(folder, spec, jnp.bfloat16) if folder else random(spec))
                rows = texts(phase, spec.vocab)
                stream = stream_of(phase, rows, laid=layout == "end to end")
                one = ours.Ours(spec, work, weights=made[0], batch=stream.stack([0]))
                compiled = one.compile()
                loss = one.run()
                return {
                    "loss": round(loss, 4),
                    "compile_s": round(compiled, 1),
                    "seconds": median_seconds(one.run, most=5),
                    **facts(rows),
                    "computed": stream.tokens(0)[1],
                    "memory_gb": round(one.memory / 1e9, 2),
                }

            part.measure(f"{work.name}, {layout}", measure, need=12)


def stream_of(phase: str, rows: list[list[np.ndarray]], laid: bool) -> Any:
    """A stream of one micro-batch, as `jaxalign.data.streams` makes it of encoded rows."""
    from jaxalign.data.batch import Encoded, EncodedPair
    from jaxalign.data.flat import Text, begin, lay, shared_by
    from jaxalign.data.loader import PairStream, TaskStream
    from jaxalign.data.report import Report
    from jaxalign.data.sampling import Sequential, choose_buckets

    report, order = Report(len(rows), len(rows), 0, 0, {}), Sequential(len(rows))
    longest = [max(len(text) for text in row) for row in rows]
    buckets = choose_buckets(longest, len(rows))
    if phase == "task":
        encoded: list[Any] = [Encoded(text, prompt_of(text)) for (text,) in rows]
        parts = [[Text(row.tokens, row.prompt - 1, row.first, row.roles)] for row in encoded]
    else:
        encoded = [EncodedPair(*row) for row in rows]
        parts = [[Text(text, len(text) - 1, len(text)) for text in row] for row in rows]
    layout = None
    if laid:
        stem = shared_by(parts, len(rows))
        layout = lay(begin(parts, stem), order, len(rows), 1, PAD, stem)
    kind: Any = TaskStream if phase == "task" else PairStream
    return kind(encoded, order, len(rows), buckets, PAD, report, layout)


# --- PEFT -----------------------------------------------------------------------------------------


def theirs_of(part: Part) -> None:
    """Both phases, padded to the longest row."""
    import peers

    made: list[Any] = []

    def measure(phase: str) -> Row:
        if not made:
            made.append(peers.Peer(part.rehearse, folder=part.options.model))
        rows = texts(phase, made[0].vocab)
        padded = [pad([row[side] for row in rows]) for side in range(len(rows[0]))]
        labels = None
        if phase == "task":
            tokens, real = padded[0]
            starts = np.array([prompt_of(text) for (text,) in rows])
            answer = (np.arange(tokens.shape[1]) >= starts[:, None]) & (real > 0)
            labels = np.where(answer, tokens, -100)
        row = made[0].short(WORK[phase], padded, labels)
        return row | facts(rows) | {"computed": sum(tokens.size for tokens, _ in padded)}

    for phase, work in WORK.items():
        part.measure(f"{work.name}, PEFT", partial(measure, phase), need=8)


def pad(side: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask [B, T], T of the longest."""
    lengths = np.array([len(text) for text in side])
    real = (np.arange(max(lengths)) < lengths[:, None]).astype(np.int64)
    tokens = np.full(real.shape, PAD, np.int64)
    tokens[real > 0] = np.concatenate(side)
    return tokens, real


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    main()
