"""Lists of links to tars: download, resuming, encoding and deletion, and refusal of malicious tars."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from anystate.tests.train.data.conftest import codecs_of
from anystate.train.data.packed.packed import Packed
from anystate.train.data.packing.image_text import Settings
from anystate.train.data.packing.open import open_source
from anystate.train.data.packing.pack import pack


def png(k: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), k, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def tar_of(numbers, *members) -> bytes:
    """A tar of images sa_K.png with a .json beside each, as in SAM, and further members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for k in numbers:
            for name, data in ((f"./sa_{k}.png", png(k)), (f"./sa_{k}.json", b"{}")):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
        for entry in members:
            tar.addfile(entry, io.BytesIO(b"x" * entry.size))
    return buffer.getvalue()


@pytest.fixture
def work(tmp_path, server):
    """Three tars of 20 images each, their list and their captions."""
    for t in range(3):
        server.files[f"sa_{t}.tar"] = tar_of(range(20 * t, 20 * t + 20))
    lines = ["file_name\tcdn_link", *(f"sa_{t}.tar\t{server.url}/sa_{t}.tar" for t in range(3))]
    (tmp_path / "links.tsv").write_text("\n".join(lines) + "\n")
    captions = [{"__key__": f"images/sa_{k}", "txt": f"image {k}"} for k in range(60)]
    (tmp_path / "captions.jsonl").write_text("\n".join(json.dumps(c) for c in captions))
    return tmp_path


def run(work, settings=None, bad_share=0.01):
    source = open_source(str(work / "links.tsv"), str(work / "captions.jsonl"))
    return pack(source, work / "set", settings or Settings(), bad_share)


def examples_of(work, split="train"):
    return Packed(work / "set", codecs_of(work / "set"), split, loader="webdataset").examples()


def check_all_there(work):
    examples = examples_of(work)
    numbers = [int(key.split("_")[1]) for key in examples.labels["key"].tolist()]
    assert sorted(numbers) == list(range(60))
    assert examples.raw.values["text"] == [[f"image {k}"] for k in numbers]
    assert np.array_equal(((examples.x["image"][:, 0, 0, 0] + 1) * 127.5).round(), numbers)
    left = list((work / "set").rglob("*.tar"))
    assert sorted(str(p.relative_to(work / "set")) for p in left) == [f"train/0000{k}.tar" for k in (1, 2, 3)]


def test_links_become_one_shard_each_and_the_tars_are_deleted(work, server):
    run(work)
    check_all_there(work)
    requests = len(server.seen)
    run(work)
    assert len(server.seen) == requests


def test_an_interrupted_download_is_resumed(work, server):
    half = len(server.files["sa_1.tar"]) // 2
    server.broken["sa_1.tar"] = [half, half // 2]
    run(work)
    check_all_there(work)
    ranges = [r for name, r in server.seen if name == "sa_1.tar"]
    assert ranges == [None, f"bytes={half}-", f"bytes={half + half // 2}-"]


def test_the_next_run_resumes_a_failed_download(work, server):
    server.broken["sa_1.tar"] = [1000] * 4
    with pytest.raises(ValueError, match=r"sa_1.tar broke off after \d+ of \d+ bytes; run again"):
        run(work)
    before = len(server.seen)
    run(work)
    ranges = [r for name, r in server.seen[before:] if name == "sa_1.tar"]
    assert "sa_0.tar" not in [name for name, _ in server.seen[before:]]  # it is done
    assert ranges[0].startswith("bytes=")  # it is resumed
    check_all_there(work)


def test_a_dead_link_is_named_and_can_be_skipped(work, server):
    del server.files["sa_1.tar"]
    with pytest.raises(ValueError, match=r"sa_1.tar: 404"):
        run(work)
    text = (work / "links.tsv").read_text()
    (work / "links.tsv").write_text(text.replace("sa_1.tar\t", "#sa_1.tar\t"))
    assert run(work).samples("train") == 40


def link(name, kind, target):
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    return entry


def file(name):
    entry = tarfile.TarInfo(name)
    entry.size = 3
    return entry


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (file("../outside.png"), "'../outside.png' leads out"),
        (file("a/../../outside.png"), "leads out"),
        (file("/tmp/anystate-outside.png"), "leads out"),
        (file("..\\outside.png"), "leads out"),
        (link("x.png", tarfile.SYMTYPE, "/etc/passwd"), "'x.png' is a link"),
        (link("x.png", tarfile.LNKTYPE, "sa_20.png"), "'x.png' is a link"),
        (link("x.png", tarfile.FIFOTYPE, ""), "not a regular file"),
    ],
)
def test_malicious_members_are_refused(work, server, member, message):
    server.files["sa_1.tar"] = tar_of(range(20, 40), member)
    before = {p for p in work.parent.rglob("*") if work / "set" not in p.parents}
    with pytest.raises(ValueError, match="refused, member") as error:
        run(work)
    assert message in str(error.value)
    assert "sa_1.tar" in str(error.value)
    assert {p for p in work.parent.rglob("*") if work / "set" not in p.parents} - before == {work / "set"}
    assert not list((work / "set").rglob("*outside*"))
    assert not (work / "set/train/00002.tar").exists()


def test_a_truncated_tar(work, server):
    server.files["sa_1.tar"] = server.files["sa_1.tar"][:3000]
    with pytest.raises(ValueError, match=r"sa_1.tar: truncated or not a tar file"):
        run(work)


def test_images_without_a_caption_are_counted(work):
    lines = (work / "captions.jsonl").read_text().splitlines()
    (work / "captions.jsonl").write_text("\n".join(lines[4:]))
    with pytest.raises(ValueError, match=r"4 of 20 samples cannot be used"):
        run(work)
    assert run(work, bad_share=0.2).skipped == {"total": 4, "text: missing": 4}


def test_held_out_share_is_drawn_by_key(work):
    manifest = run(work, Settings(test_share=0.3))
    counts = {s: manifest.samples(s) for s in manifest.splits}
    assert sum(counts.values()) == 60
    assert abs(counts["test"] - 18) < 14  # four standard deviations
    assert not set(examples_of(work).labels["key"]) & set(examples_of(work, "test").labels["key"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a.tar\thttp://x/a.tar\nb.tar ftp://x/b.tar\n", "line 2: expected NAME.tar and an http link"),
        ("a.tar\thttp://x/a.tar\nb.tar file:///etc/passwd\n", "line 2"),
        ("# nothing\n", "no links"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path, content, message):
    (tmp_path / "links.tsv").write_text(content)
    with pytest.raises(ValueError, match=message):
        open_source(str(tmp_path / "links.tsv"), "captions.csv")


def test_links_need_captions(work):
    with pytest.raises(ValueError, match="needs --captions"):
        open_source(str(work / "links.tsv"))


@pytest.mark.parametrize("kind", ["csv", "json", "parquet"])
def test_captions_from_other_tables(work, kind):
    rows = [json.loads(line) for line in (work / "captions.jsonl").read_text().splitlines()]
    path = work / f"captions.{kind}"
    if kind == "csv":
        path.write_text("key,caption\n" + "".join(f"{r['__key__']}.jpg,{r['txt']}\n" for r in rows))
    elif kind == "json":
        path.write_text(json.dumps({r["__key__"]: [r["txt"]] for r in rows}))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    pack(open_source(str(work / "links.tsv"), str(path)), work / "set", Settings())
    check_all_there(work)
