"""Tokens, labels, masks, pairs, collated batches and prompts equal those of the paper's code.

A case is a folder with rows.json, tokenizer/ and expected_block*.json (expected_prompts.json too
where it exists), anywhere below the golden folder.
"""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from jaxalign.data import sources, tasks
from jaxalign.data.batch import (
    NO_TARGET,
    Encoded,
    PairBatch,
    TaskBatch,
    collate_pairs,
    collate_tasks,
    cover,
)
from jaxalign.data.chat import encode_examples, encode_prompts, load_tokenizer, render_examples
from jaxalign.data.loader import each
from jaxalign.data.pairs import encode_pairs, to_pair
from jaxalign.data.streams import pair_stream, task_stream
from jaxalign.settings import Config

REPO = Path(__file__).resolve().parents[2]
LLAMA3 = "meta-llama/Meta-Llama-3-8B-Instruct"  # the one name the original's template flag knows


def golden_folders() -> list[Path]:
    """JAXALIGN_GOLDEN (folders, separated like PATH), else the copy and a neighbouring folder."""
    named = os.environ.get("JAXALIGN_GOLDEN", "")
    if named:
        return [Path(folder) for folder in named.split(os.pathsep)]
    return [REPO / "tests" / "data" / "golden", REPO.parent / "shared" / "golden"]


def pipeline_cases() -> dict[str, Path]:
    """Case name -> folder; the first folder that has a name wins."""
    found: dict[str, Path] = {}
    for folder in golden_folders():
        for rows in sorted(folder.rglob("rows.json")):
            case = rows.parent
            if (case / "tokenizer").is_dir() and list(case.glob("expected_block*.json")):
                found.setdefault(case.name, case)
    return found


CASES = pipeline_cases()
BLOCKS = [
    pytest.param(case, file, id=f"{name}-{file.stem}")
    for name, case in CASES.items()
    for file in sorted(case.glob("expected_block*.json"))
]
PROMPTS = [
    pytest.param(case, number, id=f"{name}-{number}")
    for name, case in CASES.items()
    if (case / "expected_prompts.json").exists()
    for number in range(len(json.loads((case / "expected_prompts.json").read_text("utf-8"))))
]


def test_cases_are_there():
    if not CASES:
        pytest.skip(
            f"no pipeline case (rows.json, tokenizer/, expected_block*.json) below "
            f"{', '.join(map(str, golden_folders()))}; set JAXALIGN_GOLDEN"
        )
    assert BLOCKS


def original_task_block(batch: TaskBatch, rows: list[Encoded]) -> dict[str, np.ndarray]:
    """Our task batch in the original's layout: labels are rebuilt from answer_at and answers.

    A row without prefix tokens has a label on its first token there; nothing predicts it (the loss
    is shifted), so our batch does not hold it and it is put back from the row.
    """
    labels = np.full_like(batch.tokens, NO_TARGET)
    row, place = np.nonzero(batch.answers != NO_TARGET)
    labels[row, batch.answer_at[row, place] + 1] = batch.answers[row, place]
    for b, encoded in enumerate(rows):
        if encoded.prompt == 0:
            labels[b, 0] = encoded.tokens[0]
    return {
        "input_ids": batch.tokens,
        "attention_mask": (batch.segments > 0).astype(np.int32),
        "labels": labels,
    }


def original_pair_blocks(batch: PairBatch) -> dict[str, np.ndarray]:
    """Our pair batch in the original's: each side as long as its own longest row, up to 8."""
    out = {}
    for number, side in enumerate(("source", "target")):
        ids, mask = getattr(batch, side), getattr(batch, f"{side}_mask")
        length = cover(int(mask.sum(axis=1).max()), 8)
        assert not mask[:, length:].any()
        out[f"input_ids_parallel_{number}"] = ids[:, :length]
        out[f"attention_mask_parallel_{number}"] = mask[:, :length]
    return out


def assert_equal(ours: dict[str, np.ndarray], golden: dict[str, list]) -> None:
    for name, array in ours.items():
        assert array.tolist() == golden[name], name


def read_case(case: Path, file: Path):
    expected = json.loads(file.read_text("utf-8"))
    return expected, load_tokenizer(str(case / "tokenizer")), sources.read(str(case / "rows.json"))


@pytest.mark.parametrize("case, file", BLOCKS)
def test_rows_and_labels(case, file):
    expected, tokenizer, records = read_case(case, file)
    assert tokenizer.pad_token_id == expected["tokenizer"]["pad_id"]
    examples = [tasks.render("rows", record) for record in records]
    rows = encode_examples(examples, tokenizer, max_length=expected["block_size"])
    assert len(rows) == len(expected["features"])
    for row, golden in zip(rows, expected["features"], strict=True):
        length = len(golden["input_ids"])
        assert row.prompt == golden["prefix_length"]
        single = collate_tasks([[row]], length, length, tokenizer.pad_token_id)
        ours = original_task_block(single, [row])
        assert_equal({name: array[0] for name, array in ours.items()}, golden)


