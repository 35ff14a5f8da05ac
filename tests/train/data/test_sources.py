"""Data sets that a config names: files, folders, tables, the hub and functions, and the errors they raise."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from anystate.configs.config import Data
from anystate.configs.kinds import find_kind
from anystate.train.data import emoji
from anystate.train.data.dataset import InMemory
from anystate.train.data.sources import open_source

STREAM = {"width": 8}
SECTIONS = {
    "image": {"kind": "image", "channels": 3, "size": 2},
    "text": {"kind": "text", "alphabet": "abc 0123", "length": 4},
    "label": {"kind": "label"},
    "row": {"kind": "columns"},
    "vector": {"kind": "vector", "size": 2},
    "series": {"kind": "series", "length": 3},
}
EMOJI = Path(os.environ.get("ANYSTATE_DATA", Path(__file__).parents[4] / "shared/data")) / "emoji/emoji.npz"


def modalities(*names: str, **more: dict) -> dict:
    """{name: modality}; a name m=n has the name m and the section of n."""
    sections = {name.partition("=")[0]: SECTIONS[name.partition("=")[2] or name] for name in names} | more
    return {m: find_kind(section["kind"])(**{"stream": STREAM} | section) for m, section in sections.items()}


def opened(source, *names: str, options=None, fields=None, **more):
    return open_source(Data(source=str(source), options=options or {}, fields=fields or {}), modalities(*names, **more))


def refused(source, *names: str, **settings) -> str:
    with pytest.raises(ValueError) as caught:
        opened(source, *names, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def picture(path: Path, red: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2), (red, 0, 0)).save(path)
    return path


# bundled


def test_digits():
    whole = opened("digits", "image", "text", "label")
    assert len(whole) == 1797
    assert whole[0]["text"] == ["a zero", "the digit 0", "number zero", "zero"]
    assert whole.labels["digit"].tolist() == list(whole.values["label"])
    other = opened("digits", "caption=text", fields={"caption": "text"})
    assert list(other.values) == ["caption"]


def test_adult_has_its_own_split():
    train, test = opened("adult", "row")
    assert (len(train), len(test)) == (32561, 16281)
    assert isinstance(train.values["row"], pd.DataFrame)
    assert list(train.values["row"])[:2] == ["age", "workclass"]
    assert train[0]["row"]["age"] == 39
    mixed, _ = opened("adult", "row", "income=label")
    assert "income" not in mixed.values["row"]
    assert set(mixed.values["income"]) == {"<=50K", ">50K"}


@pytest.mark.skipif(not EMOJI.is_file(), reason=f"needs the emoji data set ({EMOJI})")
def test_emoji():
    train, test = opened("emoji", "image", "text", "row", options={"path": str(EMOJI)})
    assert (len(train), len(test)) == (3298, 366)
    assert (train[0]["image"].shape, train[0]["image"].dtype) == ((32, 32, 3), np.uint8)
    assert set(train.labels) == {"base", "modifier"}
    rows = pd.concat([part.values["row"] for part in (train, test)])
    counts = {name: rows[name].value_counts().to_dict() for name in rows}
    assert counts["gender"] == {"none": 2490, "woman": 548, "man": 543, "both": 83}
    assert counts["kind"] == {"plain": 1723, "tone": 1525, "two-tone": 260, "gender": 156}
    assert {name: n for name, n in counts["tone"].items() if " " not in name} == {
        "none": 1879, "light": 305, "medium-light": 305, "medium": 305, "medium-dark": 305, "dark": 305
    }  # fmt: skip
    assert {n for name, n in counts["tone"].items() if " " in name} == {13}
    modifiers = np.concatenate([part.labels["modifier"] for part in (train, test)])
    is_gender = (rows["kind"] == "gender").to_numpy()
    assert rows["gender"].to_numpy()[is_gender].tolist() == modifiers[is_gender].tolist()


def test_emoji_of_a_small_file(tmp_path):
    arrays = {
        "images": np.zeros((4, 32, 32, 3), np.uint8),
        "captions": np.array(["woman running", "kiss woman man light and dark skin", "a hat", "merman dark skin tone"]),
        "split": np.array(["train", "train", "test", "train"]),
        "kind": np.array(["gender", "two-tone", "plain", "tone"]),
        "base": np.array(["running", "kiss woman man", "a hat", "merman"]),
        "modifier": np.array(["woman", "light and dark", "", "dark"]),
        "group": np.array(["People & Body"] * 4),
    }
    np.savez(tmp_path / "x.npz", **arrays)
    train, test = emoji.load(str(tmp_path / "x.npz"))
    assert train.values["row"]["tone"].tolist() == ["none", "light and dark", "dark"]
    assert train.values["row"]["gender"].tolist() == ["woman", "both", "man"]
    assert test[0]["row"] == {"group": "People & Body", "kind": "plain", "tone": "none", "gender": "none"}
    del arrays["base"]
    np.savez(tmp_path / "y.npz", **arrays)
    with pytest.raises(ValueError, match="no array 'base'; there are images, captions"):
        emoji.load(str(tmp_path / "y.npz"))
    with pytest.raises(ValueError, match=r"emoji: path 'nowhere\.npz' not found"):
        emoji.load("nowhere.npz")


# npz


IMAGES = np.zeros((5, 2, 2, 3), np.uint8)
CAPTIONS = np.array(["a", "b", "c", "ab", "bc"])


def npz(folder: Path, **arrays) -> Path:
    np.savez(folder / "x.npz", **arrays)
    return folder / "x.npz"


def test_npz_with_its_own_split_and_annotations(tmp_path):
    split = np.array(["train", "test", "train", "train", "validation"])
    path = npz(tmp_path, images=IMAGES, captions=CAPTIONS, split=split, base=CAPTIONS, other=np.zeros((2, 2)))
    train, test = opened(path, "image", "text")
    assert train.values["text"] == ["a", "c", "ab"]
    assert test.values["text"] == ["b", "bc"]
    assert {name: values.tolist() for name, values in train.labels.items()} == {"base": ["a", "c", "ab"]}


def test_npz_is_found_in_the_data_folder(tmp_path, monkeypatch):
    npz(tmp_path, images=IMAGES, captions=CAPTIONS)
    monkeypatch.setenv("ANYSTATE_DATA", str(tmp_path))
    assert len(opened("x.npz", "image", "text")) == 5


def test_npz_versions_gaps_and_fields(tmp_path):
    captions = np.array([["a", "b"], ["c", ""], ["", ""]])
    vectors = np.array([[1.0, 2.0], [np.nan, np.nan], [3.0, 4.0]])
    path = npz(tmp_path, words=captions, v=vectors, label=np.array([7, 8, 9]))
    whole = opened(path, "text", "vector", "label", fields={"text": "words", "vector": "v"})
    assert whole.values["text"] == [["a", "b"], ["c"], None]
    assert set(whole[1]) == {"text", "label"}
    assert whole[2]["vector"].tolist() == [3.0, 4.0]
    assert whole.values["label"].tolist() == [7, 8, 9]


def test_npz_columns_are_the_arrays_that_no_other_takes(tmp_path):
    path = npz(tmp_path, images=IMAGES, age=np.arange(5), name=CAPTIONS)
    rows = opened(path, "image", "row").values["row"]
    assert rows.to_dict("list") == {"age": [0, 1, 2, 3, 4], "name": CAPTIONS.tolist()}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": IMAGES}, "no array, column or file 'text' for the modality text; there are images"),
        ({"images": IMAGES, "captions": CAPTIONS[:3]}, "modalities differ in length: 5 of image, 3 of text"),
        ({"images": IMAGES, "captions": CAPTIONS, "split": np.array(["train"] * 5)}, "5 training and 0 held-out"),
        ({"images": IMAGES, "captions": CAPTIONS, "split": np.array(["dev"] * 5)}, "split 'dev' of example 0"),
    ],
)
def test_invalid_npz(tmp_path, arrays, message):
    path = npz(tmp_path, **arrays)
    error = refused(path, "image", "text")
    assert message in error
    assert str(path) in error


def test_npz_that_is_none(tmp_path):
    (tmp_path / "x.npz").write_text("hello")
    assert "not a readable .npz file" in refused(tmp_path / "x.npz", "image")


def test_a_field_that_does_not_exist(tmp_path):
    path = npz(tmp_path, images=IMAGES, captions=CAPTIONS)
    error = refused(path, "image", "text", fields={"text": "words"})
    assert "data.fields.text is 'words'; there are images, captions" in error


# folders of files


def test_files_of_one_name_are_one_example(tmp_path):
    for i in range(3):
        picture(tmp_path / f"{i}.png", i)
    (tmp_path / "0.txt").write_text("a\n\nb\n")
    (tmp_path / "2.txt").write_text("\n")
    np.save(tmp_path / "1.vector.npy", np.arange(2.0))
    (tmp_path / "0.label.txt").write_text("7\n")
    (tmp_path / "0.json").write_text('{"age": 3}')
    (tmp_path / "notes.md").write_text("no example")
    whole = opened(tmp_path, "image", "text", "vector", "label", "row")
    assert len(whole) == 3
    assert whole[0]["image"] == tmp_path / "0.png"
    assert {m: value for m, value in whole[0].items() if m != "image"} == {
        "text": ["a", "b"], "label": "7", "row": {"age": 3}
    }  # fmt: skip
    assert set(whole[1]) == {"image", "vector"}
    assert whole[1]["vector"].tolist() == [0.0, 1.0]
    assert set(whole[2]) == {"image"}


def test_subfolders_are_splits_or_classes(tmp_path):
    for split in ("train", "validation"):
        for name in ("cat", "dog"):
            picture(tmp_path / split / name / "0.png")
    train, test = opened(tmp_path, "image", "label")
    assert train.values["label"] == ["cat", "dog"]
    assert test[0]["image"] == tmp_path / "validation/cat/0.png"
    picture(tmp_path / "cat" / "0.png")
    assert "split '' of example 0" in refused(tmp_path, "image")


def test_a_folder_with_one_split_is_split_at_random_later(tmp_path):
    picture(tmp_path / "train/0.png")
    assert len(opened(tmp_path, "image")) == 1


def test_folders_without_files_of_a_modality(tmp_path):
    (tmp_path / "x.md").write_text("")
    assert "no table and no files of the modalities (image: .png, " in refused(tmp_path, "image")
    picture(tmp_path / "0.png")
    assert "'text' for the modality text; there are image, folder" in refused(tmp_path, "image", "text")


def test_an_unreadable_file_is_named(tmp_path):
    (tmp_path / "0.npy").write_text("hello")
    error = refused(tmp_path, "vector")
    assert "vector, example 0" in error
    assert "0.npy' is not a readable .npy file" in error


# the ImageFolder of Hugging Face, and lists of captions


def jsonl(path: Path, *records: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_metadata_jsonl(tmp_path):
    for i in range(3):
        picture(tmp_path / f"{i}.png")
    records = [{"file_name": "1.png", "text": "b", "n": 1}, {"file_name": "0.png", "text": ["a", "ab"], "n": 0}]
    jsonl(tmp_path / "metadata.jsonl", *records, {"file_name": "2.png", "text": None, "n": 2})
    whole = opened(tmp_path, "image", "text")
    assert whole.values["image"] == [tmp_path / f"{i}.png" for i in (1, 0, 2)]
    assert whole.values["text"] == ["b", ["a", "ab"], None]
    assert whole.labels["n"].tolist() == [1, 0, 2]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata_in_each_split(tmp_path, kind):
    for split in ("train", "test"):
        picture(tmp_path / split / "0.png")
        if kind == "csv":
            (tmp_path / split / "metadata.csv").write_text(f"file_name,text\n0.png,{split[0:0]}a\n")
        else:
            jsonl(tmp_path / split / "metadata.jsonl", {"file_name": "0.png", "text": "a"})
    train, test = opened(tmp_path, "image", "text")
    assert train.values == {"image": [tmp_path / "train/0.png"], "text": ["a"]}
    assert test.values == {"image": [tmp_path / "test/0.png"], "text": ["a"]}


def test_metadata_above_the_splits_and_several_files_a_row(tmp_path):
    for split in ("train", "test"):
        picture(tmp_path / split / "0.png")
        np.save(tmp_path / split / "0.npy", np.arange(2.0))
    rows = [{"image_file_name": f"{s}/0.png", "vector_file_name": f"{s}/0.npy"} for s in ("train", "test")]
    jsonl(tmp_path / "metadata.jsonl", *rows)
    train, test = opened(tmp_path, "image", "vector")
    assert test[0]["image"] == tmp_path / "test/0.png"
    assert train[0]["vector"].tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("line", "message"),
    [('{"file_name": "0.png", "text"', "line 2: not valid JSON"), ("[1, 2]", "line 2: expected an object")],
)
def test_a_broken_line_is_named(tmp_path, line, message):
    picture(tmp_path / "0.png")
    path = tmp_path / "metadata.jsonl"
    path.write_text('{"file_name": "0.png", "text": "a"}\n' + line + "\n")
    error = refused(tmp_path, "image", "text")
    assert error.startswith(f"{path}, {message}")


def test_captions_json_and_csv_of_captions(tmp_path):
    for i in range(2):
        picture(tmp_path / "json" / f"{i}.png")
        picture(tmp_path / "csv" / f"{i}.png")
    (tmp_path / "json/captions.json").write_text('{"0.png": ["a", "b"], "1.png": "c"}')
    assert opened(tmp_path / "json", "image", "text").values["text"] == [["a", "b"], "c"]
    (tmp_path / "csv/any.csv").write_text("File,Caption\n0.png,a\n1.png,c\n0.png,b\n")
    whole = opened(tmp_path / "csv", "image", "text")
    assert whole.values["image"] == [tmp_path / "csv/0.png", tmp_path / "csv/1.png"]
    assert whole.values["text"] == [["a", "b"], "c"]


def test_unquoted_commas_are_refused(tmp_path):
    picture(tmp_path / "0.png")
    (tmp_path / "captions.csv").write_text("file,caption\n0.png,a red car, a blue house\n")
    assert "row 1 has 3 fields, the header 2" in refused(tmp_path, "image", "text")


def test_a_picture_in_several_splits_is_refused(tmp_path):
    picture(tmp_path / "0.png")
    (tmp_path / "x.csv").write_text("file,caption,split\n0.png,a,train\n0.png,b,test\n")
    assert "0.png has rows in several splits" in refused(tmp_path, "image", "text")


# tables


def test_csv_with_a_column_a_modality(tmp_path):
    picture(tmp_path / "pics/0.png", 9)
    np.save(tmp_path / "s.npy", np.arange(3.0))
    path = tmp_path / "x.csv"
    path.write_text(
        "picture,caption,label,series,vector,age,city\n"
        "pics/0.png,007,1,s.npy,1 2,30,Ulm\n"
        ",3,2,,,31,Jena\n"
        "pics/0.png,,,s.npy,\"3, 4\",32,Ulm\n"
    )  # fmt: skip
    merged = opened(path, "image", "text")
    assert merged.values["image"] == [tmp_path / "pics/0.png", None]
    assert merged.values["text"] == ["007", "3"]
    assert len(opened(path, "image", "row")) == 3
    whole = opened(path, "text", "label", "series", "vector", "row")
    assert whole.values["text"] == ["007", "3", None]
    assert whole.values["label"] == ["1", "2", None]
    assert [None if v is None else v.tolist() for v in whole.values["vector"]] == [[1.0, 2.0], None, [3.0, 4.0]]
    assert list(whole.values["row"]) == ["picture", "age", "city"]
    assert whole[0]["row"] == {"picture": "pics/0.png", "age": 30, "city": "Ulm"}
    assert "series" not in whole[1]


def test_columns_of_a_schema_and_texts_of_missing_cells(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("age,code,city,caption\n3,1,Ulm,a\n-9,2,Jena,b\n")
    row = {
        "kind": "columns",
        "missing": ["-9"],
        "table_schema": {"columns": [{"name": "code", "kind": "categorical"}, "age"]},
    }
    whole = opened(path, "text", row=row)
    rows = whole.values["row"]
    assert list(rows) == ["code", "age"]
    assert rows["code"].tolist() == ["1", "2"]
    assert rows["age"].isna().tolist() == [False, True]
    assert whole.labels["city"].tolist() == ["Ulm", "Jena"]
    row["table_schema"] = {"columns": ["height"]}
    assert "row: column 'height' is missing; the table has" in refused(path, "text", row=row)
    assert "data.fields.row: row takes all columns" in refused(path, "text", "row", fields={"row": "age"})


def test_a_table_in_one_file_for_each_split(tmp_path):
    (tmp_path / "train.csv").write_text("text,n\n1,1\na,2\n")
    (tmp_path / "test.csv").write_text("text,n\n1,3\n")
    train, test = opened(tmp_path, "text", "row")
    assert train.values["text"] == ["1", "a"]
    assert test.values["text"] == ["1"]
    assert test[0]["row"] == {"n": 3}
    (tmp_path / "test.csv").write_text("text\n1\n")
    assert "train.csv has the columns text, n; " in refused(tmp_path, "text")
    (tmp_path / "test.csv").rename(tmp_path / "other.csv")
    (tmp_path / "train.csv").rename(tmp_path / "more.csv")
    assert "holds several tables (more.csv, other.csv)" in refused(tmp_path, "text")


def test_the_split_of_a_column(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("text,split\na,train\nb,val\n")
    train, test = opened(path, "text")
    assert (train.values["text"], test.values["text"]) == (["a"], ["b"])
    assert "split" not in train.labels
    path.write_text("text,split\na,train\nb,\n")
    assert "split '' of example 1" in refused(path, "text")


def test_rows_without_any_cell(tmp_path):
    (tmp_path / "x.csv").write_text("text,n\n")
    assert "has no rows" in refused(tmp_path / "x.csv", "text")


@pytest.fixture
def hugging_face(tmp_path):
    """Rows as `datasets` stores them: an image of bytes, several sentences, a class, numbers in a list."""
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    data = picture(tmp_path / "p.png").read_bytes()
    (tmp_path / "p.png").unlink()
    return {
        "image": [{"bytes": data, "path": "p.png"}, {"bytes": None, "path": None}],
        "sentences": [["a", "b"], []],
        "label": [3, 4],
        "vector": [[1.0, 2.0], [3.0, 4.0]],
        "series": [[[1.0, 2.0, 3.0]], [[4.0, 5.0, 6.0]]],
    }


def check_hugging_face(part):
    assert part[0]["image"][:4] == b"\x89PNG"
    assert part[0]["text"] == ["a", "b"]
    assert set(part[1]) == {"label", "vector", "series"}
    assert list(part.values["label"]) == [3, 4]
    assert part[1]["vector"].tolist() == [3.0, 4.0]
    assert part[1]["series"].tolist() == [[4.0, 5.0, 6.0]]


def test_parquet_of_a_hub_data_set(tmp_path, hugging_face, monkeypatch):
    import huggingface_hub
    import pyarrow.parquet

    (tmp_path / "repo/data").mkdir(parents=True)
    for split in ("train", "test"):
        table = pyarrow.table(hugging_face)
        pyarrow.parquet.write_table(table, tmp_path / f"repo/data/{split}-00000-of-00001.parquet")
    seen = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **options: seen.append((name, options)) or tmp_path / "repo"
    )
    train, test = opened("me/things", "image", "text", "label", "vector", "series", options={"revision": "x"})
    assert seen == [("me/things", {"repo_type": "dataset", "revision": "x"})]
    check_hugging_face(train)
    check_hugging_face(test)


def test_a_hub_data_set_that_is_none(monkeypatch):
    import huggingface_hub

    def fail(name, **options):
        raise OSError("404\nnot there")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    error = refused("me/things", "text")
    assert "data.source 'me/things' not found" in error
    assert "nor on the Hugging Face hub: 404 not there" in error


@pytest.mark.parametrize("form", ["stream", "file"])
def test_folder_that_datasets_saved(tmp_path, hugging_face, form):
    import pyarrow

    for split in ("train", "validation"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "state.json").write_text("{}")
        table, path = pyarrow.table(hugging_face), tmp_path / split / "data-00000-of-00001.arrow"
        new = pyarrow.ipc.new_stream if form == "stream" else pyarrow.ipc.new_file
        with new(str(path), table.schema) as writer:
            writer.write_table(table)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    train, test = opened(tmp_path, "image", "text", "label", "vector", "series")
    check_hugging_face(train)
    check_hugging_face(test)


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.feather", "x.jsonl"])
def test_tables_are_read_as_by_the_commands_of_tables(tmp_path, name):
    """Separators, decimal marks, encodings and formats are those of `anystate table`."""
    from anystate.model.codecs.table.dialect import Dialect
    from anystate.model.codecs.table.files import write_table

    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    rows = pd.DataFrame({"caption": ["Köln", "a, b", "007"], "height": [1.5, -2.25, 12.0]})
    write_table(rows, tmp_path / name, dialect=Dialect.of(";", "cp1252", ","))
    found = opened(tmp_path / name, "text", "row")
    assert found.values["text"] == ["Köln", "a, b", "007"]
    assert found.values["row"]["height"].tolist() == [1.5, -2.25, 12.0]


@pytest.mark.parametrize("ending", ["parquet", "arrow", "csv.gz", "json"])
def test_unreadable_tables(tmp_path, ending):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    path = tmp_path / f"x.{ending}"
    path.write_text("hello")
    error = refused(path, "text")
    assert error.startswith(str(path))
    assert "not " in error


def test_a_file_that_does_not_exist(tmp_path):
    (tmp_path / "x.csv").write_text("image\n0.png\n")
    error = refused(tmp_path / "x.csv", "image")
    assert "x.csv, image, example 0: image '0.png' not found" in error


# functions


FUNCTIONS = """
import numpy as np
from anystate.train.data.dataset import InMemory

