"""Is what was written the model that was trained? Read it back as others do, compare the logits.

The model in memory (base and adapter apart, as in training) and the files (by transformers and
PEFT, or by our own reader where they are not installed) get the same prompts in float32. A merged
model may differ by the rounding of its weights and by nothing else.

    reference = in_memory(source)
    check = verify(source, folder, 'merged', 'bfloat16', reference)
    check.difference, check.agreement              # an error is raised above `check.bound`
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.base import open_files
from jaxalign.data.chat import encode_prompts, encode_texts
from jaxalign.data.tasks import Example
from jaxalign.errors import UserError
from jaxalign.export.source import Source, whole_base
from jaxalign.hf.load import abstract_params
from jaxalign.hf.peft import load_peft
from jaxalign.model.decoder import Decoder
from jaxalign.sharding import path_name, shard_tree

TEXTS = (
    "Wake me up at nine tomorrow morning.",
    "Wird es heute Abend in Berlin regnen?",
    "Pone algo de música tranquila, por favor.",
    "明日の朝九時に起こしてください。",
)
# Largest difference, as a share of the largest logit, by the dtype of the written weights: what
# two implementations of float32 differ by, and what rounding W + s A B to 11 or 8 bits does.
NOISE = 1e-4
BOUNDS = {"float32": NOISE, "float16": 4e-3, "bfloat16": 3e-2}


@dataclass(frozen=True)
class Reference:
    """What the model in memory says."""

    rows: list[np.ndarray]  # token ids of the prompts
    logits: list[np.ndarray]  # [t, V] float32 of each
    bare: list[np.ndarray] | None  # the same of the base without adapter


@dataclass(frozen=True)
class Check:
    """How far the files are from the model in memory."""

    reader: str  # what read them
    difference: float  # the largest of all logits
    bound: float  # the largest that is allowed
    agreement: float  # share of positions whose likeliest token is the same
    positions: int
    effect: float | None  # of the adapter: the largest difference to the bare base

    def __str__(self) -> str:
        """One line for people."""
        effect = (
            "" if self.effect is None else f"; the adapter itself moves them by {self.effect:.2g}"
        )
        return (
            f"verified by {self.reader}: logits differ by at most {self.difference:.2g} "
            f"(bound {self.bound:.2g}){effect}; top-1 agreement {self.agreement:.1%} of "
            f"{self.positions} positions"
        )


def in_memory(source: Source) -> Reference:
    """The logits of the trained model, base and adapter apart, and of its base."""
    rows = prompts(source)
    mesh = source.opened.mesh
    if source.adapter is None:
        params = jax.tree.map(np.asarray, source.weights)
        params = jax.device_put(params, shard_tree(mesh, params))
        return Reference(rows, _logits(Decoder(source.spec), params, None, rows, mesh), None)
    whole_base(source)
    params = source.opened.take(jnp.float32)
    lora = jax.device_put(source.weights, shard_tree(mesh, source.weights))
    decoder = Decoder(source.spec, source.adapter)
    return Reference(
        rows,
        _logits(decoder, params, lora, rows, mesh),
        _logits(Decoder(source.spec), params, None, rows, mesh),
    )


def verify(source: Source, folder: Path, form: str, dtype: str, reference: Reference) -> Check:
    """Reads the files back and compares.

    Args:
        source: what was exported.
        folder: where the files are.
        form: peft, merged or orbax.
        dtype: of the written weights.
        reference: from `in_memory`.

    Raises:
        UserError: they differ by more than the bound, or are not nearer to the trained model than
            its base is, or their tokenizer builds other prompts, or a bit of an adapter differs.
    """
    _check_tokenizer(source, folder, reference.rows)
    reader, logits = READERS[form](source, folder, reference.rows)
    top = max(float(np.abs(one).max()) for one in reference.logits)
    same = np.concatenate(
        [a.argmax(-1) == b.argmax(-1) for a, b in zip(logits, reference.logits, strict=True)]
    )
    check = Check(
        reader=reader,
        difference=_largest(logits, reference.logits),
        bound=BOUNDS[dtype] * top,
        agreement=float(same.mean()),
        positions=same.size,
        effect=None if reference.bare is None else _largest(reference.bare, reference.logits),
    )
    if not check.difference <= check.bound:  # so that nan fails
        raise UserError(
            f"verification failed, nothing was kept: read by {reader}, logits differ by "
            f"{check.difference:.3g} from the model in memory, {dtype} allows {check.bound:.3g}"
        )
    # Bounds are wide for a weak adapter: files that lost it would pass.
    felt = check.effect is not None and check.effect > NOISE * top
    if felt and check.difference >= (check.effect or 0.0):
        raise UserError(
            f"verification failed, nothing was kept: read by {reader}, the logits are as far from "
            f"the trained model ({check.difference:.3g}) as the bare base's ({check.effect:.3g}); "
            + (f"{dtype} is too coarse for this adapter, try --dtype float32" if form != "peft"
               else "the adapter has no effect there")
        )  # fmt: skip
    if form == "peft":
        _check_bits(source, folder)
    return check


def _check_bits(source: Source, folder: Path) -> None:
    """The factors in the files must be those that were read, bit by bit.

    Those were compared with the checkpoint's own sums, or with the folder's hashes, when they were
    read: logits of a few prompts would not show a changed bit of a factor.
    """
    written, _ = load_peft(folder, source.spec)
    ours = dict(jax.tree_util.tree_leaves_with_path(source.weights))
    theirs = dict(jax.tree_util.tree_leaves_with_path(written))
    for path in ours | theirs:
        if path not in ours or path not in theirs or not _same_bits(ours[path], theirs[path]):
            raise UserError(
                f"verification failed, nothing was kept: {path_name(path)} in the files is not "
                "what was read; look for a broken disk or memory"
            )


def _same_bits(one: Any, other: Any) -> bool:
    a, b = (np.asarray(array, np.float32) for array in (one, other))
    return a.shape == b.shape and a.tobytes() == b.tobytes()


def prompts(source: Source) -> list[np.ndarray]:
    """Token ids of a few prompts as the training builds them, else of plain texts."""
    if source.opened.its_tokenizer is None:
        numbers = np.random.default_rng(0)
        return [numbers.integers(0, source.spec.vocab, 32).astype(np.int32) for _ in TEXTS]
    tokenizer = source.opened.tokenizer
    config = source.config
    if config and config.templated:
        rows = encode_prompts(_examples(), tokenizer, config.prompt.template, system=None)
    else:
        rows, _ = encode_texts(TEXTS, tokenizer)
    return [row[: source.spec.max_position] for row in rows]


def _examples() -> list[Example]:
    return [Example(text, answer="", system="") for text in TEXTS]


def _check_tokenizer(source: Source, folder: Path, rows: Sequence[np.ndarray]) -> None:
    """The written tokenizer, used as anyone uses it, must build the prompts of the training."""
    if not any(folder.glob("tokenizer*")):
        return
    tokenizer = open_files(str(folder)).tokenizer
    config = source.config
    if config and config.templated:
        theirs: list[Any] = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}],
                add_generation_prompt=True,
                return_dict=False,
                enable_thinking=False,
            )
            for text in TEXTS
        ]
    else:
        theirs = [*encode_texts(TEXTS, tokenizer)[0]]
    for text, ours, other in zip(TEXTS, rows, theirs, strict=True):
        if not np.array_equal(ours, np.asarray(other)[: len(ours)]):
            raise UserError(
                f"verification failed, nothing was kept: for {text!r} the written tokenizer gives "
                "other tokens than the training's"
            )


# Readers ------------------------------------------------------------------------------------------


def _peft(source: Source, folder: Path, rows: Sequence[np.ndarray]) -> tuple[str, list[np.ndarray]]:
    base = whole_base(source)
    assert source.adapter is not None  # or there is no such folder
    if source.adapter.in_peft and _installed("torch", "peft"):
        from peft import PeftModel

        return _torch(
            base, rows, lambda model: PeftModel.from_pretrained(model, str(folder)), "peft"
        )
    mesh = source.opened.mesh
    lora, adapter = load_peft(folder, source.spec)
    lora = jax.device_put(lora, shard_tree(mesh, lora))
    params = source.opened.take(jnp.float32)
    return "jaxalign", _logits(Decoder(source.spec, adapter), params, lora, rows, mesh)


def _merged(
    source: Source, folder: Path, rows: Sequence[np.ndarray]
) -> tuple[str, list[np.ndarray]]:
    if _installed("torch"):
        return _torch(folder, rows)
    written = open_files(str(folder))
    params = written.take(jnp.float32)
    return "jaxalign", _logits(Decoder(written.spec), params, None, rows, written.mesh)


def _orbax(
    source: Source, folder: Path, rows: Sequence[np.ndarray]
) -> tuple[str, list[np.ndarray]]:
    import orbax.checkpoint as ocp

    mesh, spec = source.opened.mesh, open_files(str(folder)).spec
    with ocp.StandardCheckpointer() as reader:
        stored = reader.metadata(folder / "params").item_metadata.tree
        shardings = shard_tree(mesh, abstract_params(spec, jnp.float32))
        wanted = jax.tree.map(
            lambda one, where: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=where),
            stored,
            shardings,
        )
        params = reader.restore(folder / "params", wanted)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    return "jaxalign", _logits(Decoder(spec), params, None, rows, mesh)


READERS = {"peft": _peft, "merged": _merged, "orbax": _orbax}


def _installed(*packages: str) -> bool:
    return all(importlib.util.find_spec(package) for package in packages)


def _torch(
    folder: Path, rows: Sequence[np.ndarray], wear: Any = None, *more: str
) -> tuple[str, list[np.ndarray]]:
    """Logits by transformers; `wear` puts an adapter on the model."""
    import torch
    from transformers import AutoModelForCausalLM

    with _quiet():
        model = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=torch.float32, trust_remote_code=False
        )
        model = (wear(model) if wear else model).eval()

    def logits(row: np.ndarray) -> np.ndarray:
        """Of the row's own tokens; PEFT gives those of soft prompts in front, too."""
        given = torch.from_numpy(np.asarray(row, np.int64))[None]
        return model(given).logits[0, -len(row) :].float().numpy()

    with torch.no_grad():
        found = [logits(row) for row in rows]
    names = ("transformers", *more)
    return " and ".join(f"{name} {version(name)}" for name in names), found


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars and warnings of other libraries among our sentences."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _logits(
    decoder: Decoder, params: Any, lora: Any, rows: Sequence[np.ndarray], mesh: jax.sharding.Mesh
) -> list[np.ndarray]:
    """[t, V] float32 of each row; padding on the right changes nothing before it."""
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    real = np.zeros(tokens.shape, bool)
    for at, row in enumerate(rows):
        tokens[at, : len(row)], real[at, : len(row)] = row, True

    @jax.jit
    def run(params: Any, lora: Any, tokens: jax.Array) -> jax.Array:
        hidden = decoder.forward(params, lora, tokens, asked=real).hidden
        assert hidden is not None  # all blocks are run
        return decoder.logits(params, hidden)

    # Matrix units round float32 unless they are asked not to.
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        found = np.asarray(run(params, lora, tokens))
    return [found[at, : len(row)] for at, row in enumerate(rows)]


def _largest(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))
