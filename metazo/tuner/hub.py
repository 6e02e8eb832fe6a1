"""Tuners and tuned models on the Hugging Face Hub, through huggingface_hub, so that metazo never handles the token.

Errors get metazo's own messages, so that neither a token nor a server's text can reach a message.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from metazo.errors import UserError
from metazo.io.extras import needs
from metazo.io.files import is_file, safe_name, write_whole
from metazo.io.plain import read_json
from metazo.io.terminal import print_line
from metazo.tuner.limits import MAX_BYTES, TUNER

with needs("llm"):
    import huggingface_hub
    from huggingface_hub import errors
    from huggingface_hub.repocard import REGEX_YAML_BLOCK, metadata_load

README, BESIDE = "README.md", "tuner.md"
"""The card of a repository, and that of a tuner in a repository whose own card another program or person wrote."""
SAVED = re.compile(
    r"adapter_(config\.json|model\.(safetensors|bin))|metazo\.json|head\.safetensors|(generation_)?config\.json"
    r"|(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)|(model\.safetensors|pytorch_model\.bin)\.index\.json"
    r"|modules\.json|\d+_(Pooling|Dense|Normalize)/[\w.-]+|config_sentence_transformers\.json|sentence_\w+_config\.json"
    r"|tokenizer(_config)?\.json|(special_tokens_map|added_tokens|vocab)\.json|(vocab|merges)\.txt"
    r"|(tokenizer|spiece|sentencepiece\.bpe)\.model|(source|target)\.spm|chat_template\.(jinja|json)"
    r"|additional_chat_templates/[\w.-]+\.jinja"
)
"""Files of a saved model: one that another model left in a repository would be read with the files of the new one."""


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
    """Upload a tuner and its card to a Hub repository, which is made if missing; returns the address of the commit.

    The card is README.md, or tuner.md if the repository has a README.md that metazo did not write. A licence that the card
    there states is kept if the tuner has none.
    """
    check_repository(repository, "repository")
    try:
        hub = huggingface_hub.HfApi()
        hub.create_repo(repository, exist_ok=True, private=private)
        if branch is not None:
            hub.create_branch(repository, branch=branch, exist_ok=True)
        card = _own_card(hub, repository, hub.list_repo_files(repository, revision=branch), branch)
        operations = [
            huggingface_hub.CommitOperationAdd(TUNER, data),
            huggingface_hub.CommitOperationAdd(
                BESIDE if card is None else README, _licensed(text, card or {}).encode()
            ),
        ]
        done = hub.create_commit(repository, operations, commit_message="Publish tuner", revision=branch)
    except Exception as error:  # as above
        _refuse(repository, "pushed to", error)
    if card is None:
        print_line(f"The README.md of {repository} is kept; the tuner's card is {BESIDE}.", stderr=True)
    return str(done.commit_url)


def check_repository(repository: str, called: str = "push") -> None:
    """Raises UserError for a text that is not OWNER/NAME. called: the caller's argument."""
    try:
        huggingface_hub.utils.validate_repo_id(repository)
    except errors.HFValidationError:
        repository_is_valid = False
    else:
        repository_is_valid = repository.count("/") == 1
    if not repository_is_valid:
        raise UserError(f"`{called}` {repository!r} is not the name of a repository of the Hub: give OWNER/NAME.")


def push_folder(repository: str, folder: Path) -> str:
    """Upload the files of a saved model to a Hub repository, which is made if missing; returns the address of the commit.

    The files of a model that was there before are deleted, and all others are left. A licence that the README.md there states
    is kept. Raises UserError also for a repository with a README.md that metazo did not write, and for one that is the base
    model of the adapters in the folder.
    """
    settings = folder / "adapter_config.json"
    base = read_json(settings, "settings of adapters").get("base_model_name_or_path") if is_file(settings) else None
    if base == repository:
        raise UserError(
            f"{repository} cannot be pushed to: it holds the base model of these adapters, which they would replace; name "
            "another repository"
        )
    try:
        hub = huggingface_hub.HfApi()
        hub.create_repo(repository, exist_ok=True)
        there = hub.list_repo_files(repository)
        if (card := _own_card(hub, repository, there)) is None:
            _refuse_card(repository)
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        texts = {
            name: _licensed(files[name].read_text(encoding="utf-8"), card).encode() for name in files if name == README
        }
        operations = [
            *(huggingface_hub.CommitOperationAdd(name, texts.get(name, path)) for name, path in files.items()),
            *(huggingface_hub.CommitOperationDelete(n) for n in there if SAVED.fullmatch(n) and n not in files),
        ]
        done = hub.create_commit(repository, operations, commit_message="Publish tuned model")
        return str(done.commit_url)
    except UserError:
        raise
    except Exception as error:  # as above
        _refuse(repository, "pushed to", error)


