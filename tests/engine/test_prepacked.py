"""Linear layers whose weights are laid out once compute what they computed before."""

from __future__ import annotations

import pytest
import torch
import transformers

from service.engine.torch.prepacked import prepack
from tests.engine.test_decoding import SIZES


def tied_model(dtype: torch.dtype) -> transformers.LlamaForCausalLM:
    """A model whose output layer is its embeddings; some of its linear layers have a bias."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True)
    return transformers.LlamaForCausalLM(config).eval().to(dtype)


@pytest.mark.parametrize("rows", [1, 3, 64, 200])
def test_logits_stay_the_same(rows: int) -> None:
    """To bf16's rounding, with more and fewer rows than were said; the embeddings stay as they are."""
    model = tied_model(torch.bfloat16)
    ids = torch.arange(3, 3 + rows).remainder(125)[:, None]
    with torch.inference_mode():
        expected = model(ids).logits
        embedded = model.get_input_embeddings()(ids)
        replaced = prepack(model, 64)
        logits = model(ids).logits

    torch.testing.assert_close(logits, expected, rtol=2e-2, atol=2e-2)
    assert torch.equal(model.get_input_embeddings()(ids), embedded)
    # Seven in each of two blocks, and the output layer; none where the processor has no bf16 products.
    assert replaced == (15 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else 0)


def test_other_layers_are_left_alone() -> None:
    """Weights in fp32, and subclasses of linear layers, which may compute something else."""

    class Doubled(torch.nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(inputs)

    assert prepack(tied_model(torch.float32), 64) == 0
    assert prepack(torch.nn.Sequential(Doubled(4, 4).to(torch.bfloat16)), 64) == 0
