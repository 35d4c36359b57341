"""The two sides of train_step.py: our jitted updates, and PyTorch's, on one base and adapter.

sides = {name: make(folder, options, batches) for name, make in SIDES.items()}
sides['ours'].update('task')                                     # one update; gives its loss
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# Shapes: a task micro-batch of 16 rows of 128 tokens, a pair micro-batch of 16 x 64 tokens a side.
# No row is padded: padding costs us nothing more, and spares torch its fused causal attention.
ROWS, TASK_LENGTH, PAIR_LENGTH = 16, 128, 64
TEMPERATURE, RATE, CLIP = 0.1, 5e-4, 1.0


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
