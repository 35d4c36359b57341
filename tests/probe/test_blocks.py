"""Stored vectors are used as they were written, or computed again; never otherwise."""

import json
import shutil

import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.probe.blocks import Blocks

LANGUAGES = ("cy", "de", "en")
SHAPE = (4, 3, 5, 6)  # [L+1, G, N, D]
POOLINGS = ("mean", "last")
WHAT = {"base": "x", "poolings": list(POOLINGS), "languages": list(LANGUAGES)}
VECTORS = {
    name: np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)
    for seed, name in enumerate(POOLINGS)
}


def fill(folder, what=WHAT, dtype="float32"):
    """What a probe does: opens the blocks and computes the languages that are not done."""
    blocks = Blocks(folder, what, LANGUAGES, SHAPE, dtype)
    computed = [language for language in LANGUAGES if language not in blocks.done]
    for language in computed:
        place = LANGUAGES.index(language)
        blocks.write(language, {name: values[:, place] for name, values in VECTORS.items()})
    return blocks.arrays, computed


def same(arrays):
    return all(np.array_equal(arrays[name], VECTORS[name]) for name in POOLINGS)


def test_what_is_intact_is_not_computed_again(tmp_path, capsys):
    arrays, computed = fill(tmp_path)
    assert computed == list(LANGUAGES) and same(arrays)
    arrays, computed = fill(tmp_path)
    assert computed == [] and same(arrays)
    assert capsys.readouterr().out == ""


def test_half_a_deleted_file_does_not_become_zeros(tmp_path, capsys):
    fill(tmp_path)
    file = tmp_path / "mean.npy"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    arrays, computed = fill(tmp_path)
    assert same(arrays) and computed
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "(mean.npy)" in said
    assert fill(tmp_path)[1] == []


def test_one_bit_costs_one_language(tmp_path, capsys):
    fill(tmp_path)
    array = np.lib.format.open_memmap(tmp_path / "last.npy", "r+")
    array.view(np.uint32)[2, 1, 4, 3] ^= 1
    array.flush()
    arrays, computed = fill(tmp_path)
    assert computed == ["de"] and same(arrays)
    assert "de are damaged (last.npy)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "states.json is damaged"),
        (b"[1, 2]", "states.json is damaged"),
        (b"\xff\xfe{", "states.json is damaged"),
        (b"[" * 5000, "states.json is damaged"),
        (json.dumps({**WHAT, "done": ["de"]}).encode(), "states.json has no content hashes"),
    ],
)
def test_a_damaged_note_is_not_believed(tmp_path, capsys, content, words):
    fill(tmp_path)
    (tmp_path / "states.json").write_bytes(content)
    arrays, computed = fill(tmp_path)
    assert computed == list(LANGUAGES) and same(arrays)
    assert words in capsys.readouterr().out


def test_states_of_something_else_are_refused(tmp_path):
    fill(tmp_path)
    with pytest.raises(UserError, match=r"base=x.* y"):
        fill(tmp_path, {**WHAT, "base": "y"})


def test_states_of_which_less_is_known_are_computed_again(tmp_path, capsys):
    """As of a version that did not yet ask for it."""
    fill(tmp_path)
    more = {**WHAT, "tokens": "abc"}
    arrays, computed = fill(tmp_path, more)
    assert computed == list(LANGUAGES) and same(arrays)
    assert (
        "does not say which tokens they were made with; all states are" in capsys.readouterr().out
    )
    assert fill(tmp_path, more)[1] == []


def test_folders_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        fill(tmp_path / "file")
    (tmp_path / "folder" / "mean.npy").mkdir(parents=True)
    with pytest.raises(UserError, match="cannot be written"):
        fill(tmp_path / "folder")


def test_float16_that_cannot_hold_massive_activations_says_so(tmp_path):
    arrays, _ = fill(tmp_path / "small", dtype="float16")
    assert arrays["mean"].dtype == np.float16
    assert fill(tmp_path / "small", dtype="float16")[1] == []
    blocks = Blocks(tmp_path / "large", WHAT, LANGUAGES, SHAPE, "float16")
    large = {name: values[:, 0] * 1e5 for name, values in VECTORS.items()}
    with pytest.raises(UserError, match=r"float16 .*--states float32"):
        blocks.write("cy", large)


def damages(content, flips, rng):
    """Name -> content of a damaged file; None: deleted."""
    yield "deleted", None
    yield "emptied", b""
    for part in (1, len(content) // 3, len(content) - 1):
        yield f"cut to {part}", content[:part]
    for _ in range(flips):
        bit = int(rng.integers(8 * len(content)))
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit}", bytes(changed)


def sweep(folder, again, flips):
    """(file, kind of damage) -> how often it was repaired, refused in a sentence, or wrong."""
    rng, table = np.random.default_rng(0), {}
    good = folder / "good"
    for file in sorted(path for path in good.rglob("*") if path.is_file()):
        for kind, content in damages(file.read_bytes(), flips, rng):
            shutil.rmtree(folder / "bad", ignore_errors=True)
            shutil.copytree(good, folder / "bad")
            damaged = folder / "bad" / file.relative_to(good)
            damaged.unlink() if content is None else damaged.write_bytes(content)
            try:
                result = "right" if again(folder / "bad") else "WRONG"
            except UserError:
                result = "refused"
            row = table.setdefault((file.name, kind.split(" ")[0]), {})
            row[result] = row.get(result, 0) + 1
    return table


@pytest.mark.parametrize("flips", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_no_damage_is_used(tmp_path, flips, capsys):
    fill(tmp_path / "good")
    table = sweep(tmp_path, lambda folder: same(fill(folder)[0]), flips)
    assert set(table) == {
        (file, kind)
        for file in ("last.npy", "mean.npy", "states.json")
        for kind in ("deleted", "emptied", "cut", "bit")
    }
    with capsys.disabled():
        if flips == 200:
            print("\n| file | damage | right again | refused | wrong |\n|---|---|---|---|---|")
            for (file, kind), row in table.items():
                counts = " | ".join(str(row.get(k, 0)) for k in ("right", "refused", "WRONG"))
                print(f"| {file} | {kind} | {counts} |")
    assert not any("WRONG" in row for row in table.values())
    assert not any("refused" in row for row in table.values())
