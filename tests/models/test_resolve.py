"""From a name to the folder of a model's files: folders, known names, converted models. Nothing is downloaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from service.models.manifest import known_models
from service.models.resolve import DEFAULT_MODEL, ModelError, ModelFiles, fingerprint, resolve
from tests.models.sandbox import ROOT, damage

FACTS = ROOT.parent / "shared" / "data" / "model_sources.json"


def test_folder_is_taken_as_it_is(tiny_model: Path) -> None:
    """An existing folder with a config.json is the model."""
    assert resolve(str(tiny_model)) == ModelFiles(tiny_model.name, tiny_model, fingerprint(tiny_model), None)


def test_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    """The error names the folder and what it lacks."""
    with pytest.raises(ModelError, match=r"has no config\.json"):
        resolve(str(tmp_path))


def test_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    """Nothing is fetched."""
    with pytest.raises(ModelError) as caught:
        resolve("gpt-17", cache_dir=tmp_path)

    assert all(name in str(caught.value) for name in known_models())
    assert not list(tmp_path.iterdir())


def test_default_model_is_known() -> None:
    """With its size."""
    assert known_models()[DEFAULT_MODEL].parameters == 1_543_714_304


def test_smallest_model_has_a_warning() -> None:
    """Its judgements mean nothing, and its note says so."""
    assert known_models()["smollm2-135m-instruct"].note == "judges at chance: a wiring check"


@pytest.mark.skipif(not FACTS.exists(), reason="the data folder is not here")
def test_manifest_carries_the_recorded_facts() -> None:
    """Every digest, size and package of the recorded sources is in the manifest."""
    facts = json.loads(FACTS.read_text())["models"]

    known = {name: json.loads(model.model_dump_json()) for name, model in known_models().items()}

    assert known.keys() == facts.keys()
    same = ("hub", "licence", "quantisation", "gguf_bytes", "gguf_sha256")
    for name, fact in facts.items():
        assert {key: known[name][key] for key in same} == {key: fact[key] for key in same}
        parts = [{key: part[key] for key in ("package", "wheel_sha256")} for part in known[name]["parts"]]
        assert parts == fact["parts"]


def test_invalid_manifest_of_ones_own_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the file from JUDGE_KNOWN_MODELS."""
    (tmp_path / "own.json").write_text('{"models": {"mine": {"hub": "me/mine"}}}')
    monkeypatch.setenv("JUDGE_KNOWN_MODELS", str(tmp_path / "own.json"))

    with pytest.raises(ModelError, match=r"own\.json is not a manifest"):
        resolve("mine")


def test_converted_model_is_used_at_once(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A known name is found in the cache, and nothing is printed."""
    files = resolve("smollm2-135m-instruct")

    assert files.path == stored
    assert files.note == "judges at chance: a wiring check"
    assert capsys.readouterr().err == ""


def test_converted_model_given_by_its_folder_keeps_its_note(stored: Path) -> None:
    """A remark about a model does not depend on how it was named."""
    assert resolve(str(stored)).note == "judges at chance: a wiring check"


def test_cache_folder_can_be_given(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`cache_dir` takes precedence over the environment."""
    monkeypatch.setenv("JUDGE_CACHE_DIR", "/nowhere")

    assert resolve("smollm2-135m-instruct", cache_dir=stored.parents[1]).path == stored


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("model.safetensors", "cut off"),
        ("model.safetensors", "one bit"),
        ("config.json", "one bit"),
        ("tokenizer.json", "cut off"),
        ("provenance.json", "cut off"),
    ],
)
def test_damaged_model_given_by_its_folder_is_refused(stored: Path, name: str, how: str) -> None:
    """The error says which file it is and what to do. Its scores would be wrong, or the process would crash."""
    damage(stored / name, how)

    with pytest.raises(ModelError, match=rf"{name}.*(as it was converted|give the model by its name)"):
        resolve(str(stored))


def test_model_that_was_changed_on_purpose_is_used_without_its_provenance(stored: Path) -> None:
    """Without that file it is a folder like any other."""
    damage(stored / "model.safetensors", "one bit")
    (stored / "provenance.json").unlink()

    assert resolve(str(stored)).path == stored


def test_the_resolver_imports_neither_torch_nor_transformers() -> None:
    """The process that resolves a name may have neither."""
    code = "import sys, service.models.resolve; sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)

    assert done.returncode == 0


def test_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in place of the cache folder is a ModelError with its path."""
    (tmp_path / "cache").touch()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")

    with pytest.raises(ModelError, match=str(tmp_path / "cache")):
        resolve("smollm2-135m-instruct", cache_dir=tmp_path / "cache")
