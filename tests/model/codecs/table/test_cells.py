"""What a cell is: dates, numbers and keys in any spelling are recognized, and come back as they were written."""

from __future__ import annotations

import datetime
import json
import re
import uuid
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from anystate.model.codecs.table.cells import canonical
from anystate.model.codecs.table.codec import TableCodec
from anystate.model.codecs.table.column import MISSING
from anystate.model.codecs.table.encoding import EncodingConfig
from anystate.model.codecs.table.schema import Schema, describe, infer, infer_column, warnings_of

R = np.random.default_rng(0)
N = 200
MOMENTS = [datetime.datetime(2019, 12, 28) + datetime.timedelta(seconds=int(s)) for s in R.integers(0, 9 * 10**7, N)]
MONEY = np.round(R.gamma(2.0, 1000.0, N), 2)


def texts(form: str) -> pd.Series:
    """Dates by Python's own strftime; <d> is a day without zero, and so on."""
    single = {"<d>": "day", "<m>": "month", "<H>": "hour"}
    cells = []
    for moment in MOMENTS:
        text = moment.strftime(form)
        for mark, part in single.items():
            text = text.replace(mark, str(getattr(moment, part)))
        cells.append(text.replace("<I>", str((moment.hour + 11) % 12 + 1)))
    return pd.Series(cells)


def swap(text: str) -> str:
    return text.translate(str.maketrans(",.", ".,"))


DATES = {
    "%Y-%m-%dT%H:%M:%SZ": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ",
    "%Y-%m-%d %H:%M:%S.%f": r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}",
    "%Y-%m-%d %H:%M:%S+02:00": r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\+02:00",
    "<m>/<d>/%Y <H>:%M": r"[1-9]\d?/[1-9]\d?/\d{4} (0|[1-9]\d?):\d\d",
    "%m/%d/%Y <I>:%M %p": r"\d\d/\d\d/\d{4} [1-9]\d?:\d\d [AP]M",
    "%d.%m.%Y": r"\d\d\.\d\d\.\d{4}",
    "%d/%m/%Y %H:%M": r"\d\d/\d\d/\d{4} \d\d:\d\d",
    "%d-%m-%Y": r"\d\d-\d\d-\d{4}",
    "%d-%b-%y": r"\d\d-[A-Z][a-z][a-z]-\d\d",
    "<d> %B %Y": r"[1-9]\d? [A-Z][a-z]+ \d{4}",
    "%b <d>, %Y": r"[A-Z][a-z][a-z] [1-9]\d?, \d{4}",
    "%Y%m%d": r"\d{8}",
    "%Y%m%d%H%M%S": r"\d{14}",
    "%H:%M": r"\d\d:\d\d",
    "<I>:%M:%S %p": r"[1-9]\d?:\d\d:\d\d [AP]M",
    "%Y-%m": r"\d{4}-\d\d",
}
NUMBERS = {
    "$": ([f"${v:,.2f}" for v in MONEY], r"\$\d{1,3}(,\d{3})*\.\d\d"),
    "accounts": ([f"({-v:,.2f})" if v < 0 else f"{v:,.2f}" for v in MONEY - 2000], r"\(?\d{1,3}(,\d{3})*\.\d\d\)?"),
    "€": ([swap(f"{v:,.2f} €") for v in MONEY - 2000], r"-?\d{1,3}(\.\d{3})*,\d\d €"),
    "USD": ([f"USD {v:.2f}" for v in MONEY], r"USD \d+\.\d\d"),
    "%": ([f"{v}%" for v in R.integers(0, 101, N)], r"\d+%"),
    "'": ([f"{v:,.2f}".replace(",", "'") for v in MONEY], r"\d{1,3}('\d{3})*\.\d\d"),
    "space": ([f"{v:,.1f}".replace(",", " ").replace(".", ",") for v in MONEY], r"\d{1,3}( \d{3})*,\d"),
    "comma": ([f"{v:.2f}".replace(".", ",") for v in MONEY], r"\d+,\d\d"),
    "kg": ([f"{v:.1f}kg" for v in MONEY], r"\d+\.\dkg"),
    "plus": ([f"{v:+d}" for v in R.integers(-500, 500, N)], r"[+-]\d+"),
    "padded": ([f" {v:.3f} " for v in MONEY], r" \d+\.\d{3} "),
    "aligned": ([f"{v:10.2f}" for v in MONEY], r"(?=.{10}$) *\d+\.\d\d"),
    "shortest": ([repr(float(v)) for v in MONEY], r"\d+\.\d\d?"),
}