@pytest.mark.parametrize("case, file", BLOCKS)
def test_pairs(case, file):
    expected, tokenizer, records = read_case(case, file)
    pairs = encode_pairs([to_pair(r) for r in records], tokenizer, expected["block_size"])
    assert len(pairs) == len(expected["features"])
    for pair, golden in zip(pairs, expected["features"], strict=True):
        assert pair.source.tolist() == golden["input_ids_parallel_0"]
        assert pair.target.tolist() == golden["input_ids_parallel_1"]
        assert set(golden["attention_mask_parallel_0"]) == {1}


@pytest.mark.parametrize("case, file", BLOCKS)
def test_collated_batches(case, file):
    expected, tokenizer, records = read_case(case, file)
    limit, pad = expected["block_size"], tokenizer.pad_token_id
    examples = [tasks.render("rows", record) for record in records]
    rows = encode_examples(examples, tokenizer, max_length=limit)
    pairs = encode_pairs([to_pair(r) for r in records], tokenizer, limit)
    starts = range(0, len(rows), 4)
    assert len(starts) == len(expected["collated_bs4"])
    for start, golden in zip(starts, expected["collated_bs4"], strict=True):
        some = rows[start : start + 4]
        length = cover(max(len(r.tokens) for r in some), 8)
        batch = collate_tasks([[r] for r in some], length, length, pad)
        both = pairs[start : start + 4]
        length = cover(max(max(len(p.source), len(p.target)) for p in both), 8)
        ours = original_task_block(batch, some) | original_pair_blocks(
            collate_pairs(both, length, pad)
        )
        assert set(ours) == set(golden)
        assert_equal(ours, golden)


@pytest.mark.parametrize("case, file", BLOCKS)
def test_streams_give_the_same_batches(case, file):
    """The streams, too; rows that lost their whole answer are dropped, the original keeps them."""
    expected, tokenizer, _ = read_case(case, file)
    config = Config()
    config.task.kind = "rows"
    config.task.valid = config.align.valid = [str(case / "rows.json")]
    config.batch.size = config.batch.pairs = 4
    config.batch.max_length = config.batch.pair_max_length = expected["block_size"]
    config.batch.buckets = list(range(8, cover(expected["block_size"], 8) + 1, 8))
    stream = task_stream(config, tokenizer, "valid")
    untrained = [set(f["labels"]) == {NO_TARGET} for f in expected["features"]]
    assert stream.report.dropped == sum(untrained)
    pairs = pair_stream(config, tokenizer, "valid")
    assert pairs.epoch_batches == len(expected["collated_bs4"])
    for index, golden in enumerate(expected["collated_bs4"]):
        real = len(golden["input_ids"])
        assert pairs.real_rows(index) == real
        batch = each(lambda array: array[:real], pairs.batch(index))  # noqa: B023
        assert_equal(original_pair_blocks(batch), golden)
        if not any(untrained):
            batch = each(lambda array: array[:real], stream.batch(index))  # noqa: B023
            assert_equal(original_task_block(batch, stream.rows[4 * index :][:real]), golden)


def first_system_turn(prompt: str) -> str:
    found = re.search(
        r"system(?:<\|end_header_id\|>\n)?\n(.*?)<\|(?:eot_id|im_end)\|>", prompt, re.S
    )
    assert found
    return found.group(1)


@pytest.mark.parametrize("case, number", PROMPTS)
def test_prompts(case, number):
    golden = json.loads((case / "expected_prompts.json").read_text("utf-8"))[number]
    tokenizer = load_tokenizer(str(case / "tokenizer"))
    paper = golden["no_default_template"] and golden["base_model_name"] == LLAMA3
    template = "llama3_paper" if paper else "chat"
    system = first_system_turn(golden["prompts"][0])
    examples = [
        tasks.Example(prompt=words, answer="None", system="replaced")
        for words in golden["utterances"]
    ]
    rendered = render_examples(examples, tokenizer, template, system)
    assert [r.prompt for r in rendered] == golden["prompts"]
    ids = [
        [token for token, real in zip(row, mask, strict=True) if real]
        for batch in golden["batches_bsz3"]
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    # The original tokenises the rendered default template with special tokens once more, so its
    # Llama prompts begin with two begin tokens; ours, as in training, with one.
    extra = [] if paper else tokenizer("")["input_ids"]
    ours = encode_prompts(examples, tokenizer, template, system)
    assert [extra + row.tolist() for row in ours] == ids
    trained = encode_examples(examples, tokenizer, template, system)
    for row, prompt in zip(trained, ours, strict=True):
        assert row.tokens[: row.prompt].tolist() == prompt.tolist()
        assert row.tokens[-1] == tokenizer.eos_token_id
