"""Greedy answers of the paper's code, token for token."""

import pytest

from jaxalign.generate import Decoding, generate
from tests.parity.golden import CASES


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize("batch_size", [6, 4])
@pytest.mark.parametrize("name", ["generated", "generated_eos2"])
def test_greedy(case, name, batch_size):
    """The original pads prompts on the left, we on the right; a text is the same in both."""
    golden = case.arrays("expected_generate.npz")
    masks = golden["attention_mask"] == 1
    prompts = [row[mask].tolist() for row, mask in zip(golden["input_ids"], masks, strict=True)]
    stops = list(case.spec.eos_ids) if name == "generated" else [int(golden["eos2"])]
    wanted = []
    for row in golden[name].tolist():
        ends = [row.index(stop) for stop in stops if stop in row]
        wanted.append(row[: min(ends, default=len(row))])
    ours = generate(
        case.decoder(),
        case.params,
        case.lora,
        prompts,
        Decoding(golden[name].shape[1]),
        stop_ids=stops,
        batch_size=batch_size,
    )
    assert ours == wanted
    if name == "generated_eos2":
        assert any(len(row) < golden[name].shape[1] for row in ours)
