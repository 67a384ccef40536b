"""A GGUF file turned into a folder that transformers (and vLLM) load: safetensors in bf16, tokenizer, configuration.

Runs as a process of its own (`python -m service.models.conversion`), so that its memory goes back when it is done and
the process that asked for it need not import torch. transformers reads the file; what it loses is put right here.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# Two roundings of one matrix differ by a few percent; two matrices by about the square root of two.
SAME_MATRIX = 0.25
_ROWS_COMPARED = 2048


class ConversionError(Exception):
    """The file cannot be converted, or the result is not the model it should be."""


def convert(gguf: Path, folder: Path, *, parameters: int | None = None) -> int:
    """Write the model that `gguf` holds into the empty folder `folder`; the number of its parameters.

    Raises ConversionError if that number is not `parameters`, where given.
    """
    tokenizer = load_tokenizer(gguf)
    model = load_model(gguf)
    tie_output_matrix(model)
    count = int(sum(weights.numel() for weights in model.parameters()))
    if parameters is not None and count != parameters:
        raise ConversionError(f"the converted model has {count:,} parameters instead of {parameters:,}")
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return count


def load_tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    """The file's tokenizer, with what transformers does not read from a GGUF file put back."""
    from gguf import GGUFReader
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConversionError(f"{type(tokenizer).__name__} is not a tokenizer that can be saved as tokenizer.json")
    scheme = GGUFReader(gguf).get_field("tokenizer.ggml.pre")
    restore_scheme(tokenizer, scheme.contents() if scheme is not None else None)
    return tokenizer


def restore_scheme(tokenizer: PreTrainedTokenizerFast, scheme: str | None) -> None:
    """Put back the steps before the merges that a GGUF file only names.

    `smollm` splits every digit off before anything else, which matters for spaces before digits. `qwen2` brings text
    into Unicode's composed form (NFC).
    """
    from tokenizers import normalizers, pre_tokenizers

    backend = tokenizer.backend_tokenizer
    if scheme == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    elif scheme == "qwen2":
        backend.normalizer = normalizers.NFC()


def load_model(gguf: Path) -> PreTrainedModel:
    """The file's weights, unpacked to bf16."""
    from transformers import AutoModelForCausalLM, GgufConfig

    # Without dequantize=True a model that came from a GGUF file refuses to be saved.
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    return model


def tie_output_matrix(model: PreTrainedModel) -> bool:
    """Make the output matrix and the embeddings one again where the file holds two roundings of one matrix.

    A quantised file of a model with tied weights often stores the matrix twice, the output's copy more exactly: that
    one is kept for both. Matrices that really differ are left alone. True if they were tied.
    """
    head = _matrix(model.get_output_embeddings())  # type: ignore[no-untyped-call]
    embeddings = _matrix(model.get_input_embeddings())
    if head is embeddings or not _same_matrix(head, embeddings):
        return False
    with torch.no_grad():
        embeddings.copy_(head)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return True


def _matrix(layer: torch.nn.Module) -> torch.nn.Parameter:
    weight = layer.weight
    if not isinstance(weight, torch.nn.Parameter):
        raise ConversionError(f"{type(layer).__name__} holds no matrix")
    return weight


def _same_matrix(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape:
        return False
    step = max(1, one.shape[0] // _ROWS_COMPARED)
    first, second = one[::step].float(), other[::step].float()
    return bool((first - second).norm() < SAME_MATRIX * first.norm())


def main(argv: list[str] | None = None) -> int:
    """Convert one file; the last line of stderr says what went wrong."""
    parser = argparse.ArgumentParser(prog="python -m service.models.conversion", description=__doc__.partition("\n")[0])
    parser.add_argument("gguf", type=Path, help="the GGUF file")
    parser.add_argument("folder", type=Path, help="the folder to write, which must not exist or be empty")
    parser.add_argument("--parameters", type=int, help="the number of parameters that the model must have")
    arguments = parser.parse_args(argv)
    try:
        convert(arguments.gguf, arguments.folder, parameters=arguments.parameters)
    except Exception as exc:  # whatever transformers raises is one line for the process that asked
        sys.stderr.write(f"\n{type(exc).__name__}: {' '.join(str(exc).split())}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
