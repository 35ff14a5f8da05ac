"""Download of the six UCI tables of the paper, with checksums and the usual train/test split.

Archives are not unpacked to disk; the needed members are read from them. Checksums:

- adult, beijing, magic and shoppers: the digests of the prepared rows must equal those in DIGESTS.
- default and news: no reference digests are available. The digests of the first download are printed and written to
  `checksums.json`, and later downloads into the same folder must have the same.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import stat
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
import yaml

from ...model.storage import atomic_write
from ...train.data.packing.download import download
from .uci import DIGESTS, SETS, UciTable

UCI = "https://archive.ics.uci.edu/static/public/"
MAX_MEMBER_BYTES = 512 << 20  # uncompressed size of a member of an archive
FILES = ("train.csv.gz", "test.csv.gz", "schema.yaml", "checksums.json")


def fetch(
    name: str, folder: Path | str, url: str | None = None, force: bool = False, say: Callable[[str], None] = print
) -> Path:
    """Download a table into `folder/NAME` as train.csv.gz, test.csv.gz, schema.yaml and checksums.json.

    An interrupted download is resumed; a complete table is only checked.

    Args:
        url: of the archive, instead of the address at UCI.
        force: download a complete table again.
        say: called with status messages.

    Raises:
        ValueError: unknown name, a failed download, or unexpected content.
    """
    if name not in SETS:
        raise ValueError(f"no set {name!r}; choose one of: {', '.join(SETS)}")
    out = Path(folder) / name
    if not force and all((out / file).is_file() for file in FILES):
        _check_complete(name, out)
        say(f"{out} exists already and its checksums match")
        return out
    out.mkdir(parents=True, exist_ok=True)
    archive = out / "archive.zip"
    url = url or UCI + SETS[name].path
    say(f"downloading {url}")
    download(url, archive)
    checksums = {"url": url, "archive_sha256": _sha256(archive.read_bytes())}
    try:
        train, test = split(name, raw_table(name, archive), raw_table(name, archive, test=True))
    except ValueError:
        archive.unlink()  # so that the next run downloads it again
        raise
    archive.unlink()
    numerical = _numerical(SETS[name], list(train.columns))
    checksums["train_rows_sha256"] = rows_digest(train, numerical)
    checksums["test_rows_sha256"] = rows_digest(test, numerical)
    _check_digests(name, out, checksums, say)
    for part, table in (("train", train), ("test", test)):
        atomic_write(out / f"{part}.csv.gz", gzip.compress(table.to_csv(index=False).encode(), 9, mtime=0))
    schema = _schema(name, train, test, numerical)
    atomic_write(out / "schema.yaml", yaml.safe_dump(schema, sort_keys=False, allow_unicode=True, width=120))
    atomic_write(out / "checksums.json", json.dumps(checksums, indent=1) + "\n")
    say(f"wrote {out}: {len(train)} training and {len(test)} test rows")
    return out


def members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """{file name without folders: entry} of an archive.

    Raises:
        ValueError: an entry has a path outside the archive's folder, is a link, or is too large.
    """
    found = {}
    for entry in archive.infolist():
        path = PurePosixPath(entry.filename.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in entry.filename:
            raise ValueError(f"the archive holds an unsafe path, {entry.filename!r}")
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise ValueError(f"the archive holds a link, {entry.filename!r}")
        if entry.file_size > MAX_MEMBER_BYTES:
            raise ValueError(f"{entry.filename!r} in the archive unpacks to {entry.file_size} bytes, too many")
        if not entry.is_dir():
            found[path.name] = entry
    return found


def _read_member(path: Path, member: str) -> bytes:
    """The content of a member of a zip file, which is not trusted."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = members(archive)
            if member not in found:
                raise ValueError(f"the archive lacks {member!r}; it holds: {', '.join(sorted(found)) or 'nothing'}")
            with archive.open(found[member]) as file:
                data = file.read(MAX_MEMBER_BYTES + 1)
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise ValueError(f"the download is not a valid zip archive: {error}") from None
    if len(data) > MAX_MEMBER_BYTES:
        raise ValueError(f"{member!r} in the archive unpacks to too many bytes")
    return data


def raw_table(name: str, archive: Path, test: bool = False) -> pd.DataFrame | None:
    """The table as the official preprocessing prepares it before the split.

    test: the set's own test file; None if it has none.
    """
    source = SETS[name]
    member = source.test_member if test else source.member
    if member is None:
        return None
    data = _read_member(archive, member)
    try:
        table = _excel(data) if member.endswith(".xls") else _csv(name, data, test)
    except (ValueError, UnicodeError) as error:
        raise ValueError(f"{member!r} is not the table expected: {' '.join(str(error).split())}") from None
    table.columns = [str(c).strip() for c in table.columns]
    table = table.apply(lambda column: column.astype(str).str.strip())
    return _prepared(name, table, test)


def _csv(name: str, data: bytes, test: bool) -> pd.DataFrame:
    # As in the official preprocessing: the first row of magic counts as a header; adult.test starts with a remark.
    header = 0 if name != "adult" or test else None
    names = SETS[name].columns
    return pd.read_csv(
        io.BytesIO(data),
        header=header,
        dtype=str,
        keep_default_na=False,
        skipinitialspace=True,
        names=list(names) if names else None,
    )


