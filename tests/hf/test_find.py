"""What a hub name may say, and that only the weights which are read come for it."""

import fnmatch
import shutil

import jax.numpy as jnp
import pytest

from jaxalign.adapters.lora import Lora
from jaxalign.errors import UserError
from jaxalign.hf.find import hub_parts, locate, pinned, small_files, unpinned
from jaxalign.hf.load import load_params, load_spec
from jaxalign.hf.peft import load_peft, save_peft
from jaxalign.hf.save import save_base
from tests.hf.conftest import LLAMA, assert_same_tree, random_lora, random_params

COMMITS = {"main": "a" * 40, "v2": "b" * 40, "refs/pr/1": "c" * 40}


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """name -> folder with all of its files."""
    root = tmp_path_factory.mktemp("hub")
    mistral = root / "lab" / "mistral"
    save_base(mistral, random_params(LLAMA), LLAMA, max_shard_bytes=40_000)
    for name in ("consolidated.safetensors", "pytorch_model.bin", "model.safetensors.bak",
                 "original.pth", "modeling_lab.py"):  # fmt: skip
        (mistral / name).write_bytes(b"a second copy")
    plain = root / "lab" / "plain"
    save_base(plain, random_params(LLAMA, seed=1), LLAMA)
    (plain / "consolidated.safetensors").write_bytes(b"a second copy")
    for seed, language in enumerate(("cy", "de")):
        save_peft(root / "me/adapters/slots" / language, random_lora(LLAMA, seed=seed), LLAMA,
                  Lora(4), base_name="lab/plain")  # fmt: skip
    return root


@pytest.fixture
def hub(repositories, tmp_path, monkeypatch):
    """A hub of these repositories; what came is listed."""
    came = []

    def download(name, *, revision=None, allow_patterns, ignore_patterns):
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        folder = repositories / name
        if not folder.is_dir():
            raise _without_response(RepositoryNotFoundError)
        commit = COMMITS.get(revision or "main", revision)
        if commit not in COMMITS.values():
            raise _without_response(RevisionNotFoundError)
        snapshot = tmp_path / name.replace("/", "--") / "snapshots" / commit
        snapshot.mkdir(parents=True, exist_ok=True)
        for file in sorted(folder.rglob("*")):
            inner = str(file.relative_to(folder))
            wanted = any(fnmatch.fnmatch(inner, pattern) for pattern in allow_patterns)
            unwanted = any(fnmatch.fnmatch(inner, pattern) for pattern in ignore_patterns)
            if file.is_file() and wanted and not unwanted:
                (snapshot / inner).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, snapshot / inner)
                came.append(inner)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return came


def _without_response(kind):
    error = kind.__new__(kind)
    Exception.__init__(error, "404")
    return error


@pytest.mark.parametrize(("name", "files"), [("lab/mistral", 4), ("lab/plain", 1)])
def test_only_the_weights_that_are_read_come(hub, name, files):
    spec = load_spec(name)
    assert not [file for file in hub if file.endswith((".safetensors", ".py"))]
    params = load_params(name, spec, jnp.float32)
    assert_same_tree(params, random_params(LLAMA, seed=int(files == 1)))
    weights = {file for file in hub if "json" not in file and file != "SHA256SUMS"}
    assert len(weights) == files
    assert all(file.startswith("model") and file.endswith(".safetensors") for file in weights)


@pytest.mark.parametrize("language", ["cy", "de"])
@pytest.mark.parametrize("pin", ["", "@v2", "@refs/pr/1", "@" + "b" * 40])
def test_an_adapter_in_a_folder_at_a_revision(hub, language, pin):
    lora, adapter = load_peft(f"me/adapters:slots/{language}{pin}", LLAMA)
    assert_same_tree(lora, random_lora(LLAMA, seed=int(language == "de")))
    assert adapter.r == 4
    assert all(f"slots/{language}/" in file for file in hub)
    where = locate(f"me/adapters:slots/{language}{pin}")
    commit = COMMITS.get(pin[1:] or "main", pin[1:])
    assert where.parts[-3:] == (commit, "slots", language)


def test_what_is_not_there(hub):
    for name, said in {
        "me/nothing": "neither a local folder nor a hub",
        "me/adapters:slots/fi": "me/adapters has no folder slots/fi",
        "me/adapters@v9": "me/adapters has no revision v9",
        "me/adapters:../x": "no such folder",
        "me/adapters:slots//cy": "no such folder",
        "runs/old/adapter": "no such folder",
        "./x/y": "no such folder",
    }.items():
        with pytest.raises(UserError) as error:
            locate(name)
        assert said in str(error.value) and str(error.value).startswith(name)
    with pytest.raises(UserError, match=r"v2 and .*main"):
        small_files("me/adapters@v2", "main")
    assert small_files("lab/plain@v2", "v2").name == "b" * 40


def test_a_local_folder_comes_first(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    for name in ("me/adapters@v2", "me/adapters:slots", "a@b"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        assert locate(name).resolve() == folder
    assert not hub


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("gpt2", ("gpt2", "", None)),
        ("me/a.b-c", ("me/a.b-c", "", None)),
        ("me/a@v1.0", ("me/a", "", "v1.0")),
        ("me/a:b/c@refs/pr/3", ("me/a", "b/c", "refs/pr/3")),
        ("a/b/c", None),
        ("me/a:", None),
        ("me/a@", None),
        ("me/a:/etc", None),
        ("me/a:b/./c", None),
        ("../a", None),
        ("me/a b", None),
        ("", None),
    ],
)
def test_names(name, parts):
    assert hub_parts(name) == parts


def test_a_name_with_its_revision(tmp_path, monkeypatch):
    assert pinned("me/a", "v2") == "me/a@v2" and unpinned("me/a@v2") == ("me/a", "v2")
    assert pinned("me/a:b", "v2") == "me/a:b@v2" and unpinned("me/a:b@v2") == ("me/a:b", "v2")
    assert pinned("me/a@v1", "v2") == "me/a@v1"
    assert pinned("me/a", None) == "me/a" and unpinned("me/a") == ("me/a", None)
    monkeypatch.chdir(tmp_path)
    for folder in ("me/a", "me/b@v2"):  # a folder of this machine has no revision
        (tmp_path / folder).mkdir(parents=True)
    assert pinned("me/a", "v2") == "me/a" and unpinned("me/b@v2") == ("me/b@v2", None)


def test_an_index_from_the_hub_names_files_not_patterns(repositories, hub, tmp_path):
    folder = repositories / "lab" / "hostile"
    folder.mkdir(exist_ok=True)
    shutil.copy(repositories / "lab/plain/config.json", folder)
    (folder / "secret.safetensors").write_bytes(b"x")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "*", "b": "../x"}}')
    with pytest.raises(UserError, match="in a file of this folder"):
        load_params("lab/hostile", LLAMA, jnp.float32)
    assert "secret.safetensors" not in hub
