"""Models and tokenizers for training and sampling: a folder or a hub id becomes a folder, a folder becomes a model.

torch and transformers are imported inside the functions: `--help` and the stages that need no model work without them.
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args

from client.chat import NO_THINKING, turn_end
from client.chat_date import apply_dated
from client.runtime.files import sync, sync_all
from client.schema import Message
from trainer.policy.weights import model_digest

DType: TypeAlias = Literal["auto", "bfloat16", "float16", "float32"]
DTYPES: Final = get_args(DType)

# For models that have no chat template (base models): plain text, no new tokens. A turn of the assistant ends with the
# end-of-sequence token, so that training on it teaches where to stop. See `load_tokenizer`.
BASE_TEMPLATE: Final = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token + '\n\n' }}"
    "{% else %}{{ message['role'] | capitalize + ': ' + message['content'] + '\n\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# Where a base model that knows no end writes the next question itself.
BASE_STOPS: Final = ("\nUser:", "\nSystem:")

_HUB_ID: Final = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
# Pickled weights run code when they are read, and sub-folders hold other formats.
_PATTERNS: Final = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
_NOT_PATTERNS: Final = ["*/*", "consolidated*"]


class ModelError(ValueError):
    """The model cannot be had or cannot be used; the message says why and what to do."""


@contextmanager
def needs_trainer() -> Iterator[None]:
    """Around imports: a package that is missing raises an ImportError that says what to install."""
    try:
        yield
    except ImportError as error:
        missing = error.name or "a package"
        raise ImportError(f"{missing} is missing: pip install 'judge-as-api[trainer]'", name=error.name) from error


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Around the work of transformers, PEFT and TRL: no bars but ours, nor what they tell each other to rename."""
    import transformers.utils.logging

    logging: Any = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|trl")
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


