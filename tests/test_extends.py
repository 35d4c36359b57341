"""`extends`: a configuration that goes on from another file."""

import pytest

from jaxalign.config import load
from jaxalign.errors import UserError


@pytest.fixture
def write(tmp_path):
    def write(name: str, text: str):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_each_file_over_the_one_before_it(write):
    write("base.yaml", "seed: 3\nalign: {layer: 2, weight: 0.5}\ntask: {train: [a, b]}")
    write("methods/one.yaml", "extends: ../base.yaml\nalign: {weight: 0.1}\ntask: {train: [c]}")
    last = write("methods/two.yaml", "extends: one.yaml\nalign: {temperature: 0.2}")
    loaded = load(last, ["seed=4"])
    config = loaded.config
    assert (config.seed, config.task.train) == (4, ["c"])
    assert (config.align.layer, config.align.weight, config.align.temperature) == (2, 0.1, 0.2)
    origin = {key: origin.rsplit("/")[-1] for key, _, origin in loaded.rows()}
    assert origin["align.layer"] == "base.yaml"
    assert origin["align.weight"] == "one.yaml"
    assert origin["align.temperature"] == "two.yaml"
    assert origin["seed"] == "command line"


def test_groups_of_a_later_file_replace_those_before_them(write):
    write("base.yaml", "evaluate: {groups: {aligned: [de]}}")
    last = write("last.yaml", "extends: base.yaml\nevaluate: {groups: {unseen: [cy]}}")
    assert load(last).config.evaluate.groups == {"unseen": ["cy"]}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("extends: missing.yaml", "missing.yaml: no such configuration file"),
        ("extends: [a.yaml]", "run.yaml: extends: ['a.yaml'] should be the name of a file"),
        ("extends: other.yaml", "other.yaml: extends: run.yaml comes back to itself"),
        ("extends: run.yaml", "run.yaml: extends: run.yaml comes back to itself"),
    ],
)
def test_what_cannot_be_extended(write, text, says):
    write("other.yaml", "extends: run.yaml")
    with pytest.raises(UserError) as error:
        load(write("run.yaml", text))
    assert says in str(error.value)


def test_a_key_that_is_unknown_names_its_file(write):
    base = write("base.yaml", "align: {leyer: 2}")
    with pytest.raises(UserError, match=r"did you mean 'align\.layer'") as error:
        load(write("run.yaml", "extends: base.yaml"))
    assert str(base) in str(error.value)
