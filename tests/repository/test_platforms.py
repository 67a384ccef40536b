"""What Python lacks on Windows is not needed to import a program; docs/platforms.md says what runs there."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from client.runtime.memory import allocator
from tests.support.fleet import ROOT

# The libraries are imported as they are here; then our modules once more, on a Python without POSIX.
PROGRAM = """
import importlib, os, pkgutil, signal, sys

import client, service

names = ["client", "service"]
for package in (client, service):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not module.name.endswith("__main__") and "vllm" not in module.name and "verl_" not in module.name:
            names.append(module.name)
for name in names:
    importlib.import_module(name)
for name in [name for name in sys.modules if name.partition(".")[0] in ("client", "service")]:
    del sys.modules[name]
sys.platform = "win32"
for name in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules[name] = None
for name in ("SIGPIPE", "SIGKILL", "SIGALRM", "SIGHUP", "SIGUSR1", "alarm"):
    delattr(signal, name)
for name in ("fork", "register_at_fork", "sched_getaffinity", "killpg", "getuid", "geteuid"):
    delattr(os, name)
for name in names:
    importlib.import_module(name)

from client.runtime import stderr

stderr.install()
print(len(names))
"""


def test_modules_are_imported_without_posix() -> None:
    """Every module of client and service, but for those of vLLM and verl, which are not installed here."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100


def test_a_c_library_without_a_function_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """glibc has mallopt; other libraries may not, and Windows gives no handle of the process."""

    def refuse(name: str | None) -> None:
        raise TypeError(f"expected a name, not {name}")

    known, unknown = allocator("mallopt"), allocator("no_such_function")
    monkeypatch.setattr(ctypes, "CDLL", refuse)

    assert known is not None
    assert unknown is None
    assert allocator("mallopt") is None
