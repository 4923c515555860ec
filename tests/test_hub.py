"""From an id or a directory to an adapter's files, without a network; and the model card."""

from __future__ import annotations

import os
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors

from peftlite.checkpoint import hub
from peftlite.checkpoint.card import Card, write_card
from peftlite.checkpoint.hub import HubOptions, resolve
from peftlite.checkpoint.keys import CONFIG_NAME, RECORD_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peftlite.config import PeftConfig
from peftlite.errors import AdapterFilesNotFoundError, CheckpointError, ConfigError, PeftliteWarning

COMMIT = "0123456789" * 4


def adapter(directory: Path, *names: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name in names or (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        (directory / name).write_text("{}")
    return directory


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with the adapter `some/adapter`, laid out as huggingface_hub does; nothing else can be reached."""
    repo = tmp_path / "cache" / "models--some--adapter"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    (repo / "blobs").mkdir()
    for at, names in {"": (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME), "old": (CONFIG_NAME, WEIGHTS_NAME)}.items():
        place = repo / "snapshots" / COMMIT / at
        place.mkdir(parents=True)
        for name in names:
            (repo / "blobs" / f"{at}{name}").write_text('{"peft_type": "LORA"}')
            (place / name).symlink_to(os.path.relpath(repo / "blobs" / f"{at}{name}", place))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


# ---- options


def test_options_are_what_from_pretrained_was_given() -> None:
    assert HubOptions.from_kwargs({}) == HubOptions()
    options = HubOptions.from_kwargs({"revision": "v1", "subfolder": "a", "token": "t", "local_files_only": True})
    assert (options.revision, options.subfolder, options.token, options.local_files_only) == ("v1", "a", "t", True)
    assert HubOptions.from_kwargs({"use_auth_token": "old"}).token == "old"
    assert HubOptions.from_kwargs({"use_auth_token": "old", "token": "new"}).token == "new"
    assert HubOptions.from_kwargs({"proxies": None, "resume_download": None}) == HubOptions()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("revison", "nearest: `revision`"),
        ("subfoldr", "nearest: `subfolder`"),
        ("proxies", "HTTPS_PROXY"),
        ("mirror", "HF_ENDPOINT"),
    ],
)
def test_an_option_that_is_none_is_refused(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"`{name}`.*{words}"):
        HubOptions.from_kwargs({name: "x"})


@pytest.mark.parametrize("name", ["a", "a/b", "A-b_c.d/e.f-g", "gpt2", "0/1"])
def test_ids_of_repositories(name: str) -> None:
    assert hub.is_repo_id(name)
    huggingface_hub.utils.validate_repo_id(name)


@pytest.mark.parametrize("name", ["", "a/b/c", "/a", "./a", "../a", "a b", "a/", "a--b", "a.git", "-a", "a.", "x" * 97])
def test_what_is_no_id_of_a_repository(name: str) -> None:
    assert not hub.is_repo_id(name)
    with pytest.raises(hub_errors.HFValidationError):
        huggingface_hub.utils.validate_repo_id(name)


# ---- local directories


def test_a_directory_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter(tmp_path / "some" / "adapter")
    adapter(tmp_path / "some" / "adapter" / "other", CONFIG_NAME, WEIGHTS_NAME)
    monkeypatch.chdir(tmp_path)
    assert resolve("some/adapter") == Path("some/adapter")  # before the hub is asked
    assert resolve(tmp_path / "some" / "adapter") == tmp_path / "some" / "adapter"
    assert resolve("some/adapter", HubOptions(subfolder="other")) == Path("some/adapter/other")
    assert resolve("some/adapter", HubOptions(subfolder="./other/")) == Path("some/adapter/other")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/some/adapter") == tmp_path / "some" / "adapter"


def test_what_a_directory_lacks_is_named(tmp_path: Path) -> None:
    adapter(tmp_path / "run" / "other")
    adapter(tmp_path / "config", CONFIG_NAME)
    adapter(tmp_path / "weights", SAFETENSORS_WEIGHTS_NAME)
    with pytest.raises(AdapterFilesNotFoundError, match=rf"no `{CONFIG_NAME}`; its sub-directories `other` have"):
        resolve(tmp_path / "run")
    with pytest.raises(AdapterFilesNotFoundError, match=rf"no `{SAFETENSORS_WEIGHTS_NAME}`"):
        resolve(tmp_path / "config")
    with pytest.raises(AdapterFilesNotFoundError, match=rf"no `{CONFIG_NAME}`"):
        resolve(tmp_path / "weights")
    assert resolve(tmp_path / "config", weights=False) == tmp_path / "config"
    assert resolve(tmp_path / "weights", config_file=False) == tmp_path / "weights"
    for missing in (tmp_path / "rnu", str(tmp_path / "rnu"), "./rnu"):
        with pytest.raises(AdapterFilesNotFoundError, match="no directory"):
            resolve(missing)
    with pytest.raises(AdapterFilesNotFoundError, match="nearest: `run`"):
        resolve(tmp_path / "rnu")


@pytest.mark.parametrize("subfolder", ["..", "a/../..", "/etc", "\\etc", "..\\a", "a/../../b"])
def test_a_subfolder_does_not_leave_the_directory(tmp_path: Path, subfolder: str) -> None:
    adapter(tmp_path / "mine")
    adapter(tmp_path / "mine" / "run")
    with pytest.raises(CheckpointError, match="leaves the directory"):
        resolve(tmp_path / "mine" / "run", HubOptions(subfolder=subfolder))


# ---- the hub


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_an_id_is_found_in_the_cache(cache: Path) -> None:
    snapshot = cache / "models--some--adapter" / "snapshots" / COMMIT
    assert resolve("some/adapter", HubOptions(cache_dir=cache)) == snapshot
    assert resolve("some/adapter", HubOptions(cache_dir=cache, revision=COMMIT)) == snapshot
    assert resolve("some/adapter", HubOptions(cache_dir=cache, subfolder="old")) == snapshot / "old"
    config = PeftConfig.from_pretrained("some/adapter", cache_dir=cache)
    assert config.peft_type == "LORA"


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("local_files_only", [True, False])
def test_an_id_that_is_not_in_the_cache(tmp_path: Path, local_files_only: bool) -> None:
    options = HubOptions(cache_dir=tmp_path / "empty", local_files_only=local_files_only)
    with pytest.raises(AdapterFilesNotFoundError, match=r"`some/adapter` is not a local directory.*not in the cache"):
        resolve("some/adapter", options)


def _raising(error: BaseException):  # type: ignore[no-untyped-def]
    def download(*args: object, **kwargs: object) -> str:
        raise error

    return download


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("GatedRepoError", "on request only"),
        ("RepositoryNotFoundError", "no such repository"),
        ("RevisionNotFoundError", "no such `revision`"),
        ("EntryNotFoundError", "it has no `adapter_config.json`"),
        ("LocalEntryNotFoundError", "not in the cache"),
        ("OfflineModeIsEnabled", "wrong"),
    ],
)
def test_the_hubs_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch, kind: str, words: str) -> None:
    made = getattr(hub_errors, kind)
    error = made.__new__(made)
    Exception.__init__(error, "wrong\nand more")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", _raising(error))
    with pytest.raises(CheckpointError, match=words) as caught:
        resolve("some/adapter")
    assert caught.value.__cause__ is error
    assert str(caught.value).endswith("Nothing was changed.")


def test_all_files_are_of_the_commit_of_the_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def download(repo_id: str, name: str, *, revision: str | None, subfolder: str | None, **rest: object) -> str:
        asked.append((name, revision, subfolder))
        if name == SAFETENSORS_WEIGHTS_NAME:
            raise hub_errors.LocalEntryNotFoundError("no such file")
        return str(tmp_path / "snapshots" / COMMIT / str(subfolder) / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    place = resolve("some/adapter", HubOptions(subfolder="sub", revision="v1"))
    assert place == tmp_path / "snapshots" / COMMIT / "sub"
    assert asked == [
        (CONFIG_NAME, "v1", "sub"),
        (SAFETENSORS_WEIGHTS_NAME, COMMIT, "sub"),
        (WEIGHTS_NAME, COMMIT, "sub"),
        (RECORD_NAME, COMMIT, "sub"),
    ]


class FakeApi:
    """The part of `HfApi` that pushing uses; remembers the calls."""

    calls: list[tuple[str, dict[str, object]]]

    def __init__(self, token: object = None) -> None:
        type(self).calls = [("api", {"token": token})]

    def create_repo(self, repo_id: str, **rest: object) -> huggingface_hub.RepoUrl:
        self.calls.append(("repo", {"repo_id": repo_id, **rest}))
        return huggingface_hub.RepoUrl(f"https://huggingface.co/me/{repo_id}")

    def create_branch(self, repo_id: str, **rest: object) -> None:
        self.calls.append(("branch", {"repo_id": repo_id, **rest}))

    def upload_folder(self, **rest: object) -> huggingface_hub.CommitInfo:
        self.calls.append(("upload", rest))
        return huggingface_hub.CommitInfo(
            commit_url="https://huggingface.co/me/a/commit/1", commit_message="", commit_description="", oid="1"
        )


def test_push_uploads_adapters_and_card_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    adapter(tmp_path / "other")
    (tmp_path / "secrets.txt").write_text("")
    (tmp_path / ".hidden").mkdir()
    url = hub.push_to_hub(tmp_path, "a", private=True, token="t", revision="dev")
    assert url == "https://huggingface.co/me/a/commit/1"
    calls = dict(FakeApi.calls)
    assert calls["api"] == {"token": "t"}
    assert calls["repo"] == {"repo_id": "a", "private": True, "exist_ok": True}
    assert calls["branch"] == {"repo_id": "me/a", "branch": "dev", "exist_ok": True}
    names = [f"{at}{name}" for at in ("", "other/") for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)]
    names += ["README.md", "secrets.txt", WEIGHTS_NAME, f".adapter-staging-1/{CONFIG_NAME}"]
    patterns = {key: calls["upload"][key] for key in ("allow_patterns", "ignore_patterns")}
    kept = huggingface_hub.utils.filter_repo_objects(names, **patterns)  # type: ignore[arg-type]
    assert list(kept) == names[:5]
    with pytest.raises(AdapterFilesNotFoundError, match=r"no `adapter_config\.json`"):
        hub.push_to_hub(adapter(tmp_path / "empty", "x"), "a")


def test_an_interrupted_save_is_not_pushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    adapter(tmp_path / "other")
    adapter(tmp_path / "other" / ".adapter-pending")
    FakeApi.calls = []
    with pytest.raises(CheckpointError, match="interrupted"):
        hub.push_to_hub(tmp_path, "a")
    assert not FakeApi.calls


def test_a_push_that_fails_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeApi, "upload_folder", _raising(ConnectionError("no route")))
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    with pytest.raises(CheckpointError, match="could not be pushed to `a`: no route"):
        hub.push_to_hub(adapter(tmp_path), "a")


# ---- the card


def front(path: Path) -> dict[str, object]:
    return huggingface_hub.ModelCard.load(path / "README.md").data.to_dict()


def test_a_new_card(tmp_path: Path) -> None:
    write_card(tmp_path, Card("meta/llama", "LORA", "CAUSAL_LM"))
    assert front(tmp_path) == {
        "base_model": "meta/llama",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:meta/llama", "lora", "transformers"],
    }
    text = (tmp_path / "README.md").read_text()
    assert 'AutoModelForCausalLM.from_pretrained("meta/llama")' in text
    before = (tmp_path / "README.md").stat().st_mtime_ns
    write_card(tmp_path, Card("meta/llama", "LORA", "CAUSAL_LM"))
    assert (tmp_path / "README.md").stat().st_mtime_ns == before


@pytest.mark.parametrize("base", [None, "", "/home/me/model", "./model"])
def test_a_base_without_an_id_is_not_named(tmp_path: Path, base: str | None) -> None:
    write_card(tmp_path, Card(base, "IA3", None, transformers=False))
    assert front(tmp_path) == {"library_name": "peft", "tags": ["ia3"]}
    assert "home" not in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_card_that_is_there_keeps_what_is_its_own(tmp_path: Path, newline: str) -> None:
    own = "---\nlicense: mit\ntags:\n- mine\nlibrary_name: other\n---\n# By hand é\n---\ntext\n".replace("\n", newline)
    (tmp_path / "README.md").write_bytes(own.encode())
    for _ in range(2):
        write_card(tmp_path, Card("a/b"))
        assert front(tmp_path) == {
            "license": "mit",
            "tags": ["mine", "base_model:adapter:a/b", "lora", "transformers"],
            "library_name": "peft",
            "base_model": "a/b",
        }
        body = (tmp_path / "README.md").read_bytes().decode().split("---\n", 2)[-1]
        assert body == "# By hand é\n---\ntext\n".replace("\n", newline)


def test_a_text_without_front_matter_gets_one(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"only text \xff\n")
    write_card(tmp_path, Card("a/b"))
    assert (tmp_path / "README.md").read_bytes().endswith(b"\n---\nonly text \xff\n")


@pytest.mark.parametrize("front_matter", ["a: [", "- a\n- b", "!!python/object/apply:os.mkdir [code-was-run]"])
def test_front_matter_that_cannot_be_read_is_left_alone(tmp_path: Path, front_matter: str) -> None:
    text = f"---\n{front_matter}\n---\ntext"
    (tmp_path / "README.md").write_text(text)
    with pytest.warns(PeftliteWarning, match="left as it is"):
        write_card(tmp_path, Card("a/b"))
    assert (tmp_path / "README.md").read_text() == text


def test_a_card_that_cannot_be_written_costs_no_adapter(tmp_path: Path) -> None:
    (tmp_path / "README.md").mkdir()
    with pytest.warns(PeftliteWarning, match="could not be written") as caught:
        write_card(tmp_path, Card("a/b"))
    assert caught[0].filename == __file__
