"""One training update of ours against the same update in PyTorch: time, memory, equal losses.

Everything runs in float32 on the CPU with random weights, one LoRA (rank 8, seven projections),
clipping and AdamW. Two rivals: `peft`, what one writes with transformers and PEFT (pairs: all
layers of both sides with `output_hidden_states=True`), and `paper`, the steps of the paper's code
as we understand them (pairs: the lower blocks of each side, plus a head whose logits nobody reads).

    python benchmarks/train_step.py                                # 10 M parameters, 2 threads
    python benchmarks/train_step.py --model 60m --remat full       # with gradient checkpointing
    python benchmarks/train_step.py --answers 1.0 --dropout 0.1
    python benchmarks/train_step.py --memory                       # a process per side and step
    python benchmarks/train_step.py --profile                      # where our step spends its time

Before anything is timed, both sides must give the same loss and, after three updates, the same
adapter: otherwise the run ends. Then ours and a rival take turns (A B A B), and the table shows the
median of the ratios of neighbouring runs, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# Shapes: a task micro-batch of 16 rows of 128 tokens, a pair micro-batch of 16 x 64 tokens a side.
# No row is padded: padding costs us nothing more, and spares torch its fused causal attention.
ROWS, TASK_LENGTH, PAIR_LENGTH = 16, 128, 64
TEMPERATURE, RATE, CLIP = 0.1, 5e-4, 1.0
STEPS, RIVALS = ("task", "align"), ("peft", "paper")
TOLERANCE = 1e-4


class Shape(NamedTuple):
    """A model size, and the tapped layer."""

    layers: int
    dim: int
    ffn: int
    vocab: int
    heads: int
    kv_heads: int
    tap: int


MODELS = {
    "10m": Shape(layers=8, dim=256, ffn=1024, vocab=4096, heads=8, kv_heads=4, tap=4),
    "60m": Shape(layers=12, dim=512, ffn=2048, vocab=16384, heads=8, kv_heads=4, tap=6),
}

Update = Callable[[], float]  # one update on the held state; gives the loss back


def make_batches(shape: Shape, answers: float, seed: int = 1) -> dict[str, np.ndarray]:
    """Random task rows whose last `answers` share is trained, and random pairs."""
    rng = np.random.default_rng(seed)
    draw = lambda length: rng.integers(3, shape.vocab, (ROWS, length)).astype(np.int32)  # noqa: E731
    # The first token of a row has nothing before it, so at most T - 1 positions are trained.
    trained = min(round(answers * TASK_LENGTH), TASK_LENGTH - 1)
    return {
        "tokens": draw(TASK_LENGTH),
        "first_answer": np.array(TASK_LENGTH - trained),
        "source": draw(PAIR_LENGTH),
        "target": draw(PAIR_LENGTH),
    }


# --- ours ---------------------------------------------------------------------------------------


class Ours:
    """Our jitted updates on the weights of a folder."""

    def __init__(self, folder: Path, options: argparse.Namespace, batches: dict) -> None:
        import jax
        import jax.numpy as jnp

        from jaxalign.adapters.lora import Lora
        from jaxalign.hf.load import load_params, load_spec
        from jaxalign.hf.peft import load_peft
        from jaxalign.model.decoder import Decoder
        from jaxalign.objectives import bind, resolve
        from jaxalign.train.optim import make_optimiser
        from jaxalign.train.phases.build import Term, build
        from jaxalign.train.schedule import learning_rate
        from jaxalign.train.state import Frozen, TrainState
        from jaxalign.train.step import make_train_step

        shape = MODELS[options.model]
        spec = load_spec(folder / "base")
        self.frozen = Frozen(load_params(folder / "base", spec, jnp.float32))
        lora, facts = load_peft(folder / "adapter", spec)
        adapter = Lora(facts.r, facts.alpha, options.dropout, facts.targets)
        decoder = Decoder(spec, adapter, remat=options.remat)

        def phase(number: int, name: str, **options: Any) -> Any:
            objective = bind(resolve(name), name, options, "options", {}, {})
            return build(decoder, (Term(name, objective),), number=number)

        phases = {
            "task": phase(0, "language_model"),
            "align": phase(1, "contrastive", layer=shape.tap, temperature=TEMPERATURE),
        }
        optimiser = make_optimiser(learning_rate("constant", RATE, 1, 0), clip_norm=CLIP)
        self.step = make_train_step(phases, optimiser)
        self.state = TrainState.create(jax.tree.map(jnp.asarray, lora), optimiser)
        self.key = jax.random.key(0) if options.dropout else None
        self.batches = {
            "task": {"task": self._task(batches)},
            "align": {"align": self._pairs(batches)},
        }

    @staticmethod
    def _task(batches: dict) -> Any:
        import jax

        from jaxalign.data.batch import TaskBatch

        tokens, first = batches["tokens"], int(batches["first_answer"])
        rows = lambda x: np.broadcast_to(x.astype(np.int32), (ROWS, len(x)))  # noqa: E731
        batch = TaskBatch(
            tokens=tokens,
            segments=np.ones_like(tokens),
            positions=rows(np.arange(TASK_LENGTH)),
            answer_at=rows(np.arange(first - 1, TASK_LENGTH - 1)),
            answers=tokens[:, first:],
        )
        return jax.tree.map(lambda x: x[None], batch)  # one micro-batch

    @staticmethod
    def _pairs(batches: dict) -> Any:
        import jax

        from jaxalign.data.batch import PairBatch

        mask = np.ones((ROWS, PAIR_LENGTH), np.int32)
        batch = PairBatch(batches["source"], mask, batches["target"], mask)
        return jax.tree.map(lambda x: x[None], batch)

    def update(self, step: str) -> float:
        self.state, metrics = self.step(self.state, self.frozen, self.batches[step], self.key)
        return float(metrics[f"{step}/loss"])

    def compile(self, step: str) -> Any:
        """The program of the gradient, by far the largest part of an update."""
        batch = self.batches[step][step]
        return self.step.gradient.lower(step, self.state, self.frozen, batch, self.key).compile()

    def adapter(self) -> float:
        """A number that any difference in the trained weights would move."""
        import jax

        return sum(float(np.abs(np.asarray(x)).sum()) for x in jax.tree.leaves(self.state.trained))


# --- PyTorch ------------------------------------------------------------------------------------


class Torch:
    """Eager PyTorch updates: transformers' Llama, PEFT's LoRA, SDPA attention."""

    def __init__(self, folder: Path, options: argparse.Namespace, batches: dict, kind: str) -> None:
        import torch
        from peft import PeftModel
        from transformers import LlamaForCausalLM

        torch.set_num_threads(options.threads)
        torch.manual_seed(0)
        self.kind, self.tap = kind, MODELS[options.model].tap
        base = LlamaForCausalLM.from_pretrained(
            folder / "base", dtype=torch.float32, attn_implementation="sdpa"
        )
        base.config.use_cache = False
        self.model = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
        for module in self.model.modules():
            if hasattr(module, "lora_dropout"):
                # PEFT reads the rate from the folder; dropout 0 is PEFT's Identity.
                rate = options.dropout
                module.lora_dropout["default"] = (
                    torch.nn.Dropout(rate) if rate else torch.nn.Identity()
                )
        if options.remat == "full":
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.trained, lr=RATE, weight_decay=0.0)
        tensors = {k: torch.tensor(np.asarray(v)).long() for k, v in batches.items()}
        self.tokens, self.sides = tensors["tokens"], (tensors["source"], tensors["target"])
        self.labels = self.tokens.clone()
        self.labels[:, : int(batches["first_answer"])] = -100
        self.mask = torch.ones_like(self.tokens)
        self.pair_mask = torch.ones_like(self.sides[0])
        self.losses = {
            "task": self._task,
            "align": {"peft": self._align_peft, "paper": self._align_paper}[kind],
        }

    def _task(self) -> Any:
        return self.model(self.tokens, attention_mask=self.mask, labels=self.labels).loss

    def _align_peft(self) -> Any:
        states = [
            self.model(side, attention_mask=self.pair_mask, output_hidden_states=True)
            for side in self.sides
        ]
        return self._contrast([state.hidden_states[self.tap] for state in states])

    def _align_paper(self) -> Any:
        causal = self.model.get_base_model()
        states = [self._lower_blocks(causal.model, side) for side in self.sides]
        causal.lm_head(states[0]).float()  # computed there, then thrown away
        return self._contrast(states)

    def _lower_blocks(self, stack: Any, tokens: Any) -> Any:
        import torch
        from transformers.masking_utils import create_causal_mask

        x = stack.embed_tokens(tokens)
        places = torch.arange(x.shape[1])[None]
        mask = create_causal_mask(
            config=stack.config,
            inputs_embeds=x,
            attention_mask=self.pair_mask,
            past_key_values=None,
            position_ids=places,
        )
        turn = stack.rotary_emb(x, position_ids=places)
        for block in stack.layers[: self.tap]:
            x = block(x, attention_mask=mask, position_ids=places, position_embeddings=turn)
        return x

    def _contrast(self, states: list) -> Any:
        from torch.nn.functional import cosine_similarity, cross_entropy

        weights = self.pair_mask[..., None].float()
        source, target = ((weights * x).sum(1) / weights.sum(1) for x in states)
        import torch

        scores = cosine_similarity(source[:, None], target[None], dim=-1) / TEMPERATURE
        return cross_entropy(scores, torch.arange(len(scores)))

    def update(self, step: str) -> float:
        import torch

        loss = self.losses[step]()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, CLIP)
        self.optimiser.step()
        # Tensors above the tap keep a zero gradient, as under ZeRO, so that both sides do the same.
        self.optimiser.zero_grad(set_to_none=False)
        return loss.item()

    def adapter(self) -> float:
        return sum(float(p.detach().abs().sum()) for p in self.trained)


SIDES: dict[str, Callable[..., Any]] = {
    "ours": Ours,
    "peft": partial(Torch, kind="peft"),
    "paper": partial(Torch, kind="paper"),
}


def random_llama(shape: Shape, **facts: Any) -> Any:
    """A Llama of this shape with random weights; `facts` are more of its configuration."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.dim,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        **facts,
    )
    return LlamaForCausalLM(config)


