"""Merging: the result says what base and adapter say together, loads everywhere, and is uploaded only when asked."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from peft import LoraConfig, LoraModel, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import GenerationConfig, LlamaForCausalLM

from service.engine.contract import ScoreItem
from service.engine.torch.engine import TorchEngine
from tests.support.tiny import CHAT_TEMPLATE
from tests.support.training import toy_preferences, toy_settings, with_nan
from trainer.errors import ModelError
from trainer.merge import main
from trainer.policy.models import load_model, quiet_libraries, resolve_model
from trainer.policy.tokenizers import load_tokenizer
from trainer.run.model_files import TensorFiles
from trainer.tuning.dpo import train_dpo
from trainer.tuning.merging import merge
from trainer.tuning.preferences import Split
from trainer.tuning.rounding import kept_update, merge_and_measure
from trainer.tuning.stochastic import round_to_bfloat16

IDS = torch.arange(3, 43)[None]


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes the tiny model a good deal."""
    folder = tmp_path_factory.mktemp("trained")
    train_dpo(tiny_model, Split(toy_preferences(16), []), folder, toy_settings())
    return folder / "adapter"


def logits(model: Any) -> Any:
    """The model's logits for IDS."""
    with torch.inference_mode():
        return model.eval()(input_ids=IDS).logits


def logits_of(model: Path) -> Any:
    """The logits of a model's folder."""
    return logits(load_model(model, torch.float32))


def logits_together(base: Path, adapter: Path) -> Any:
    """The logits of base and adapter, unmerged."""
    with quiet_libraries():
        return logits(PeftModel.from_pretrained(load_model(base, torch.float32), str(adapter)))


@pytest.fixture(scope="module")
def expected(tiny_model: Path, adapter: Path) -> torch.Tensor:
    """The logits of base and adapter together."""
    return logits_together(tiny_model, adapter)


def test_the_merged_model_is_base_and_adapter(
    tiny_model: Path, adapter: Path, expected: torch.Tensor, tmp_path: Path
) -> None:
    """In fp32 the logits agree to rounding, and differ from the base's."""
    merged = merge(adapter, tmp_path / "merged", dtype="float32")

    assert torch.allclose(logits_of(merged), expected, atol=1e-4)
    assert not torch.allclose(logits_of(tiny_model), expected, atol=0.1)


def test_bf16_rounds_once(adapter: Path, expected: torch.Tensor, tmp_path: Path) -> None:
    """Saved in bf16 by default, the logits differ only by the rounding of the weights."""
    merged = merge(adapter, tmp_path / "merged")

    assert {tensor.dtype for tensor in load_file(merged / "model.safetensors").values()} == {torch.bfloat16}
    difference = logits_of(merged) - expected
    assert difference.square().mean().sqrt() < 0.02 * expected.std()


