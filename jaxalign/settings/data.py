"""The settings of the two streams and what is done with them: task, pairs, objectives, batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxalign.bounds import setting

AUTO = "auto"  # align.layer=auto: the layer where a probe of the base finds retrieval best
KINDS = ("rows", "slots", "intent", "intent_slots", "translation", "ner", "choice", "text")
UNJUDGED = ("text",)  # kinds without a scorer: nothing is answered
UNASKED = ("rows", "text")  # kinds whose rows get no template: nobody is asked
HALVED = ("maml", "fomaml", "reptile")  # rules that learn from a half of each micro-batch
SAMPLING = ("proportional", "uniform", "temperature")


@dataclass
class TaskConfig:
    """The task stream; weight 0 turns it off."""

    kind: str = setting(
        "rows",
        "`rows`: finished rows, prefix and text; `text`: texts of which every token is trained",
        choices=KINDS,
    )
    train: list[str] = setting(
        [], "files, globs, `hf:NAME[:SUBSET]@SPLIT`, `tfds:NAME[/CONFIG]@SPLIT`", path=True
    )
    valid: list[str] = setting([], "as `task.train`; what validation measures", path=True)
    columns: dict[str, str] = setting({}, "our field name: the data's")
    languages: list[str] = setting(
        [], "keep only these; for translation codes or directions (`de-en`); empty: all"
    )
    loss: str = setting(
        "answer",
        "the tokens that are predicted; `all`: the prompt's, too",
        choices=("answer", "all"),
    )
    sampling: str = setting("proportional", "over languages", choices=SAMPLING)
    sampling_temperature: float = setting(
        2.0, "p ~ n^(1/T), with `task.sampling=temperature`", above=0
    )
    order: str = setting(
        "mixed",
        "`grouped`: each micro-batch holds one language; with `task.sampling=uniform` they take "
        "turns",
        choices=("mixed", "grouped"),
    )
    transforms: list[Any] = setting(
        [],
        "changes to the records before they are used: names or `module:function`",
        free=True,
        see="objectives.md#transforms",
    )
    objective: str = setting(
        "language_model", "registry name or `package.module:function`", see="objectives.md"
    )
    options: dict[str, Any] = setting(
        {}, "keyword arguments of an objective of one's own", free=True
    )
    weight: float = setting(1.0, "0 turns the task off", lowest=0)
    rule: str = setting(
        "mean",
        "from micro-batches to a gradient; `maml`, `fomaml`, `reptile`: a gradient that helps "
        "after a few steps on a half of each",
        choices=("mean", *HALVED),
        see="methods.md#meta-learning-over-languages",
    )
    inner_rate: float = setting(
        0.01, "learning rate of these steps (plain SGD); 0: as if there were none", lowest=0
    )
    inner_steps: int = setting(2, "how many of these steps", lowest=1)

    @property
    def halved(self) -> bool:
        """Whether the rule learns from one half of each micro-batch and asks the other."""
        return self.rule in HALVED


@dataclass
class AlignConfig:
    """The sentence pairs and the alignment objective; weight 0 turns them off."""

    every: str = setting(
        "microbatch",
        "how the phases take turns: `microbatch` (the paper's code), `step` (its text), `joint`",
        choices=("microbatch", "step", "joint"),
    )
    layer: Any = setting(  # a whole number or AUTO
        16,
        "the output of this block, counted from 1; 0: the embeddings; `auto`: where a probe of the "
        "base finds retrieval best",
        lowest=0,
        besides=(AUTO,),
    )
    temperature: float = setting(0.1, "τ", above=0)
    direction: str = setting(
        "one_way",
        "`one_way`: a source finds its target; `symmetric`: both ways",
        choices=("one_way", "symmetric"),
    )
    negatives: str = setting(
        "group",
        "candidates: the targets of `align.group` consecutive pairs; `global`: of the micro-batch",
        choices=("group", "global"),
    )
    group: int = setting(32, "pairs per group", lowest=1)
    detach: str = setting(
        "none", "no gradient through this side", choices=("none", "source", "target")
    )
    states: str = setting(
        "raw",
        "what the objective compares; `standardised`: every dimension by its mean and deviation "
        "over a sample, so that massive activations do not drown the others; `centred`: by its "
        "mean alone; `trimmed`: without the massive dimensions",
        choices=("raw", "standardised", "centred", "trimmed"),
    )
    pooling: str = setting(
        "mean",
        "over real tokens; `mean_rest`: all but the first token, the attention sink; `position`: "
        "later tokens weigh more",
        choices=("mean", "mean_rest", "first", "last", "position"),
    )
    rows: str = setting(
        "pairs",
        "`prompts`: one answer to two prompts, from task rows (`task.kind`) of one `id`",
        choices=("pairs", "prompts"),
        see="objectives.md#two-prompts",
    )
    pivot: str = setting(
        "en",
        "with `align.rows=prompts` the language of the teacher's prompts; empty: it reads the "
        "student's own",
    )
    control: str = setting(
        "none",
        "`shuffled`: targets are moved to other sources (a control run)",
        choices=("none", "shuffled"),
    )
    train: list[str] = setting(
        [], "sentence pairs, or task rows; sources as in `task.train`", path=True
    )
    valid: list[str] = setting([], "as `align.train`; what validation measures", path=True)
    columns: dict[str, str] = setting({}, "our field name: the data's")
    languages: list[str] = setting([], "keep pairs with both languages listed; empty: all")
    sampling: str = setting("uniform", "over language pairs", choices=SAMPLING)
    sampling_temperature: float = setting(
        2.0, "p ~ n^(1/T), with `align.sampling=temperature`", above=0
    )
    transforms: list[Any] = setting(
        [],
        "changes to the records before they are used: names or `module:function`",
        free=True,
        see="objectives.md#transforms",
    )
    objective: str = setting(
        "contrastive", "registry name or `package.module:function`", see="objectives.md"
    )
    options: dict[str, Any] = setting(
        {}, "keyword arguments of an objective of one's own", free=True
    )
    weight: float = setting(1.0, "0 turns alignment off", lowest=0)
    rule: str = setting(
        "mean",
        "from micro-batches to a gradient; `cached`: that of all pairs of an update as one batch, "
        "in the memory of one micro-batch",
        choices=("mean", "cached"),
    )


@dataclass
class ExtraObjective:
    """One more term in a phase."""

    objective: str = setting("", "registry name or `package.module:function`", see="objectives.md")
    phase: str = setting("task", "the phase it joins", choices=("task", "align"))
    weight: float = setting(1.0, "its factor in the sum", lowest=0)
    every: int = setting(1, "it counts in every n-th update of its phase", lowest=1)
    options: dict[str, Any] = setting({}, "its keyword arguments", free=True)


@dataclass
class BatchConfig:
    """Sizes are global: rows of one micro-batch over all devices and hosts."""

    size: int = setting(32, "task rows (packed: sequences) of a micro-batch", lowest=1)
    pairs: int = setting(32, "sentence pairs (or rows of two prompts) of a micro-batch", lowest=1)
    accumulate: int = setting(4, "micro-batches per update (`joint`: of each phase)", lowest=1)
    max_length: int = setting(
        2048, "tokens of a task row; longer rows are cut on the right and counted", lowest=2
    )
    pair_max_length: int = setting(2048, "tokens of one side of a pair; longer ones are cut, too",
                                   lowest=1)  # fmt: skip
    buckets: list[int] = setting(
        [], "padded lengths; empty: chosen from the data", whole=True, lowest=1
    )
    pack: str = setting(
        "auto",
        "`flatten`: the rows of a micro-batch end to end, without padding; `segments`: several "
        "task rows fill a sequence; `none`: each row padded; `auto`: `flatten` where rows have up "
        "to 1,024 tokens of their own, `batch.buckets` is empty and `mesh.seq` is 1",
        choices=("auto", "none", "segments", "flatten"),
    )
    share_prefix: str = setting(
        "auto",
        "`auto`: tokens that rows have in common at their start are computed once where rows "
        "are flattened or packed; `off`: in each row",
        choices=("auto", "off"),
    )
