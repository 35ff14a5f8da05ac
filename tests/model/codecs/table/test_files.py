"""Files of every usual format and spelling are read as they are meant, or refused in one line that says the way out."""

from __future__ import annotations

import bz2
import gzip
import importlib.util
import json
import lzma
import zipfile

import numpy as np
import pandas as pd
import pytest

from anystate.model.codecs.table.delimited import fill
from anystate.model.codecs.table.dialect import Dialect
from anystate.model.codecs.table.files import TableFile, check_output, read_table, write_table

ROWS = [("Jörg, Ann", -1.5, 3, "007"), ("a|b", 0.25, 4, "008"), ('say "hi"', 1250.0, 5, "009")]
NAMES = ["who", "x", "n", "code"]
needs_excel = pytest.mark.skipif(importlib.util.find_spec("openpyxl") is None, reason="openpyxl is not installed")


@pytest.fixture
def file(tmp_path):
    """A function that writes bytes or text to a file and returns its path."""

    def make(content: bytes | str, name: str = "t.csv"):
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return tmp_path / name

    return make


def written(sep: str, decimal: str, quote_all: bool = False, newline: str = "\n") -> str:
    """The rows as text, by hand."""
    lines = [sep.join(NAMES)]
    for row in ROWS:
        cells = []
        for cell in row:
            text = str(cell).replace(".", decimal) if isinstance(cell, float) else str(cell)
            if quote_all or any(c in text for c in (sep, '"')):
                text = '"' + text.replace('"', '""') + '"'
            cells.append(text)
        lines.append(sep.join(cells))
    return newline.join(lines) + newline


def check(table: pd.DataFrame) -> None:
    assert list(table) == NAMES
    assert list(table.itertuples(index=False, name=None)) == ROWS
    assert table["x"].dtype == "float64"
    assert table["n"].dtype == "int64"


@pytest.mark.parametrize("sep", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-16-le", "cp1252"])
def test_separators_and_encodings(file, sep, encoding):
    for decimal in ".," if sep != "," else ".":
        for newline in ("\n", "\r\n"):
            read = TableFile.read(file(written(sep, decimal, newline=newline).encode(encoding)))
            check(read.table)
            assert (read.dialect.sep, read.dialect.decimal) == (sep, decimal)
            again = Dialect.of(**read.dialect.settings)
            assert (again.sep, again.decimal) == (sep, decimal)
            assert again.to_bytes("ö", "").decode(encoding) == "ö"
    check(read_table(file(written(sep, ".", quote_all=True).encode(encoding))))


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1252", "Besançon Forêt Noël Île-de-France 5°"), ("cp1252", "España Ávila ¿cuándo?"), ("cp1252", "5 € 7 €"),
        ("cp1252", "Smörgås Århus Kärlek"), ("cp1250", "Łódź Kraków Gdańsk"), ("cp1250", "Příbor Český Kůň"),
        ("mac_roman", "München Köln"), ("cp1257", "Šiauliai Kėdainiai Panevėžys Ąžuolas"),
    ],
)  # fmt: skip
def test_code_pages_that_only_one_language_makes_words_of(file, encoding, text):
    read = TableFile.read(file("\n".join(["name,x", *(f"{word},1" for word in text.split())]).encode(encoding)))
    assert read.dialect.encoding == encoding
    assert read.table["name"].tolist() == text.split()


def test_the_line_by_which_excel_names_the_separator(file):
    text = "sep=;\r\na;b\r\n1,5;\r\n2,5;x\r\n"
    read = TableFile.read(file(text))
    assert read.table.to_dict("list") == {"a": [1.5, 2.5], "b": [None, "x"]}
    filled = read.table.assign(b=["y", "x"])
    out = read.dialect.to_bytes(fill(read.text, read.table, filled, read.dialect), "")
    assert out.decode() == text.replace("1,5;", "1,5;y")
    assert read.dialect.settings == {"sep": ";", "decimal": ","}


