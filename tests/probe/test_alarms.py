"""One line of warning for all layers and languages that share it."""

import numpy as np

from jaxalign.probe.alarms import Alarms, merged
from jaxalign.probe.collapse import collapse
from tests.probe import plain


def shapes(layers, sick, place=17):
    """Healthy states in every layer; in the layers of `sick` these languages are massive."""
    for layer in range(layers):
        states = plain.realistic(languages=3, number=20)
        for language in sick.get(layer, ()):
            states[language, :, place] += (40 + layer) * np.abs(states).max()
        yield layer, collapse(states)


def test_layers_and_languages_are_grouped():
    alarms = Alarms(("cy", "de", "en"))
    sick = {1: (0, 1, 2), 2: (0, 1, 2), 3: (0, 1, 2), 5: (0, 1, 2), 6: (1,), 7: (1,)}
    for layer, shape in shapes(8, sick):
        alarms.add(layer, shape)
    first, second = alarms.lines()
    assert first.startswith("layers 1 to 3 and 5, all 3 languages: one dimension (number 17)")
    assert "standardised" in first
    assert second.startswith("layers 6 and 7, de: one dimension (number 17) carries")
    assert "{" not in first + second


def test_poolings_and_corpora():
    healthy, ill = Alarms(("de", "en"), "last"), Alarms(("cy", "de", "en"), "last")
    for layer, shape in shapes(3, {2: (0,)}):
        ill.add(layer, shape)
    assert healthy.lines() == []
    (line,) = merged([healthy, ill]).lines()
    assert line.startswith("layer 2 (last pooling), cy: one dimension")


def test_many_languages_are_counted():
    names = tuple(f"l{n}" for n in range(9))
    states = np.stack([*plain.realistic(languages=8, number=12), np.full((12, 48), 2.0)])
    states[:7] = 1.5
    alarms = Alarms(names)
    alarms.add(4, collapse(states.astype(np.float32)))
    (line,) = alarms.lines()
    assert line.startswith("layer 4, l0, l1, l2, l3, l4, l5 and 2 more languages: all sentences")
