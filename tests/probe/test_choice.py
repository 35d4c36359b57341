"""Which layer is aligned, by which states, and what is said about it."""

import dataclasses

import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.probe.choice import bests, choose_for_training, choose_layer, hidden
from jaxalign.probe.retrieval import retrieval
from jaxalign.probe.table import SCORES, keyed
from tests.probe.tables import small


def curved(raw, standardised, largest):
    """A table of one system whose margin curves are these, blocks 0 to L."""
    table = small()
    cells = {}
    for form, curve in (("raw", raw), ("standardised", standardised)):
        values = np.broadcast_to(np.array(curve)[:, None, None], (len(curve), 3, 3)).copy()
        values[:, range(3), range(3)] = np.nan
        for score in SCORES:
            cells[keyed(score, form)] = values[None, None]
    mexa = {keyed("mexa", form): table.pivoted["mexa"] for form in ("raw", "standardised")}
    health = {name: np.full((1, 1, len(raw)), 0.5) for name in table.health}
    health |= {"largest": np.full((1, 1, len(raw)), largest), "cosine": health["norm"] + 0.4}
    return dataclasses.replace(
        table, pairs=cells, pivoted={**table.pivoted, **mexa}, health=health,
        forms=("raw", "standardised"),
    )  # fmt: skip


RAW = [0.5, 0.1, 0.1, 0.2, 0.4, 0.1]
FLAT = [0.9, 0.5, 0.79, 0.8, 0.78, 0.3]


def test_raw_states_choose_where_they_say_something():
    choice = choose_for_training(curved(RAW, FLAT, largest=0.1))
    assert (choice.layer, choice.form, round(choice.score, 6)) == (4, "raw", 0.4)
    assert choice.sentence().endswith("40.0% by margin score")


def test_massive_activations_hand_the_choice_to_standardised_states():
    table = curved(RAW, FLAT, largest=0.97)
    assert hidden(table, 0, 0).all()
    choice = choose_for_training(table)
    assert (choice.layer, choice.form, round(choice.score, 6)) == (3, "standardised", 0.8)
    words = choice.sentence()
    assert "chose block 3 of 5" in words and "80.0% by CSLS of standardised states" in words
    assert "blocks 2 to 4" in words
    assert "dominate in 5 blocks" in words and "block 4 with 40.0%" in words
    assert "align.states=standardised" in words
    assert choose_layer(table).layer == 4  # the report stays at the raw states' block


def test_a_raw_peak_where_they_are_small_is_not_believed():
    table = curved([0.1, 0.6, 0.1, 0.2, 0.4, 0.1], FLAT, largest=0.97)
    table.health["largest"][..., 1] = 0.1
    assert not hidden(table, 0, 0)[1]
    assert choose_for_training(table).layer == 3
    table.health["largest"][..., 1:4] = 0.1  # two of five
    assert choose_for_training(table).layer == 1


def test_a_run_with_standardised_states_is_asked_about_them():
    choice = choose_for_training(curved(RAW, FLAT, largest=0.1), "standardised")
    assert (choice.layer, choice.form) == (3, "standardised")
    assert "set align.states" not in choice.sentence()


def test_cosines_that_do_not_spread_hide_as_well():
    table = curved(RAW, FLAT, largest=0.1)
    table.health["contrast"][:] = 0.001
    assert choose_for_training(table).form == "standardised"


def test_centred_states_are_not_judged_by_a_ratio():
    """Unit vectors about their mean have neighbours of cosine 0 or less: the ratio says nothing."""
    draw = np.random.default_rng(0)
    source = draw.normal(size=(8, 64))
    both = np.stack([source, source + 0.3 * draw.normal(size=source.shape)])
    both -= both.mean((0, 1))
    both /= np.linalg.norm(both, axis=-1, keepdims=True)
    # As many neighbours as candidates: the translation itself does not save their mean.
    found = retrieval(both.astype(np.float32), margin_neighbours=8, csls_neighbours=8)
    assert found["csls"][0, 1] == found["cosine"][0, 1] == 1 and found["margin"][0, 1] < 0.9
    table = curved(RAW, FLAT, largest=0.97)
    key = keyed("margin", "standardised")
    table.pairs[key] = np.zeros_like(table.pairs[key])
    assert choose_for_training(table).layer == 3


def test_nothing_found_is_no_choice():
    nothing = [0.0] * 6
    with pytest.raises(UserError, match=r"align\.layer=auto: no block"):
        choose_for_training(curved(nothing, nothing, largest=0.1))


def test_bests_name_block_and_value():
    found = bests(curved(RAW, FLAT, largest=0.1), 0, 0)
    assert found["raw"]["margin"] == (4, pytest.approx(0.4))  # never the embeddings
    assert found["standardised"]["csls"] == (3, pytest.approx(0.8))
    assert set(found["raw"]) == {*SCORES, "mexa"}
