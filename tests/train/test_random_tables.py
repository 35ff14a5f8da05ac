"""Random tables of mixed, dirty columns: what a user may do with one works, and cells come back as they were written.

`make test` tries a few, `make test-long` 300. A failure prints the kinds of the columns, the rows and the seed.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
import uuid
import warnings
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from anystate.bench.table.report import report
from anystate.model.codecs.table.files import read_table, write_table
from anystate.train.synthesizer import TableSynthesizer

TINY = ["network.width=8", "network.depth=1", "network.heads=2", "train.batch=16", "train.steps=3", "sample.steps=2"]
TINY += ["train.save_every=3", "compile=never"]
Cells = Callable[[np.random.Generator, int], object]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of column.

    cells: of a column of n rows. pattern: what every synthetic cell looks like as text; "" for no check. has_order:
    there are ranges of cells. is_key: cells never repeat, and synthetic ones are new.
    """

    cells: Cells
    pattern: str = ""
    has_order: bool = False
    is_key: bool = False


def days(form: str) -> Cells:
    return lambda r, n: list((moments(r, n, 900, "D")).dt.strftime(form))


def moments(r: np.random.Generator, n: int, span: int, unit: str) -> pd.Series:
    return pd.Series(pd.Timestamp("2019-03-01") + pd.to_timedelta(r.integers(0, span, n), unit=unit))


def numbers(r: np.random.Generator, n: int) -> np.ndarray:
    return np.round(r.gamma(2.0, 700.0, n), 2)


def written(form: str, swap: bool = False) -> Cells:
    """Numbers as text; swap: 1,234.5 becomes 1.234,5."""
    table = str.maketrans(",.", ".,") if swap else {}
    return lambda r, n: [form.format(v).translate(table) for v in numbers(r, n)]


def with_few(cells: Cells, other: object, share: float = 0.15) -> Cells:
    """Some cells are `other`, one at least."""

    def mixed(r: np.random.Generator, n: int) -> pd.Series:
        column = pd.Series(cells(r, n)).astype(object)
        column[r.random(n) < share] = other
        column[int(r.integers(n))] = other
        return column

    return mixed


def one_of(*values: object) -> Cells:
    return lambda r, n: [values[i] for i in r.integers(len(values), size=n)]


