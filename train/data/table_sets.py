"""The six tables of the paper from UCI: download, check, split as the literature does, write like `shared/data`.

Nothing is unpacked to disk: the wanted members are read out of the archive. What is checked:

- adult, beijing, magic and shoppers: a digest of the finished rows, known in advance (ROWS).
- default and news: no copy was at hand to take a digest of, so the first download is trusted, its digests are printed
  and written to `checksums.json`, and later downloads into the same folder must agree with them.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import json
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
import yaml

from ...model.storage import atomic_write
from .packing.download import download

UCI = "https://archive.ics.uci.edu/static/public/"
LARGEST = 512 << 20  # bytes that a member of an archive may unpack to
ADULT = (
    "age workclass fnlwgt education education.num marital.status occupation relationship race sex capital.gain "
    "capital.loss hours.per.week native.country income"
)
MAGIC = "Length Width Size Conc Conc1 Asym M3Long M3Trans Alpha Dist class"


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a set lies and how its official preprocessing reads it. Columns not named categorical are numbers."""

    title: str
    path: str
    member: str
    task: str
    target: str
    categorical: tuple[str, ...]
    rows: tuple[int, int]
    test_member: str | None = None
    columns: tuple[str, ...] | None = None


SETS = {
    "adult": Source(
        "Adult (Census Income), Barry Becker and Ronny Kohavi (1996)",
        "2/adult.zip",
        "adult.data",
        "binclass",
        "income",
        ("workclass", "education", "marital.status", "occupation", "relationship", "race", "sex", "native.country"),
        (32561, 16281),
        "adult.test",
        tuple(ADULT.split()),
    ),
    "default": Source(
        "Default of Credit Card Clients, I-Cheng Yeh (2009)",
        "350/default+of+credit+card+clients.zip",
        "default of credit card clients.xls",
        "binclass",
        "default payment next month",
        ("SEX", "EDUCATION", "MARRIAGE", "PAY_0", "PAY_2", "PAY_3", "PAY_4", "PAY_5", "PAY_6"),
        (27000, 3000),
    ),
    "shoppers": Source(
        "Online Shoppers Purchasing Intention Dataset, C. Okan Sakar and Yomi Kastro (2018)",
        "468/online+shoppers+purchasing+intention+dataset.zip",
        "online_shoppers_intention.csv",
        "binclass",
        "Revenue",
        ("Month", "OperatingSystems", "Browser", "Region", "TrafficType", "VisitorType", "Weekend"),
        (11097, 1233),
    ),
    "magic": Source(
        "MAGIC Gamma Telescope, R. Bock (2004)",
        "159/magic+gamma+telescope.zip",
        "magic04.data",
        "binclass",
        "class",
        (),
        (17117, 1902),
        columns=tuple(MAGIC.split()),
    ),
    "beijing": Source(
        "Beijing PM2.5, Song Chen (2017)",
        "381/beijing+pm2+5+data.zip",
        "PRSA_data_2010.1.1-2014.12.31.csv",
        "regression",
        "pm2.5",
        ("year", "month", "day", "hour", "cbwd"),
        (37581, 4176),
    ),
    "news": Source(
        "Online News Popularity, Kelwin Fernandes et al. (2015)",
        "332/online+news+popularity.zip",
        "OnlineNewsPopularity.csv",
        "regression",
        "shares",
        ("data_channel", "weekday"),
        (35679, 3965),
    ),
}
ROWS = {  # rows_digest of (train, test), computed from tables checked against the official preprocessing
    "adult": (
        "b89a88f1f999255082117441be74b8fa98fb48ff4a6ce8fe175c8a82e7968ac5",
        "dfe90203b94ca16dd8f0d94c0e7552200902dd837918fdcdc09df44cfb0a2737",
    ),
    "shoppers": (
        "55dfdcdc882c3387c2a489d148a2e5fd7e1a775dce6f05b785774e8e0b34a28b",
        "423f684edc9de3a6d2a427fea4f4146ed2fe4df8cc00c942c7fefa6e7b1367d0",
    ),
    "magic": (
        "864e3a496ea219f05dd0a19c1d3fbb7526c7cc26f47e5f635198f088ecdbe686",
        "39735b14b6e6509534cd7e9c6b6a980e064b61d70e9d3e3cb10dc20e64db65cb",
    ),
    "beijing": (
        "a97d3080681e197247d0e103ad7ed6fed1b11dc02e8213a83a1453cef57ca60d",
        "278ddd2d771b42dc7910ca7baea684b473e2608dfc99c05569557a301a9b67f1",
    ),
}


