"""The engine that runs a transformers model with torch in this process: prefill only, one head row per prompt.

    items ──> micro-batches, padded on the right ──> the model's own forward ──> its output layer, replaced:
              last real position of each row only, in fp32 ──> log-softmax over the whole vocabulary in fp32

A causal model's real tokens never see what stands on their right, so no attention mask is passed and attention takes
its fast causal path. The model's own forward stays in charge of what comes after the output layer (soft-capping,
logit scales). A probe at load compares both ways; where they disagree the model's own layer and no padding are used.
"""

from __future__ import annotations

import gc
import inspect
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from service.engine.contract import EngineItem, LabelLogprobs

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)

DType = Literal["auto", "bfloat16", "float16", "float32"]

# Padded tokens per forward. On a CPU 512 to 2048 are alike; 4096 loses a fifth (SmolLM2, time of one core), as
# does one item at a time, which pays for the output layer each time.
_MICRO_TOKENS: Final = {"cpu": 1024}
_MICRO_TOKENS_ELSEWHERE: Final = 16_384
_BATCH_TOKENS: Final = {"cpu": 4096}
_BATCH_TOKENS_ELSEWHERE: Final = 32_768
# Rows per forward: bounds the logits, rows x vocabulary in fp32 (39 MB for 64 rows of 152k).
_MAX_ROWS: Final = 64
# A row shorter than this share of its micro-batch's longest goes to the next one: bounds the padding.
_MIN_FILL: Final = 0.75
# Floats of output-layer weights held in fp32 at a time: 4 MB stays in a CPU's cache, four times as fast as 64 MB.
_HEAD_CHUNK: Final = {"cpu": 1 << 20}
_HEAD_CHUNK_ELSEWHERE: Final = 1 << 26
# For models that state no limit (recurrent ones).
_DEFAULT_MAX_TOKENS: Final = 8192
_PROBE_TOKENS: Final = 12
# Share of the logits' spread by which two ways of computing them may differ.
_PROBE_TOLERANCE: Final = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


class EngineLoadError(RuntimeError):
    """The folder cannot be loaded as a judge; the message says why and what to do."""