def write_models(folder: Path, options: argparse.Namespace) -> None:
    """A random base and a random adapter, both written by transformers and PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model

    base = random_llama(MODELS[options.model])
    base.save_pretrained(folder / "base")
    names = ("q", "k", "v", "o", "gate", "up", "down")
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=[f"{name}_proj" for name in names])
    model = get_peft_model(base, lora)
    for name, tensor in model.named_parameters():
        if "lora_B" in name:  # zero as PEFT makes it would leave A without a gradient
            torch.nn.init.normal_(tensor, std=0.02)
    model.save_pretrained(folder / "adapter")


# --- measuring ----------------------------------------------------------------------------------


def check_equal(sides: dict[str, Any], dropout: float) -> None:
    """Ends the run where two sides do not compute the same thing."""
    print("same weights, same batch: loss of three updates, then the sum of |adapter|")
    for step in STEPS:
        losses = {name: [side.update(step) for _ in range(3)] for name, side in sides.items()}
        for name, values in losses.items():
            shown = " ".join(f"{value:.6f}" for value in values)
            print(f"  {step:5} {name:5} {shown}  {sides[name].adapter():.4f}")
        gap = max(
            abs(a - b) for n in losses for a, b in zip(losses[n], losses["ours"], strict=True)
        )
        if dropout:
            print(f"  {step:5} not compared: dropout draws other masks on either side")
        elif gap > TOLERANCE:
            sys.exit(f"{step}: losses differ by {gap:.1e}, more than {TOLERANCE}")


def take_turns(ours: Update, theirs: Update, rounds: int) -> dict[str, Any]:
    """Seconds of each side and their ratios over `rounds` turns A B A B."""
    ours(), theirs()
    pairs = [(_seconds(ours), _seconds(theirs)) for _ in range(rounds)]
    ratios = [a / b for a, b in pairs]
    return {
        "ours_ms": 1e3 * statistics.median(a for a, _ in pairs),
        "theirs_ms": 1e3 * statistics.median(b for _, b in pairs),
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
    }


def _seconds(update: Update) -> float:
    start = time.perf_counter()
    update()
    return time.perf_counter() - start


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Ratios of every step and rival, in this process."""
    batches = make_batches(MODELS[options.model], options.answers)
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder), options)
        sides = {name: make(Path(folder), options, batches) for name, make in SIDES.items()}
    check_equal(sides, options.dropout)
    rows = []
    for step in options.steps:
        for rival in RIVALS:
            a, b = (partial(sides[name].update, step) for name in ("ours", rival))
            rows.append({"step": step, "rival": rival, **take_turns(a, b, options.rounds)})
    print(
        f"\n{'step':6} {'rival':6} {'ours ms':>8} {'theirs':>8} {'ratio':>6} {'lowest':>7} highest"
    )
    for row in rows:
        times = f"{row['ours_ms']:8.0f} {row['theirs_ms']:8.0f}"
        ratios = f"{row['ratio']:6.2f} {row['lowest']:7.2f} {row['highest']:7.2f}"
        print(f"{row['step']:6} {row['rival']:6} {times} {ratios}")
    return rows


