"""How others are told to decode: nothing that changes a token is left to a base's own settings."""

import dataclasses

import pytest

from jaxalign.generate import Decoding


@pytest.mark.parametrize(
    ("decoding", "call", "request_"),
    [
        (Decoding(64), {"do_sample": False}, {"temperature": 0}),
        (
            Decoding(64, "sample", temperature=0.7, top_k=20, top_p=0.9),
            {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
            {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
        ),
        (
            Decoding(64, "beam", beams=3, length_penalty=0.5),
            {"do_sample": False, "num_beams": 3, "length_penalty": 0.5, "early_stopping": False},
            None,
        ),
    ],
    ids=["greedy", "sample", "beam"],
)
def test_in_the_words_of_others(decoding, call, request_):
    assert decoding.call() == call | {"repetition_penalty": 1.0, "max_new_tokens": 64}
    told = {} if request_ is None else request_ | {"repetition_penalty": 1.0, "max_tokens": 64}
    assert decoding.request() == told


def test_among_other_settings():
    decoding = Decoding(64, "beam", beams=3)
    settings = dataclasses.asdict(decoding) | {"batch": 32, "adapter": "merged"}
    assert Decoding.of(settings) == decoding
    assert Decoding.of({"score": "label"}) == Decoding()
