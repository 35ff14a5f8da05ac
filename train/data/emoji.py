"""Emoji of 32×32 pixels with captions and a row of attributes: the file `emoji.npz`."""

from __future__ import annotations

import numpy as np

from ...configs.locate import locate, not_found
from .dataset import InMemory, Opened, by_split
from .source_arrays import read_npz

ARRAYS = ("images", "captions", "split", "kind", "base", "modifier", "group")
WORDS = {**dict.fromkeys(("man", "men", "merman"), "man"), **dict.fromkeys(("woman", "women", "mermaid"), "woman")}


def load(path: str = "emoji/emoji.npz") -> Opened:
    """The training and held-out emoji: image, text, and row with the columns group, kind, tone and gender.

    `tone` is the skin tone, "light and dark" for two people, or none; `gender` is man, woman, both or none. The
    annotations are base and modifier. The split is the file's own: combinations of base and modifier are held out.

    path: of the file, also looked up below $ANYSTATE_DATA.

    Raises:
        ValueError: not found, unreadable, or without an array.
    """
    import pandas as pd

    from ...model.codecs.table.schema import TEXT

    file = locate(path)
    if file is None:
        raise ValueError(not_found("emoji: path", path))
    z = read_npz(file)
    if missing := [name for name in ARRAYS if name not in z]:
        raise ValueError(f"{file}: no array {missing[0]!r}; there are {', '.join(z)}")
    has_tone = np.isin(z["kind"], ("tone", "two-tone"))
    row = {
        "group": z["group"],
        "kind": z["kind"],
        "tone": np.where(has_tone, z["modifier"], "none"),
        "gender": [gender_of(caption) for caption in z["captions"].tolist()],
    }
    values = {"image": z["images"], "text": z["captions"].tolist(), "row": pd.DataFrame(row).astype(TEXT)}
    whole = InMemory(values, {name: z[name] for name in ("base", "modifier")})
    return by_split(whole, z["split"].tolist(), file)


def gender_of(caption: str) -> str:
    """man, woman, both or none, by the `WORDS` of a caption; they agree with every modifier of the kind gender."""
    found = {WORDS[word] for word in caption.split() if word in WORDS}
    return "both" if len(found) > 1 else next(iter(found), "none")
