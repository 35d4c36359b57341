"""The subspace against LSAR as it is printed; planted clusters; files that runs read."""

import json

import numpy as np
import pytest

from jaxalign.base import open_base
from jaxalign.cli import main
from jaxalign.config import load
from jaxalign.errors import UserError
from jaxalign.objectives import FINAL
from jaxalign.prepare.clusters import cluster, cosine_distances
from jaxalign.prepare.lsar import subspace
from jaxalign.prepare.means import layer_of
from jaxalign.probe.states import pooled_states
from tests.tiny import ASSETS


def lsar(means, rank):
    """Xie et al. 2022, algorithm 1, line by line: M [D, n]."""
    matrix = means.T
    centre = matrix.mean(axis=1, keepdims=True)
    left, sizes, right = np.linalg.svd(matrix - centre, full_matrices=False)
    near = centre + left[:, :rank] @ np.diag(sizes[:rank]) @ right[:rank]
    w = np.linalg.pinv(near).T @ np.ones(matrix.shape[1])
    w = w / np.linalg.norm(w) ** 2
    return w, np.linalg.svd(near - w[:, None], full_matrices=False)[0][:, :rank]


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_subspace_is_that_of_lsar(rank):
    rng = np.random.default_rng(rank)
    means = rng.normal(size=(5, 24)) + 4 * rng.normal(size=24)  # they share a direction
    w, basis = lsar(means, rank)
    found = subspace(means, 1, rank if rank < 4 else None)
    np.testing.assert_allclose(found.axis, w / np.linalg.norm(w), atol=1e-6)
    np.testing.assert_allclose(found.basis @ found.basis.T, basis @ basis.T, atol=1e-6)
    np.testing.assert_allclose(found.basis.T @ found.basis, np.eye(rank), atol=1e-12)
    shifts = (means - means[1]) @ basis @ basis.T
    np.testing.assert_allclose(found.shifts, shifts, atol=1e-6)
    if rank == 4:  # nothing is left out
        np.testing.assert_allclose(found.shifts, means - means[1], atol=1e-12)
        np.testing.assert_allclose(found.basis.T @ found.axis, 0, atol=1e-12)
        np.testing.assert_allclose(means @ found.axis, np.linalg.norm(w), atol=1e-9)


def test_means_that_say_too_little_are_refused():
    means = np.random.default_rng(0).normal(size=(4, 8))
    means[3] = means[2]
    with pytest.raises(UserError, match=r"differ in 2 directions, not in 3; .* --rank 2"):
        subspace(means, 0)
    assert subspace(means, 0, 2).basis.shape == (8, 2)
    with pytest.raises(UserError, match=r"--rank: 4 is not from 1 to 3"):
        subspace(means, 0, 4)
    with pytest.raises(UserError, match="at least two"):
        subspace(means[:1], 0)


def test_planted_clusters_are_found():
    scipy = pytest.importorskip("scipy.cluster.hierarchy")
    rng = np.random.default_rng(3)
    centres = 3 * rng.normal(size=(3, 16))
    owners = np.array([0, 1, 2, 0, 1, 0, 1, 0, 2, 0])
    noise = rng.normal(size=(10, 16))
    noise[3] *= 0.05  # in the middle of its cluster
    vectors = centres[owners] + 0.6 * noise
    found = cluster(vectors, 3)
    wanted = [tuple(np.flatnonzero(owners == owner).tolist()) for owner in (0, 1, 2)]
    assert [one.members for one in found] == wanted
    assert found[0].medoid == 3
    noisy = rng.normal(size=(12, 5))  # where nothing is planted, as scipy
    distances = cosine_distances(noisy)
    condensed = distances[np.triu_indices(12, 1)]
    for number in (2, 4, 7):
        labels = scipy.fcluster(scipy.linkage(condensed, "average"), number, "maxclust")
        theirs = {tuple(np.flatnonzero(labels == label).tolist()) for label in set(labels)}
        assert {one.members for one in cluster(noisy, number)} == theirs
    with pytest.raises(UserError, match="--number: 13 is not from 1 to 12"):
        cluster(noisy, 13)


