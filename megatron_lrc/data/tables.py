"""Parquet files as JSON lines, a line per row.

What a value is follows from its column's type, never from how Python prints it. Text is a string, or bytes (BINARY,
as Spark and Impala may write text) that have to be UTF-8. Types that hold no text are refused before any row is
read, also within messages.

Of the other columns only those are read that filters ask for. A row that does not meet the filters still gives a line,
so that lines have the numbers of rows, but one with those columns alone: the workers, who count it, see the same as of
JSON lines, and its text is never made into one.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_lrc.config import ConfigError
from megatron_lrc.data.filters import Filter
from megatron_lrc.data.json_kinds import kind_named
from megatron_lrc.data.packings import import_for

# Types by the name that pyarrow prints: not every supported version of it has a predicate for each.
_TEXT = {"string", "large_string", "string_view", "binary", "large_binary", "binary_view", "extension<arrow.json>"}
_INTEGERS = {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
_FLOATS = {"halffloat", "float", "double"}
_OTHER_JSON = {"bool", "null", *_FLOATS}
#: What of them a filter's value of each kind (`Filter.kind`) compares with.
_COMPARABLE = {"string": _TEXT, "number": _INTEGERS | _FLOATS, "bool": {"bool"}}
#: Few: a file of a kilobyte can have the same 10 MB in every row.
_ROWS_AT_ONCE = 8


def check_table(path: str, keys: list[str], filters: Sequence[Filter] = ()) -> None:
    """ConfigError if a column is missing, holds neither text, nor token ids, nor chats, or nothing that its filter
    compares. Reads no row."""
    with _opened(path, keys, filters):
        pass


def row_lines(path: str, keys: list[str], filters: Sequence[Filter] = ()) -> Iterator[tuple[float, list[bytes]]]:
    """The rows' values under `keys` and the filters' columns as JSON lines, a line per row; of rows that do not meet
    the filters these columns alone. Some at a time, each time with the share of the file read so far.

    A row with bytes that are not UTF-8 gives those bytes, for whoever parses lines to find. ConfigError as of
    `check_table`, or if the file cannot be read.
    """
    columns = list(dict.fromkeys([*keys, *(condition.column for condition in filters)]))
    with _opened(path, keys, filters) as table:
        rows_read, num_rows = 0, max(table.metadata.num_rows, 1)
        for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns):
            rows_read += batch.num_rows
            yield rows_read / num_rows, _filtered_lines(batch, filters) if filters else _lines_of(batch)


@contextlib.contextmanager
def _opened(path: str, keys: list[str], filters: Sequence[Filter]) -> Iterator[Any]:
    """A pyarrow.parquet.ParquetFile whose columns have been checked."""
    parquet = import_for(path, "pyarrow.parquet")
    arrow_error: Any = import_for(path, "pyarrow").ArrowException
    try:
        with parquet.ParquetFile(path) as table:
            _check_columns(path, keys, table.schema_arrow)
            for condition in filters:
                _check_filter(path, condition, table.schema_arrow)
            yield table
    except (arrow_error, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} cannot be read as a parquet file ({reason}).") from error


def _check_columns(path: str, keys: list[str], schema: Any) -> None:
    for key in keys:
        if key not in schema.names:
            raise ConfigError(
                f"{path} has no column {key!r}; its columns are {', '.join(schema.names)}. "
                "Name the columns with --json-keys."
            )
        _refuse_doubled(path, key, schema)
        for name, arrow_type in _unreadable(key, schema.field(key).type):
            field = "" if name == key else f", field {name!r},"
            raise ConfigError(
                f"{path}: the column {key!r}{field} is of type {arrow_type}, which is not text. Strings are expected, "
                "binary or large_binary (of any length, not of a fixed one) that holds UTF-8, or lists of token ids or "
                "messages. Cast it or drop it, or name another column with --json-keys."
            )


def _check_filter(path: str, condition: Filter, schema: Any) -> None:
    if condition.column not in schema.names:
        raise ConfigError(
            f"{path} has no column {condition.column!r}, which --filter '{condition.text}' asks for; its columns are "
            f"{', '.join(schema.names)}."
        )
    _refuse_doubled(path, condition.column, schema)
    arrow_type = schema.field(condition.column).type
    stored = str(getattr(arrow_type, "value_type", arrow_type) if hasattr(arrow_type, "index_type") else arrow_type)
    if stored not in {*_COMPARABLE[condition.kind], "null"}:
        raise ConfigError(
            f"{path}: the column {condition.column!r} is of type {arrow_type}, which --filter '{condition.text}' "
            f"cannot compare with {kind_named(condition.values[0])}. Quote a string that looks like a number; cast "
            "other types."
        )


def _refuse_doubled(path: str, column: str, schema: Any) -> None:
    """A table may have several columns, and a struct several fields, of one name; JSON lines cannot."""
    if (count := schema.names.count(column)) > 1:
        raise ConfigError(
            f"{path} has {count} columns of the name {column!r}, so which one is meant cannot be told. Write the table "
            "again with names that differ."
        )


def _unreadable(name: str, arrow_type: Any) -> Iterator[tuple[str, Any]]:
    """The types that make a whole column unfit, by the name of the field: it is text, or a list of ids or messages."""
    if hasattr(arrow_type, "index_type"):  # a dictionary: values that are often the same, stored once
        yield from _unreadable(name, arrow_type.value_type)
    elif hasattr(arrow_type, "value_field"):  # a list of whichever kind
        if str(arrow_type.value_type).startswith("struct<"):
            yield from _unreadable_in_message(name, arrow_type.value_type)
        elif str(arrow_type.value_type) not in _INTEGERS:
            yield name, arrow_type
    elif str(arrow_type) not in _TEXT:
        yield name, arrow_type


def _unreadable_in_message(name: str, arrow_type: Any) -> Iterator[tuple[str, Any]]:
    """Within messages whatever JSON has is fine: which of it becomes text is for the chat template to say."""
    if hasattr(arrow_type, "index_type") or hasattr(arrow_type, "value_field"):
        yield from _unreadable_in_message(name, arrow_type.value_type)
    elif str(arrow_type).startswith("struct<"):
        names = [field.name for field in arrow_type]
        if len(set(names)) < len(names):
            yield name, f"{arrow_type} with several fields of one name"
        for field in arrow_type:
            yield from _unreadable_in_message(f"{name}.{field.name}", field.type)
    elif str(arrow_type) not in _TEXT | _INTEGERS | _OTHER_JSON:
        yield name, arrow_type


def _filtered_lines(batch: Any, filters: Sequence[Filter]) -> list[bytes]:
    import pyarrow

    columns = batch.select(list(dict.fromkeys(condition.column for condition in filters)))
    try:
        left_out = [_line_if_left_out(row, filters) for row in columns.to_pylist()]
    except UnicodeDecodeError:  # in some row: one by one
        left_out = [_line_of_one_if_left_out(columns.slice(number, 1), filters) for number in range(batch.num_rows)]
    kept = iter(_lines_of(batch.filter(pyarrow.array([line is None for line in left_out]))))
    return [next(kept) if line is None else line for line in left_out]


def _line_if_left_out(row: dict[str, Any], filters: Sequence[Filter]) -> bytes | None:
    values = _decoded(row)
    return None if all(condition.holds(values) for condition in filters) else _as_line(values)


def _line_of_one_if_left_out(batch_of_one: Any, filters: Sequence[Filter]) -> bytes | None:
    try:
        return _line_if_left_out(batch_of_one.to_pylist()[0], filters)
    except UnicodeDecodeError as error:
        return error.object


def _lines_of(batch: Any) -> list[bytes]:
    try:
        return [_as_line(row) for row in batch.to_pylist()]
    except UnicodeDecodeError:  # in some row: one by one
        return [_as_line_or_bytes(batch.slice(number, 1)) for number in range(batch.num_rows)]


def _as_line_or_bytes(batch_of_one: Any) -> bytes:
    try:
        return _as_line(batch_of_one.to_pylist()[0])
    except UnicodeDecodeError as error:
        return error.object


def _as_line(row: dict[str, Any]) -> bytes:
    return json.dumps(_decoded(row)).encode()


def _decoded(value: Any) -> Any:
    """The value with all bytes in it as text."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, dict):
        return {name: _decoded(item) for name, item in value.items()}
    if isinstance(value, list) and value and not isinstance(value[0], int):
        return [_decoded(item) for item in value]
    return value