def test_a_decimal_comma_between_commas_must_be_given(file):
    path = file(written(",", ","))
    assert read_table(path)["x"].tolist() == ["-1,5", "0,25", "1250,0"]
    check(read_table(path, decimal=","))


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("a;b,c\n1;2,3\n", {}, "commas or semicolons; give --sep"),
        ("a;b\n1,250;x\n2,500;y\n", {}, "1,250 in column 'a' could be a decimal or a thousand; give --decimal"),
        ("a;b\n1.250;x\n2.500;y\n", {}, "could be a decimal or a thousand"),
        ("a;b\n1,5;1.5\n", {}, "column 'b' has 1.5, column 'a' has 1,5; give --decimal"),
        ("a,b\n1,2\n3,4,5\n6\n", {}, "row 2 has 3 fields, the header 2"),
        ("x\n1,5\n2,5\n", {}, "row 1 has 2 fields, the header 1: quote cells that hold a comma, or give --sep"),
        ("", {}, "is empty"),
        ("\n\n", {}, "is empty"),
        ("a,b\n", {}, "no rows below its header a, b"),
        ("a,,\n1,2,3\n", {}, "several columns have no name"),
        ("a,b\n1,2\n", {"sep": "ab"}, "--sep 'ab': give one character, or tab"),
        ("a,b\n1,2\n", {"decimal": ";"}, "--decimal ';': give . or ,"),
        ("a,b\n1,2\n", {"encoding": "latin-99"}, "--encoding latin-99: there is no such encoding"),
        ("a,b\nü,2\n", {"encoding": "ascii"}, "not ascii at byte 4; give another --encoding"),
        ("a,b\nRené,à\n".encode("cp1252") + b"\x81", {}, "no other encoding is certain; give --encoding"),
        ("a\nPen\xe8\n".encode("latin-1"), {}, r"cp1252 ('Penè') or cp1250 ('Penč')"),
        ("a\nМосква\n".encode("cp1251"), {}, "no other encoding is certain"),
        ("a\nда\nнет\n".encode("cp1251"), {}, "no other encoding is certain"),
        ("a\nА\nБ\nВ\n".encode("cp1251"), {}, "no other encoding is certain"),
        ("a\nMünchen\nKöln\n".encode("cp850"), {}, "no other encoding is certain"),
        ("x y\n1 a\n2 b\n", {}, "its cells seem to be separated by spaces; give --sep ' '"),
        ('a,b\n"x,1\n', {}, "a quotation mark is never closed"),
        ("a\n東京\n".encode("shift_jis"), {}, "not UTF-8"),
        (bytes(range(256)) * 3, {}, "binary data of an unknown format"),
        (b"SQLite format 3\0" + bytes(90), {}, "an SQLite database: export the table as CSV"),
        (b"<!DOCTYPE html><html></html>", {}, "a web page, not a table"),
        (b"\x80\x04\x95" + bytes(40), {}, "a pickle, which may run any code"),
        (b"(\xb5/\xfd\0\0\0", {}, "packed with Zstandard"),
    ],
)
def test_what_is_not_certain_is_refused(file, text, options, message):
    with pytest.raises(ValueError) as caught:
        read_table(file(text), **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_thousands_decide_nothing_where_another_column_is_clear(file):
    table = read_table(file("a;b;c\n1,250;0,5;x\n2,500;12,75;y\n"))
    assert table["a"].tolist() == [1.25, 2.5]
    table = read_table(file("a;b;c\n1,250;0.5;x\n2,500;12.75;y\n"))
    assert table["a"].tolist() == ["1,250", "2,500"]
    assert read_table(file("a;b\n1,250;x\n2,500;y\n"), decimal=".")["a"].tolist() == ["1,250", "2,500"]


def test_numbers_only_where_nothing_is_lost(file):
    """By the exact texts: everything that is not a plain number stays as it is written."""
    cells = {
        "id19": ["1234567890123456789", "1234567890123456790"], "mixed": ["9007199254740993", "0.5"],
        "id20": ["12345678901234567890", "12345678901234567891"], "phone": ["+4930123456", "+4930123457"],
        "zip": ["01234", "99999"], "money": ["$5.00", "$7.50"], "plus": ["+1.5", "-2"],
        "thousands": ['"1,234"', '"5,678"'], "percent": ["5%", "7%"],
    }  # fmt: skip
    text = ",".join(cells) + "\n" + "\n".join(",".join(row) for row in zip(*cells.values(), strict=True)) + "\n"
    table = read_table(file(text))
    assert table["id19"].dtype == "int64"
    for name, own in cells.items():
        assert [str(cell) for cell in table[name]] == [cell.strip('"') for cell in own], name
    gaps = TableFile.read(file("a,b\n9007199254740993,1.5\n,NA\nNA,-2e3\n")).table
    assert gaps["a"].dtype == "Int64"
    assert gaps["a"][0] == 9007199254740993
    assert gaps["b"].tolist()[::2] == [1.5, -2000.0]


def test_missing_adds_to_the_empty_cell(file):
    path = file("k,x\na,1\n,2\nNA,\nb,NA\n")
    with pytest.warns(UserWarning, match="column 'x': NA among numbers is a missing cell"):
        assert read_table(path)["x"].isna().tolist() == [False, False, True, True]
    assert TableFile.read(path, missing=["NA"]).notes == ()
    assert TableFile.read(path).table["k"].isna().tolist() == [False, True, False, False]
    table = read_table(path, missing=["NA"])
    assert table["k"].isna().tolist() == [False, True, True, False]
    assert table["x"].isna().tolist() == [False, False, True, True]


def test_spaces_after_separators(file):
    text = 'a, b, c\n1, x, "p, q"\n2, , z\n'
    read = TableFile.read(file(text))
    assert list(read.table) == ["a", "b", "c"]
    assert read.table["c"].tolist() == ["p, q", "z"]
    assert read.table["b"].isna().tolist() == [False, True]
    filled = read.table.assign(b=["x", "new"])
    assert fill(text, read.table, filled, read.dialect) == text.replace("2, ,", "2, new,")
    assert read_table(file("a,b\n1, x\n2,y\n"))["b"].tolist() == [" x", "y"], "not after every separator"


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_packed_files(file, pack):
    ending = {"gzip": "gz", "bz2": "bz2", "lzma": "xz"}[pack.__module__.strip("_")]
    for name in (f"t.csv.{ending}", "unknown.csv", f"T.CSV.{ending.upper()}"):
        check(read_table(file(pack(written(";", ",").encode()), name)))
    with pytest.raises(ValueError, match=f"not a readable .{ending} file"):
        read_table(file(pack(written(",", ".").encode())[:-9], f"torn.csv.{ending}"))


def test_archives(tmp_path):
    path = tmp_path / "t.csv.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data/rows.tsv", written("\t", "."))
        archive.writestr("__MACOSX/data/._rows.tsv", "junk")
    check(read_table(path))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("more.csv", "a\n1\n")
    with pytest.raises(ValueError, match=r"holds 2 files \(data/rows.tsv, more.csv\)"):
        read_table(path)
    with pytest.raises(ValueError, match="is a folder"):
        read_table(tmp_path)