def fetch(
    name: str, folder: Path | str, url: str | None = None, force: bool = False, say: Callable[[str], None] = print
) -> Path:
    """Download a set into `folder/NAME`: train.csv.gz, test.csv.gz, schema.yaml, checksums.json. A broken-off download
    resumes; a finished set is checked and left alone unless `force`. `url` replaces the address at UCI."""
    if name not in SETS:
        raise ValueError(f"no set {name!r}; there are: {', '.join(SETS)}")
    source, out = SETS[name], Path(folder) / name
    if not force and all((out / f).is_file() for f in ("train.csv.gz", "test.csv.gz", "schema.yaml", "checksums.json")):
        _check_finished(name, out)
        say(f"{out} is there already and its checksums agree")
        return out
    out.mkdir(parents=True, exist_ok=True)
    archive = out / "archive.zip"
    url = url or UCI + source.path
    say(f"downloading {url}")
    download(url, archive)
    checksums = {"url": url, "archive_sha256": _sha256(archive.read_bytes())}
    try:
        train, test = split(name, raw_table(name, archive), raw_table(name, archive, test=True))
    except ValueError:
        archive.unlink()  # so that the next run downloads afresh
        raise
    numerical = _numerical(source, list(train.columns))
    digests = tuple(rows_digest(t, numerical) for t in (train, test))
    checksums |= {"train_rows_sha256": digests[0], "test_rows_sha256": digests[1]}
    archive.unlink()
    _judge(name, out, checksums, say)
    for part, table in (("train", train), ("test", test)):
        atomic_write(out / f"{part}.csv.gz", gzip.compress(table.to_csv(index=False).encode(), 9, mtime=0))
    schema = _schema(name, train, test, numerical)
    atomic_write(out / "schema.yaml", yaml.safe_dump(schema, sort_keys=False, allow_unicode=True, width=120))
    atomic_write(out / "checksums.json", json.dumps(checksums, indent=1) + "\n")
    say(f"wrote {out}: {len(train)} training and {len(test)} test rows")
    return out


