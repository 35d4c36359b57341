"""The model card of an export or a merge: README.md with the front matter that the hub reads.

Only what is known is written: a field that is empty leaves no line, no heading and no guess. The
licence is the user's to choose.

    facts = Facts('slots-cy', 'adapter', base='meta-llama/Meta-Llama-3-8B-Instruct')
    (folder / 'README.md').write_text(model_card(facts), 'utf-8')
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAPER = """\
@inproceedings{liu-niehues-2025-middle,
  title     = {Middle-Layer Representation Alignment for Cross-Lingual Transfer in Fine-Tuned {LLM}s},
  author    = {Liu, Danni and Niehues, Jan},
  booktitle = {Proceedings of the 63rd Annual Meeting of the Association for Computational Linguistics (Volume 1: Long Papers)},
  year      = {2025},
  pages     = {15979--15996},
  doi       = {10.18653/v1/2025.acl-long.778},
}"""  # noqa: E501
LIBRARIES = {"adapter": "peft", "model": "transformers"}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Data:
    """One stream of the training."""

    part: str  # what it was for: task, pairs
    files: tuple[str, ...]
    languages: str = ""  # 'en 1200, de 300' or 'en, de'


@dataclass(frozen=True)
class Merge:
    """How several adapters became one, or went into their base."""

    adapters: tuple[tuple[str, str, str], ...]  # name, weight, rank
    settings: tuple[tuple[str, str], ...]  # rows of a table


@dataclass(frozen=True)
class Scores:
    """A table of an evaluation, finished for print."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Facts:
    """What is known about an export."""

    title: str
    kind: str  # adapter | model
    path: str = "."  # what a loader calls it: a folder or hub name
    base: str = ""  # hub name; empty where the base is a local folder
    base_folder: str = ""  # name of that folder
    languages: tuple[str, ...] = ()  # two- or three-letter codes
    datasets: tuple[str, ...] = ()  # on the hub
    tags: tuple[str, ...] = ()
    summary: str = ""  # the sentence after 'A LoRA adapter for BASE'
    training: tuple[tuple[str, str], ...] = ()  # rows of a table
    data: tuple[Data, ...] = ()
    merge: Merge | None = None
    scores: Scores | None = None
    prompts: str = ""  # how prompts looked in training
    system: str = ""  # the system turn that all of them had
    template: str = "none"  # the chat template beside the weights: base (the base's) | own | none
    served_rank: int | None = None  # vLLM's --max-lora-rank
    limits: tuple[str, ...] = ()  # why vLLM does not serve the adapter; see `vllm_limits`
    dtype: str = ""  # of the weights of a model
    aligned: str = "no"  # whether the paper's objective was trained: yes | no


def model_card(facts: Facts) -> str:
    """README.md: front matter, then the body in Markdown."""
    return "\n\n".join([_front_matter(facts), *_body(facts)]) + "\n"


def hub_name(base: str) -> str:
    """The base as the hub calls it; empty where it is a folder of this machine."""
    return base if _HUB_NAME.fullmatch(base) and not Path(base).exists() else ""


def _front_matter(facts: Facts) -> str:
    import yaml

    fields: dict[str, Any] = {
        "base_model": facts.base,
        # The hub draws the tree of models by it; adapters it knows by their library.
        "base_model_relation": "finetune" if facts.base and facts.kind == "model" else "",
        "library_name": LIBRARIES[facts.kind],
        "pipeline_tag": "text-generation",
        "language": list(facts.languages),
        "datasets": list(facts.datasets),
        "tags": [*facts.tags, "jaxalign"],
    }
    known = {name: value for name, value in fields.items() if value}
    # A YAML library quotes what needs it: Norwegian is 'no'.
    return f"---\n{yaml.safe_dump(known, sort_keys=False, allow_unicode=True)}---"


def _body(facts: Facts) -> Iterator[str]:
    yield f"# {facts.title}"
    yield _opening(facts)
    if facts.training:
        yield "## Training"
        yield table(("", ""), facts.training)
    if facts.data:
        yield "## Data"
        head = ("", "files", "languages")
        yield table(
            head, [(d.part, ", ".join(map(_code, d.files)), d.languages) for d in facts.data]
        )
    if facts.merge:
        yield "## Merge"
        yield table(("adapter", "weight", "rank"), facts.merge.adapters)
        yield table(("", ""), facts.merge.settings)
    if facts.scores:
        yield "## Scores"
        yield table(facts.scores.head, facts.scores.rows)
        yield from facts.scores.notes
    if facts.prompts:
        yield "## Prompts"
        yield facts.prompts
        if facts.system:
            yield "The system turn was:"
            yield "\n".join(f"> {line}" for line in facts.system.splitlines())
    yield "## Use"
    yield from _use(facts)
    if facts.aligned == "yes":
        yield "## Citation"
        yield f"```bibtex\n{PAPER}\n```"


def _opening(facts: Facts) -> str:
    what = "LoRA adapter" if facts.kind == "adapter" else "Model"
    if facts.base:
        of = f" of [{facts.base}](https://huggingface.co/{facts.base})"
    else:
        of = f" of a local base, `{facts.base_folder}`" if facts.base_folder else ""
    return f"{what}{of}{', ' + facts.summary if facts.summary else ''}."


def _use(facts: Facts) -> Iterator[str]:
    base = facts.base or "PATH/TO/THE/BASE"
    if facts.kind == "adapter":
        yield _python(
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{base}", dtype="auto")',
            f'model = PeftModel.from_pretrained(model, "{facts.path}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{facts.path}")',
        )
    else:
        yield _python(
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{facts.path}", dtype="auto")',
            f'tokenizer = AutoTokenizer.from_pretrained("{facts.path}")',
        )
    if facts.template != "none":
        turns = ['{"role": "user", "content": "..."}']
        if facts.system:
            turns.insert(0, '{"role": "system", "content": "..."}')
        yield _python(
            f"turns = [{', '.join(turns)}]",
            "inputs = tokenizer.apply_chat_template(",
            '    turns, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ")",
            "answer = model.generate(**inputs, max_new_tokens=128)",
            'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :]))',
        )
    yield from _serve(facts, base)


def _serve(facts: Facts, base: str) -> Iterator[str]:
    chat = " \\\n    --chat-template chat_template.jinja" if facts.template == "own" else ""
    if facts.kind == "model":
        yield f"```bash\nvllm serve {facts.path}\n```"
    elif facts.limits:
        yield from (f"{limit}." for limit in facts.limits)
    elif facts.served_rank:
        yield (
            f"```bash\nvllm serve {base} --enable-lora --max-lora-rank {facts.served_rank} \\\n"
            f"    --lora-modules adapter={facts.path}{chat}\n```"
        )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; what stands in the cells is shown as it is."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)])


def _code(text: str) -> str:
    return f"`{text}`"


def _python(*lines: str) -> str:
    return "```python\n" + "\n".join(lines) + "\n```"