KINDS = {
    "float": Kind(lambda r, n: r.standard_normal(n), has_order=True),
    "decimals": Kind(numbers, r"\d+(\.\d{1,2})?|nan", has_order=True),
    "float32": Kind(lambda r, n: r.standard_normal(n).astype("float32"), has_order=True),
    "integer": Kind(lambda r, n: r.integers(-50, 3000, n), has_order=True),
    "small integer": Kind(lambda r, n: r.integers(0, 5, n).astype("int8"), has_order=True),
    "large integer": Kind(lambda r, n: 10**17 + 7 * r.integers(0, 15, n), has_order=True),
    "multiple of 500": Kind(lambda r, n: 500 * r.integers(2, 90, n), r"\d+[05]00|[05]00", has_order=True),
    "prices": Kind(lambda r, n: r.integers(1, 90, n) + 0.99, r"\d+\.99"),
    "nullable": Kind(lambda r, n: pd.Series(r.integers(0, 99, n)).astype("Int64").mask(r.random(n) < 0.2)),
    "gaps": Kind(lambda r, n: np.where(r.random(n) < 0.2, np.nan, r.standard_normal(n))),
    "infinite": Kind(lambda r, n: np.where(r.random(n) < 0.1, np.inf, r.standard_normal(n))),
    "object numbers": Kind(lambda r, n: pd.Series(list(r.standard_normal(n)), dtype=object)),
    "object with None": Kind(with_few(lambda r, n: list(r.standard_normal(n)), None)),
    "decimal": Kind(lambda r, n: [Decimal(f"{v:.2f}") for v in numbers(r, n)], r"\d+\.\d\d"),
    "dollars": Kind(written("${:,.2f}"), r"\$\d{1,3}(,\d{3})*\.\d\d", has_order=True),
    "euros": Kind(written("{:,.2f} €", swap=True), r"\d{1,3}(\.\d{3})*,\d\d €"),
    "percent": Kind(lambda r, n: [f"{v:.1f}%" for v in r.uniform(0, 100, n)], r"\d+\.\d%"),
    "decimal comma": Kind(lambda r, n: [f"{v:.2f}".replace(".", ",") for v in numbers(r, n)], r"\d+,\d\d"),
    "gap words": Kind(with_few(lambda r, n: [str(v) for v in r.integers(100, 999, n)], "NA"), r"\d{3}|NA|nan|None|"),
    "ISO": Kind(days("%Y-%m-%d"), r"\d{4}-\d\d-\d\d", has_order=True),
    "US": Kind(days("%m/%d/%Y"), r"\d\d/\d\d/\d{4}"),
    "German": Kind(days("%d.%m.%Y"), r"\d\d\.\d\d\.\d{4}"),
    "Zulu": Kind(
        lambda r, n: list(moments(r, n, 10**6, "s").dt.strftime("%Y-%m-%dT%H:%M:%SZ")), r"\d{4}-\d\d-\d\dT[\d:]{8}Z"
    ),
    "clock": Kind(lambda r, n: list(moments(r, n, 1440, "min").dt.strftime("%H:%M")), r"[0-2]\d:[0-5]\d"),
    "datetime": Kind(lambda r, n: moments(r, n, 10**6, "s"), has_order=True),
    "quarter hours": Kind(lambda r, n: moments(r, n, 5000, "h").dt.floor("6h"), has_order=True),
    "zone": Kind(lambda r, n: moments(r, n, 900, "D").dt.tz_localize("Europe/Berlin")),
    "date": Kind(lambda r, n: pd.Series(list(moments(r, n, 900, "D").dt.date), dtype=object)),
    "timedelta": Kind(lambda r, n: pd.Series(pd.to_timedelta(r.integers(1, 900, n), unit="min"))),
    "period": Kind(lambda r, n: pd.Series(pd.PeriodIndex(moments(r, n, 900, "D"), freq="M"))),
    "intervals": Kind(lambda r, n: pd.Series(pd.cut(r.standard_normal(n), 4))),
    "category": Kind(
        lambda r, n: pd.Series(pd.Categorical(one_of("low", "high")(r, n), ["low", "mid", "high"], ordered=True))
    ),
    "word": Kind(one_of("north", "south", 'it\'s, "east"'), 'north|south|it\'s, "east"'),
    "code": Kind(lambda r, n: [f"{v:05d}" for v in r.integers(0, 30, n)], r"\d{5}"),
    "phone": Kind(lambda r, n: [f"+49{v}" for v in r.integers(10**9, 10**9 + 20, n)], r"\+49\d{10}"),
    "mixed": Kind(one_of("a", 1, 2.5)),
    "bool": Kind(lambda r, n: r.random(n) < 0.4, "True|False"),
    "nullable bool": Kind(lambda r, n: pd.Series(r.random(n) < 0.4).astype("boolean").mask(r.random(n) < 0.2)),
    "yes or no": Kind(one_of("Yes", "No"), "Yes|No"),
    "key": Kind(lambda r, n: [f"CUST-{i:05d}" for i in r.permutation(n)], r"CUST-\d{5}", is_key=True),
    "uuid": Kind(
        lambda r, n: [str(uuid.UUID(bytes=r.bytes(16), version=4)) for _ in range(n)], r"[-0-9a-f]{36}", is_key=True
    ),
    "long key": Kind(lambda r, n: [str(10**19 + int(i)) for i in r.permutation(n)], r"\d{20}", is_key=True),
    "counter": Kind(lambda r, n: r.permutation(n) + 1000, is_key=True),
    "constant": Kind(lambda r, n: ["here"] * n, "here"),
    "empty": Kind(lambda r, n: np.full(n, np.nan)),
    "arrow text": Kind(lambda r, n: pd.Series(one_of("p", "q")(r, n), dtype="string[pyarrow]"), "p|q"),
    "arrow integer": Kind(lambda r, n: pd.Series(r.integers(0, 400, n), dtype="int64[pyarrow]"), has_order=True),
    "arrow time": Kind(lambda r, n: moments(r, n, 10**6, "s").astype("timestamp[ns][pyarrow]")),
}
tables = st.tuples(
    st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=7, unique=True),
    st.integers(20, 70),
    st.integers(0, 2**31),
)


def try_tables(examples: int, number: int) -> None:
    """Try so many random tables; each `number` has its own."""

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(tables)
    def try_table(drawn):
        check_table(*drawn)

    try_table()