def measure_memory(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak memory of each side and step, each in a process of its own."""
    rows = []
    print(f"\n{'step':6} {'side':6} {'peak MB':>8} {'added by three updates':>23} compiled")
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder), options)
        for step in options.steps:
            for side in SIDES:
                command = [sys.executable, __file__, *sys.argv[1:], "--one", side, step, folder]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                row = json.loads(done.stdout.splitlines()[-1])
                rows.append({"step": step, "side": side, **row})
                compiled = f"{row['compiled_mb']:8.0f}" if "compiled_mb" in row else ""
                print(f"{step:6} {side:6} {row['peak_mb']:8.0f} {row['added_mb']:23.0f} {compiled}")
    return rows


def measure_one(options: argparse.Namespace) -> None:
    """This process's memory: prints one line of JSON."""
    name, step, folder = options.one
    batches = make_batches(MODELS[options.model], options.answers)
    side = SIDES[name](Path(folder), options, batches)
    found = {}
    if name == "ours":
        # What the compiler itself needs would hide in the peak, hence the program's own figure.
        found["compiled_mb"] = side.compile(step).memory_analysis().temp_size_in_bytes / 1e6
    before = _peak_mb()
    for _ in range(3):
        side.update(step)
    print(json.dumps({"peak_mb": _peak_mb(), "added_mb": _peak_mb() - before, **found}))


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3  # Linux: KB


def profile(options: argparse.Namespace) -> None:
    """Our time by kind of instruction, from a trace of three updates."""
    import jax

    batches = make_batches(MODELS[options.model], options.answers)
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder), options)
        ours = Ours(Path(folder), options, batches)
        for step in options.steps:
            ours.update(step)
            with jax.profiler.trace(folder):
                for _ in range(3):
                    ours.update(step)
            trace = max(Path(folder).rglob("*.xplane.pb"), key=os.path.getmtime)
            data = jax.profiler.ProfileData.from_file(str(trace))
            spent: dict[str, float] = {}
            for plane in data.planes:
                for line in plane.lines:
                    for event in line.events:
                        if dict(event.stats).get("hlo_op"):
                            spent[event.name] = spent.get(event.name, 0) + event.duration_ns / 3e6
            print(f"\n{step}: ms an update, nested instructions count twice")
            for name, ms in sorted(spent.items(), key=lambda item: -item[1])[:40]:
                print(f"  {ms:8.1f}  {name}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="10m", help="10m, 60m; with --rows slots also a folder")
    parser.add_argument("--rows", choices=("random", "slots"), default="random",
                        help="slots: real rows, see benchmarks/slots.py")  # fmt: skip
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--remat", choices=("none", "full"), default="none")
    parser.add_argument("--dropout", type=float, default=0.0, help="of the adapter, either side")
    parser.add_argument("--answers", type=float, default=0.25, help="share of trained positions")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--peft-rows", type=int, default=32,
                        help="--rows slots: task rows that PEFT runs at a time")  # fmt: skip
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.model not in MODELS and options.rows == "random":
        parser.error(f"--model {options.model}: choose one of {', '.join(MODELS)}")
    # XLA takes as many threads as it may run on cores, so the affinity binds it; torch is told.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    if options.rows == "slots":
        import slots

        shape = MODELS.get(options.model)
        make = shape and partial(random_llama, shape)
        rows = slots.measure(options, shape, make)
        if options.json:
            options.json.write_text(
                json.dumps({"options": vars(options), "rows": rows}, indent=1, default=str)
            )
    elif options.one:
        measure_one(options)
    elif options.profile:
        profile(options)
    else:
        facts = f"{options.model}, remat {options.remat}, dropout {options.dropout}"
        print(f"{facts}, answers {options.answers:.0%} of the tokens, {options.threads} threads")
        rows = measure_memory(options) if options.memory else measure(options)
        if options.json:
            options.json.write_text(json.dumps({"options": facts, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
