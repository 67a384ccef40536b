"""The files of a labelling. Pairs are written one by one: no file is in memory as a whole, Parquet's a part at a time.

scores.jsonl       a line for each response        pairs.jsonl         --format trl
flips.jsonl        given labels turned round       pairs-plain.jsonl   --format plain
stats.json         LabelStats                      pairs.parquet       --format parquet
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from client.data.tables import DataError
from client.labels.pairs import pair_of
from client.labels.reading import LabelData
from client.labels.records import Pair
from client.labels.results import Labelled, flips
from client.runs.resumable import RunError
from client.runtime.extras import needs
from client.runtime.files import replacing, write_whole
from client.runtime.jsonl import Record, line_of

PairFormat: TypeAlias = Literal["trl", "plain", "parquet"]

SCORES_FILE: Final = "scores.jsonl"
FLIPS_FILE: Final = "flips.jsonl"
STATS_FILE: Final = "stats.json"
PAIR_FILES: Final[dict[PairFormat, str]] = {
    "trl": "pairs.jsonl",
    "plain": "pairs-plain.jsonl",
    "parquet": "pairs.parquet",
}
# Rows of Parquet that are in memory at once.
_ROW_GROUP: Final = 1000


def check_formats(formats: Collection[PairFormat], data: LabelData) -> None:
    """Raises DataError or ImportError for data that a format cannot hold, before anything is asked."""
    if "parquet" in formats:
        with needs("hub"):
            import_module("pyarrow")
    conversation = next((one.id for one in data.sets if not isinstance(one.prompt, str)), None)
    if "plain" in formats and conversation is not None:
        raise DataError(f"--format plain has room for one text, and the prompt of {conversation} is a conversation")


def write_outputs(folder: Path, labelled: Labelled, formats: Collection[PairFormat]) -> list[Path]:
    """Write everything but the report; returns the files of pairs.

    Pairs in another format from an earlier run in this folder are renewed too, so that no file contradicts another.
    Raises OSError, and RunError for columns that Parquet cannot hold.
    """
    # Answers come in any order: the finished file is in that of the data.
    _write_lines(folder / SCORES_FILE, (labelled.scores[answer.key] for answer in labelled.data.answers()))
    if labelled.stats.agreement is not None:
        _write_lines(folder / FLIPS_FILE, flips(labelled.data, labelled.scores))
    written = []
    for name, file in PAIR_FILES.items():
        path = folder / file
        if name in formats or path.exists():
            _write_pairs(path, labelled, name)
            written.append(path)
    write_whole(folder / STATS_FILE, labelled.stats.model_dump_json(indent=2) + "\n")
    return written


def _write_pairs(path: Path, labelled: Labelled, name: PairFormat) -> None:
    if name == "parquet":
        _write_parquet(path, labelled)
        return
    with replacing(path) as file:
        for row in pair_rows(labelled, plain=name == "plain"):
            # JSON can spell half a surrogate pair, UTF-8 cannot: it stays an escape.
            file.write(json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace") + b"\n")


def pair_rows(labelled: Labelled, *, plain: bool) -> Iterator[dict[str, Any]]:
    """The pairs in the order of the data, with the data's other columns behind our own."""
    for one in labelled.data.sets:
        for pair in labelled.pairs.get(one.id, ()):
            line = pair_of(one, pair)
            yield {**(_plain(line) if plain else line.model_dump()), **one.columns}


def _plain(pair: Pair) -> dict[str, Any]:
    texts = {side: getattr(pair, side)[-1].content for side in ("prompt", "chosen", "rejected")}
    return {**pair.model_dump(), **texts}


def _write_parquet(path: Path, labelled: Labelled) -> None:
    pa, pq = import_module("pyarrow"), import_module("pyarrow.parquet")
    try:
        schema = None
        for group in _groups(pair_rows(labelled, plain=False)):
            found = pa.Table.from_pylist(group).schema
            schema = found if schema is None else pa.unify_schemas([schema, found], promote_options="permissive")
        with replacing(path) as file, pq.ParquetWriter(file, schema or pa.schema([])) as writer:
            for group in _groups(pair_rows(labelled, plain=False)):
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
    except pa.ArrowException as error:
        raise RunError(
            f"the pairs cannot be written as Parquet ({error}): give --format trl, and the judge is not asked again"
        ) from error


def _groups(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    while group := list(islice(rows, _ROW_GROUP)):
        yield group


def _write_lines(path: Path, lines: Iterable[Record]) -> None:
    with replacing(path) as file:
        for line in lines:
            file.write(line_of(line))
