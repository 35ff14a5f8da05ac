"""Subword captions: byte-level BPE trained by the test, and a small CLIP tokenizer read from its files."""

from __future__ import annotations

import pytest
import torch

from anystate.model.codecs.subwords import TokenizerCodec, open_tokenizer, train_bpe

pytest.importorskip("tokenizers")
CAPTIONS = [f"a {colour} {thing}" for colour in ("red", "green") for thing in ("boat", "house", "bird")]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    file = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train_bpe(CAPTIONS, 300).save(str(file))
    return file


def codec_of(file, length=12):
    return TokenizerCodec(file, length, open_tokenizer(file).get_vocab_size())


def test_every_string_round_trips(bpe):
    codec = codec_of(bpe, 40)
    texts = ["a red boat", "", "Zebra, 42!", "naïve 日本 🙂"]
    tokens = codec.encode(texts)
    assert tokens.shape == (4, 40)
    assert tokens.dtype == torch.int64
    assert tokens.max() < codec.states <= 300
    assert (tokens[1] == codec.pad).all()
    assert codec.decode(tokens) == texts


def test_frequent_strings_are_few_tokens(bpe):
    tokens, lengths = codec_of(bpe).encode_with_lengths(["a red boat", "xyzzy"])
    assert lengths == [3, 5]
    assert ((tokens != 0).sum(1) == torch.tensor(lengths)).all()


def test_long_captions_are_truncated(bpe):
    tokens, lengths = codec_of(bpe, 3).encode_with_lengths(["a red boat a red boat"])
    assert lengths[0] > 3
    assert codec_of(bpe, 3).decode(tokens) == ["a red boat"]


def test_masked_positions_are_shown(bpe):
    codec = codec_of(bpe)
    tokens = codec.encode(["a red boat"])
    tokens[0, 1] = codec.states
    assert codec.decode(tokens) == ["a▯ boat"]


def test_bpe_needs_room_for_all_bytes():
    with pytest.raises(ValueError, match="more than 256 states, got 200"):
        train_bpe(CAPTIONS, 200)


def test_a_tokenizer_beyond_the_vocabulary(bpe):
    with pytest.raises(ValueError, match="beyond the vocabulary of 260"):
        TokenizerCodec(bpe, 8, 260).encode(["a"])


def test_tokenizer_from_json(bpe, tmp_path):
    codec = codec_of(bpe)
    (tmp_path / "copy.json").write_text(codec.json())
    copy = codec_of(tmp_path / "copy.json")
    assert torch.equal(copy.encode(CAPTIONS), codec.encode(CAPTIONS))
    assert copy.json() == codec.json()


def test_clip_agrees_with_transformers(clip_tokenizer):
    transformers = pytest.importorskip("transformers")
    reference = transformers.CLIPTokenizer.from_pretrained(clip_tokenizer)
    codec = TokenizerCodec(clip_tokenizer, 10, 76, pad=75, start=74, end=75)
    texts = ["red bird", "a", "Red   BIRD", "abcdefghijklmnop"]
    expected = reference(texts, padding="max_length", truncation=True, max_length=10)["input_ids"]
    assert codec.encode(texts).tolist() == expected
    assert codec.decode(codec.encode(texts)) == ["red bird", "a", "red bird", "abcdefgh"]


def test_clip_from_its_single_file_reads_and_writes_the_same(clip_tokenizer, tmp_path):
    ids = {"pad": 75, "start": 74, "end": 75}
    codec = TokenizerCodec(clip_tokenizer, 12, 76, **ids)
    (tmp_path / "tokenizer.json").write_text(codec.json())
    copy = TokenizerCodec(tmp_path, 12, 76, **ids)
    tokens = codec.encode(["red bird 42"])
    assert torch.equal(copy.encode(["red bird 42"]), tokens)
    tokens[0, 2] = 76
    assert copy.decode(tokens) == codec.decode(tokens) == ["red ▯ird 4 2"]


def test_clip_pads_with_its_end_token_and_decoding_stops_at_the_first(clip_tokenizer):
    pytest.importorskip("transformers")
    tokens = TokenizerCodec(clip_tokenizer, 8, 76, pad=75, start=74, end=75).encode(["red"])
    assert tokens.tolist() == [[74, 73, 75, 75, 75, 75, 75, 75]]


@pytest.mark.parametrize("content", ["{}", "not json"])
def test_missing_tokenizer(tmp_path, monkeypatch, content):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "tokenizer.json").write_text(content)
    for path in (tmp_path / "tokenizer.json", tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"is not a tokenizer.json, a folder") as error:
            open_tokenizer(path)
        assert "\n" not in str(error.value)
