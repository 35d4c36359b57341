"""The same updates by transformers and PEFT in PyTorch: SDPA, gradient checkpointing on and off.

As `benchmarks/train_step.py` does it for its rival `peft`: bfloat16 weights made on the device, a
LoRA in bfloat16 (PEFT's default of float32 is slower), no mask (rows are not padded, and without
one SDPA takes its fused causal kernel), clipping and the fused AdamW; pairs run through the whole
model with `output_hidden_states=True`. Micro-batches are halved until they fit. `--full` adds
torch.compile, and the first update with the kernels of liger-kernel where that is installed.

    python benchmarks/gpu/peers.py --seconds 200
"""

from __future__ import annotations

import gc
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

from part import Part, Row, median_seconds
from shapes import LLAMA, WORK, Work, hf_config, least_flops, shrunk, spec_of

TEMPERATURE, RATE, CLIP = 0.1, 5e-4, 1.0
NAMES = ("q", "k", "v", "o", "gate", "up", "down")


def main() -> None:
    part = Part(__doc__)
    # The anchor first with either setting, then each shape; what runs short of time is left out.
    chosen = WORK[: 2 if part.quick else 4]
    made: list[Peer] = []

    def peer() -> Peer:
        if not made:
            made.append(Peer(part.rehearse))
        return made[0]

    part.measure("model", lambda: {"made_s": peer().took})
    settings = [(work, kept) for work in chosen for kept in (True, False)]
    for work, checkpointing in settings:
        small = shrunk(work) if part.rehearse else work
        name = f"{work.name}, checkpointing {'on' if checkpointing else 'off'}"
        part.measure(name, lambda w=small, c=checkpointing: peer().measure(w, c), need=12)
    for work in chosen[:2] if part.full else ():
        small = shrunk(work) if part.rehearse else work
        run = partial(Peer.measure, work=small, checkpointing=False, compiled=True)
        part.measure(f"{work.name}, torch.compile", lambda run=run: run(peer()), need=60)
    if part.full:
        first = shrunk(chosen[0]) if part.rehearse else chosen[0]
        made.clear()  # its weights make room
        part.measure(
            f"{chosen[0].name}, liger kernels, checkpointing off",
            lambda: Peer(part.rehearse, liger=True).measure(first, False),
            need=25,
        )


