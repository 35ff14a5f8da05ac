"""Captions ↔ tokens of a subword tokenizer: byte-level BPE trained on the captions, or CLIP's."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .base import Codec, NoFile
from .characters import MASKED

if TYPE_CHECKING:
    from typing import Self

    from tokenizers import Tokenizer


@dataclasses.dataclass
class TokenizerCodec(Codec):
    """Captions ↔ int64 (N, length): [start] subwords [end], then pads.

    Longer captions are truncated before the end token, as with CLIP; `encode_with_lengths` also gives the full lengths.

    Args:
        path: a `tokenizer.json`, a folder with one (or with CLIP's vocab.json and merges.txt), or a hub id; None: `fit`
            trains a byte-level BPE on the captions.
        states: number of tokens without the mask token, whose index it is.
        pad, start, end: token ids; start and end may be None. CLIP pads with its end token.
        content: of a `tokenizer.json`, as checkpoints keep it, instead of the file at `path`.
    """

    path: str | Path | None
    length: int
    states: int
    pad: int = 0
    start: int | None = None
    end: int | None = None
    content: str | None = dataclasses.field(default=None, repr=False)

    @property
    def is_fitted(self) -> bool:
        return self.path is not None or self.content is not None

    def fit(self, values: Sequence[str], seed: int = 0) -> None:
        if not self.is_fitted:
            self.content = train_bpe(values, self.states).to_str()

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            ValueError: it cannot be loaded, or has more than `states` tokens.
        """
        tokenizer = open_tokenizer(self.path, self.content)
        size = tokenizer.get_vocab_size()
        if size > self.states:
            raise ValueError(f"{self.path}: the tokenizer has {size} tokens, beyond the vocabulary of {self.states}")
        return tokenizer

    def encode(self, values: Sequence[str]) -> Tensor:
        """Captions → tokens."""
        return self.encode_with_lengths(values)[0]

    def encode_masked(self, captions: Sequence[str]) -> Tensor:
        """Captions → tokens, where the sign ▯ becomes the mask token."""
        return self._pack([self._masked_ids(caption) for caption in captions])[0]

    def encode_with_lengths(self, captions: Sequence[str]) -> tuple[Tensor, list[int]]:
        """Tokens, and the number of tokens of each caption before truncation."""
        encodings = self.tokenizer.encode_batch(list(captions), add_special_tokens=False)
        return self._pack([encoding.ids for encoding in encodings])

    def ready(self, device=None) -> Self:
        _ = self.tokenizer
        return self

    def count_truncated(self, values: Sequence[str]) -> int:
        return sum(n > self.length for n in self.encode_with_lengths(values)[1])

    def settings(self) -> dict[str, Any]:
        names = ("length", "states", "pad", "start", "end")
        return {"kind": "subwords", **{name: getattr(self, name) for name in names}}

    def _masked_ids(self, caption: str) -> list[int]:
        """The subwords of a caption, without start and end, with the mask token for every ▯."""
        first, *others = [self.tokenizer.encode(part, add_special_tokens=False).ids for part in caption.split(MASKED)]
        for ids in others:
            first = [*first, self.states, *ids]
        return first

    def _pack(self, captions: Sequence[list[int]]) -> tuple[Tensor, list[int]]:
        """(N, length) tokens with start, end and pads, and the length of each caption before truncation."""
        tokens = np.full((len(captions), self.length), self.pad, dtype=np.int64)
        prefix = [] if self.start is None else [self.start]
        suffix = [] if self.end is None else [self.end]
        room = self.length - len(prefix) - len(suffix)
        lengths = []
        for row, subwords in enumerate(captions):
            ids = prefix + subwords[:room] + suffix
            tokens[row, : len(ids)] = ids
            lengths.append(len(prefix) + len(subwords) + len(suffix))
        return torch.from_numpy(tokens), lengths

    def decode(self, x: Tensor) -> list[str]:
        """Tokens → captions: up to the end token, without pads; masked positions are shown as ▯."""
        return [self._decode_row(row) for row in x.cpu().tolist()]

    def _decode_row(self, row: list[int]) -> str:
        if self.end is not None and self.end in row:
            row = row[: row.index(self.end)]
        special = (self.pad, self.start, self.end)
        runs = [[]]  # of tokens between masked positions
        for token in row:
            if token >= self.states:
                runs.append([])
            elif token not in special:
                runs[-1].append(token)
        return MASKED.join(self._decode_run(run) if run else "" for run in runs).strip()

    def _decode_run(self, tokens: list[int]) -> str:
        text = self.tokenizer.decode(tokens, skip_special_tokens=False)
        suffix = getattr(self.tokenizer.model, "end_of_word_suffix", None)  # CLIP's </w>, which its decoder leaves in
        return text.replace(suffix, " ") if suffix else text

    def json(self) -> str:
        """The content of a `tokenizer.json`, for a copy stored with weights or data."""
        return self.tokenizer.to_str()

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.json": self.json().encode()}


def open_tokenizer(path: str | Path | None, content: str | None = None) -> Tokenizer:
    """A `tokenizers.Tokenizer` without padding or truncation of its own; content: instead of the file.

    Raises:
        ValueError: the library is missing, or there is no tokenizer at that path or hub id.
    """
    try:
        import tokenizers
    except ImportError:
        raise ValueError("subword tokens need tokenizers: pip install anystate[pairs]") from None
    try:
        tokenizer = (
            _load_tokenizer(Path(str(path)), str(path)) if content is None else tokenizers.Tokenizer.from_str(content)
        )
    except Exception as error:  # the hub, the disk and the library raise their own exception types
        reason = " ".join(str(error).split())[:200]
        raise NoFile(
            f"{str(path)!r} is not a tokenizer.json, a folder with one or a tokenizer on the hub: {reason}"
        ) from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _load_tokenizer(file: Path, hub_id: str) -> Tokenizer:
    from tokenizers import Tokenizer

    if file.is_file():
        return Tokenizer.from_file(str(file))
    if (file / "tokenizer.json").is_file():
        return Tokenizer.from_file(str(file / "tokenizer.json"))
    if (file / "vocab.json").is_file():
        from transformers import CLIPTokenizerFast

        backend = CLIPTokenizerFast.from_pretrained(str(file)).backend_tokenizer
        return Tokenizer.from_str(backend.to_str())  # without the decoder that transformers wraps around it
    return Tokenizer.from_pretrained(hub_id)


def train_bpe(captions: Iterable[str], states: int, pad: str = "<pad>") -> Tokenizer:
    """A byte-level BPE tokenizer with at most `states` tokens, which can encode any string; token 0 is the pad.

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