def codec_of(table: pd.DataFrame, schema: Schema | None = None, **settings) -> TableCodec:
    """A fitted codec as it comes back from its file; by default all numbers are z."""
    codec = TableCodec.fit(table, schema or infer(table), EncodingConfig(**{"max_discrete_values": 0, **settings}))
    return TableCodec.from_json(json.loads(json.dumps(codec.to_json())))


def table_of(values) -> pd.DataFrame:
    values = pd.Series(values)
    return pd.DataFrame({"it": values, "other": R.choice(["p", "q"], len(values))})


def sampled(codec: TableCodec, n: int = 500) -> pd.Series:
    """Column `it` of rows of random z and tokens."""
    tokens = torch.from_numpy(np.stack([R.integers(0, k, n) for k in codec.states], 1))
    return codec.decode(tokens, torch.randn(n, len(codec.numerical)))["it"]


def exact(values: pd.Series) -> tuple[pd.Series, pd.Series]:
    """The cells, and what is left of them after a codec in which each value is a state."""
    table = table_of(values)
    codec = codec_of(table, max_discrete_values=10**6)
    column = codec.columns["it"]
    if column.is_numerical:
        numbers = column.to_numbers(table["it"])
        return table["it"], column.from_numbers(numbers, np.isnan(numbers))
    return table["it"], codec.decode(*codec.encode(table))["it"]


@pytest.mark.parametrize("form", DATES)
def test_dates_that_are_text_come_back_as_they_were_written(form):
    cells = texts(form)
    column = infer_column("it", cells)
    assert column.kind == "datetime"
    was, back = exact(cells)
    assert back.tolist() == was.tolist()
    made = sampled(codec_of(table_of(cells)))
    assert all(re.fullmatch(DATES[form], text) for text in made)
    assert canonical(column, made).between(canonical(column, cells).min(), canonical(column, cells).max()).all()
    assert made.nunique() > 20


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_are_text_come_back_as_they_were_written(name):
    cells, pattern = NUMBERS[name]
    column = infer_column("it", pd.Series(cells))
    assert column.kind in ("continuous", "integer")
    assert column.warning is None
    was, back = exact(cells)
    assert back.tolist() == was.tolist()
    made = sampled(codec_of(table_of(cells)))
    assert all(re.fullmatch(pattern, text) for text in made)
    assert not set(made) <= set(cells)


def arrow(values, kind: str) -> pd.Series:
    pa = pytest.importorskip("pyarrow", reason="Arrow types need pyarrow")
    kinds = {"decimal": lambda: pa.decimal128(12, 2), "dictionary": lambda: pa.dictionary(pa.int32(), pa.string())}
    kind = kinds[kind]() if kind in kinds else pa.type_for_alias(kind)
    return pd.Series(values).astype(pd.ArrowDtype(kind))


