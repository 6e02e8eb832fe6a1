"""Tuners and tuned models on the Hugging Face Hub, through huggingface_hub, so that metazo never handles the token.

Errors get metazo's own messages, so that neither a token nor a server's text can reach a message.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from metazo.errors import UserError
from metazo.io.extras import needs
from metazo.io.files import safe_name, write_whole
from metazo.io.terminal import print_line
from metazo.tuner.limits import MAX_BYTES, TUNER

with needs("llm"):
    import huggingface_hub
    from huggingface_hub import errors


def hub_file(repository: str, revision: str | None, report: Callable[[str], None] = print_line) -> Path:
    """Path in the Hub's cache of a repository's tuner.safetensors, whose size is shown and limited before it is read."""
    name = f"{repository}@{safe_name(revision or 'main', 'revision')}"
    try:
        cached = huggingface_hub.try_to_load_from_cache(repository, TUNER, revision=revision)
        if isinstance(cached, str) and (huggingface_hub.is_offline_mode() or _is_commit(revision)):
            return Path(cached)
        about = huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(repository, TUNER, revision=revision))
        if about.size is None or about.size > MAX_BYTES:
            raise UserError(f"{name} has a tuner of {about.size or 'unknown'} bytes, more than {MAX_BYTES:,}; refused")
        report(f"pulling {name} ({about.size:,} bytes)")
        path = Path(huggingface_hub.hf_hub_download(repository, TUNER, revision=about.commit_hash or revision))
        if (
            about.commit_hash
        ):  # pinned to the announced file; the revision's name is noted, so that the file is found offline
            write_whole(path.parents[2] / "refs" / safe_name(revision or "main", "revision"), path.parent.name.encode())
        return path
    except UserError:
        raise
    except (
        Exception
    ) as error:  # the client's network library has its own exception types, which differ between versions
        _refuse(name, "pulled", error)


def hub_push(repository: str, data: bytes, text: str, *, private: bool | None = None, branch: str | None = None) -> str:
    """Upload a tuner and its card to a Hub repository, which is made if missing; returns the address of the commit."""
    operations = [
        huggingface_hub.CommitOperationAdd(TUNER, data),
        huggingface_hub.CommitOperationAdd("README.md", text.encode()),
    ]
    try:
        hub = huggingface_hub.HfApi()
        hub.create_repo(repository, exist_ok=True, private=private)
        if branch is not None:
            hub.create_branch(repository, branch=branch, exist_ok=True)
        done = hub.create_commit(repository, operations, commit_message="Publish tuner", revision=branch)
        return str(done.commit_url)
    except Exception as error:  # as above
        _refuse(repository, "pushed to", error)


def check_repository(repository: str) -> None:
    """Raises UserError for a text that is not OWNER/NAME."""
    try:
        huggingface_hub.utils.validate_repo_id(repository)
    except errors.HFValidationError:
        repository_is_valid = False
    else:
        repository_is_valid = repository.count("/") == 1
    if not repository_is_valid:
        raise UserError(f"`push` {repository!r} is not the name of a repository of the Hub: give OWNER/NAME.")


def push_folder(repository: str, folder: Path) -> str:
    """Upload the files of a saved model to a Hub repository, which is made if missing; returns the address of the commit."""
    try:
        hub = huggingface_hub.HfApi()
        hub.create_repo(repository, exist_ok=True)
        done = hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Publish tuned model")
        return str(done.commit_url)
    except Exception as error:  # as above
        _refuse(repository, "pushed to", error)


def _is_commit(revision: str | None) -> bool:
    return revision is not None and len(revision) == 40 and set(revision) <= set("0123456789abcdef")


def _refuse(name: str, done: str, error: Exception) -> NoReturn:
    reasons: list[tuple[type[Exception], str]] = [
        (errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE is set and it is not in the cache"),
        (errors.GatedRepoError, "the repository is gated; accept its terms on the Hub and log in with `hf auth login`"),
        (errors.RepositoryNotFoundError, "there is no such repository, or it is private: log in with `hf auth login`"),
        (errors.RevisionNotFoundError, "the repository has no such revision"),
        (errors.EntryNotFoundError, f"the repository holds no {TUNER}"),
        (errors.HFValidationError, "this is not a valid repository name"),
    ]
    status = getattr(getattr(error, "response", None), "status_code", None)
    fallback = f"the Hub answers {status}" if status else f"the Hub cannot be used ({type(error).__name__})"
    reason = next((words for kind, words in reasons if isinstance(error, kind)), fallback)
    raise UserError(f"{name} cannot be {done}: {reason}") from None
