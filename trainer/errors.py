"""The trainer's errors. Each message says what is wrong and what to do about it.

    ValueError
    ├── InputError        a flag or a file given to a command cannot be used
    └── ModelError        a model or tokenizer cannot be loaded or used
    RuntimeError
    └── StageError        the run stops here; repeating the command resumes it
        ├── RecordError   a file of the run cannot be read or written
        └── …             NoPairsError, TrainingError, MergeError, next to the code that raises them

`trainer.programs.run_program` turns the first kind into exit code 2 and the second into 1.
"""

from __future__ import annotations


class InputError(ValueError):
    """A flag or a file given to a command cannot be used."""


class ModelError(ValueError):
    """A model or tokenizer cannot be loaded or used."""


class StageError(RuntimeError):
    """The run cannot go on. Everything written so far stays, and a rerun resumes from it."""


class RecordError(StageError):
    """A file of the run cannot be read or written; the message names the file and, where it applies, the line."""
