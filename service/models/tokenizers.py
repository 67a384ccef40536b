"""The tokenizer in a model's folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from client.errors import ErrorCode
from service.errors import ServiceError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside a model's weights; the network is not asked.

    Raises ServiceError(NOT_READY) where the folder holds none, or one without a fast (Rust) implementation.
    """
    from transformers import AutoTokenizer  # here: it takes seconds, and not every user of this module needs it

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ServiceError(ErrorCode.NOT_READY, f"no usable tokenizer in {folder}: {error}") from error
    if not tokenizer.is_fast:
        raise ServiceError(ErrorCode.NOT_READY, f"the tokenizer in {folder} has no fast version (tokenizer.json)")
    return tokenizer