def _excel(data: bytes) -> pd.DataFrame:
    try:
        import xlrd  # noqa: F401
    except ImportError:
        raise ValueError("reading this set's .xls needs xlrd: pip install 'anystate[table]'") from None
    return pd.read_excel(io.BytesIO(data), sheet_name="Data", header=1, dtype=str)


def _prepared(name: str, table: pd.DataFrame, test: bool) -> pd.DataFrame:
    """The official preprocessing of a table before the split."""
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
    _check_shape(name, table, test)
    table = table.reset_index(drop=True)
    for column in _numerical(source, list(table.columns)):
        try:
            table[column] = pd.to_numeric(table[column])
        except ValueError:
            raise ValueError(f"{name}: the numerical column {column!r} holds text") from None
    return table


def _check_shape(name: str, table: pd.DataFrame, test: bool) -> None:
    """Raise ValueError if a column is missing or the number of rows is wrong."""
    source = SETS[name]
    missing = [c for c in (*source.categorical, source.target) if c not in table.columns]
    if missing:
        raise ValueError(f"{name}: the file lacks column {missing[0]!r}")
    expected = sum(source.rows) if source.test_member is None else source.rows[test]
    if len(table) != expected:
        raise ValueError(f"{name}: the file has {len(table)} rows, expected {expected}")


def split(name: str, table: pd.DataFrame, test: pd.DataFrame | None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Training and test rows: UCI's own test file, or the official random split.

    The official split is numpy's legacy shuffle with seed 1234, of which the first 90% are for training. It is repeated
    with the next seed until the training rows hold every category of every categorical column.
    """
    if test is not None:
        return table, test
    order, train_rows = np.arange(len(table)), SETS[name].rows[0]
    for seed in range(1234, 1334):
        np.random.RandomState(seed).shuffle(order)
        train = table.loc[order[:train_rows]]
        if all(train[c].nunique() == table[c].nunique() for c in SETS[name].categorical):
            return train.reset_index(drop=True), table.loc[order[train_rows:]].reset_index(drop=True)
    raise ValueError(f"{name}: none of 100 random splits has every category in its training rows")


def rows_digest(table: pd.DataFrame, numerical: list[str]) -> str:
    """SHA-256 of the column names and cells in order.

    Numbers enter as float32 with nine digits, so that 1021 and 1021.0 count as equal, other cells as text.
    """
    columns = []
    for name in table.columns:
        if name in numerical:
            columns.append([f"{value:.9g}" for value in table[name].astype(np.float32)])
        else:
            columns.append([str(value) for value in table[name]])
    lines = ["\x1f".join(table.columns), *("\x1f".join(row) for row in zip(*columns, strict=True))]
    return _sha256("\n".join(lines).encode())


def _check_digests(name: str, out: Path, checksums: dict, say: Callable[[str], None]) -> None:
    """Compare digests with the reference, or with those of an earlier download into the same folder.

    Raises:
        ValueError: they differ.
    """
    record = out / "checksums.json"
    if name in DIGESTS:
        reference, origin = DIGESTS[name], "the digest of its official rows"
    elif record.exists():
        earlier = json.loads(record.read_text())
        reference = (earlier.get("train_rows_sha256"), earlier.get("test_rows_sha256"))
        origin = f"the first download's in {record}"
    else:
        say(f"{name}: there is no reference checksum; this first download is trusted and recorded:")
        for key, value in checksums.items():
            say(f"  {key} {value}")
        return
    found = (checksums["train_rows_sha256"], checksums["test_rows_sha256"])
    for part, digest, expected in zip(("training", "test"), found, reference, strict=True):
        if digest != expected:
            raise ValueError(f"{name}: wrong checksum of the {part} rows, {digest}; {origin} is {expected}")
    say(f"{name}: the rows have the checksums expected")


def _check_complete(name: str, out: Path) -> None:
    """Raise ValueError if the files of an earlier download were changed."""
    try:
        recorded = json.loads((out / "checksums.json").read_text())
        numerical = yaml.safe_load((out / "schema.yaml").read_text())["numerical"]
        if SETS[name].task == "regression":
            numerical = [*numerical, SETS[name].target]
        text = {c: str for c in (*SETS[name].categorical, SETS[name].target) if c not in numerical}
        for part in ("train", "test"):
            table = pd.read_csv(out / f"{part}.csv.gz", dtype=text, keep_default_na=False)
            if rows_digest(table, numerical) != recorded[f"{part}_rows_sha256"]:
                raise ValueError("rows changed")
    except (ValueError, KeyError, OSError, EOFError) as error:
        raise ValueError(f"{out} does not hold what was downloaded ({error}); fetch it again with --force") from None


def _numerical(source: UciTable, columns: list[str]) -> list[str]:
    """The numerical columns, among them the target of a regression."""
    categorical = set(source.categorical)
    if source.task != "regression":
        categorical.add(source.target)
    return [c for c in columns if c not in categorical]


def _schema(name: str, train: pd.DataFrame, test: pd.DataFrame, numerical: list[str]) -> dict:
    """The content of schema.yaml."""
    source = SETS[name]
    categorical = [c for c in train.columns if c not in numerical]
    return {
        "name": name,
        "task": source.task,
        "target": source.target,
        "numerical": [c for c in numerical if c != source.target],
        "categorical": list(source.categorical),
        "columns": list(train.columns),
        "rows": {"train": len(train), "test": len(test)},
        "levels": {c: sorted({*train[c], *test[c]}) for c in categorical},
        "source": {"name": "UCI Machine Learning Repository: " + source.title, "licence": "CC BY 4.0"},
    }


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
