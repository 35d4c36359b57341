"""Options of an objective are compared with its signature before a weight is read."""

from contextlib import nullcontext
from functools import partial, wraps
from typing import Literal

import jax
import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.objectives import FINAL, TOKENS, Loss, Needs, Tap, bind, both_sides, declare, resolve


def own(states, batch, *, layer: int, margin: float = 0.0, mode: str = "a", deep=None) -> Loss:
    return Loss(layer, margin, {})


def hinted(states: "NotHere", batch, *, margin: "float | None" = None, by: "NotHere" = 1) -> Loss:  # noqa: F821
    return Loss(margin, by, {})


def plain(states, batch, *, layer, margin=0, scale=None) -> Loss:
    return Loss(layer, margin, {})


@declare(lambda layer, sides, **_: {side: Needs((Tap(layer, "mean"),)) for side in sides})
def marked(states, batch, *, layer, sides) -> Loss:
    return Loss(0, 1, {})


def greedy(states, batch, **options) -> Loss:
    return Loss(0, 1, options)


OWN, HINTED, PLAIN, MARKED = (f"{__name__}:{name}" for name in ("own", "hinted", "plain", "marked"))
PAIRS = both_sides(Needs((Tap(2, "mean"),)))


def with_options(name, options, key, settings=None, **more):
    return bind(resolve(name), name, options, key, settings or {}, {}, **more)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        (OWN, {"layer": 1, "marjin": 2}, "takes no option 'marjin'; did you mean 'margin'?"),
        (OWN, {"margin": 0.5}, "needs the option 'layer'; add it"),
        (OWN, {"layer": "two"}, "own.options.layer: 'two' should be of the kind int"),
        (OWN, {"layer": 1.5}, "own.options.layer: 1.5 should be of the kind int"),
        (OWN, {"layer": True}, "own.options.layer: True should be of the kind int"),
        (OWN, {"layer": 1, "mode": 3}, "own.options.mode: 3 should be of the kind str"),
        (OWN, {"layer": 1, "states": 3}, "takes no option 'states'"),
        # A hint that nobody finds says nothing, and the others do.
        (HINTED, {"margn": 0.1}, "takes no option 'margn'; did you mean 'margin'?"),
        (HINTED, {"margin": "0.1"}, "own.options.margin: '0.1' should be of the kind float"),
        (HINTED, {"margin": [1]}, "own.options.margin: [1] should be of the kind float"),
        (PLAIN, {"margin": 1}, "needs the option 'layer'; add it"),
        (PLAIN, {"layer": 1, "margin": "0.1"}, "options.margin: '0.1' should be of the kind float"),
        (
            MARKED,
            {"layer": 1, "sides": 3},
            "own.options: tests.objectives.test_options:marked fails: TypeError: 'int'",
        ),
        ("language_model", {"gamma": 2}, "language_model takes no option 'gamma'; did you mean"),
        ("contrastive", {"layer": 1, "tau": 0.1}, "contrastive takes no option 'tau'"),
        *(
            ("contrastive", {"layer": 1, name: value}, f"own.options.{name}: {value!r} {says}")
            for name, value, says in (
                ("direction", "symetric", "is not among one_way, symmetric; did you mean symm"),
                ("negatives", "globl", "is not among group, global"),
                ("detach", "sources", "is not among none, source, target"),
                ("view", "texts", "is not among pairs, text"),
                ("pooling", "means", "is not among mean, mean_rest, first, last, position"),
                ("form", "standardized", "is not among raw, standardised"),
                ("temperature", -0.1, "should be a number, above 0"),
                ("temperature", 0.0, "should be a number, above 0"),
                ("group", 0, "should be a whole number, 1 or more"),
            )
        ),
        ("cka", {"layer": 1, "rows": "sentences"}, "options.rows: 'sentences' is not among tokens"),
        ("language_model", {"label_smoothing": 1.5}, "label_smoothing: 1.5 should be a number, fr"),
        ("language_matching", {"width": 0}, "options.width: 0 should be a whole number, 1 or more"),
    ],
)
def test_options_that_do_not_fit(name, options, says):
    with pytest.raises(UserError) as error:
        with_options(name, options, "own.options")
    assert says in str(error.value) and str(error.value).startswith("own.options")


