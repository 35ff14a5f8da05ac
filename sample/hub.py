"""Models on the Hugging Face hub: where a checkpoint is, downloading, uploading."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from ..configs.locate import is_on_hub
from ..configs.runs import CheckpointError, resolve


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder meant by a run folder (its newest one), a checkpoint folder, or an id on the hub.

    Raises:
        CheckpointError: there is none.
    """
    return resolve(download(str(path)) if is_on_hub(str(path)) else path)


def download(repo_id: str) -> Path:
    """The folder, in the cache of huggingface_hub, of a model on the hub.

    Raises:
        CheckpointError: the library is missing, the hub has no such model, or cannot be reached.
    """
    hub = _library(f"there is no folder {repo_id!r}; as the id of a model on the Hugging Face hub")
    try:
        return Path(hub.snapshot_download(repo_id))
    except Exception as error:  # the hub raises its own exception types
        raise CheckpointError(
            f"{repo_id!r} is neither a folder nor a model available on the Hugging Face hub: {_reason(error)}"
        ) from None


def upload(folder: Path, repo_id: str, private: bool) -> str:
    """Write the files of a folder to a model on the hub, which is made if it is missing; returns its address.

    Raises:
        ValueError: the library is missing, nobody is logged in, or the hub refuses or cannot be reached.
    """
    hub = _library("a model on the Hugging Face hub")
    try:
        address = hub.create_repo(repo_id, private=private, exist_ok=True)
        hub.upload_folder(folder_path=folder, repo_id=repo_id, commit_message="Upload an anystate pipeline")
    except Exception as error:  # the hub raises its own exception types
        raise ValueError(f"{repo_id!r} could not be written to the Hugging Face hub: {_reason(error)}") from None
    return str(address)


def _library(what: str) -> ModuleType:
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError(f"{what} needs huggingface_hub: pip install huggingface_hub") from None
    return huggingface_hub


def _reason(error: Exception) -> str:
    """The first line of an error's message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
