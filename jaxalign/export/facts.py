"""What a run's own records say about it, for the model card: settings, data, scores.

Every line comes from the configuration saved with the checkpoint, from the data files as they are,
or from an evaluation of these very weights; where one of them is missing, so is the line.

    facts = card_facts(source, 'adapter', path='runs/own/export/peft', template=template)
    model_card(facts)                                    # README.md
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxalign.adapters import Adapter
from jaxalign.base import decoding_of
from jaxalign.data import sources, tasks
from jaxalign.data.chat import instruction
from jaxalign.data.languages import base_language, split_direction
from jaxalign.data.prompts import examples_of
from jaxalign.data.template import Template, joins
from jaxalign.data.wanted import read_again
from jaxalign.errors import UserError
from jaxalign.export.scores import scores_of
from jaxalign.export.source import Source
from jaxalign.generate.decoding import Decoding
from jaxalign.hf.card import Data, Facts, Scores, base_facts
from jaxalign.model.spec.tensors import parameter_count
from jaxalign.objectives import FINAL
from jaxalign.settings import AlignConfig, Config, TaskConfig
from jaxalign.settings.data import UNASKED
from jaxalign.settings.together import compared
from jaxalign.train.phases import PHASES, facts_of
from jaxalign.train.phases.align import reads

CODE = re.compile(r"[a-z]{2,3}")
PROMPTS = {
    "chat": "the tokenizer's chat template",
    "llama3_paper": (
        "the paper's layout for Llama 3 (a newline after each end of turn), here as the chat "
        "template of these files"
    ),
}


def card_facts(
    source: Source,
    kind: str,
    path: str,
    template: Template,
    stops: tuple[int, ...] = (),
    dtype: str = "",
) -> Facts:
    """Everything known about an export.

    Args:
        source: what is exported.
        kind: as of `Facts`.
        path: the folder or hub name it will be loaded from; its last part is the title.
        template: the chat template stored with it.
        stops: the tokens that end its answers, where its base does not say them all.
        dtype: of a model's weights.
    """
    config, adapter = source.config, source.adapter
    found = list(streams(config)) if config else []
    systems = {system for stream in found for system in stream.systems}
    system = systems.pop() if len(systems) == 1 else ""
    scores = scores_of(source)
    how = _decoding(config, scores)
    return Facts(
        title=Path(path).name if path != "." else source.name,
        kind=kind,
        path=path,
        **base_facts(source.base, source.opened.revision),
        languages=tuple(sorted({code for stream in found for code in stream.codes})),
        datasets=tuple(dict.fromkeys(_hub_sets(config))) if config else (),
        tags=_tags(source, config),
        summary=_summary(config) if config else "",
        training=tuple(_training(source, config, dtype)),
        data=tuple(stream.data for stream in found),
        scores=scores,
        prompts=_prompts(config, template.kind) if config else "",
        system=system,
        asked=_how_asked(source, template, system),
        call=how.call(),
        request=how.request(),
        template=template.kind,
        stops=stops,
        served_rank=adapter.served_rank if adapter else None,
        limits=tuple(adapter.limits()) if adapter else (),
        dtype=dtype,
        **_adapter(adapter),
        aligned="yes" if config and _is_aligned(config) else "no",
    )


def _adapter(adapter: Adapter | None) -> dict[str, Any]:
    """What it is, where it is not a change of weights as LoRA and DoRA are."""
    if adapter is None or adapter.merges:
        return {}
    return {"what": adapter.name[0].upper() + adapter.name[1:], "in_peft": adapter.in_peft}


# Settings -----------------------------------------------------------------------------------------


def _training(source: Source, config: Config | None, dtype: str) -> Iterator[tuple[str, str]]:
    """Rows of the table: what was trained, on what, how long."""
    adapter = source.adapter
    if adapter:
        yield from adapter.facts(source.spec).items()
    else:
        yield "trained", f"all {parameter_count(source.spec):,} parameters"
    if dtype:
        yield "weights", dtype
    if source.saved:
        best = " (the best by validation)" if source.saved.best else ""
        yield "updates", f"{source.saved.step:,}{best}"
    if not config:
        return
    if config.task.weight > 0:
        yield "task objective", _objective(config.task, {})
    if config.align.weight > 0:
        looks = _looks(config)
        yield "alignment objective", _objective(config.align, _alignment(config, looks))
        for layer in looks.layers:
            final = "none: the states after the final norm"
            block = f"{layer} of {source.spec.layers} (its output)"
            yield "aligned layer", final if layer == FINAL else block
        if config.align.control != "none":
            yield "control run with pairs", config.align.control
        if config.align.rows == "prompts":
            yield "prompts of the teacher", config.align.pivot or "those of the student"
    for extra in config.objectives:
        options = "".join(f", {key} {value}" for key, value in extra.options.items())
        words = f"{extra.objective}, weight {extra.weight:g}{options}"
        yield f"more in the {extra.phase} phase", words
    if config.task.weight > 0 and config.align.weight > 0:
        yield "turns", TURNS[config.align.every]
    yield from _hyper_parameters(config)


TURNS = {
    "microbatch": "task and alignment by micro-batch",
    "step": "task and alignment by update",
    "joint": "task and alignment in every update",
}


def _hyper_parameters(config: Config) -> Iterator[tuple[str, str]]:
    optim, batch = config.optim, config.batch
    clip = f"clipped at {optim.clip_norm:g}" if optim.clip_norm else "not clipped"
    yield "learning rate", f"{optim.learning_rate:g}, {optim.schedule}"
    warm = f"{optim.warmup_steps} updates" if optim.warmup_steps else f"{optim.warmup_ratio:g}"
    yield "warm-up", warm if optim.warmup_steps else f"{warm} of the updates"
    yield (
        "AdamW",
        f"betas {optim.beta1:g} and {optim.beta2:g}, eps {optim.eps:g}, weight decay "
        f"{optim.weight_decay:g}, gradients {clip}",
    )
    sizes = []
    if config.task.weight > 0:
        rows = "packed sequences" if PHASES["task"].packed(config) else "rows"
        sizes.append(f"{batch.size} {rows} of at most {batch.max_length} tokens")
    if config.align.weight > 0 and config.align.rows == "pairs":
        sizes.append(f"{batch.pairs} pairs of at most {batch.pair_max_length}")
    elif config.align.weight > 0:
        sizes.append(f"{batch.pairs} rows of two prompts of at most {batch.max_length} tokens")
    yield "micro-batch", "; ".join(sizes)
    yield "micro-batches per update", str(batch.accumulate)
    yield "base in training", config.model.stored
    yield "seed", str(config.seed)


def _objective(part: TaskConfig | AlignConfig, own: dict[str, Any]) -> str:
    options = own | part.options
    words = "".join(f", {key} {value}" for key, value in options.items())
    return f"{part.objective}, weight {part.weight:g}{words}"


@dataclass(frozen=True)
class Looks:
    """What the objective of the alignment reads."""

    settings: frozenset[str] = frozenset()  # as the phase offers them
    layers: tuple[int, ...] = ()


def _looks(config: Config) -> Looks:
    """What training bound; nothing where the objective's code or files are not here any more."""
    facts = facts_of(config, "align")
    try:
        term = facts.terms(dataclasses.replace(config, objectives=[]))[0].objective
    except UserError:
        return Looks()
    layers = {tap.layer for needs in term.needs.values() for tap in needs.taps}
    taken = term.function.keywords.keys() - config.align.options.keys()
    if term.needs == facts.needs(config):  # of an objective without a mark, too
        taken |= {"pooling", "form"}
    offered = facts.offers(config).items()
    read = (name for name, value in offered if name in taken and reads(term, name, value))
    return Looks(frozenset(read), tuple(sorted(layers)))