class TorchEngine:
    """A causal language model in this process. See `Engine` for the contract; `load` makes one.

    A log-probability that is not finite (fp16 overflow, broken weights) is returned as it is: the caller checks each
    item, so that one such item does not fail its neighbours.
    """

    name = "torch"

    def __init__(self, model: Any, *, max_tokens: int, batch_tokens: int, micro_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.batch_tokens = batch_tokens
        self.micro_tokens = micro_tokens
        self.dtype = str(model.dtype).removeprefix("torch.")
        self._model = model  # Any: what transformers says of its own types is not enough for strict checks
        self._vocabulary: int = model.get_input_embeddings().num_embeddings
        self._head: _LastTokenHead | None = None
        self._length_limit = _longrope_threshold(model.config)
        self._install_head()

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        dtype: DType = "auto",
        device: str = "auto",
        max_tokens: int | None = None,
        batch_tokens: int | None = None,
        threads: int | None = None,
    ) -> TorchEngine:
        """Load the model in `folder`; nothing is fetched.

        dtype `auto` is bfloat16 where the hardware multiplies it natively, else float32; device `auto` is cuda, mps or
        cpu, the first there is. `max_tokens` lowers the model's own limit. `threads` sets torch's CPU threads for the
        whole process. Raises EngineLoadError.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("highest")  # no TF32: fp32 has to mean fp32
        where = _choose_device(device)
        what = _choose_dtype(dtype, where)
        model = _load_model(folder, what, where)
        return cls(
            model,
            max_tokens=_choose_max_tokens(model.config, max_tokens),
            batch_tokens=batch_tokens or _BATCH_TOKENS.get(where.type, _BATCH_TOKENS_ELSEWHERE),
            micro_tokens=_MICRO_TOKENS.get(where.type, _MICRO_TOKENS_ELSEWHERE),
        )

    def label_logprobs(self, items: Sequence[EngineItem]) -> list[LabelLogprobs]:
        """One answer per item, in order; any number of items and tokens.

        Raises ValueError for an item outside the contract, before anything is computed.
        """
        for item in items:
            self._check(item)
        found: dict[int, LabelLogprobs] = {}
        for rows in self._micro_batches([len(item.token_ids) for item in items]):
            batch = [items[row] for row in rows]
            found.update(zip(rows, _read_labels(self._last_logits(batch), batch), strict=True))
        return [found[index] for index in range(len(items))]

    def close(self) -> None:
        """Free the model; the engine cannot be used afterwards."""
        self._model = self._head = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _check(self, item: EngineItem) -> None:
        """Ids out of range would abort the whole CUDA context, not just this call."""
        length = len(item.token_ids)
        if not 1 <= length <= self.max_tokens:
            raise ValueError(f"an item has {length} tokens; this engine reads 1 to {self.max_tokens}")
        if not item.label_ids:
            raise ValueError("an item has no label ids")
        low = min(min(item.token_ids), *item.label_ids)
        high = max(max(item.token_ids), *item.label_ids)
        if low < 0 or high >= self._vocabulary:
            raise ValueError(f"a token id is outside the model's vocabulary of {self._vocabulary}")

    def _micro_batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Indices of `lengths`, longest first, in groups of similar length that fit the padded-token budget."""
        group: list[int] = []
        for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            if group and not self._fits(len(group), lengths[group[0]], lengths[index]):
                yield group
                group = []
            group.append(index)
        if group:
            yield group

    def _fits(self, rows: int, longest: int, length: int) -> bool:
        limit = self._length_limit
        return (
            self._head is not None
            and rows < _MAX_ROWS
            and (rows + 1) * longest <= self.micro_tokens
            and length >= _MIN_FILL * longest
            and (limit is None or (longest > limit) == (length > limit))
        )

    @torch.inference_mode()
    def _last_logits(self, items: Sequence[EngineItem]) -> Tensor:
        """Next-token logits after each item, [items, vocabulary], in fp32."""
        if self._model is None:
            raise RuntimeError("the engine is closed")
        lengths = [len(item.token_ids) for item in items]
        ids = torch.zeros(len(items), max(lengths), dtype=torch.long)
        for row, item in enumerate(items):
            ids[row, : lengths[row]] = torch.tensor(list(item.token_ids))
        ids = ids.to(self._model.device)
        if self._head is None:
            return _own_logits(self._model, ids)
        self._head.last = torch.tensor(lengths, device=ids.device) - 1
        return cast(Tensor, self._model(input_ids=ids, use_cache=False).logits)[:, 0].float()

    def _install_head(self) -> None:
        """Put the fp32 last-position layer in place where it gives what the model gives by itself, padding included."""
        model = self._model
        output = model.get_output_embeddings()
        probe = EngineItem([(37 * i + 11) % self._vocabulary for i in range(min(_PROBE_TOKENS, self.max_tokens))], (0,))
        # The second item has twice the length where the limit allows, so that the first is padded.
        longer = EngineItem([*probe.token_ids, *probe.token_ids][: self.max_tokens], (0,))
        own = self._last_logits([probe])[0]
        self._vocabulary = min(self._vocabulary, len(own))
        if not bool(torch.isfinite(own).all()):
            raise EngineLoadError(f"the model gives values that are not finite in {self.dtype}; use another dtype")
        if type(output) is nn.Linear:
            self._head = _LastTokenHead(output)
            model.set_output_embeddings(self._head)
            if _agree(own, self._last_logits([probe, longer]), model.dtype):
                return
            self._head = None
            model.set_output_embeddings(output)
        logger.warning("the fp32 output layer does not fit %s: using the model's own, unbatched", type(model).__name__)


class _LastTokenHead(nn.Module):
    """An output layer computed in fp32, and only at position `last[row]` of each row.

    [rows, tokens, width] -> [rows, 1, vocabulary]. 16-bit weights are cast chunk by chunk: memory stays bounded.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.last = torch.zeros(1, dtype=torch.long)
        floats = _HEAD_CHUNK.get(linear.weight.device.type, _HEAD_CHUNK_ELSEWHERE)
        self._chunk = max(1, floats // linear.in_features)

    def forward(self, hidden: Tensor) -> Tensor:
        rows = torch.arange(len(hidden), device=hidden.device)
        last = hidden[rows, self.last].float()
        bias = None if self.bias is None else self.bias.float()
        if self.weight.dtype == torch.float32:
            return functional.linear(last, self.weight, bias)[:, None]
        logits = torch.cat([last @ part.float().T for part in torch.split(self.weight, self._chunk)], dim=1)
        return (logits if bias is None else logits + bias)[:, None]


def _own_logits(model: Any, ids: Tensor) -> Tensor:
    """The model's own logits at the last position of unpadded rows, [rows, vocabulary], cast to fp32."""
    keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    return cast(Tensor, model(input_ids=ids, use_cache=False, **keep).logits)[:, -1].float()


