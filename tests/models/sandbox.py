"""A machine of a test's own to fetch models to, with `python -m service.models`; and damage to the files there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

from bench.support.process import free_port
from tests.support.model_sources import Hub, PackageIndex, manifest_entry

HUB_ID: Final = "tiny-org/tiny-llama"
ROOT: Final = Path(__file__).parents[2]


class Sandbox:
    """A user's machine: a cache, a package index, a hub that can be switched off, and a manifest with the model `tiny`.

    `run` and `start` run `python -m service.models` on it.
    """

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
        self.environment["HF_ENDPOINT"] = f"http://127.0.0.1:{free_port()}"

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "service.models", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, cwd=ROOT, env=self.environment, text=True, **pipes)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments)
        out, err = process.communicate()
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def error(self, *arguments: str) -> str:
        """What a run that must fail says on stderr."""
        done = self.run(*arguments)
        assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
        return done.stderr


def damage(path: Path, how: str) -> None:
    """Remove the file (`missing`), cut it in half (`cut off`), or flip one bit near its end (`one bit`).

    In JSON the bit is one of a digit, so that it stays JSON.
    """
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