def members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """{file name without folders: entry}; refuses an archive with an entry that could land elsewhere when unpacked."""
    found = {}
    for entry in archive.infolist():
        path = PurePosixPath(entry.filename.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in entry.filename:
            raise ValueError(f"the archive holds an unsafe path, {entry.filename!r}")
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise ValueError(f"the archive holds a link, {entry.filename!r}")
        if entry.file_size > LARGEST:
            raise ValueError(f"{entry.filename!r} in the archive unpacks to {entry.file_size} bytes, too many")
        if not entry.is_dir():
            found[path.name] = entry
    return found


def _read_member(path: Path, member: str) -> bytes:
    try:
        with zipfile.ZipFile(path) as archive:
            found = members(archive)
            if member not in found:
                raise ValueError(f"the archive lacks {member!r}; it holds: {', '.join(sorted(found)) or 'nothing'}")
            with archive.open(found[member]) as file:
                data = file.read(LARGEST + 1)
    except (zipfile.BadZipFile, EOFError, zipfile.zlib.error) as error:
        raise ValueError(f"the download is not a sound zip archive: {error}") from None
    if len(data) > LARGEST:
        raise ValueError(f"{member!r} in the archive unpacks to too many bytes")
    return data


def raw_table(name: str, archive: Path, test: bool = False) -> pd.DataFrame | None:
    """The set as its official preprocessing reads it, every cell as text; `test`: its own test file, if it has one."""
    source = SETS[name]
    member = source.test_member if test else source.member
    if member is None:
        return None
    data = _read_member(archive, member)
    try:
        if member.endswith(".xls"):
            table = _excel(data)
        else:
            # magic: the official preprocessing takes the first row for a header; adult.test has a remark there
            header = 0 if name != "adult" or test else None
            table = pd.read_csv(
                io.BytesIO(data), header=header, dtype=str, keep_default_na=False, skipinitialspace=True,
                names=list(source.columns) if source.columns else None,
            )  # fmt: skip
    except (ValueError, UnicodeError) as error:
        raise ValueError(f"{member!r} is not the table expected: {' '.join(str(error).split())}") from None
    table.columns = [str(c).strip() for c in table.columns]
    table = table.apply(lambda column: column.astype(str).str.strip())
    return _prepared(name, table, test)


def _excel(data: bytes) -> pd.DataFrame:
    try:
        import xlrd  # noqa: F401
    except ImportError:
        raise ValueError("reading this set's .xls needs xlrd: pip install 'anystate[table]'") from None
    return pd.read_excel(io.BytesIO(data), sheet_name="Data", header=1, dtype=str)


def _prepared(name: str, table: pd.DataFrame, test: bool) -> pd.DataFrame:
    """What each official preprocessing does before the split."""
    source = SETS[name]
    if name == "adult" and test:
        table[source.target] = table[source.target].str.rstrip(".")
    elif name == "shoppers":
        table = table.replace({"TRUE": "True", "FALSE": "False"})
    elif name == "default":
        table = table.drop(columns="ID")
    elif name == "beijing":
        table = table.drop(columns="No")
        table = table[~table.isin(["NA", "", "nan"]).any(axis=1)]
    elif name == "news":
        table = table.drop(columns="url")
        channel, weekday = list(table.columns[12:18]), list(table.columns[30:38])
        flags = [table[part].astype(float).to_numpy().argmax(1).astype(str) for part in (channel, weekday)]
        table = table.drop(columns=[*channel, *weekday]).assign(data_channel=flags[0], weekday=flags[1])
    expected = sum(source.rows) if source.test_member is None else source.rows[test]
    lacking = [c for c in (*source.categorical, source.target) if c not in table.columns]
    if lacking:
        raise ValueError(f"{name}: the file lacks column {lacking[0]!r}")
    if len(table) != expected:
        raise ValueError(f"{name}: the file has {len(table)} rows, expected {expected}")
    table = table.reset_index(drop=True)
    for column in _numerical(source, list(table.columns)):
        try:
            table[column] = pd.to_numeric(table[column])
        except ValueError:
            raise ValueError(f"{name}: column {column!r} holds text where numbers belong") from None
    return table


def split(name: str, table: pd.DataFrame, test: pd.DataFrame | None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """UCI's own test file, or the official rule: numpy's legacy shuffle with seed 1234, first 90% train; shuffled again
    with the next seed until train holds every level of every categorical column."""
    if test is not None:
        return table, test
    order, train_rows = np.arange(len(table)), SETS[name].rows[0]
    for seed in range(1234, 1334):
        np.random.RandomState(seed).shuffle(order)
        train = table.loc[order[:train_rows]]
        if all(train[c].nunique() == table[c].nunique() for c in SETS[name].categorical):
            return train.reset_index(drop=True), table.loc[order[train_rows:]].reset_index(drop=True)
    raise ValueError(f"{name}: no split of a hundred has every category in its training rows")


def rows_digest(table: pd.DataFrame, numerical: list[str]) -> str:
    """SHA-256 of names and cells in order: numbers as float32 in nine digits, the rest as text, so that two spellings
    of a number (1021 and 1021.0) are the same row."""
    texts = [
        [f"{v:.9g}" for v in table[c].astype(np.float32)] if c in numerical else [str(v) for v in table[c]]
        for c in table.columns
    ]
    lines = ["\x1f".join(table.columns), *("\x1f".join(row) for row in zip(*texts, strict=True))]
    return _sha256("\n".join(lines).encode())


def _judge(name: str, out: Path, checksums: dict, say: Callable[[str], None]) -> None:
    """Compare digests with those known in advance, or with those of an earlier download into the same folder."""
    got = (checksums["train_rows_sha256"], checksums["test_rows_sha256"])
    record = out / "checksums.json"
    if name in ROWS:
        expected, whose = ROWS[name], "the digest of its official rows"
    elif record.exists():
        earlier = json.loads(record.read_text())
        expected = (earlier.get("train_rows_sha256"), earlier.get("test_rows_sha256"))
        whose = f"the first download's in {record}"
    else:
        say(f"{name}: no checksum is known in advance; this first download is trusted and recorded:")
        for key, value in checksums.items():
            say(f"  {key} {value}")
        return
    for part, mine, theirs in zip(("training", "test"), got, expected, strict=True):
        if mine != theirs:
            raise ValueError(f"{name}: wrong checksum of the {part} rows, {mine}; {whose} is {theirs}")
    say(f"{name}: the rows have the checksums expected")


def _check_finished(name: str, out: Path) -> None:
    try:
        recorded = json.loads((out / "checksums.json").read_text())
        numerical = yaml.safe_load((out / "schema.yaml").read_text())["numerical"]
        if SETS[name].task == "regression":
            numerical = [*numerical, SETS[name].target]
        for part in ("train", "test"):
            text = {c: str for c in (*SETS[name].categorical, SETS[name].target) if c not in numerical}
            table = pd.read_csv(out / f"{part}.csv.gz", dtype=text, keep_default_na=False)
            if rows_digest(table, numerical) != recorded[f"{part}_rows_sha256"]:
                raise ValueError("rows changed")
    except (ValueError, KeyError, OSError, EOFError) as error:
        raise ValueError(f"{out} does not hold what was downloaded ({error}); fetch it again with force") from None


def _numerical(source: Source, columns: list[str]) -> list[str]:
    text = {*source.categorical, *([] if source.task == "regression" else [source.target])}
    return [c for c in columns if c not in text]


def _schema(name: str, train: pd.DataFrame, test: pd.DataFrame, numerical: list[str]) -> dict:
    source = SETS[name]
    text = [c for c in train.columns if c not in numerical]
    return {
        "name": name,
        "task": source.task,
        "target": source.target,
        "numerical": [c for c in numerical if c != source.target],
        "categorical": list(source.categorical),
        "columns": list(train.columns),
        "rows": {"train": len(train), "test": len(test)},
        "levels": {c: sorted({*train[c], *test[c]}) for c in text},
        "source": {"name": "UCI Machine Learning Repository: " + source.title, "licence": "CC BY 4.0"},
    }


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
