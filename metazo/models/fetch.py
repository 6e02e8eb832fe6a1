"""Get a file of a Hub repository that another file there belongs to, so that a failure is never taken for its absence."""

from __future__ import annotations

from pathlib import Path

from metazo.errors import UserError
from metazo.io.extras import needs

with needs("llm"):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError


def of_commit(repository: str, name: str, commit: str) -> Path | None:
    """The path in the Hub's cache of a file of a repository at a commit; None if there is no such file, or if the cache has
    none and HF_HUB_OFFLINE is set. Raises UserError if the Hub does not say.
    """
    cached = huggingface_hub.try_to_load_from_cache(repository, name, revision=commit)
    if isinstance(cached, str):
        return Path(cached)
    if cached is not None or huggingface_hub.is_offline_mode():  # not None: known to be missing
        return None
    try:
        return Path(huggingface_hub.hf_hub_download(repository, name, revision=commit))
    except Exception as error:  # the kinds of the client's network library differ between versions
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        status = getattr(getattr(error.__cause__ or error, "response", None), "status_code", None)
        answer = f"it answers {status}" if status else "the connection failed"
        raise UserError(f"{name} of {repository} cannot be had from the Hub ({answer}): try again later.") from None