def _read_labels(logits: Tensor, items: Sequence[EngineItem]) -> list[LabelLogprobs]:
    """Log-probability of each item's labels, from [items, vocabulary] logits in fp32."""
    total = torch.logsumexp(logits, dim=1).tolist()
    argmax = logits.argmax(dim=1).tolist()
    answers = []
    for row, item in enumerate(items):
        values = logits[row, list(item.label_ids)].tolist()
        answers.append(LabelLogprobs(tuple(value - total[row] for value in values), argmax[row]))
    return answers


def _agree(own: Tensor, ours: Tensor, dtype: torch.dtype) -> bool:
    """Whether the first row of `ours` is `own`, but for the rounding of `dtype`."""
    if ours.shape[-1] != own.shape[-1]:
        return False
    difference = (ours[0] - own).square().mean().sqrt()
    return bool(difference <= _PROBE_TOLERANCE[dtype] * own.std())


def _choose_device(device: str) -> torch.device:
    if device != "auto":
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _choose_dtype(dtype: DType, device: torch.device) -> torch.dtype:
    if dtype != "auto":
        return cast(torch.dtype, getattr(torch, dtype))
    return torch.bfloat16 if _multiplies_bfloat16(device) else torch.float32


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the hardware has bfloat16 products; where they are emulated fp32 is faster and exact."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return any(able.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))
    return False


def _choose_max_tokens(config: PreTrainedConfig, asked: int | None) -> int:
    own = getattr(config.get_text_config(), "max_position_embeddings", None)
    if asked is None:
        return int(own or _DEFAULT_MAX_TOKENS)
    if asked < 1 or (own is not None and asked > own):
        raise EngineLoadError(f"max_tokens is {asked}; the model reads 1 to {own} tokens")
    return asked


def _longrope_threshold(config: PreTrainedConfig) -> int | None:
    """The padded length over which a LongRoPE model reads *all* rows of a batch with its other frequencies."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    limits = [part["original_max_position_embeddings"] for part in parts if part.get("rope_type") == "longrope"]
    return min(limits, default=None)


def _load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The folder's causal model in evaluation mode on `device`, every weight of it read from the folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise EngineLoadError(f"{folder} holds no model that transformers can read: {error}") from error
    _require_causal(config)
    _require_memory(folder, dtype, device)
    try:
        auto: Any = AutoModelForCausalLM
        model, info = auto.from_pretrained(folder, dtype=dtype, local_files_only=True, output_loading_info=True)
        model = model.eval().to(device)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise EngineLoadError(f"not enough memory for the model on {device}: take a smaller one") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise EngineLoadError(f"the model in {folder} cannot be loaded: {error}") from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise EngineLoadError(f"{folder} lacks weights of the model ({missing}, …): they would be random numbers")
    return model


def _require_causal(config: PreTrainedConfig) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    kinds = ("CausalLM", "LMHeadModel", "ConditionalGeneration")
    stated = config.architectures or []
    fits = not stated or any(kind in name for name in stated for kind in kinds)
    if not fits or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        name = ", ".join(stated) or config.model_type
        raise EngineLoadError(f"{name} is not a causal language model (…ForCausalLM); a judge needs one")


def _require_memory(folder: Path, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse what cannot fit a Linux host's free memory: the kernel would kill the process without a word."""
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return
    free = next(int(line.split()[1]) * 1024 for line in meminfo.read_text().splitlines() if "MemAvailable" in line)
    need = _weight_count(folder) * dtype.itemsize
    if need > free:
        raise EngineLoadError(
            f"the weights take {need / 2**30:.1f} GiB in {dtype} and {free / 2**30:.1f} GiB are free: "
            "take a smaller model or bfloat16"
        )


def _weight_count(folder: Path) -> int:
    """Numbers in the folder's safetensors files, from their headers alone (0 where there are none)."""
    from safetensors import safe_open

    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as tensors:
            shapes = [tensors.get_slice(key).get_shape() for key in tensors.keys()]  # noqa: SIM118 - not a dict
        count += sum(torch.Size(shape).numel() for shape in shapes)
    return count
