"""Converts a GGUF file to a folder that transformers and vLLM load: safetensors in bf16, tokenizer, configuration.

Runs as its own process (`python -m service.models.conversion`), so that its memory is freed and the process that
started it need not import torch. transformers reads the file; what it drops on the way is restored here.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# As a relative distance: two roundings of one matrix differ by a few percent, unrelated matrices by about sqrt(2).
SAME_MATRIX = 0.25
_ROWS_COMPARED = 2048


class ConversionError(Exception):
    """The file cannot be converted, or the result is not the model it should be."""


def convert(gguf: Path, folder: Path, *, parameters: int | None = None) -> int:
    """Write the model in `gguf` to the empty folder `folder`. Returns its number of parameters.

    Raises ConversionError if `parameters` is given and differs from that.
    """
    tokenizer = gguf_tokenizer(gguf)
    model = gguf_model(gguf)
    tie_output_matrix(model)
    count = int(sum(weights.numel() for weights in model.parameters()))
    if parameters is not None and count != parameters:
        raise ConversionError(f"the converted model has {count:,} parameters instead of {parameters:,}")
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return count


def gguf_tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    """The file's tokenizer, including the steps that transformers does not read from a GGUF file."""
    from gguf import GGUFReader
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConversionError(f"{type(tokenizer).__name__} is not a tokenizer that can be saved as tokenizer.json")
    scheme = GGUFReader(gguf).get_field("tokenizer.ggml.pre")
    restore_scheme(tokenizer, scheme.contents() if scheme is not None else None)
    return tokenizer


def restore_scheme(tokenizer: PreTrainedTokenizerFast, scheme: str | None) -> None:
    """Restore the steps before the merges, of which a GGUF file stores only the name.

    `smollm` splits off every digit first, which changes how spaces before digits are merged. `qwen2` normalizes text
    to NFC.
    """
    from tokenizers import normalizers, pre_tokenizers

    backend = tokenizer.backend_tokenizer
    if scheme == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    elif scheme == "qwen2":
        backend.normalizer = normalizers.NFC()


def gguf_model(gguf: Path) -> PreTrainedModel:
    """The file's model, dequantized to bf16."""
    from transformers import AutoModelForCausalLM, GgufConfig

    # Without dequantize=True transformers refuses to save the model.
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    return model


def tie_output_matrix(model: PreTrainedModel) -> bool:
    """Tie the output matrix and the embeddings again if the file holds two roundings of one matrix.

    A quantized file of a model with tied weights often stores the matrix twice, with more bits for the output's copy,
    which is kept for both. Matrices that really differ are left alone. True if they were tied.
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
        raise ConversionError(f"{type(layer).__name__} has no weight matrix")
    return weight


def _same_matrix(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape:
        return False
    step = max(1, one.shape[0] // _ROWS_COMPARED)
    first, second = one[::step].float(), other[::step].float()
    return bool((first - second).norm() < SAME_MATRIX * first.norm())


def main(argv: list[str] | None = None) -> int:
    """Convert one file. If that fails, the last line of stderr says why."""
    parser = argparse.ArgumentParser(prog="python -m service.models.conversion", description=__doc__.partition("\n")[0])
    parser.add_argument("gguf", type=Path, help="the GGUF file")
    parser.add_argument("folder", type=Path, help="the folder to write: new or empty")
    parser.add_argument("--parameters", type=int, help="how many parameters the model must have")
    arguments = parser.parse_args(argv)
    try:
        convert(arguments.gguf, arguments.folder, parameters=arguments.parameters)
    except Exception as exc:  # any: the parent process shows the reason as one line
        sys.stderr.write(f"\n{type(exc).__name__}: {' '.join(str(exc).split())}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