def _alignment(config: Config, looks: Looks) -> dict[str, Any]:
    """The settings that the alignment objective reads; its own options are not among them."""
    align = config.align
    found = {
        "temperature": ("temperature", f"{align.temperature:g}"),
        "direction": ("direction", align.direction.replace("_", "-")),
        "negatives": ("negatives among", _negatives(config)),
        "pooling": ("pooling", align.pooling),
        "form": ("states", align.states if align.states != "raw" else ""),
        "detach": ("no gradient through the", align.detach if align.detach != "none" else ""),
    }
    return {label: text for name, (label, text) in found.items() if name in looks.settings and text}


def _negatives(config: Config) -> str:
    """The candidates of a pair: of its group, of the micro-batch, or of all in an update."""
    align, pairs = config.align, max(compared(config))
    cached = align.rule == "cached"
    if align.negatives == "group" and (align.group < pairs or not cached):
        return f"{min(align.group, pairs)} consecutive pairs"
    return "all pairs of the update" if cached else "the micro-batch"


def _is_aligned(config: Config) -> bool:
    return config.align.weight > 0 and config.align.objective == "contrastive"


def _summary(config: Config) -> str:
    on = []
    if config.task.weight > 0:
        on.append(f"fine-tuned for {tasks.TASKS[config.task.kind].words}")
    if config.align.weight > 0:
        place = "".join(
            " after the final norm" if layer == FINAL else f" at layer {layer}"
            for layer in _looks(config).layers
        )
        if config.align.rows == "prompts":
            on.append("distilled from one prompt to another")
        elif config.align.control == "none":
            on.append(f"aligned across languages{place}")
        else:
            on.append(f"trained as a control run{place} on pairs that are {config.align.control}")
    return " and ".join(on)