def test_tied_embeddings_stay_tied(adapter: Path, tmp_path: Path) -> None:
    """The output layer is not saved a second time, and shares the embeddings after loading."""
    merged = merge(adapter, tmp_path / "merged")
    model = load_model(merged, torch.float32)

    assert "lm_head.weight" not in load_file(merged / "model.safetensors")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_the_folder_is_a_complete_model(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    """Tokenizer, chat template and generation settings are the base's."""
    merged = merge(adapter, tmp_path / "merged")

    tokenizers = [load_tokenizer(folder) for folder in (tiny_model, merged)]
    generation = [GenerationConfig.from_pretrained(folder).to_diff_dict() for folder in (tiny_model, merged)]
    assert tokenizers[1].chat_template == CHAT_TEMPLATE
    assert tokenizers[0]("def add(2) <|im_end|>") == tokenizers[1]("def add(2) <|im_end|>")
    assert generation[0] == generation[1]


def test_the_service_loads_it(adapter: Path, expected: torch.Tensor, tmp_path: Path) -> None:
    """The judge's engine gives the log-probabilities of base and adapter."""
    engine = TorchEngine.load(merge(adapter, tmp_path / "merged", dtype="float32"), dtype="float32", device="cpu")

    answer = engine.run([ScoreItem(tuple(IDS[0].tolist()), (5, 6))])[0]

    assert answer.logprobs == pytest.approx(expected[0, -1].log_softmax(0)[[5, 6]].tolist(), abs=1e-4)


def test_the_card_has_the_runs_numbers(adapter: Path, tmp_path: Path) -> None:
    """README.md shows the given numbers under their titles."""
    merged = merge(adapter, tmp_path / "merged", numbers={"evaluation": {"win_rate": {"mean": 0.58251}}})

    card = (merged / "README.md").read_text("utf-8")
    assert "## evaluation" in card
    assert "| win_rate.mean | 0.58251 |" in card


def test_a_failed_merge_leaves_what_was_there(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If writing fails, the folder of that name is still the old one."""
    before = (merge(adapter, tmp_path / "merged") / "model.safetensors").read_bytes()
    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", lambda *_, **__: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        merge(adapter, tmp_path / "merged", dtype="float32")

    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == before


def test_adapters_and_models_are_not_confused(adapter: Path, tmp_path: Path) -> None:
    """An adapter instead of a model, and a folder that is neither, are errors that say what to do."""
    (tmp_path / "empty").mkdir()

    with pytest.raises(ModelError, match=r"python -m trainer\.merge"):
        resolve_model(str(adapter))
    with pytest.raises(ModelError, match=r"no adapter_config\.json"):
        merge(tmp_path / "empty", tmp_path / "merged")


def test_a_fully_trained_model_is_rounded(tiny_model: Path, tmp_path: Path) -> None:
    """A whole model instead of an adapter stays the same, in the dtype asked for."""
    merged = merge(tiny_model, tmp_path / "merged")

    difference = logits_of(merged) - logits_of(tiny_model)
    assert json.loads((merged / "config.json").read_text())["dtype"] == "bfloat16"
    assert 0 < difference.abs().max() < 0.5


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path]]:
    """What would have been uploaded: the tests cannot reach the hub."""
    uploaded: list[tuple[str, Path]] = []

    def upload(_: object, *, repo_id: str, folder_path: Path, **__: object) -> None:
        uploaded.append((repo_id, folder_path))

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda _, repo, **__: f"https://hub/{repo}")
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    return uploaded


def test_nothing_is_pushed_unless_asked(
    adapter: Path, tmp_path: Path, uploads: list[tuple[str, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    """The command prints the new folder, and uploads only to the repository that a flag names."""
    codes = [main([str(adapter), "--output", str(tmp_path / "plain")])]
    assert uploads == []

    codes.append(main([str(adapter), "--output", str(tmp_path / "pushed"), "--push-to-hub", "me/better"]))

    assert codes == [0, 0]
    assert uploads == [("me/better", tmp_path / "pushed")]
    assert capsys.readouterr().out.splitlines()[0] == str(tmp_path / "plain")


def test_an_existing_folder_is_not_overwritten_unasked(adapter: Path, tmp_path: Path) -> None:
    """A second merge into the same folder needs --overwrite."""
    command = [str(adapter), "--output", str(tmp_path / "merged")]

    assert [main(command), main(command), main([*command, "--overwrite"])] == [0, 2, 0]


def made_adapter(base: Path, folder: Path, **config: Any) -> Path:
    """A random adapter of this kind, saved by PEFT itself."""
    torch.manual_seed(0)
    known = {"r": 8, "lora_alpha": 16, "init_lora_weights": False, "target_modules": ["q_proj", "v_proj"]}
    with quiet_libraries():
        tuned: Any = get_peft_model(load_model(base, torch.float32), LoraConfig(**{**known, **config}))
    for name, weights in tuned.named_parameters():
        if "modules_to_save" in name:
            weights.data += 0.1 * torch.randn_like(weights)
    tuned.peft_config["default"].base_model_name_or_path = str(base)
    with quiet_libraries(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that embeddings are saved too
        tuned.save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`")
@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"use_rslora": True},
        {"use_dora": True},
        {"bias": "all"},
        {"alpha_pattern": {"q_proj": 64}, "rank_pattern": {"v_proj": 2}},
    ],
)
def test_every_kind_of_adapter_is_merged_exactly(config: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    """Tied layers that an adapter changes apart become two; the logits are those of base and adapter."""
    adapter = made_adapter(tiny_model, tmp_path / "adapter", **config)
    together = logits_together(tiny_model, adapter)

    merged = logits_of(merge(adapter, tmp_path / "merged", dtype="float32"))

    assert torch.allclose(merged, together, atol=1e-3)
    assert (together - logits_of(tiny_model)).abs().max() > 0.1


def test_tokens_that_were_added_in_training_are_merged(tiny_model: Path, tmp_path: Path) -> None:
    """An adapter may bring embeddings with more rows than the base's."""
    model = load_model(tiny_model, torch.float32)
    rows = model.get_input_embeddings().weight.shape[0] + 8
    model.resize_token_embeddings(rows, mean_resizing=False)
    known: Any = {"r": 4, "init_lora_weights": False, "target_modules": ["q_proj"]}
    with quiet_libraries():
        tuned: Any = get_peft_model(model, LoraConfig(**known))
    tuned.peft_config["default"].base_model_name_or_path = str(tiny_model)
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)

    merged = load_model(merge(tmp_path / "adapter", tmp_path / "merged", dtype="float32"), torch.float32)

    assert merged.get_input_embeddings().weight.shape[0] == rows
    assert torch.allclose(logits(merged), logits(tuned), atol=1e-3)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_untied_layers_stay_untied_in_bf16(tiny_model: Path, tmp_path: Path) -> None:
    """An adapted output layer is saved beside the embeddings, which stay the base's."""
    merged = merge(made_adapter(tiny_model, tmp_path / "adapter", target_modules=["lm_head"]), tmp_path / "merged")

    model, base = load_model(merged, torch.float32), load_model(tiny_model, torch.bfloat16)
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(model.get_input_embeddings().weight.bfloat16(), base.get_input_embeddings().weight)
    assert not torch.equal(model.get_output_embeddings().weight, model.get_input_embeddings().weight)


def test_logits_that_are_off_leave_no_model(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever PEFT does to the weights, a sum with other logits is an error, and is not kept."""
    monkeypatch.setattr(LoraModel, "merge_and_unload", lambda self, *_, **__: self.unload())

    assert main([str(adapter), "--output", str(tmp_path / "merged")]) == 1
    assert "the logits are off by" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_nan_is_not_merged(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An adapter with NaN is named, with exit code 1, and nothing is left."""
    name = next(name for name in load_file(adapter / "adapter_model.safetensors") if "lora_B" in name)
    broken = with_nan(adapter, tmp_path / "broken", name)

    assert main([str(broken), "--output", str(tmp_path / "merged")]) == 1
    assert "NaN" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_a_quantised_base_is_refused(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    """Nothing can be added to quantised weights; the message names --base."""
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": quantised}))

    with pytest.raises(ModelError, match="--base"):
        merge(adapter, tmp_path / "merged", base=str(base))


@pytest.mark.filterwarnings("ignore:.*lora_bias")
@pytest.mark.parametrize(
    "config", [{"base_model_name_or_path": None}, {"peft_type": "NO_SUCH_KIND"}, {"lora_bias": True}]
)
def test_an_adapter_that_cannot_be_merged_is_refused(config: dict[str, Any], adapter: Path, tmp_path: Path) -> None:
    """With an error instead of a traceback."""
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))

    with pytest.raises(ModelError, match="adapter"):
        merge(folder, tmp_path / "merged")


def test_an_update_lost_to_rounding_is_reported(tiny_model: Path, tmp_path: Path) -> None:
    """The warning and merge.json say that the merged model has its base's weights."""
    base = merge(tiny_model, tmp_path / "base")
    train_dpo(base, Split(toy_preferences(4), []), tmp_path, toy_settings(lr=1e-9, epochs=1.0))

    warning = merge_and_measure(tmp_path / "adapter", tmp_path / "merged", str(base), "bfloat16")

    assert warning is not None
    assert "nothing of the training is left" in warning
    assert json.loads((tmp_path / "merge.json").read_text())["changed"] is False


def test_bf16_keeps_updates_far_below_its_step(tiny_model: Path, tmp_path: Path) -> None:
    """An update of a twentieth of a weight's step is kept in expectation, and embeddings are the base's."""
    base = merge(tiny_model, tmp_path / "base")
    adapter = made_adapter(base, tmp_path / "adapter", lora_alpha=0.02)

    merged = merge(adapter, tmp_path / "merged")

    kept = kept_update(base, adapter, merged)
    assert kept == pytest.approx(1, abs=0.25)
    with TensorFiles(base) as before, TensorFiles(merged) as after:
        changed = [name for name in before.names if not torch.equal(before[name], after[name])]
    assert changed
    assert all("q_proj" in name or "v_proj" in name for name in changed)


def test_rounding_by_chance_is_unbiased_and_always_the_same() -> None:
    """A number between two neighbours becomes either, its own value on average; numbers on the grid stay."""
    between = torch.full((100_000,), 1 + 2**-7 * 0.3)
    exact = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16()

    rounded = round_to_bfloat16(between, "a")

    assert set(rounded.tolist()) == {1.0, 1 + 2**-7}
    assert rounded.float().mean() == pytest.approx(float(between[0]), abs=1e-4)
    assert torch.equal(round_to_bfloat16(-between, "a"), -rounded)
    assert torch.equal(rounded, round_to_bfloat16(between, "a"))
    assert not torch.equal(rounded, round_to_bfloat16(between, "b"))
    assert torch.equal(round_to_bfloat16(exact.float(), "a"), exact)


@pytest.mark.parametrize("config", [{"use_rslora": True}, {"alpha_pattern": {"q_proj": 64, "v_proj": 64}}, {}])
def test_what_is_kept_is_measured_in_the_adapters_own_scale(
    config: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    """In fp32 all of the update is kept, whatever its scale."""
    adapter = made_adapter(tiny_model, tmp_path / "adapter", **config)
    merged = merge(adapter, tmp_path / "merged", dtype="float32")

    assert kept_update(tiny_model, adapter, merged) == pytest.approx(1, abs=1e-3)