class Mine:
    def __len__(self): return 3
    def __getitem__(self, i): return {"text": "abc"[i]}

def mine(n=1): return InMemory({"words": ["a"] * n, "image": np.zeros((n, 2, 2, 3))}, {"digit": np.arange(n)})
def two(): return Mine(), Mine()
def numbers(): return [1, 2]
def words(): return {"text": ["a"]}
def three(): return Mine(), Mine(), Mine()
def breaks(): raise RuntimeError("in the function of the user")
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "functions_of_a_user.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    return "functions_of_a_user"


def test_function(module):
    whole = opened(f"{module}:mine", "text", "image", options={"n": 4}, fields={"text": "words"})
    assert isinstance(whole, InMemory)
    assert whole.values["text"] == ["a"] * 4
    assert whole.labels["digit"].tolist() == [0, 1, 2, 3]
    train, _ = opened(f"{module}:two", "text")
    assert train[2] == {"text": "c"}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mine", {"m": 1}, "got an unexpected keyword argument 'm'; data.options are its arguments"),
        ("mine", {}, "'text' for the modality text; there are words, image"),
        ("numbers", {}, "returned a list: return a data set"),
        ("words", {}, "returned a dict: return a data set"),
        ("three", {}, "returned a tuple"),
        ("nothing", {}, "has no 'nothing'"),
    ],
)
def test_wrong_functions(module, name, options, message):
    error = refused(f"{module}:{name}", "text", options=options)
    assert message in error
    assert f"{module}:{name}" in error


def test_errors_inside_a_function_are_not_hidden(module):
    with pytest.raises(RuntimeError, match="in the function of the user"):
        opened(f"{module}:breaks", "text")


# none of them


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.npz", "data.source 'nowhere.npz' not found"),
        ("no_such_module:function", "cannot be imported"),
    ],
)
def test_no_such_source(source, message):
    assert message in refused(source, "text")


def test_file_of_another_kind(tmp_path):
    (tmp_path / "x.tar").write_text("")
    assert "give a folder, or an .npz" in refused(tmp_path / "x.tar", "text")
