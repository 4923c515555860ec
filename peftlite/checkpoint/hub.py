"""From a directory or a hub repository to a local directory with an adapter's files, and back to the hub.

Knows file names only: what is in the files is for `checkpoint/files.py`, and torch is not imported here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from peftlite import config
from peftlite.checkpoint.commit import PENDING
from peftlite.checkpoint.keys import CONFIG_NAME, RECORD_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, shown
from peftlite.errors import AdapterFilesNotFoundError, CheckpointError, ConfigError, nearest

CARD_NAME = "README.md"
FILES = (CONFIG_NAME, RECORD_NAME, SAFETENSORS_WEIGHTS_NAME)
UPLOADED = (CARD_NAME, *FILES, *(f"*/{name}" for name in FILES))

_REPO_ID = re.compile(r"(\w[\w.-]*/)?\w([\w.-]*\w)?", re.ASCII)
_GONE = {
    "proxies": "set the environment variable HTTPS_PROXY",
    "resume_download": "downloads always resume",
    "mirror": "set the environment variable HF_ENDPOINT",
    "repo_type": "adapters are in repositories of models",
}


class HubOptions(config.HubOptions):
    """Where in a hub repository to look, and how to get there.

    `subfolder` counts for local directories too; the others concern the hub alone.
    """

    @classmethod
    def from_kwargs(cls, options: Mapping[str, Any]) -> HubOptions:
        """The options among the keyword arguments of a `from_pretrained`.

        `use_auth_token` is the old name of `token`. Arguments that the hub no longer has may be None.

        Raises: ConfigError for any other name.
        """
        given = dict(options)
        old = given.pop("use_auth_token", None)
        if given.get("token") is None and old is not None:
            given["token"] = old
        for name, instead in _GONE.items():
            if given.pop(name, None):
                raise ConfigError(f"`{name}` is not an option any more: {instead}. Nothing was changed.")
        for name in given:
            if name not in cls._fields:
                raise ConfigError(
                    f"`{name}` is not an option of loading; nearest: {nearest(name, cls._fields)}. Nothing was changed."
                )
        return cls(**given)


def resolve(
    id_or_dir: str | os.PathLike[str],
    options: config.HubOptions | None = None,
    *,
    config_file: bool = True,
    weights: bool = True,
) -> Path:
    """The local directory that holds an adapter: `id_or_dir` itself, or where its files were downloaded to.

    Local directories come first. From the hub, config and weights are of one commit even while somebody pushes, and the
    pickled weights are fetched only where there are no others.

    Args:
        id_or_dir: a directory, or the id of a repository.
        options: subfolder, revision, token, ...
        config_file: whether an `adapter_config.json` is needed.
        weights: whether weights are needed.

    Raises: AdapterFilesNotFoundError if there are no such files, CheckpointError if they cannot be fetched.
    """
    options = options or HubOptions()
    subfolder = _checked(options.subfolder)
    text = os.fspath(id_or_dir)
    place = Path(text).expanduser()
    if place.is_dir():
        place = place / subfolder if subfolder else place
        needed = [name for name, asked in ((CONFIG_NAME, config_file), (SAFETENSORS_WEIGHTS_NAME, weights)) if asked]
        for name in needed:
            if not _has(place, name) and not (name != CONFIG_NAME and _has(place, WEIGHTS_NAME)):
                raise missing(place, name)
        return place
    if not is_repo_id(id_or_dir):
        raise missing(place, CONFIG_NAME)
    return _download(text, options, subfolder, config_file, weights)


def local_file(id_or_dir: str, name: str, revision: str | None = None) -> Path | None:
    """A file of a directory, or of a repository as far as it is in the cache: the hub is not asked."""
    if os.path.isdir(id_or_dir):
        path = Path(id_or_dir) / name
        return path if path.is_file() else None
    if not is_repo_id(id_or_dir) or _leaves(revision or ""):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(id_or_dir, name, revision=revision)
    return Path(found) if isinstance(found, str) else None


def push_to_hub(
    directory: str | os.PathLike[str],
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload the adapters in `directory`, and their card, to a repository, which is made if there is none.

    Gives back the URL of the commit. Nothing but the files of adapters and the card is uploaded.

    Raises: CheckpointError if the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    place = Path(directory)
    homes = [at for at in (place, *_entries(place)) if at.is_dir() and _has(at, CONFIG_NAME)]
    if not homes:
        raise missing(place, CONFIG_NAME)
    for home in homes:
        if (home / PENDING).exists():
            raise CheckpointError(f"A save into `{home}` was interrupted: save again first. Nothing was changed.")
    api = HfApi(token=token)
    with _hub_errors(f"`{place}` could not be pushed to {shown(repo_id)}"):
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None and not create_pr:
            api.create_branch(repo.repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=place,
            commit_message=commit_message or "Upload adapter",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            allow_patterns=list(UPLOADED),
            ignore_patterns=[".adapter-*", "*/.adapter-*"],
        )
    return str(commit.pr_url or commit.commit_url)


def missing(place: Path, name: str) -> AdapterFilesNotFoundError:
    """The error for a local directory without an adapter's file: says what is there instead."""
    if not place.is_dir():
        near = sorted(at.name for at in _entries(place.parent) if at.is_dir())
        hint = f"; nearest: {nearest(place.name, near)}" if near else ""
        return AdapterFilesNotFoundError(f"There is no directory `{place}`{hint}. Nothing was changed.")
    inside = sorted(at.name for at in _entries(place) if at.is_dir() and _has(at, CONFIG_NAME))
    hint = f"; its sub-directories {', '.join(map(shown, inside[:5]))} have" if inside else ""
    return AdapterFilesNotFoundError(f"`{place}` has no `{name}`{hint}. Nothing was changed.")


