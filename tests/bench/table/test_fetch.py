"""`table fetch` from a local server: official rows, checksums, resuming, refused archives."""

from __future__ import annotations

import io
import json
import stat
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from anystate.bench.table import fetch as fetching
from anystate.bench.table.fetch import SETS, download, fetch


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def original(tabular: Path, name: str) -> dict[str, bytes]:
    """The members of UCI's archive, made again from our files by undoing the split."""
    train, test = (
        pd.read_csv(tabular / name / f"{p}.csv.gz", dtype=str, keep_default_na=False) for p in ("train", "test")
    )
    if name == "adult":
        test["income"] += "."
        files = {"adult.data": train, "adult.test": test}
        texts = {f: "\n".join(map(", ".join, t.itertuples(index=False, name=None))) for f, t in files.items()}
        return {"adult.data": texts["adult.data"].encode() + b"\n\n",
                "adult.test": b"|1x3 Cross validator\n" + texts["adult.test"].encode() + b"\n"}  # fmt: skip
    both = pd.concat([train, test], ignore_index=True)
    order = np.arange(len(both))
    np.random.RandomState(1234).shuffle(order)
    raw = both.iloc[np.argsort(order)]
    if name == "magic":
        return {"magic04.data": b"28.7967,16.0021,2.6449,0.3918,0.1982,27.7004,22.011,-8.2027,40.092,81.8828,g\n"
                + raw.to_csv(index=False, header=False).encode()}  # fmt: skip
    if name == "beijing":
        gap = raw.iloc[[0]].assign(**{"pm2.5": "NA"})
        raw = pd.concat([gap, raw.iloc[:100], gap, raw.iloc[100:]])
        raw.insert(0, "No", range(1, len(raw) + 1))
        return {"PRSA_data_2010.1.1-2014.12.31.csv": raw.to_csv(index=False).encode()}
    raw = raw.replace({"True": "TRUE", "False": "FALSE"})
    return {"online_shoppers_intention.csv": raw.to_csv(index=False).encode()}


@pytest.mark.parametrize("name", ["adult", "beijing", "magic", "shoppers"])
def test_rows_equal_the_official_split(tabular, server, tmp_path, name):
    """From the raw file, over a connection that breaks, to the rows of the official split and their checksum."""
    server.files["x.zip"] = zipped({"folder/note.txt": b"", **original(tabular, name)})
    server.broken["x.zip"] = [50_000]
    messages = []
    out = fetch(name, tmp_path, f"{server.url}/x.zip", say=messages.append)
    assert any("checksums expected" in line for line in messages)
    for part in ("train", "test"):
        ours, theirs = (pd.read_csv(f / f"{part}.csv.gz") for f in (out, tabular / name))
        pd.testing.assert_frame_equal(ours, theirs)
    ours, theirs = (yaml.safe_load((f / "schema.yaml").read_text()) for f in (out, tabular / name))
    for key in ("name", "task", "target", "numerical", "categorical", "columns", "rows"):
        assert ours[key] == theirs[key]
    assert {k: sorted(v) for k, v in ours["levels"].items()} == {k: sorted(v) for k, v in theirs["levels"].items()}
    assert sorted(p.name for p in out.iterdir()) == ["checksums.json", "schema.yaml", "test.csv.gz", "train.csv.gz"]


def test_rows_with_a_wrong_checksum_are_refused(tabular, server, tmp_path):
    members = original(tabular, "magic")
    members["magic04.data"] = members["magic04.data"].replace(b"102.26,", b"102.27,", 1)
    server.files["x.zip"] = zipped(members)
    with pytest.raises(ValueError, match="magic: wrong checksum of the training rows"):
        fetch("magic", tmp_path, f"{server.url}/x.zip")
    assert not list((tmp_path / "magic").iterdir())


def news(rows: int = 60) -> bytes:
    """A file in the format of OnlineNewsPopularity.csv, with blanks before column names."""
    rng = np.random.default_rng(0)
    names = ["url", *(f" n{i}" for i in range(12)), *(f" data_channel_is_{i}" for i in range(6)),
             *(f" m{i}" for i in range(12)), *(f" weekday_is_{i}" for i in range(8)),
             *(f" k{i}" for i in range(21)), " shares"]  # fmt: skip
    table = pd.DataFrame(rng.normal(size=(rows, len(names))).round(3), columns=names).astype(object)
    table["url"], table[" shares"] = "http://x", rng.integers(1, 9000, rows)
    for start, width in ((13, 6), (31, 8)):
        table.iloc[:, start : start + width] = np.eye(width)[np.arange(rows) % width]
    return table.to_csv(index=False).encode()


@pytest.fixture
def small_news(monkeypatch):
    import dataclasses

    monkeypatch.setitem(fetching.SETS, "news", dataclasses.replace(SETS["news"], rows=(54, 6)))


