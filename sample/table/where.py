"""Conditions of table columns from the texts of a command line."""

from __future__ import annotations

from ...model.codecs.table.codec import TableCodec


def parse_where(codec: TableCodec, pairs: list[tuple[str, str]]) -> dict[str, str | tuple | None]:
    """{column: condition} of (column, text) pairs, as `TableSynthesizer.sample` takes them.

    The text LOW..HIGH of a numerical column is a range, either end of which may be missing; an empty text is an empty
    cell; any other text is a value.

    Raises:
        ValueError: a column that occurs twice.
    """
    conditions = {}
    for name, text in pairs:
        if name in conditions:
            raise ValueError(f"--where gives column {name!r} twice")
        numerical = name in codec.columns and codec.columns[name].is_numerical
        if text == "":
            conditions[name] = None
        elif numerical and ".." in text:
            low, _, high = text.partition("..")
            conditions[name] = (low or None, high or None)
        else:
            conditions[name] = text
    return conditions
