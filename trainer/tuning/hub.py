"""Uploading an adapter or a model to the Hugging Face hub. Nothing is uploaded unless a flag names the repository."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, TypeAlias

from trainer.errors import ModelError
from trainer.policy.models import needs_trainer

Uploaded: TypeAlias = Literal["model", "adapter"]


@dataclass(frozen=True, slots=True)
class Upload:
    """What goes to which repository; a repository that has to be created is private unless `public`."""

    repo: str
    what: Uploaded = "model"
    public: bool = False

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Self | None:
        """What the flags of `add_hub_flags` ask for."""
        return cls(args.push_to_hub, args.push, args.public) if args.push_to_hub else None


def add_hub_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `Upload.from_args`."""
    group = parser.add_argument_group("hub", "Nothing is uploaded without --push-to-hub.")
    group.add_argument("--push-to-hub", metavar="ORG/NAME", help="repository to upload the result to (default: none)")
    group.add_argument("--push", choices=("model", "adapter"), default="model", help="what to upload (default: model)")
    group.add_argument("--public", action="store_true", help="create the repository as public (default: private)")


def push_to_hub(folder: Path, upload: Upload) -> str:
    """Upload the folder, creating the repository if needed, and return its address.

    The token is HF_TOKEN's, or the one that `hf auth login` stored. Raises ModelError.
    """
    with needs_trainer():
        from huggingface_hub import HfApi
    hub = HfApi()
    try:
        url = hub.create_repo(upload.repo, private=not upload.public, exist_ok=True)
        hub.upload_folder(repo_id=upload.repo, folder_path=folder, commit_message="Upload by judge-as-api")
    except Exception as error:  # from several libraries, as when downloading
        raise ModelError(
            f"{folder} could not be pushed to {upload.repo} ({type(error).__name__}: {error}); it is complete here. "
            "Set HF_TOKEN to a token with write access, and push again"
        ) from error
    return str(url)