def _entries(place: Path) -> list[Path]:
    try:
        return list(place.iterdir())
    except OSError:
        return []


def _has(place: Path, name: str) -> bool:
    return any(os.path.lexists(at / name) for at in (place, place / PENDING))


def _checked(subfolder: str | None) -> str:
    """`subfolder` without detours.

    Raises: CheckpointError for one that is not inside.
    """
    if _leaves(subfolder or ""):
        raise CheckpointError(
            f"`subfolder` is {shown(str(subfolder))}, which leaves the directory. Nothing was changed."
        )
    path = PurePosixPath((subfolder or "").replace("\\", "/"))
    return "" if path == PurePosixPath() else str(path)


def _leaves(name: str) -> bool:
    """Whether a name, as a path, leads out of where it is looked up."""
    path = PurePosixPath(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or bool(Path(name).drive)


def is_repo_id(name: str | os.PathLike[str]) -> bool:
    """Whether `name` can be the id of a repository, `repo` or `owner/repo`; a path object never is."""
    fits = isinstance(name, str) and len(name) <= 96 and _REPO_ID.fullmatch(name) is not None
    return fits and not any(refused in f"{name}$" for refused in ("--", "..", ".git$"))


def _download(repo_id: str, options: config.HubOptions, subfolder: str, config_file: bool, weights: bool) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    def fetch(name: str, revision: str | None) -> Path:
        return Path(
            hf_hub_download(
                repo_id,
                name,
                subfolder=subfolder or None,
                revision=revision,
                cache_dir=None if options.cache_dir is None else Path(options.cache_dir),
                token=options.token,
                force_download=options.force_download,
                local_files_only=options.local_files_only,
            )
        )

    where = f"{shown(repo_id)}{f', subfolder {shown(subfolder)}' if subfolder else ''}"
    at, revision = Path(), options.revision
    with _hub_errors(f"The adapter {where} is not a local directory, and could not be fetched from the hub"):
        if config_file:
            at = fetch(CONFIG_NAME, revision)
            revision = _commit_of(at) or revision
        if weights:
            try:
                at = fetch(SAFETENSORS_WEIGHTS_NAME, revision)
            except EntryNotFoundError:
                at = fetch(WEIGHTS_NAME, revision)
            with suppress(EntryNotFoundError):  # only peftlite writes it
                fetch(RECORD_NAME, _commit_of(at) or revision)
    return at.parent


def has(id_or_dir: str | os.PathLike[str], name: str, options: config.HubOptions) -> bool:
    """Whether a file lies beside an adapter, in its directory or repository; False where the hub cannot be asked."""
    place = Path(id_or_dir).expanduser()
    if place.is_dir() or not is_repo_id(id_or_dir):
        return (place / _checked(options.subfolder) / name).is_file()
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        hf_hub_download(os.fspath(id_or_dir), name, **options._asdict())
    except EntryNotFoundError:
        return False
    return True


def _commit_of(path: Path) -> str | None:
    """The commit that a file in the hub's cache is of."""
    parts = path.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts[:-1] else None


@contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    """The hub's errors as ours, with what they mean for somebody who wants an adapter."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise CheckpointError(f"{what}: access to it is granted on request only. Nothing was changed.") from error
    except errors.RepositoryNotFoundError as error:
        raise AdapterFilesNotFoundError(
            f"{what}: there is no such repository, or it is private and `token` does not open it. Nothing was changed."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise AdapterFilesNotFoundError(f"{what}: it has no such `revision`. Nothing was changed.") from error
    except errors.LocalEntryNotFoundError as error:
        raise AdapterFilesNotFoundError(
            f"{what}: it is not in the cache, and the hub was not asked (offline) or not reached. Nothing was changed."
        ) from error
    except errors.EntryNotFoundError as error:
        raise AdapterFilesNotFoundError(
            f"{what}: it has no `{CONFIG_NAME}`, or no `{SAFETENSORS_WEIGHTS_NAME}`. Nothing was changed."
        ) from error
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{what}: {reason}. Nothing was changed.") from error


def _fetch(name: str, options: config.HubOptions) -> Path:
    return resolve(name, options, weights=False)


config.register_fetch(_fetch)
