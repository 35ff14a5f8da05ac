"""Captions ↔ tokens of a subword tokenizer: byte-level BPE trained here, or CLIP's."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

HIDDEN = "▯"  # a masked position of a half-noised caption


@dataclasses.dataclass(frozen=True)
class TokenizerCodec:
    """Captions ↔ int64 (N, length): [start] subwords [end], then pads.

    Longer captions are cut off, the end token stays, as everywhere with CLIP; `encode_measured` tells which.

    Args:
        path: a `tokenizer.json`, a folder that holds one (or CLIP's vocab.json and merges.txt), or a hub id.
        states: number of real tokens; the hidden (mask) token has this index.
        pad, start, end: token ids; start and end may be None. CLIP pads with its end token.
    """

    path: str | Path
    length: int
    states: int
    pad: int = 0
    start: int | None = None
    end: int | None = None

    @functools.cached_property
    def tokenizer(self):
        """The `tokenizers.Tokenizer`; raises ValueError if its tokens go beyond `states`."""
        tokenizer = open_tokenizer(self.path)
        size = tokenizer.get_vocab_size()
        if size > self.states:
            raise ValueError(f"{self.path}: the tokenizer has {size} tokens, beyond the vocabulary of {self.states}")
        return tokenizer

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Captions → tokens."""
        return self.encode_measured(captions)[0]

    def encode_measured(self, captions: Sequence[str]) -> tuple[Tensor, list[int]]:
        """Tokens, and how many positions each caption would take if none were cut off."""
        tokens = np.full((len(captions), self.length), self.pad, dtype=np.int64)
        head = [] if self.start is None else [self.start]
        tail = [] if self.end is None else [self.end]
        room = self.length - len(head) - len(tail)
        lengths = []
        for row, encoding in enumerate(self.tokenizer.encode_batch(list(captions), add_special_tokens=False)):
            ids = head + encoding.ids[:room] + tail
            tokens[row, : len(ids)] = ids
            lengths.append(len(encoding) + len(head) + len(tail))
        return torch.from_numpy(tokens), lengths

    def decode(self, tokens: Tensor) -> list[str]:
        """Tokens → captions: up to the end token, or without the pads if there is none; hidden positions show as ▯."""
        special = {self.pad, self.start, self.end} - {None}
        captions = []
        for row in tokens.cpu().tolist():
            if self.end is not None and self.end in row:
                row = row[: row.index(self.end)]
            shown, run = [], []
            for token in [*row, self.states]:  # a hidden token at the end closes the last run
                if token < self.states:
                    run += [] if token in special else [token]
                    continue
                shown += [self._words(run)] if run else []
                shown, run = [*shown, HIDDEN], []
            captions.append("".join(shown[:-1]).strip())
        return captions

    def _words(self, tokens: list[int]) -> str:
        text = self.tokenizer.decode(tokens, skip_special_tokens=False)
        suffix = getattr(self.tokenizer.model, "end_of_word_suffix", None)  # CLIP's </w>; its file has no rule for it
        return text.replace(suffix, " ") if suffix else text

    def json(self) -> str:
        """The content of a `tokenizer.json`, for copies beside weights or data."""
        return self.tokenizer.to_str()


def open_tokenizer(path: str | Path):
    """A `tokenizers.Tokenizer` without padding or truncation of its own.

    Raises:
        ValueError: the library is missing, or there is no tokenizer at that path or hub id.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ValueError("subword tokens need tokenizers: pip install anystate[pairs]") from None
    file = Path(path)
    try:
        if file.is_file():
            tokenizer = Tokenizer.from_file(str(file))
        elif (file / "tokenizer.json").is_file():
            tokenizer = Tokenizer.from_file(str(file / "tokenizer.json"))
        elif (file / "vocab.json").is_file():
            from transformers import CLIPTokenizerFast

            made = CLIPTokenizerFast.from_pretrained(str(file)).backend_tokenizer
            tokenizer = Tokenizer.from_str(made.to_str())  # without the decoding that transformers puts around it
        else:
            tokenizer = Tokenizer.from_pretrained(str(path))
    except Exception as error:  # the hub, the disk and the library each raise kinds of their own
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{str(path)!r} is no tokenizer.json, no folder with one and no tokenizer the hub gives out: {reason}"
        ) from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def train_bpe(captions: Iterable[str], states: int, pad: str = "<pad>"):
    """A byte-level BPE tokenizer with at most `states` tokens; token 0 is the pad, every text can be written.

    Source: Sennrich et al., arXiv 1508.07909, over bytes as in GPT-2.
    """
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise ValueError("byte-level BPE needs tokenizers: pip install anystate[pairs]") from None
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if states <= len(alphabet):
        raise ValueError(f"byte-level BPE needs more than {len(alphabet)} states, got {states}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=states, special_tokens=[pad], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    return tokenizer