def _tags(source: Source, config: Config | None) -> tuple[str, ...]:
    kind = (source.adapter.kind,) if source.adapter else ()
    crosses = config and config.align.weight > 0 and config.align.control == "none"
    crossing = ("cross-lingual-transfer",) if crosses else ()
    return (*kind, *crossing)


def _prompts(config: Config, template: str) -> str:
    if not config.prompted:
        return ""
    if config.task.kind == "text":
        return "Every token of the texts was trained; there were no prompts."
    if config.task.kind in UNASKED:
        return "Prompts were the rows' own prefixes; no chat template was applied in training."
    return f"Prompts were built by {PROMPTS[config.prompt.template]}." if template != "none" else ""


def _how_asked(source: Source, template: Template, system: str) -> str:
    """As `Facts.asked` names it: as prompts were built in training."""
    if source.config and not source.config.templated:
        return "text"
    # Training saw the instruction, so the base has a tokenizer.
    joined = bool(system) and joins(source.opened.tokenizer, template.text, system)
    return "joined" if joined else "turns"


def _decoding(config: Config | None, scores: Scores | None) -> Decoding:
    """That of the scored answers, or what the run's settings say."""
    if scores and scores.decoding:
        return Decoding.of(scores.decoding)
    return decoding_of(config) if config else Decoding()


# Data ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stream:
    """A stream that was on: what the card shows of it, and what its rows say."""

    data: Data
    codes: frozenset[str]  # of its languages
    systems: frozenset[str]  # the instructions of its rows


def streams(config: Config) -> Iterator[Stream]:
    """The streams of a run, with what their files hold now; nothing of a file that is gone."""
    parts: tuple[tuple[str, TaskConfig | AlignConfig], ...] = (
        ("task", config.task),
        (config.align.rows, config.align),
    )
    for name, part in parts:
        if part.weight <= 0 or not part.train:
            continue
        rows = read_again(config, part)
        directed = isinstance(part, TaskConfig) and tasks.TASKS[part.kind].directed
        named = [
            (row.language, getattr(row, "languages", None) or _sides(row.language, directed))
            for row in rows
        ]
        asked = [one for row in rows for one in examples_of(row) if not one.finished]
        systems = frozenset(instruction(one, config.prompt.system) for one in asked)
        counts = Counter(language for language, _ in named if language)
        if part.languages:  # the training saw these only, and made sure that each has rows
            counts = Counter(dict.fromkeys(part.languages, 0))
            named = [(language, _sides(language, directed)) for language in part.languages]
        yield Stream(
            Data(
                name,
                tuple(map(_shown, part.train)),
                ", ".join(map(_counted, sorted(counts.items()))),
            ),
            frozenset(filter(CODE.fullmatch, map(base_language, {c for _, s in named for c in s}))),
            systems - {""},
        )


def _sides(language: str, directed: bool) -> tuple[str, ...]:
    """The two languages of the direction 'de-en', or the one of 'de-st' and 'zh-CN'."""
    return tuple(filter(None, split_direction(language))) if directed else (language,)


def _counted(item: tuple[str, int]) -> str:
    language, rows = item
    return f"{language} {rows:,}" if rows else language


def _hub_sets(config: Config) -> Iterator[str]:
    for part in (config.task, config.align):
        for one in part.train if part.weight > 0 else ():
            if _scheme(one) == "hf":
                yield re.split("[:@]", one.removeprefix("hf:"))[0]


def _scheme(source: str) -> str:
    kind = source.partition(":")[0]
    return kind if kind in sources.SCHEMES else ""


def _shown(source: str) -> str:
    """A data source without the folders of this machine."""
    return source if _scheme(source) or not Path(source).is_absolute() else Path(source).name