class Peer:
    """A model with two adapters, of rank 8 and 16, and AdamW on the one in use.

    Llama 3 8B with random weights, or the model of a folder. `liger` replaces its norms, rotations,
    gated products and loss by liger-kernel's.
    """

    def __init__(self, rehearse: bool, folder: Path | None = None, liger: bool = False) -> None:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

        began = time.monotonic()
        if not rehearse and not torch.cuda.is_available():
            raise RuntimeError("PyTorch finds no GPU here; --rehearse runs on the CPU")
        self.torch, self.device = torch, "cpu" if rehearse else "cuda"
        if liger and not rehearse:  # its kernels are Triton's
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama()
        facts = hf_config(LLAMA, rehearse)
        if folder:
            facts = json.loads((folder / "config.json").read_text("utf-8"))
        self.spec, self.vocab = spec_of(facts), facts["vocab_size"]
        self.tap = self.spec.layers // 2
        torch.manual_seed(0)
        usual = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(self.device):
            if folder:
                base = AutoModelForCausalLM.from_pretrained(
                    folder, dtype=torch.bfloat16, attn_implementation="sdpa"
                )
            else:
                base = LlamaForCausalLM(LlamaConfig(**facts, attn_implementation="sdpa"))
        torch.set_default_dtype(usual)
        base.config.use_cache = False
        targets = [f"{name}_proj" for name in NAMES]
        lora = lambda r: LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets)  # noqa: E731
        self.model = get_peft_model(base, lora(8), "r8", autocast_adapter_dtype=False)
        self.model.add_adapter("r16", lora(16), autocast_adapter_dtype=False)
        self.model.train()
        self._wait()
        self.took = round(time.monotonic() - began, 1)

    def measure(self, work: Work, checkpointing: bool, compiled: bool = False) -> Row:
        """One work's row, in the largest micro-batches that fit."""
        loss_of = self._align if work.phase == "align" else self._task
        rows, micro_batches, refused = work.rows, work.micro_batches, []
        while True:
            batches = self._batches(work, rows, micro_batches)
            try:
                found = self._timed(work.rank, checkpointing, batches, loss_of, compiled)
                break
            except self.torch.cuda.OutOfMemoryError:
                refused.append(rows)
                if rows == 1 or work.phase == "align":  # fewer pairs are another loss
                    raise
                rows, micro_batches = rows // 2, micro_batches * 2
        row = found | {"rows": rows, "tokens": work.tokens, "flops": least_flops(self.spec, work)}
        return row | ({"too_large_rows": refused} if refused else {})

    def short(self, work: Work, padded: list[Any], labels: Any) -> Row:
        """Padded rows in one micro-batch: tokens and mask of each side; checkpointing if needed."""
        put = lambda x: self.torch.as_tensor(x, device=self.device)  # noqa: E731
        sides = [[put(x) for x in side] for side in padded]

        def task(model: Any, batch: Any) -> Any:
            (tokens, real), targets = batch[0][0], batch[1]
            return model(input_ids=tokens, attention_mask=real, labels=targets).loss

        def align(model: Any, batch: Any) -> Any:
            return self._align(model, *zip(*batch[0], strict=True))

        batches = [(sides, None if labels is None else put(labels))]
        loss_of = task if work.phase == "task" else align
        for checkpointing in (False, True):
            try:
                found = self._timed(work.rank, checkpointing, batches, loss_of)
                return found | {"checkpointing": checkpointing}
            except self.torch.cuda.OutOfMemoryError:
                if checkpointing:
                    raise
        raise AssertionError

    def _timed(
        self, rank: int, checkpointing: bool, batches: Any, loss_of: Any, compiled: bool = False
    ) -> Row:
        """Seconds of an update on these micro-batches."""
        torch = self.torch
        self.model.set_adapter(f"r{rank}")
        if checkpointing:
            self.model.enable_input_require_grads()
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)
        run_model = torch.compile(self.model) if compiled else self.model
        self._empty()

        def update() -> float:
            total = 0.0
            for batch in batches:
                loss = loss_of(run_model, batch) / len(batches)
                loss.backward()
                total = total + loss.detach()
            torch.nn.utils.clip_grad_norm_(trained, CLIP)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            self._wait()
            return float(total)

        try:
            loss = update()
            row = {"loss": round(loss, 4), "seconds": median_seconds(update, most=3, budget=6.0)}
        finally:
            optimiser.zero_grad(set_to_none=True)
        if self.device == "cuda":
            row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return row

    def _batches(self, work: Work, rows: int, number: int) -> list[Any]:
        torch = self.torch
        draw = partial(torch.randint, 3, self.vocab, (rows, work.length), device=self.device)
        sides = 2 if work.phase == "align" else 1
        return [[draw() for _ in range(sides)] for _ in range(number)]

    def _task(self, model: Any, batch: Any) -> Any:
        return model(input_ids=batch[0], labels=batch[0]).loss

    def _align(self, model: Any, batch: Any, masks: Any = None) -> Any:
        torch, functional = self.torch, self.torch.nn.functional
        means = []
        for side, real in zip(batch, masks or (None, None), strict=True):
            found = model(input_ids=side, attention_mask=real, output_hidden_states=True)
            states = found.hidden_states[self.tap].float()
            if real is None:
                means.append(states.mean(1))
            else:
                means.append((states * real[..., None]).sum(1) / real.sum(1, keepdim=True))
        source, target = means
        scores = functional.cosine_similarity(source[:, None], target[None], dim=-1) / TEMPERATURE
        return functional.cross_entropy(scores, torch.arange(len(scores), device=self.device))

    def _wait(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def _empty(self) -> None:
        gc.collect()
        if self.device == "cuda":
            self.torch.cuda.empty_cache()
            self.torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