def test_some_tables():
    try_tables(8, 0)


@pytest.mark.long
@pytest.mark.parametrize("number", range(1, 7))
def test_300_tables(number):
    try_tables(50, number)


def check_table(names: list[str], rows: int, seed: int) -> None:
    """Fit, sample, conditions, imputation, report, files, save and load of one table."""
    r = np.random.default_rng(seed)
    table = pd.DataFrame({name: pd.Series(KINDS[name].cells(r, rows)) for name in [*names, "score"] if name in KINDS})
    table["score"] = r.standard_normal(rows)  # something to model
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        model = TableSynthesizer(overrides=TINY, device="cpu", seed=seed % 1000).fit(table)
        synthetic = model.sample(40)
        table = table.mask(table == "NA")  # words for gaps are gaps from here on
        check_cells(table, synthetic)
        check_conditions(model, table, r)
        check_imputation(model, table, r)
        check_files(model, synthetic, Path(folder))
        model.save(Path(folder) / "run")
        loaded = TableSynthesizer.load(Path(folder) / "run", device="cpu")
        pd.testing.assert_frame_equal(loaded.sample(40), synthetic)
        if seed % 4 == 0:
            scores = report(table, synthetic, out=Path(folder) / "report.html", fast=True)
            assert 0.0 <= scores["shape"] <= 1.0


def check_cells(table: pd.DataFrame, synthetic: pd.DataFrame) -> None:
    """Columns, dtypes, spellings and ranges are those of the table; keys are new."""
    assert list(synthetic.columns) == list(table.columns)
    for name, kind in KINDS.items():
        if name not in table:
            continue
        cells = synthetic[name]
        assert cells.dtype == table[name].dtype, name
        odd = [c for c in cells if kind.pattern and not re.fullmatch(kind.pattern, str(c))]
        assert not odd, (name, odd[0])
        if kind.is_key:
            assert cells.is_unique, name
            assert not set(cells) & set(table[name]), name
        if kind.has_order and pd.api.types.is_numeric_dtype(cells) and name != "infinite":
            assert cells.between(table[name].min(), table[name].max()).all(), name
        if table[name].notna().all():
            assert cells.notna().all(), name


def check_conditions(model: TableSynthesizer, table: pd.DataFrame, r: np.random.Generator) -> None:
    """A value, a set of values, and a range of some column hold in every row."""
    usable = [name for name in table if name in KINDS and not KINDS[name].is_key and name not in ("constant", "empty")]
    if not usable:
        return
    name = usable[int(r.integers(len(usable)))]
    present = table[name].dropna()
    value = present.iloc[int(r.integers(len(present)))]
    given = model.sample(7, where={name: value})[name]
    assert all(str(c) == str(value) or c == value for c in given), (name, value, list(given))
    others = list(present.drop_duplicates().iloc[:2])
    within = model.sample(7, where={name: others})[name]
    assert all(str(c) in set(map(str, others)) for c in within), (name, others, list(within))
    if KINDS[name].has_order and not isinstance(value, str):
        low, high = sorted([value, present.iloc[int(r.integers(len(present)))]])
        ranged = model.sample(7, where={name: (low, high)})[name]
        assert all(low <= c <= high for c in ranged), (name, low, high, list(ranged))


def check_imputation(model: TableSynthesizer, table: pd.DataFrame, r: np.random.Generator) -> None:
    """Known cells stay, and no cell of a column that is modelled stays empty."""
    holes = table.mask(pd.DataFrame(r.random(table.shape) < 0.3, columns=table.columns))
    filled = model.impute(holes)
    known = holes.notna()
    for name in table:
        before, after = holes[name][known[name]], filled[name][known[name]]
        assert [str(v) for v in after] == [str(v) for v in before], name
        if table[name].notna().any() and not KINDS.get(name, Kind(numbers)).is_key:
            assert filled[name].notna().all(), name


def check_files(model: TableSynthesizer, synthetic: pd.DataFrame, folder: Path) -> None:
    """A CSV holds the cells; it is read again and can be given to the model."""
    write_table(synthetic, folder / "synthetic.csv")
    again = read_table(folder / "synthetic.csv")
    assert list(again.columns) == [str(name) for name in synthetic.columns]
    assert len(again) == len(synthetic)
    model.impute(again.iloc[:5])
