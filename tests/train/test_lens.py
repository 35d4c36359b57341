"""Lens through the real decoder, and files of options: what is refused, and what a resume sees."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.adapters import Lora
from jaxalign.errors import UserError
from jaxalign.prepare.run import subspace
from jaxalign.train import setup
from jaxalign.train.loop import train
from jaxalign.train.phases import PHASES
from jaxalign.train.phases.build import phase_loss
from tests.tiny import ASSETS
from tests.train.test_flat import assert_equal, gradients
from tests.train.test_loop import lines, use_devices
from tests.train.test_resume import changed


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    use_devices(monkeypatch, 1)


FAST = (
    "train.steps=2",
    "train.eval_every=0",
    "task.weight=0",
    "align.valid=[]",
    "lora.layers=2..3",
)


@pytest.fixture(scope="session")
def measured(base, tmp_path_factory):
    """The file of `jaxalign prepare subspace` of the tiny base."""
    from jaxalign.config import load

    file = tmp_path_factory.mktemp("lens") / "space.npz"
    config = load(None, [f"model.path={base}", "model.dtype=float32"]).config
    parallel = str(ASSETS / "dev.*.jsonl")
    subspace(config, parallel, str(file), layer="final", pooling="last", rows=4,
             languages=["en", "da", "de"])  # fmt: skip
    return file


@pytest.fixture
def with_file(configure):
    def build(file, *words):
        options = f"align.options={{subspace: {{file: {file}}}}}"
        return configure(*FAST, "align.objective=lens", options, *words)

    return build


def other(measured, folder, **values):
    """A copy of the file with other content."""
    with np.load(measured) as found:
        content = dict(found) | values
    np.savez(folder / "other.npz", **content)
    return folder / "other.npz"


def test_a_fresh_adapter_retains(with_file, measured):
    """No gradient of `retain` where B is 0; `bring` and `apart` begin the motion."""
    run = setup.prepare(with_file(measured, "lora.dropout=0"))
    phase, batch = run.phases["align"], run.train["align"].batch(0)
    assert [(one.model, one.sides) for one in phase.passes] == [
        ("trained", ("source", "target")), ("reference", ("source", "target")),
    ]  # fmt: skip
    whole = lambda t: phase_loss(phase, t, run.frozen, batch, None)  # noqa: E731
    with jax.set_mesh(run.mesh):
        (value, losses), gradient = jax.jit(jax.value_and_grad(whole, has_aux=True))(
            run.state.trained
        )
    assert float(losses["lens"].logs["retain"]) < 1e-10 < float(value)
    planned = PHASES["align"].batch(jax.ShapeDtypeStruct((8, 48), jnp.int32))  # `jaxalign plan`
    shapes = jax.eval_shape(
        partial(phase_loss, phase), run.state.trained, run.frozen, planned, None
    )
    assert shapes[0].shape == ()
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(jax.device_get(gradient)))


def test_layouts_and_devices_give_one_gradient(with_file, measured, monkeypatch):
    names, init = ("align",), Lora.init
    warm = lambda w: w + 0.03 * jnp.cos(jnp.arange(w.size) ** 1.5).reshape(w.shape)  # noqa: E731
    monkeypatch.setattr(Lora, "init", lambda *args: jax.tree.map(warm, init(*args)))
    words = (measured, "batch.buckets=[]")
    padded, _ = gradients(with_file(*words, "batch.pack=none"), names)
    laid, run = gradients(with_file(*words, "batch.pack=auto"), names)
    assert run.train["align"].layout is not None
    assert_equal(laid, padded)
    use_devices(monkeypatch, 4)
    spread, _ = gradients(with_file(*words, "batch.pack=none", "mesh.data=2", "mesh.fsdp=2"), names)
    assert_equal(spread, padded)


@pytest.mark.slow
def test_a_run_resumes_by_what_is_in_the_file(with_file, measured, tmp_path):
    config = with_file(measured, "checkpoint.every=1")
    train(config)
    found = lines(config, "train")
    for name in ("bring", "apart", "retain"):
        assert f"align/lens/{name}" in found[-1]
    moved = other(measured, tmp_path)
    train(changed(config, f"align.options.subspace.file={moved}", "train.steps=3"))
    with np.load(measured) as content:
        shifts = content["shifts"] * 2
    moved = other(measured, tmp_path, shifts=shifts)
    with pytest.raises(UserError, match=r"other numbers in the file of lens\.subspace than are"):
        train(changed(config, f"align.options.subspace.file={moved}", "train.steps=4"))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"base": np.array("0" * 64)}, r"other\.npz was measured on another base than model\.path"),
        ({"axis": np.ones(3, np.float32)}, r"options\.subspace: .*is not an \.npz of jaxalign"),
        ({"pivot": np.array("fr")}, r"options\.subspace: .*is not an \.npz of jaxalign"),
        (
            {"languages": np.array(["en", "fr", "de"])},
            r"align\.train: .* not know the language 'da'",
        ),
        ({"pivot": np.array("da")}, r"a pair da-en has the target en, but .* has the pivot da"),
    ],
    ids=["base", "shape", "pivot", "language", "target"],
)
def test_another_file_is_one_sentence(with_file, measured, tmp_path, values, says):
    with np.load(measured) as content:
        order = list(content["languages"])
    if "languages" in values:
        values = {"languages": np.array(["fr" if name == "da" else name for name in order])}
    with pytest.raises(UserError, match=says):
        setup.prepare(with_file(other(measured, tmp_path, **values)))


def test_what_is_no_such_file_is_one_sentence(with_file, measured, tmp_path):
    with pytest.raises(UserError, match=r"align\.options\.subspace: there is no file .*none\.npz"):
        setup.prepare(with_file(tmp_path / "none.npz"))
    (tmp_path / "text.npz").write_text("nothing")
    with pytest.raises(UserError, match=r"text\.npz is not an \.npz of jaxalign prepare subspace"):
        setup.prepare(with_file(tmp_path / "text.npz"))
    narrow = {"axis": np.ones(8), "basis": np.ones((8, 2)), "shifts": np.ones((3, 8))}
    with pytest.raises(UserError, match=r"has 8 dimensions, but the states of model\.path have 32"):
        setup.prepare(with_file(other(measured, tmp_path, **narrow)))
