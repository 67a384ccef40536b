"""Loads the tokenizer in a model's folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from client.errors import ErrorCode
from service.errors import ServiceError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in this folder, without using the network.

    Raises ServiceError(NOT_READY) if there is none, or none with a fast (Rust) implementation.
    """
    from transformers import AutoTokenizer  # here, because the import takes seconds

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ServiceError(ErrorCode.NOT_READY, f"no usable tokenizer in {folder}: {error}") from error
    if not tokenizer.is_fast:
        raise ServiceError(ErrorCode.NOT_READY, f"the tokenizer in {folder} has no fast version (tokenizer.json)")
    return tokenizer