def test_first_download_is_recorded_and_later_ones_must_agree(server, tmp_path, small_news):
    server.files["x.zip"] = zipped({"OnlineNewsPopularity/OnlineNewsPopularity.csv": news()})
    messages = []
    out = fetch("news", tmp_path, f"{server.url}/x.zip", say=messages.append)
    record = json.loads((out / "checksums.json").read_text())
    assert any("trusted" in line for line in messages)
    assert any(record["archive_sha256"] in line for line in messages)
    train = pd.read_csv(out / "train.csv.gz")
    schema = yaml.safe_load((out / "schema.yaml").read_text())
    assert len(schema["numerical"]) == 45
    assert list(train.columns[-3:]) == ["shares", "data_channel", "weekday"]
    order = np.arange(60)
    np.random.RandomState(1234).shuffle(order)
    assert train["data_channel"].tolist() == (order[:54] % 6).tolist()
    assert train["weekday"].tolist() == (order[:54] % 8).tolist()

    requests = len(server.seen)
    fetch("news", tmp_path, f"{server.url}/x.zip", say=messages.append)
    assert len(server.seen) == requests, "a finished set was downloaded again"
    fetch("news", tmp_path, f"{server.url}/x.zip", force=True, say=messages.append)
    server.files["x.zip"] = zipped({"OnlineNewsPopularity.csv": news().replace(b"0.126", b"0.127", 1)})
    with pytest.raises(ValueError, match="first download"):
        fetch("news", tmp_path, f"{server.url}/x.zip", force=True, say=messages.append)
    (out / "train.csv.gz").write_bytes((out / "test.csv.gz").read_bytes())
    with pytest.raises(ValueError, match="does not hold what was downloaded"):
        fetch("news", tmp_path, f"{server.url}/x.zip", say=messages.append)


def test_default_preparation():
    table = pd.DataFrame("1", index=range(30_000), columns=["ID", *SETS["default"].categorical, "LIMIT_BAL", "AGE",
                         *(f"BILL_AMT{i}" for i in range(1, 13)), SETS["default"].target])  # fmt: skip
    train, test = fetching.split("default", fetching._prepared("default", table, False), None)
    assert (len(train), len(test)) == SETS["default"].rows
    assert "ID" not in train
    assert train["AGE"].dtype.kind == "i"
    assert train["SEX"].iloc[0] == "1"


def test_an_interrupted_download_is_resumed(server, tmp_path):
    data = np.random.default_rng(0).bytes(300_000)
    server.files["f"], server.broken["f"] = data, [100_000]
    with pytest.raises(ValueError, match="broke off after 100000 of 300000 bytes"):
        download(f"{server.url}/f", tmp_path / "f", attempts=1)
    download(f"{server.url}/f", tmp_path / "f", attempts=1)
    assert (tmp_path / "f").read_bytes() == data
    assert server.seen == [("f", None), ("f", "bytes=100000-")]


@pytest.mark.parametrize("case", ["no ranges", "another file"])
def test_download_restarts_if_the_file_on_the_server_changed(server, tmp_path, case):
    old, new = b"a" * 200_000, b"b" * 150_000
    server.files["f"], server.broken["f"] = old, [100_000]
    with pytest.raises(ValueError):
        download(f"{server.url}/f", tmp_path / "f", attempts=1)
    server.files["f"] = new
    server.ranges, server.tag = (False, server.tag) if case == "no ranges" else (True, '"two"')
    download(f"{server.url}/f", tmp_path / "f", attempts=1)
    assert (tmp_path / "f").read_bytes() == new


def test_file_address(tmp_path, small_news):
    (tmp_path / "x.zip").write_bytes(zipped({"OnlineNewsPopularity.csv": news()}))
    fetch("news", tmp_path / "out", (tmp_path / "x.zip").as_uri(), say=lambda line: None)
    assert (tmp_path / "out" / "news" / "schema.yaml").is_file()


def link() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        entry = zipfile.ZipInfo("magic04.data")
        entry.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(entry, "/etc/passwd")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"<html>", "not a valid zip archive"),
        (zipped({"magic04.data": b"1,2\n" * 99})[:100], "not a valid zip archive"),
        (zipped({"other.csv": b""}), "lacks 'magic04.data'"),
        (zipped({"../magic04.data": b""}), "unsafe path"),
        (zipped({"/magic04.data": b""}), "unsafe path"),
        (zipped({"c:\\magic04.data": b""}), "unsafe path"),
        (zipped({"a/../../magic04.data": b""}), "unsafe path"),
        (link(), "holds a link"),
        (zipped({"magic04.data": b"1,2,3,4,5,6,7,8,9,10,g\n" * 5}), "has 4 rows, expected 19019"),
        (zipped({"magic04.data": b""}), "has 0 rows, expected 19019"),
        (zipped({"magic04.data": b"1,2\n3,4\n"}), "not the table expected"),
    ],
    ids=[str(i) for i in range(11)],  # archives hold the time, which ids must not
)
def test_bad_archives(server, tmp_path, data, message):
    server.files["x.zip"] = data
    with pytest.raises(ValueError, match=message) as caught:
        fetch("magic", tmp_path / "out", f"{server.url}/x.zip", say=lambda line: None)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out" / "magic").iterdir())
    assert not (tmp_path / "magic04.data").exists()


def test_too_large_a_member(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "MAX_MEMBER_BYTES", 1000)
    server.files["x.zip"] = zipped({"magic04.data": b"0" * 5000})
    with pytest.raises(ValueError, match="unpacks to 5000 bytes"):
        fetch("magic", tmp_path, f"{server.url}/x.zip", say=lambda line: None)


def test_bad_requests(server, tmp_path):
    with pytest.raises(ValueError, match="no set 'titanic'; choose one of: adult, default"):
        fetch("titanic", tmp_path)
    with pytest.raises(ValueError, match="404"):
        fetch("magic", tmp_path, f"{server.url}/gone.zip", say=lambda line: None)
    with pytest.raises(ValueError, match=r"127\.0\.0\.1:9"):
        fetch("magic", tmp_path, "http://127.0.0.1:9/x.zip", say=lambda line: None)