def check_card(repository: str) -> None:
    """Raises UserError for a repository with a README.md that `push_folder` would refuse; a Hub that cannot be asked refuses
    nothing.
    """
    try:
        hub = huggingface_hub.HfApi()
        # asked once; without a network the list would be asked for again and again
        hub.get_hf_file_metadata(url=huggingface_hub.hf_hub_url(repository, README))
        card = _own_card(hub, repository, hub.list_repo_files(repository))
    except Exception:  # as above; also for a repository or README.md that is not there yet
        return
    if card is None:
        _refuse_card(repository)


def _refuse_card(repository: str) -> NoReturn:
    raise UserError(
        f"{repository} cannot be pushed to: it has a README.md that metazo did not write; name another repository, or delete "
        "that file on the Hub"
    )


def _own_card(
    hub: huggingface_hub.HfApi, repository: str, files: list[str], branch: str | None = None
) -> dict[str, Any] | None:
    """The front matter of a repository's README.md, empty if there is none; None if metazo may not write that file. It may if
    the file has metazo's tag, or is front matter alone in a repository without a model, as the Hub's site makes it.
    """
    if README not in files:
        return {}
    path = hub.hf_hub_download(repository, README, revision=branch)
    try:
        found = metadata_load(path) or {}
        text = REGEX_YAML_BLOCK.sub("", Path(path).read_text(encoding="utf-8-sig"), count=1)
        new = not text.strip() and not any(map(SAVED.fullmatch, files))
        return found if new or "metazo" in found["tags"] else None
    except Exception:  # no text, no YAML, no tags: yaml's own errors have no common kind with the others
        return None


def _licensed(text: str, card: dict[str, Any]) -> str:
    """A card with the licence of the one that it replaces, if it has none itself."""
    licence, start = card.get("license"), "---\n"
    if not isinstance(licence, str) or not text.startswith(start) or "\nlicense:" in text.partition("\n---\n")[0]:
        return text
    return f"{start}license: {json.dumps(licence)}\n{text.removeprefix(start)}"


def _is_commit(revision: str | None) -> bool:
    return revision is not None and len(revision) == 40 and set(revision) <= set("0123456789abcdef")


def _refuse(name: str, done: str, error: Exception) -> NoReturn:
    login = "log in with `hf auth login`"
    broken = "the connection was cut, or the file is not as it was announced; try again"
    reasons: list[tuple[type[Exception], str]] = [
        (errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE is set and it is not in the cache"),
        (errors.GatedRepoError, f"the repository is gated; accept its terms on the Hub and {login}"),
        (errors.RepositoryNotFoundError, f"there is no such repository, or it is private: {login}"),
        (errors.RevisionNotFoundError, "the repository has no such revision"),
        (errors.LocalEntryNotFoundError, broken),
        (errors.EntryNotFoundError, f"the repository holds no {TUNER}"),
        (errors.HFValidationError, "this is not a valid repository name"),
    ]
    status = getattr(getattr(error, "response", None), "status_code", None)
    answers = {
        401: f"; {login}",
        403: f"; you may not {'read' if done == 'pulled' else 'write'} there: {login} as someone who may",
    }
    fallback = f"the Hub cannot be used ({type(error).__name__})"
    if status:
        fallback = f"the Hub answers {status}{answers.get(status, '')}"
    elif type(error).__module__.startswith("http") or (isinstance(error, OSError) and error.errno is None):
        fallback += f": {broken}"
    reason = next((words for kind, words in reasons if isinstance(error, kind)), fallback)
    raise UserError(f"{name} cannot be {done}: {reason}") from None