def resolve_model(name: str) -> Path:
    """The folder of a model that is given as a folder or as a hub id, `org/name` or `org/name@revision`.

    What is downloaded is cached where HF_HOME says. Raises ModelError.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / "adapter_config.json").is_file():
            raise ModelError(f"{folder} is an adapter: make a model of it first, python -m trainer.merge {folder}")
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder} has no config.json: give the folder of a model in the format of transformers")
        return folder
    match = _HUB_ID.fullmatch(name)
    if match is None:
        raise ModelError(
            f"{name!r} is no folder here and no hub id (org/name). For a model that the service knows by name, give "
            f"its folder: `python -m service.models path {name}` prints it, after `… fetch {name}` where need be"
        )
    return _from_hub(match[1], match[2])


def model_identity(name: str) -> list[str]:
    """A model as a run's files name it: how the user did, and the digest of its files, which alone tells models apart.

    Raises ModelError, and RecordError where a file cannot be read.
    """
    return [name, model_digest(resolve_model(name))]


def _from_hub(repo: str, revision: str | None) -> Path:
    with needs_trainer():
        from huggingface_hub import snapshot_download
    try:
        found = snapshot_download(repo, revision=revision, allow_patterns=_PATTERNS, ignore_patterns=_NOT_PATTERNS)
    except Exception as error:  # of several libraries' making: the hub's, its HTTP client's, the file system's
        raise ModelError(
            f"{repo}: no folder of that name here, and the hub does not give it ({type(error).__name__}: {error}). "
            "Give a folder, set HF_ENDPOINT to a mirror, or HF_TOKEN for a gated model"
        ) from error
    return Path(found)


def choose_device(device: str = "auto") -> Any:
    """The torch.device of that name; `auto` is cuda, mps or cpu, the first there is."""
    with needs_trainer():
        import torch
    if device != "auto":
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def choose_dtype(dtype: DType, device: Any) -> Any:
    """The torch.dtype of that name; `auto` is bfloat16 where the hardware multiplies it, else float32."""
    import torch

    if dtype != "auto":
        return getattr(torch, dtype)
    return torch.bfloat16 if _multiplies_bfloat16(device) else torch.float32


def _multiplies_bfloat16(device: Any) -> bool:
    import torch

    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return any(able.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))
    return False


def load_model(folder: Path, dtype: Any, **kwargs: Any) -> Any:
    """The folder's causal model on the CPU, or where `kwargs` put it. Raises ModelError."""
    with needs_trainer():
        from transformers import AutoModelForCausalLM
    auto: Any = AutoModelForCausalLM
    try:
        model, info = auto.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True, **kwargs
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"the model in {folder} cannot be loaded: {error}") from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ModelError(f"{folder} lacks weights of the model ({missing}, …): they would be random numbers")
    return model


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, with a chat template and a padding token in any case. Raises ModelError.

    A tokenizer without a chat template, as base models have it, gets BASE_TEMPLATE ("User: …", "Assistant: …"), with
    the beginning-of-sequence token before it where the tokenizer itself would put one. It is the same for sampling,
    SFT and DPO, and is saved with what is trained. One without a padding token pads with its end-of-sequence token.
    """
    with needs_trainer():
        from transformers import AutoTokenizer
    auto: Any = AutoTokenizer
    try:
        tokenizer = auto.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"the tokenizer in {folder} cannot be loaded: {error}") from error
    if tokenizer.eos_token is None:
        raise ModelError(f"the tokenizer in {folder} has no end-of-sequence token: add one to tokenizer_config.json")
    if tokenizer.chat_template is None:
        tokenizer.chat_template = _bos(tokenizer) + BASE_TEMPLATE
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # For TRL's renderings as well: a run that goes on on another day would train on other prompts than it sampled.
    tokenizer.apply_chat_template = partial(apply_dated, tokenizer)
    return tokenizer


def _bos(tokenizer: Any) -> str:
    adds = tokenizer.bos_token is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return "{{ bos_token }}" if adds else ""


def has_base_template(tokenizer: Any) -> bool:
    """Whether the chat template is the one of this module."""
    return isinstance(tokenizer.chat_template, str) and tokenizer.chat_template.endswith(BASE_TEMPLATE)


def chat_ids(tokenizer: Any, messages: Sequence[Message], *, answer: bool) -> list[int]:
    """The token ids of a conversation in the chat template, with `answer` up to where the assistant begins.

    Thinking is off, as it is for the judge. Control tokens that stand in a message's text are read as such, as they are
    in training. Raises ModelError for a conversation that the template refuses.
    """
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        encoded = tokenizer.apply_chat_template(
            turns, tokenize=True, return_dict=True, add_generation_prompt=answer, **NO_THINKING
        )
    except Exception as error:  # a template raises what it likes, through jinja2
        raise ModelError(f"the model's chat template refuses a conversation: {error}") from error
    return list(encoded["input_ids"])


def is_as_sampled(tokenizer: Any, prompt: Sequence[Message], answer: Message) -> bool:
    """Whether the template renders a finished conversation as the policy would have written it.

    That is: the very tokens of the prompt that it is asked with, the answer's text, white space around it apart, and
    what ends a turn. Templates that put empty thoughts before an answer, or take thoughts out of it, do otherwise.
    """
    asked = chat_ids(tokenizer, prompt, answer=True)
    whole = chat_ids(tokenizer, [*prompt, answer], answer=False)
    if whole[: len(asked)] != asked:
        return False
    # Both by way of tokens: some tokenizers normalise texts.
    own = tokenizer(answer.content, add_special_tokens=False)["input_ids"]
    text, written = (_decoded(tokenizer, ids).strip() for ids in (own, whole[len(asked) :]))
    behind = written.removeprefix(text).lstrip()
    known = turn_end(tokenizer)
    ends = [tokenizer.eos_token, *map(tokenizer.decode, known.ids), *(stop.strip() for stop in known.texts)]
    return written.startswith(text) and (not behind or any(behind.startswith(end) for end in ends))


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def eos_ids(folder: Path, tokenizer: Any) -> frozenset[int]:
    """All tokens that end a response: the tokenizer's, the chat template's, those of the generation configuration."""
    found = {tokenizer.eos_token_id, *turn_end(tokenizer).ids}
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        stated = json.loads(file.read_text("utf-8")).get("eos_token_id") if file.is_file() else None
        if stated is not None:
            found.update(stated if isinstance(stated, list) else [stated])
            break
    return frozenset(found)


def context_length(folder: Path) -> int | None:
    """How many tokens the model reads, where its configuration says so."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    length = config.get("text_config", config).get("max_position_embeddings")
    return int(length) if length else None


def closing(tokenizer: Any) -> str:
    """What training adds to an answer so that its end is learnt: the end-of-sequence token, for a template that puts no
    token behind the last one.
    """
    return "" if turn_end(tokenizer).closes else str(tokenizer.eos_token)


def release_memory() -> None:
    """Give back what models that nobody refers to any more still hold, on a GPU and on the host."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
    # glibc keeps what a training on a CPU has freed: gigabytes, which the judge beside it may need.
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def put_in_place(part: Path, target: Path) -> None:
    """A folder that is complete takes its name, in the place of what had it, readable as other files are."""
    for file in part.iterdir():
        file.chmod(0o644)  # safetensors writes for the owner alone, and a service may run as somebody else
    sync_all(part)
    if target.exists():
        shutil.rmtree(target)
    part.replace(target)
    sync(target.parent)