def test_the_file_of_a_subspace(base, tmp_path, one_device, capsys):
    source, out = f"{ASSETS}/dev.*.jsonl", tmp_path / "deep" / "subspace.npz"
    words = ["--parallel", source, "--rows", "6", "--languages", "en,de,tr", "--layer", "2"]
    assert main(["prepare", "subspace", base, *words, "--out", str(out),
                 "model.dtype=float32", "--pooling", "mean"]) == 0  # fmt: skip
    assert "3 languages, 6 sentences each: they differ in 2 of 32 dimensions" in (
        " ".join(capsys.readouterr().out.split())
    )
    found = np.load(out)
    assert found["axis"].shape == (32,) and found["basis"].shape == (32, 2)
    assert found["shifts"].shape == (3, 32) and found["axis"].dtype == np.float32
    assert found["languages"].tolist() == ["de", "en", "tr"] and found["pivot"] == "en"
    assert found["layer"] == 2 and found["pooling"] == "mean"
    opened = open_base(load(None, [f"model.path={base}", "model.dtype=float32"]).config)
    assert found["base"] == opened.fingerprint
    from jaxalign.probe.corpus import read_parallel

    (corpus,) = read_parallel(source, ["en", "de", "tr"], 6)
    means = np.stack([
        pooled_states(opened, opened.bare(), corpus.sentences[name], layers=[2])["mean"][0].mean(0)
        for name in ("de", "en", "tr")
    ])  # fmt: skip
    np.testing.assert_allclose(found["shifts"], means - means[1], atol=1e-5)
    assert not [*out.parent.glob("*.partial")]


def test_states_after_the_final_norm(base, one_device):
    """As the head reads them, which no block's output is."""
    import jax
    import jax.numpy as jnp

    opened = open_base(load(None, [f"model.path={base}", "model.dtype=float32"]).config)
    system, texts = opened.bare(), ["wake me up", "rain"]
    found = pooled_states(opened, system, texts, ("last", "mean"), [FINAL, 1])
    for row, text in enumerate(texts):
        ids = np.asarray(opened.tokenizer(text)["input_ids"], np.int32)[None]
        with jax.set_mesh(opened.mesh):
            hidden = system.decoder.forward(system.params, None, jnp.asarray(ids)).hidden[0]
        np.testing.assert_allclose(found["last"][0, row], hidden[-1], atol=1e-5)
        np.testing.assert_allclose(found["mean"][0, row], hidden.mean(axis=0), atol=1e-5)
    assert layer_of("final") == FINAL and layer_of("3") == 3
    with pytest.raises(UserError, match="'last' is neither final nor"):
        layer_of("last")


def test_clusters_of_a_base_and_of_a_file(base, tmp_path, one_device, capsys):
    out = tmp_path / "clusters.json"
    assert main(["prepare", "clusters", base, "--parallel", f"{ASSETS}/dev.*.jsonl", "--rows", "5",
                 "--number", "2", "--layer", "1", "--out", str(out)]) == 0  # fmt: skip
    written = json.loads(out.read_text())
    assert len(written["clusters"]) == 2 and len(written["distances"]) == 9
    members = [name for one in written["clusters"] for name in one["languages"]]
    assert sorted(members) == written["languages"]
    medoids = sorted(one["medoid"] for one in written["clusters"])
    assert f"task.languages=[{','.join(medoids)}]" in capsys.readouterr().out
    assert written["layer"] == 1 and written["states_as"] == "standardised"

    vectors = tmp_path / "vectors.json"
    vectors.write_text(json.dumps({"a": [1, 0], "b": [0.9, 0.1], "c": [0, 1]}))
    given = ["prepare", "clusters", "--vectors", str(vectors), "--out", str(out)]
    assert main([*given, "--number", "2"]) == 0
    assert [one["languages"] for one in json.loads(out.read_text())["clusters"]] == [
        ["a", "b"], ["c"],
    ]  # fmt: skip
    assert main([*given, "--languages", "a,z"]) == 2
    assert "has no vector of 'z'; it has: a, b, c" in capsys.readouterr().err
    for words, named in [  # the vectors are clustered as they are
        (["--pooling", "last", "--layer", "final"], "--layer, --pooling"),
        (["--states-as", "standardised"], "--states-as"),
        (["--rows", "3", "--pivot", "en"], "--rows, --pivot"),
        ([base, "model.dtype=float32"], f"{base}, model.dtype=float32"),
        (["--parallel", "nowhere"], "--parallel"),
        ([base, "--parallel", "nowhere"], f"{base}, --parallel"),
    ]:
        assert main([*given, *words]) == 2, words
        assert f"--vectors: no model is run over them; leave out {named}\n" in (
            capsys.readouterr().err
        )
    assert main(["prepare", "clusters", base, "--out", str(out)]) == 2
    assert main(["prepare", "clusters", base, "--parallel", f"{ASSETS}/pairs_dev.jsonl",
                 "--out", str(out), "--layer", "9"]) == 2  # fmt: skip
    assert "--layer" in capsys.readouterr().err