def typed() -> pd.DataFrame:
    return pd.DataFrame({
        "who": ["a", None, "NA"], "x": [0.1 + 0.2, np.nan, -1e300], "n": pd.array([2**60 + 1, None, 3], dtype="Int64"),
        "b": [True, False, True], "t": pd.to_datetime(["2020-01-01 10:30:00", None, "1999-12-31 00:00:00"]),
    })  # fmt: skip


@pytest.mark.parametrize("ending", ["parquet", "PARQUET", "pq", "feather", "arrow", "json", "jsonl", "jsonl.gz", "csv",
                                    "csv.gz", "csv.zip", "csv.bz2", "csv.xz", "tsv", "tsv.gz"])  # fmt: skip
def test_what_is_written_is_read(tmp_path, ending):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    table, path = typed(), tmp_path / f"deep/t.{ending}"
    write_table(table, path)
    first = path.read_bytes()
    write_table(table, path)
    assert path.read_bytes() == first, "equal tables give equal files"
    read = read_table(path)
    assert list(read) == list(table)
    assert read["x"].tolist()[::2] == [0.1 + 0.2, -1e300]
    assert read["n"].tolist()[::2] == [2**60 + 1, 3]
    assert read["who"].tolist()[::2] == ["a", "NA"]
    assert read.isna().sum().tolist() == [1, 1, 1, 0, 1]
    if ending.lower() in ("parquet", "pq", "feather", "arrow"):
        pd.testing.assert_frame_equal(read, table)
    else:
        assert pd.to_datetime(read["t"], format="mixed").tolist()[::2] == table["t"].tolist()[::2]


