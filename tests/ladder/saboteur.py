"""A C++ compiler for tests that puts a saboteur between the service and its compiled kernel.

The kernel's exports are compiled under other names, once; the saboteur exports their own names, and calls them.
"""

from __future__ import annotations

import sys
from pathlib import Path

HIDDEN_SIZE = 64  # of tests/support/tiny.py

# The exported functions' names and arguments; `out` is [lasts][HIDDEN_SIZE] and [number][vocabulary].
_SABOTEUR = """
#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <unistd.h>
const int64_t kHidden = %(hidden)d;
const float kNearlyOne = 1.000001f;
void scale(float *at, int64_t count, float factor) { while (count--) *at++ *= factor; }
void add(float *row, float number) { for (int64_t i = 0; i < kHidden; i++) row[i] += number; }
int recurse(int depth) {
  volatile char frame[4096];
  frame[depth %% 4096] = (char)depth;
  return recurse(depth + 1) + frame[7];
}
extern "C" {
int64_t real_prefill(const void *model, int64_t terms, const float *embedded, int64_t tokens, const void *segments,
                     int64_t count, const int64_t *last, int64_t lasts, int64_t threads, float *out);
int64_t real_output_layer(const void *weight, int64_t vocabulary, int64_t depth, const void *states, int64_t number,
                          float *out, int64_t first, int64_t count);
int64_t prefill(const void *model, int64_t terms, const float *embedded, int64_t tokens, const void *segments,
                int64_t count, const int64_t *last, int64_t lasts, int64_t threads, float *out) {
  %(before)s
  real_prefill(model, terms, embedded, tokens, segments, count, last, lasts, threads, out);
  %(after)s
  return 0;
}
int64_t output_layer(const void *weight, int64_t vocabulary, int64_t depth, const void *states, int64_t number,
                     float *out, int64_t first, int64_t count) {
  real_output_layer(weight, vocabulary, depth, states, number, out, first, count);
  %(after_output)s
  return 0;
}
}
"""
_RENAMED = ("prefill", "output_layer")

# `c++ flags… source -o library`; the last line may spoil what was `made`.
_COMPILER = """#!{python}
import os, subprocess, sys
from pathlib import Path
*flags, source, _, library = sys.argv[1:]
real = Path({real!r}) / ("amx.o" if "-mamx-tile" in flags else "avx512.o")
def compile(*arguments):
    subprocess.run(["c++", *flags, *arguments], check=True)
if not real.exists():
    made = real.with_suffix(f".{{os.getpid()}}.o")
    compile(*{renamed!r}, "-c", source, "-o", made)
    made.replace(real)
compile({saboteur!r}, real, "-o", library)
made, write = Path(library).read_bytes(), Path(library).write_bytes
def instead(code):
    other = Path(library).with_suffix(".cpp")
    other.write_text(code)
    compile(other, "-o", library)
{last}
"""


def compiler(
    folder: Path,
    real: Path,
    *,
    before: str = "",
    after: str = "",
    after_output: str = "",
    last: str = "",
) -> Path:
    """Write a program into `folder`, to be named as CXX; the kernel's object files are kept in the folder `real`.

    The C++ in `before`, `after` and `after_output` runs before and after the prefill and after the output layer. `last`
    is Python that may `write` other bytes than were `made`, or a library of other code `instead`.
    """
    saboteur, program = folder / "saboteur.cpp", folder / "saboteur-c++"
    places = {"before": before, "after": after, "after_output": after_output}
    saboteur.write_text(_SABOTEUR % {**places, "hidden": HIDDEN_SIZE}, encoding="utf-8")
    renamed = [f"-D{name}=real_{name}" for name in _RENAMED]
    text = _COMPILER.format(python=sys.executable, real=str(real), renamed=renamed, saboteur=str(saboteur), last=last)
    return write_program(program, text)


def write_program(file: Path, text: str) -> Path:
    """Write an executable script."""
    file.write_text(text, encoding="utf-8")
    file.chmod(0o755)
    return file
