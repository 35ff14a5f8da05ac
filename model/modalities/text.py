"""The kind `text`: captions as characters or subwords under masked or uniform diffusion."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from ...configs.config import Section
from ...configs.locate import locate
from ..codecs.characters import MASKED, CharCodec
from ..codecs.subwords import TokenizerCodec
from ..streams import Tokens
from .base import DiscreteModality

TOKENIZER = "tokenizer.json"


class Tokenizer(Section):
    """A vocabulary in the format of the `tokenizers` library."""

    kind: Literal["bpe", "clip"] = Field(description="byte-level BPE, or CLIP's")
    path: str | None = Field(
        None,
        description="tokenizer.json, a folder that holds it, or a Hugging Face id; null: a bpe trained on the data",
    )
    states: int = Field(gt=1, description="real states: every id the tokenizer gives, the pad included")
    pad: int = Field(ge=0, description="id that fills a caption up to its length; official CLIP: 49407")
    start: int | None = Field(None, ge=0, description="id put before every caption; official CLIP: 49406")
    end: int | None = Field(None, ge=0, description="id put after every caption; official CLIP: 49407")

    @model_validator(mode="after")
    def _inside(self):
        if self.path is None and (self.kind != "bpe" or self.pad or self.start is not None or self.end is not None):
            raise ValueError("a tokenizer without a path is a bpe trained on the data, with pad 0 and no start or end")
        for name in ("pad", "start", "end"):
            if (value := getattr(self, name)) is not None and value >= self.states:
                raise ValueError(f"{name} = {value} lies outside the {self.states} states")
        return self


class Text(DiscreteModality):
    """A caption under masked or uniform diffusion: characters (state 0 is the pad, then the alphabet) or tokens."""

    suffix: ClassVar[str] = ".txt"
    joined: ClassVar[bool] = True
    metrics: ClassVar[tuple[str, ...]] = ("elbo", "labels", "clip")
    prompts: ClassVar[bool] = True
    synonyms: ClassVar[tuple[str, ...]] = ("captions", "caption", "text", "txt", "sentences", "sentence")
    file_suffixes: ClassVar[tuple[str, ...]] = (".txt", ".caption")

    alphabet: str | None = Field(
        None, min_length=1, description="the characters, in the order of their token ids 1, 2, …"
    )
    tokenizer: Tokenizer | None = Field(None, description="instead of an alphabet")
    length: int = Field(gt=0, description="tokens of a caption, pads included")
    mask_logit: Literal["ignored"] | None = Field(
        None, description="ignored: the head has a logit for the mask, which sampling leaves out (official)"
    )
    attend_pads: bool = Field(True, description="false: attention skips keys whose current token is the pad")

    @property
    def states(self) -> int:
        """Real states K, the pad included."""
        return self.tokenizer.states if self.tokenizer else len(self.alphabet or "") + 1

    @property
    def pad(self) -> int:
        """The token that fills a caption up to its length."""
        return self.tokenizer.pad if self.tokenizer else 0

    @model_validator(mode="after")
    def _one_vocabulary(self):
        if (self.alphabet is None) == (self.tokenizer is None):
            raise ValueError("a text needs an alphabet or a tokenizer, one of the two")
        if self.alphabet and len(set(self.alphabet)) < len(self.alphabet):
            raise ValueError("alphabet repeats a character")
        if self.mask_logit and self.process == "uniform":
            raise ValueError("mask_logit is for the masked process")
        return self

    def build_codec(self, files):
        if self.tokenizer is None:
            return CharCodec(self.alphabet or "", self.length)
        t, kept = self.tokenizer, files.get(TOKENIZER)
        path = t.path and (locate(t.path) or t.path)
        return TokenizerCodec(path, self.length, t.states, t.pad, t.start, t.end, kept and kept.decode())

    def build_process(self, codec):
        pads = {} if self.process == "uniform" else {"pad_id": self.pad, "attend_pads": self.attend_pads}
        return self.discrete(self.length, self.states, **pads, **({"mask_logit": self.mask_logit} if pads else {}))

    def build_stream(self, codec):
        columns = self.states + 1 if self.mask_logit else None
        return Tokens.of(self.stream, length=self.length, states=self.states, columns=columns)

    def read(self, text: str) -> str:
        return text

    def from_file(self, path: Path) -> list[str]:
        """The captions of a file, one a line."""
        return [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]

    def lines(self, values) -> list[str]:
        return [" ".join(str(caption).splitlines()) for caption in values]

    def render(self, value: Any) -> str:
        return str(value)

    def encode_condition(self, codec, values, limit: int | None = None, repeat: int = 1):
        """Captions, of which those with ▯, a masked token, are known in part.

        limit: at most so many tokens are used, the rest is padding. repeat: how often a caption is repeated.
        """
        self._check_limit(limit)
        captions, length = [" ".join([str(value)] * repeat) for value in values], limit or self.length
        if isinstance(codec, CharCodec) and (repeat > 1 or limit is not None):
            captions = [caption[:length] for caption in captions]  # a TokenizerCodec truncates by itself
        is_masked = any(MASKED in caption for caption in captions)
        if is_masked and self.process == "uniform":
            raise ValueError("▯ needs a modality under masked diffusion, this one is not")
        shorter = dataclasses.replace(codec, length=length)
        tokens = shorter.encode_masked(captions) if is_masked else shorter.encode(captions)
        tokens = torch.nn.functional.pad(tokens, (0, self.length - length), value=self.pad)
        return {"": (tokens, tokens != self.states if is_masked else None)}

    def shorten(self, tokens: Tensor, limit: int | None) -> Tensor:
        """Tokens (N, L) with padding after the first `limit`."""
        self._check_limit(limit)
        positions = torch.arange(tokens.shape[1])
        return tokens if limit is None else torch.where(positions < limit, tokens, self.pad)

    def read_mask(self, codec, path: str):
        raise ValueError("in a caption, write ▯ for every masked token: it has no mask file")

    def _check_limit(self, limit: int | None) -> None:
        if limit is not None and not 1 <= limit <= self.length:
            raise ValueError(f"--context-limit must lie in 1 … {self.length}, got {limit}")

    def features(self, codec, values) -> np.ndarray:
        from sklearn.feature_extraction.text import HashingVectorizer

        counts = HashingVectorizer(analyzer="char_wb", ngram_range=(1, 5), n_features=2**12, norm="l2")
        return counts.transform([str(value) for value in values]).toarray()