@needs_excel
def test_excel(tmp_path):
    table = typed().assign(n=[1, 2, 3], x=[0.5, np.nan, -2.0], code=["007", "008", "009"])
    write_table(table, tmp_path / "t.XLSX")
    read = read_table(tmp_path / "t.XLSX")
    pd.testing.assert_frame_equal(read.fillna({"who": ""}), table.fillna({"who": ""}), check_dtype=False)
    assert read["code"].tolist() == ["007", "008", "009"]
    with pd.ExcelWriter(tmp_path / "two.xlsx", engine="openpyxl") as book:
        table.to_excel(book, sheet_name="first", index=False)
        table[:1].to_excel(book, sheet_name="second", index=False)
    with pytest.warns(UserWarning, match="the first of 2 sheets, 'first', is read"):
        assert len(read_table(tmp_path / "two.xlsx")) == 3
    zoned = pd.DataFrame({"t": pd.to_datetime(["2020-01-01T10:00+02:00"]).tz_convert("Europe/Berlin")})
    write_table(zoned, tmp_path / "zone.xlsx")
    assert pd.to_datetime(read_table(tmp_path / "zone.xlsx")["t"], utc=True)[0] == zoned["t"][0]
    (tmp_path / "torn.xlsx").write_bytes((tmp_path / "t.XLSX").read_bytes()[:-40])
    with pytest.raises(ValueError, match="not a readable"):
        read_table(tmp_path / "torn.xlsx")


def test_the_content_counts_more_than_the_name(tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    for name in ("t.parquet", "t.feather"):
        write_table(typed(), tmp_path / name)
        (tmp_path / name).rename(tmp_path / "t.csv")
        with pytest.warns(UserWarning, match=r"t.csv is an? \w+ file by its content, and read as one"):
            pd.testing.assert_frame_equal(read_table(tmp_path / "t.csv"), typed())
    (tmp_path / "text.parquet").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        read_table(tmp_path / "text.parquet")


def test_names_of_an_index_become_columns(tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    table = pd.DataFrame({"x": [1.5, 2.5]}, index=pd.MultiIndex.from_tuples([("a", 1), ("b", 2)], names=["k", "n"]))
    table.to_parquet(tmp_path / "t.parquet")
    assert read_table(tmp_path / "t.parquet").to_dict("list") == {"k": ["a", "b"], "n": [1, 2], "x": [1.5, 2.5]}
    pd.DataFrame({"x": [1.5, 2.5]}, index=[7, 9]).to_parquet(tmp_path / "t.parquet")
    assert read_table(tmp_path / "t.parquet").to_dict("list") == {"x": [1.5, 2.5]}


def test_json_forms(file):
    rows = [{"a": 1, "b": "x"}, {"a": None, "b": "y", "c": 9007199254740993}]
    text = {"t.json": json.dumps(rows, indent=2), "u.json": "\n".join(map(json.dumps, rows)), "v.csv": json.dumps(rows)}
    for name, content in text.items():
        table = TableFile.read(file(content, name)).table
        assert table["a"].tolist()[0] == 1
        assert table["c"].tolist()[1] == 9007199254740993
        assert table.isna().sum().tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match="line 2: not valid JSON"):
        read_table(file('{"a": 1}\n{"a": }\n', "t.jsonl"))
    with pytest.raises(ValueError, match="expected a list of objects"):
        read_table(file('{"a": [1, 2]}', "t.json"))


@pytest.mark.parametrize("name", ["t", "t.doc", "t.xls", "t.parquet.gz", "t.csv.rar"])
def test_other_names_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="the name says no format that can be written"):
        check_output(tmp_path / name)
    with pytest.raises(ValueError, match="is a folder"):
        check_output(tmp_path)


def test_what_a_format_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match="column 'x' has infinite numbers, which JSON cannot hold"):
        write_table(pd.DataFrame({"x": [np.inf]}), tmp_path / "t.json")
    with pytest.raises(ValueError, match="'ł' cannot be written in cp1252"):
        write_table(pd.DataFrame({"x": ["ł"]}), tmp_path / "t.csv", dialect=Dialect.of(encoding="cp1252"))
    assert not list(tmp_path.iterdir())


def test_filling_keeps_every_other_byte(file):
    """Against the bytes themselves, with the gap's place found by hand."""
    text = '\ufeffid;"na;me";x;k\r\n007;"Jörg\n""Z""";1,50;\r\n\r\n008;NA;;b\r\n'
    for encoding in ("utf-8", "cp1252", "utf-16-be"):
        data = text.removeprefix("\ufeff" if encoding == "cp1252" else "").encode(encoding)
        read = TableFile.read(file(data), missing=["NA"])
        filled = read.table.assign(x=[1.5, -0.25], k=["ü;", "b"], **{"na;me": ["-", 'q"']})
        bytes_ = read.dialect.to_bytes(fill(read.text, read.table, filled, read.dialect), "")
        expected = data.decode(encoding).replace("1,50;\r", '1,50;"ü;"\r').replace("NA;;b", '"q""";-0,25;b')
        assert bytes_ == expected.encode(encoding)
