"""A push makes a repository and uploads the folder; what can go wrong is told in one sentence."""

import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError


@pytest.fixture
def hub(monkeypatch):
    """An HfApi that keeps what it is asked for; `hub.fails[name]` makes one call fail."""
    state = SimpleNamespace(calls=[], fails={}, files=[])

    class Api:
        def whoami(self):
            state.calls.append(("whoami", {}))
            self._fail("whoami")
            return {"name": "me"}

        def create_repo(self, repo_id, **how):
            state.calls.append(("create_repo", {"repo_id": repo_id, **how}))
            self._fail("create_repo")

            class Url(str):
                pass

            url = Url(f"https://huggingface.co/{repo_id}")
            url.repo_id = repo_id
            return url

        def upload_folder(self, **how):
            state.calls.append(("upload_folder", how))
            self._fail("upload_folder")
            state.files = sorted(path.name for path in Path(how["folder_path"]).iterdir())

        def _fail(self, name):
            if name in state.fails:
                raise state.fails[name]

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return state


def refusal(code):
    response = SimpleNamespace(
        status_code=code, headers={}, request=None, json=dict, url="", text=""
    )
    return HfHubHTTPError(f"{code} Client Error: Forbidden\n\nmore\nlines", response=response)


def test_calls(run, hub, done):
    out, _ = run()
    said = done("export", out, "--push", "me/slots", "--private")
    assert [name for name, _ in hub.calls] == ["whoami", "create_repo", "upload_folder"]
    assert hub.calls[1][1] == {"repo_id": "me/slots", "private": True, "exist_ok": True}
    upload = hub.calls[2][1]
    assert upload["repo_id"] == "me/slots"
    assert Path(upload["folder_path"]) == Path(out, "export", "peft")
    assert hub.files == [
        "README.md", "SHA256SUMS", "adapter_config.json", "adapter_model.safetensors",
        "chat_template.jinja", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert "pushed: https://huggingface.co/me/slots" in said
    card = Path(out, "export", "peft", "README.md").read_text()
    assert 'from_pretrained(model, "me/slots")' in card
    config = json.loads(Path(out, "export", "peft", "adapter_config.json").read_text())
    # A path of this machine means nothing on the hub, and is nobody's business there.
    assert "/" not in config["base_model_name_or_path"]


def test_public_unless_the_account_says_otherwise(run, hub, done):
    out, _ = run()
    done("export", out, "--push", "slots")
    assert hub.calls[1][1]["private"] is None


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        ("whoami", LocalTokenNotFoundError("Token is required"), "run `hf"),
        ("whoami", ConnectionError("[Errno -2] Name not known"), "cannot be reached"),
        ("create_repo", refusal(403), "(403 Client Error: Forbidden)"),
        ("upload_folder", refusal(401), "the hub refuses (401"),
        ("upload_folder", TimeoutError("timed out"), "cannot be reached (timed out)"),
    ],
    ids=["token", "network", "forbidden", "unauthorised", "timeout"],
)
def test_failures(run, hub, told, call, error, words):
    out, _ = run()
    hub.fails[call] = error
    assert words in told("export", out, "--push", "me/slots")
    # What fails before the work fails before the work; what was written before stays.
    assert Path(out, "export", "peft").exists() == (call != "whoami")


def test_names(run, hub, told):
    out, _ = run()
    assert "--push a/b/c: " in told("export", out, "--push", "a/b/c")
    assert hub.calls == []


def test_the_real_client_offline(run, told, monkeypatch):
    """HF_HUB_OFFLINE is set for all tests: the real client refuses by itself."""
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    out, _ = run()
    assert "HF_HUB_OFFLINE" in told("export", out, "--push", "me/slots")