def test_a_function_without_a_mark_gets_the_layer_of_the_settings():
    text = {"text": Needs((Tap(FINAL, TOKENS), Tap(2, "mean")), answers="trained")}  # of task rows
    for needs in (PAIRS, text):
        bound = partial(bind, resolve(PLAIN), PLAIN, key="k.options", settings={}, otherwise=needs)
        assert bound(options={"layer": 2}).needs == needs
        with pytest.raises(UserError, match=r"k\.options\.layer: 5 contradicts align\.layer=2, wh"):
            bound(options={"layer": 5})
        assert bind(resolve(HINTED), HINTED, {}, "", {}, needs).needs == needs  # asks for none


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda states, batch: states.source[3], "fails: AttributeError: .*line"),
        (lambda states, batch: [], "returns list, not a jaxalign.objectives.Loss"),
        (
            lambda states, batch: Loss(np.zeros(1), 1, {}),
            r"Loss.sum has the shape \(1,\); give one number",
        ),
        (
            lambda states, batch: Loss(0.0, 1, {"v": "a"}),
            r"Loss.logs\['v'\] is 'a'; give one number",
        ),
        (lambda states, batch: Loss(0.0, np.ones(2), {}), r"Loss.count has the shape \(2,\)"),
    ],
)
def test_what_fails_in_the_users_function_is_one_sentence(function, says):
    with pytest.raises(UserError, match=f"mine:it.* ?{says}"):
        bind(function, "mine:it", {}, "k.options", {}, {}).loss(None, None)


@pytest.mark.parametrize(
    ("value", "fits"), [(3, True), ("auto", True), (None, True), ("nope", False), (True, False)]
)
def test_kinds_of_a_union(value, fits):
    def many(states, batch, *, width: int | Literal["auto"] | None = None) -> Loss: ...

    says = "should be of the kind int or 'auto', as mine:it declares"
    with nullcontext() if fits else pytest.raises(UserError, match=says):
        bind(many, "mine:it", {"width": value}, "k.options", {}, {})


def test_a_mark_is_found_behind_partial_wraps_and_jit():
    whole = {"layer": 3, "sides": ["source"]}
    for function in (partial(marked, sides=["source"]), wraps(marked)(lambda *_: None)):
        assert bind(function, "mine:it", whole, "", {}, {}).needs == marked.declared.needs(**whole)
    assert bind(jax.jit(marked), "mine:it", whole, "", {}, {}).needs.keys() == {"source"}


def test_a_mark_that_gives_no_needs_of_sides():
    wrong = declare(lambda **_: Needs((Tap(1),)))(lambda states, batch: None)
    with pytest.raises(
        UserError, match=r"k\.options: the mark of mine:it gives Needs\(.*each side"
    ):
        bind(wrong, "mine:it", {}, "k.options", {}, {})


def test_what_fails_in_ours_is_not():
    with pytest.raises(AttributeError):
        bind(lambda states, batch: states.no, "contrastive", {}, "", {}, {}).loss(None, None)


def test_options_that_fit():
    for options in ({}, {"margin": None}, {"margin": 2}, {"by": "what it says"}):
        with_options(HINTED, options, "")
    with_options(PLAIN, {"layer": "2x", "margin": 0.5, "scale": [1]}, "")
    loss = with_options(OWN, {"layer": 2, "margin": 1, "deep": {"a": [1]}}, "").function(None, None)
    assert tuple(loss[:2]) == (2, 1)
    with_options(f"{__name__}:greedy", {"anything": 1}, "")
    with_options("json:dumps", {}, "")


def test_a_module_that_fails_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "broken_losses.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="cannot be imported: ZeroDivisionError"):
        with_options("broken_losses:own", {}, "task.options")
