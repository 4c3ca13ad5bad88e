"""Documents out of Arrow IPC files, Arrow streams and Parquet, one column of text, batch by batch.

Seam: `arrow_documents(path, column)`. Which of the three it is, the first bytes say (as for gzip in `sources`). IPC files are read through
a memory map; Parquet is decompressed one batch at a time. Needs pyarrow, the extra `data`, imported when it is first used.

Failures: no pyarrow -> an `ImportError` with the extra; a file that is none of the three, is cut short, lacks the column or has one that
is not text, or a row without a value -> one `ValueError` with the file. Empty documents are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning_gemini.datasets.settings import optional

_ROWS = 1024


def pyarrow(module: str = "pyarrow") -> Any:
    return optional(module, "reading Arrow and Parquet files")


def arrow_documents(path: Path, column: str) -> Iterator[str]:
    pa = pyarrow()
    row = 0
    try:
        with ExitStack() as stack:
            for batch in _batches(path, column, stack):
                for text in _texts(batch, column, path).to_pylist():
                    if text is None:
                        raise ValueError(f"{path}: row {row} has no value in column {column!r}: repair or leave out the row")
                    if text:
                        yield text
                    row += 1
    except pa.ArrowException as error:
        raise ValueError(f"{path}: cut short or garbled after row {row}: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 in the {_ROWS} rows after row {row} ({error.reason})") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read after row {row}: {error}") from error


def _batches(path: Path, column: str, stack: ExitStack) -> Iterator[Any]:
    with open(path, "rb") as file:
        magic = file.read(6)
    if magic[:4] == b"PAR1":
        parquet = stack.enter_context(pyarrow("pyarrow.parquet").ParquetFile(path, memory_map=True))
        _require_column(path, column, parquet.schema_arrow.names)
        # Without threads: the pool would be alive in every process forked later.
        yield from parquet.iter_batches(batch_size=_ROWS, columns=[column], use_threads=False)
        return
    if not magic:
        raise ValueError(f"{path} is empty: an Arrow or Parquet file was expected")
    ipc, source = pyarrow("pyarrow.ipc"), stack.enter_context(pyarrow().memory_map(str(path)))
    if magic != b"ARROW1":
        stream = stack.enter_context(ipc.open_stream(source))
        _require_column(path, column, stream.schema.names)
        yield from stream
        return
    file_reader = stack.enter_context(ipc.open_file(source))
    _require_column(path, column, file_reader.schema.names)
    for number in range(file_reader.num_record_batches):
        yield file_reader.get_batch(number)


def _require_column(path: Path, column: str, names: list[str]) -> None:
    if column not in names:
        raise ValueError(f"{path}: no column {column!r}; there are {sorted(names)}: name it with column=")


def _texts(batch: Any, column: str, path: Path) -> Any:
    found, types = batch.column(column), pyarrow("pyarrow.types")
    kind = found.type.value_type if types.is_dictionary(found.type) else found.type
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise ValueError(f"{path}: column {column!r} is {found.type}, not text: name another one with column=")
    return found