WORDS = pd.Series(R.choice(["x", "y"], N))
DECIMALS = pd.Series([Decimal(f"{v:.2f}") for v in MONEY])
OTHERS = {
    "objects that are floats": lambda: pd.Series(R.standard_normal(N).tolist(), dtype=object),
    "objects that are ints or None": lambda: pd.Series([None, *R.integers(0, 999, N).tolist()], dtype=object),
    "ints and floats": lambda: pd.Series(
        [int(v) if v % 1 == 0 else float(v) for v in R.integers(0, 99, N) / 4], dtype=object
    ),
    "floats and NA": lambda: pd.Series(["NA", *MONEY.tolist()], dtype=object),
    "Decimal": lambda: DECIMALS,
    "date": lambda: pd.Series([m.date() for m in MOMENTS]),
    "datetime": lambda: pd.Series(MOMENTS, dtype=object),
    "time": lambda: pd.Series([m.time() for m in MOMENTS]),
    "timedelta": lambda: pd.Series([datetime.timedelta(minutes=int(v)) for v in MONEY], dtype=object),
    "timedelta64": lambda: pd.Series(pd.to_timedelta(R.integers(0, 10**6, N) * 15, "min")),
    "period": lambda: pd.Series(pd.PeriodIndex(MOMENTS, freq="M")),
    "cut": lambda: pd.Series(pd.cut(MONEY, 4)),
    "interval": lambda: pd.Series(pd.cut(MONEY, 4)).astype("interval[float64, right]"),
    "category of numbers": lambda: pd.Series(pd.Categorical(R.integers(0, 5, N))),
    "sparse": lambda: pd.Series(pd.arrays.SparseArray(np.where(R.random(N) < 0.8, 0, R.integers(0, 99, N)))),
    "Arrow int64": lambda: arrow(R.integers(0, 9999, N), "int64"),
    "Arrow int32 with gaps": lambda: arrow(pd.array([None, *R.integers(0, 9999, N)], dtype="Int64"), "int32"),
    "Arrow string": lambda: arrow(WORDS, "string"),
    "Arrow dictionary": lambda: arrow(arrow(WORDS, "string"), "dictionary"),
    "Arrow timestamp": lambda: arrow(MOMENTS, "timestamp[us]"),
    "Arrow bool": lambda: arrow(R.random(N) < 0.3, "bool"),
    "Arrow decimal": lambda: arrow(DECIMALS, "decimal"),
    "Arrow date": lambda: arrow([m.date() for m in MOMENTS], "date32"),
    "Arrow double": lambda: arrow(MONEY, "double"),
    "zoned": lambda: pd.Series(pd.to_datetime(MOMENTS)).dt.tz_localize("UTC").dt.tz_convert("Asia/Tokyo"),
    "on off": lambda: pd.Series(R.choice(["on", "off"], N)),
    "digits of codes": lambda: pd.Series([f"{v:05d}" for v in R.integers(0, 150, N)]),
    "far dates": lambda: pd.Series(["9999-12-31", "1900-01-01", *texts("%Y-%m-%d")]),
    "dates as integers": lambda: texts("%Y%m%d").astype("int64"),
    "dates as floats": lambda: texts("%Y%m%d").astype("float64").mask(pd.Series(R.random(N) < 0.1)),
    "clock times as integers": lambda: texts("%H%M").astype("int64"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_cells_keep_their_type_and_value(name):
    was, back = exact(OTHERS[name]())
    assert back.dtype == was.dtype
    known = was.notna() & (was.astype(object) != "NA")
    assert back.notna().equals(known)
    assert all(type(a) is type(b) and a == b for a, b in zip(was[known], back[known], strict=True))
    assert sampled(codec_of(table_of(was))).dtype == was.dtype
    schema = infer(table_of(was))
    assert Schema.load(yaml.safe_load(schema.dump())) == schema


DAYS = pd.Series(pd.to_datetime(MOMENTS)).dt.normalize()
GRIDS = {
    "500": (lambda: pd.Series(R.integers(10, 900, N) * 500), lambda v: v % 500 == 0),
    ".99": (lambda: pd.Series(R.integers(1, 400, N) + 0.99), lambda v: np.round(v % 1, 9) == 0.99),
    "0.05": (lambda: pd.Series(R.integers(1, 4000, N) * 0.05).round(2), lambda v: np.isclose(v * 20 % 1, 0, atol=1e-9)),
    "$25": (
        lambda: pd.Series([f"${v * 25:,}" for v in R.integers(1, 400, N)]),
        lambda v: v.str.replace(r"\D", "", regex=True).astype(int) % 25 == 0,
    ),
    "quarter hours": (lambda: pd.Series(pd.to_datetime(MOMENTS)).dt.floor("15min"), lambda v: v.dt.minute % 15 == 0),
    "local midnight": (
        lambda: DAYS.dt.tz_localize("America/New_York"),
        lambda v: (v.dt.hour == 0) & (v.dt.tz.key == "America/New_York" if hasattr(v.dt.tz, "key") else True),
    ),
    "Mondays": (lambda: DAYS - pd.to_timedelta(DAYS.dt.day_of_week, "D"), lambda v: v.dt.day_of_week == 0),
    "first of month": (lambda: DAYS.dt.to_period("M").dt.to_timestamp(), lambda v: v.dt.day == 1),
    "end of month": (lambda: DAYS + pd.offsets.MonthEnd(0), lambda v: v.dt.is_month_end),
    "quarter-hour spans": (
        lambda: pd.Series(pd.to_timedelta(R.integers(0, 999, N) * 15, "min")),
        lambda v: v.dt.total_seconds() % 900 == 0,
    ),
}


@pytest.mark.parametrize("name", GRIDS)
def test_steps_are_kept(name):
    make, holds = GRIDS[name]
    values = make()
    assert holds(values).all()
    made = sampled(codec_of(table_of(values)))
    assert holds(made).all()
    assert made.nunique() > 10


def test_no_step_is_seen_where_there_may_be_none():
    """Ten even numbers may be chance (2⁻⁹); among 60 random integers, a common step has probability 2⁻⁵⁹."""
    assert infer_column("x", pd.Series(R.permutation(500)[:10] * 2)).increment is None
    assert infer_column("x", pd.Series(R.permutation(500)[:40] * 2)).increment == 2
    assert infer_column("x", pd.Series(R.integers(0, 1000, 60))).increment is None


def test_neighbours_among_large_integers_and_nanoseconds_stay_apart():
    big = pd.Series(10**17 + np.array([*range(150), 149, 7 * 10**9]))
    was, back = exact(big)
    assert back.tolist() == was.tolist()
    made = sampled(codec_of(table_of(big)))
    assert made.between(big.min(), big.max()).all()
    unsigned = pd.Series([2**64 - 1 - v for v in [*range(150), 149]], dtype="uint64")
    assert exact(unsigned)[1].tolist() == unsigned.tolist()
    ns = pd.Series(pd.Timestamp("2021-03-01") + pd.to_timedelta(R.integers(0, 10**6, N), "ns"))
    assert exact(ns)[1].tolist() == ns.tolist()


@pytest.mark.parametrize(
    ("make", "pattern"),
    [
        (lambda i, _: f"CUST-{i:05d}", r"CUST-\d{5}"),
        (lambda i, _: f"2024/{i:04d}/A", r"2024/\d{4}/A"),
        (lambda _, r: f"+49{r.integers(10**9, 10**10)}", r"\+49\d{10}"),
        (lambda _, r: str(10**19 + int(r.integers(0, 10**17))), r"\d{20}"),
        (lambda _, r: str(uuid.UUID(bytes=r.bytes(16), version=4)), r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"),
        (lambda _, r: uuid.UUID(bytes=r.bytes(16)).hex.upper(), r"[0-9A-F]{32}"),
        (lambda _, r: "".join(r.choice(list("ABCDEFGHJK23456789"), 6)), r"[A-Z0-9]{6}"),
        (lambda _, r: f"{r.choice(list('AB'))}{r.integers(10**6):06d}-X", r"[A-Z]\d{6}-X"),
        (lambda i, _: f"someone{i}@firm.com", r"it-\d+@example\.com"),
        (lambda i, r: f"note {i} has {r.integers(20)} points", r"it-\d+"),
    ],
)
def test_new_identifiers_are_new_unique_and_in_the_same_spelling(make, pattern):
    r = np.random.default_rng(3)
    known = list(dict.fromkeys(make(i, r) for i in range(400)))
    table = table_of(known)
    codec = codec_of(table)
    assert codec.columns["it"].column.kind == "identifier"
    tokens, z = torch.zeros(3000, 1, dtype=torch.int64), torch.zeros(3000, 0)
    made = codec.decode(tokens, z, seed=5)["it"]
    assert made.is_unique
    assert not set(made) & set(known)
    assert all(re.fullmatch(pattern, text) for text in made)
    assert codec.decode(tokens[:100], z[:100], seed=5, start=2000)["it"].tolist() == made[2000:2100].tolist()


def test_keys_with_gaps_have_gaps():
    keys = pd.Series([f"K{i:04d}" for i in range(300)]).mask(pd.Series(np.arange(300) % 3 == 0), "NULL")
    codec = codec_of(table_of(keys))
    back = codec.decode(*codec.encode(table_of(keys)))["it"]
    assert back.isna().tolist() == (np.arange(300) % 3 == 0).tolist()
    assert back.dropna().is_unique
    assert not set(back.dropna()) & set(keys)
    numbers = pd.Series(R.permutation(10**6)[:300], name="customer_id")
    assert infer_column("customer_id", numbers).kind == infer_column("orderNo", numbers).kind == "identifier"
    assert infer_column("salary", numbers).kind == "integer"


def test_gap_words_and_typing_errors_are_missing_and_said():
    words = pd.Series([f"{v:.1f}" for v in MONEY]).where(pd.Series(R.random(N) > 0.2), "n/a")
    column = infer_column("it", words)
    assert (column.kind, column.missing, column.gaps) == ("continuous", True, ["n/a"])
    assert f"{(words == 'n/a').sum()} of {N} cells are 'n/a' among numbers" in column.warning
    codec = codec_of(table_of(words))
    tokens, _ = codec.encode(table_of(words))
    missing = tokens[:, codec.categorical.index("it")] == codec.columns["it"].state(MISSING)
    assert missing.tolist() == (words == "n/a").tolist()
    typo = pd.Series([f"{v:.1f}" for v in MONEY]).replace({f"{MONEY[7]:.1f}": "12.x"})
    column = infer_column("it", typo)
    assert (column.kind, column.gaps) == ("continuous", ["12.x"])
    assert "1 of 200 cells are no numbers, the first is '12.x'" in column.warning
    with pytest.raises(ValueError, match="'it': 'tall' is not a number"):
        codec.columns["it"].to_numbers(pd.Series(["tall"]))
    dates = pd.Series([*texts("%d.%m.%Y"), "31.02.2020"])
    assert infer_column("it", dates).gaps == ["31.02.2020"]
    many = pd.Series(["?!"] * 20 + typo.tolist())
    assert infer_column("it", many).kind == "categorical"
    assert "199 of 220 cells are numbers, the first other is '?!'" in infer_column("it", many).warning
    grades = pd.Series(["A", "B", "NA", "-"] * 20)
    assert (infer_column("it", grades).kind, infer_column("it", grades).warning) == ("categorical", None)


@pytest.mark.parametrize(
    ("cells", "format_", "words"),
    [
        (["01/02/2020", "03/04/2020"], "%d/%m/%Y", "DD/MM/YYYY from MM/DD/YYYY"),
        (["1/2/2020", "3/4/2020"], "%-m/%-d/%Y", "MM/DD/YYYY from DD/MM/YYYY"),
        (["01/02/2020", "03/14/2020"], "%m/%d/%Y", None),
        (["03-JAN-20", "04-FEB-21"], "%d-%^b-%y", "two digits"),
        (["2020-01-01T10:00:00+01:00", "2020-07-01T10:00:00+02:00"], "%Y-%m-%dT%H:%M:%S%z", "2 offsets from UTC"),
        (["2020-01-01 10:00:00", "2020-01-01 10:00:00.5"], "%Y-%m-%d %H:%M:%S", "several ways"),
    ],
)
def test_what_cannot_be_known_of_dates_is_said(cells, format_, words):
    column = infer_column("it", pd.Series(cells * 10))
    assert (column.kind, column.format) == ("datetime", format_)
    assert column.warning is None if words is None else words in column.warning


def test_integers_are_not_taken_for_dates_or_clock_times():
    """Random integers of 4, 6 and 8 digits: see `digits_format` for the chances, all below 10⁻⁶ a column."""
    for low, high in ((0, 2400), (190_001, 210_000), (19_000_101, 21_001_231), (10**13, 10**14)):
        for _ in range(50):
            assert infer_column("amount", pd.Series(R.integers(low, high, 100))).kind == "integer"
    for name, low, high in (("age", 0, 60), ("hour", 0, 24), ("year", 1990, 2020)):
        assert infer_column(name, pd.Series(R.integers(low, high, N))).kind == "integer"
    said = infer_column("it", texts("%Y%m%d").astype("int64"))
    assert "kind: integer in the schema" in said.warning
    kept = infer(table_of(texts("%Y%m%d").astype("int64")), Schema(columns=[{"name": "it", "kind": "integer"}]))
    assert (kept.columns[0].kind, kept.columns[0].format) == ("integer", None)


@pytest.mark.parametrize(
    "cells",
    [
        ["007", "012", "113"],
        ["+49301234567", "+49301234568"],
        ["12345678901234567890", "12345678901234567891"],
        ["1.2.3", "1.3.0"],
        ["10-20", "20-30"],
        ["1/2", "3/4"],
        ["5 kg", "300 g"],
        ["€5", "£6"],
        ["Q1", "Q2"],
        ["Feb", "Mar"],
    ],
)
def test_codes_and_words_stay_text(cells):
    table = table_of(cells * 15)
    codec = codec_of(table)
    assert codec.columns["it"].column.kind == "categorical"
    assert codec.decode(*codec.encode(table))["it"].tolist() == cells * 15


def test_equal_cells_are_equal_whatever_they_come_from():
    day = datetime.date(2020, 2, 28)
    same = {
        "number": [1.0, np.int64(1), "1", Decimal("1.00"), 1],
        "truth": [True, "True", "true", "yes", np.True_, "TRUE"],
        "category": [2, 2.0, "2", "2.0", Decimal(2)],
        "when": [day, pd.Timestamp(day), "2020-02-28", "2020-02-28 00:00:00", datetime.datetime(2020, 2, 28)],
    }
    kinds = {"number": "continuous", "truth": "boolean", "category": "categorical", "when": "datetime"}
    dtypes = {"number": "float64", "truth": "bool", "category": "int64", "when": "datetime64[us]"}
    for name, cells in same.items():
        schema = Schema(columns=[{"name": name, "kind": kinds[name], "dtype": dtypes[name], "step": "day"}])
        column = schema.columns[0].model_copy(update={} if name == "when" else {"step": None})
        found = [canonical(column, pd.Series([cell, None], dtype=object)) for cell in cells]
        assert len({v[0] for v in found}) == 1
        assert all(v[1] is None or pd.isna(v[1]) for v in found)
    zoned = pd.Series(pd.to_datetime(["2021-01-05", "2021-07-05"])).dt.tz_localize("America/New_York")
    column = infer_column("when", zoned.repeat(20))
    written = pd.Series(zoned.map(str))
    assert canonical(column, written).tolist() == canonical(column, zoned).tolist()


def test_an_edited_schema_with_another_increment_is_refused():
    table = table_of(R.integers(10, 900, N) * 500)
    schema = infer(table)
    schema.columns[0].increment = 1500
    with pytest.raises(ValueError, match="'it' has cells between the steps of the schema: delete its step"):
        codec_of(table, schema)


def test_reasons_and_warnings_are_listed():
    notes = [f"it is {i} or {i + 1}" for i in range(N)]
    schema = infer(pd.DataFrame({"price": NUMBERS["$"][0], "day": ["01/02/2020"] * N, "note": notes}))
    rows = {name: (kind, reason) for name, kind, reason in describe(schema)}
    assert rows["price"] == ("continuous, 2 decimals", f"numbers written like {NUMBERS['$'][0][0]!r}")
    assert rows["day"] == ("constant", "one value in all rows: repeated, not modelled")
    assert [line.split(":")[0] for line in warnings_of(schema)] == ["column 'note'"]
    assert "reason" not in schema.dump()
