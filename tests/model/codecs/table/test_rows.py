"""The codec of rows as a modality: round trips, cells that are conditions, values written as text, its file."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from anystate.model.codecs.base import NotFitted
from anystate.model.codecs.table.column import MISSING, RARE, REGULAR
from anystate.model.codecs.table.encoding import EncodingConfig
from anystate.model.codecs.table.rows import RowCodec, as_in_training
from anystate.sample.table.constraints import Region

N = 400


def table() -> pd.DataFrame:
    r = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "mixed": r.choice(np.array([1, "1", 2.5, True, "x"], dtype=object), N),
            "length": r.normal(170.0, 5.0, N).round(2),
            "bonus": np.where(r.random(N) < 0.6, 0.0, r.gamma(2.0, 100.0, N).round(2)),
            "pet": np.where(r.random(N) < 0.3, None, r.choice(["cat", "dog"], N)).astype(object),
        }
    )


@pytest.fixture(scope="module")
def codec() -> RowCodec:
    made = RowCodec(EncodingConfig(max_categories=4, max_discrete_values=20))
    made.fit(table(), seed=0)
    return made


def test_rows_round_trip(codec):
    rows = table()
    x = codec.encode(rows)
    assert {part: value.shape for part, value in x.items()} == {"num": (N, 2), "cat": (N, 3)}
    gaps = codec.table.numerical.index("bonus")
    assert torch.equal(x["num"][:, gaps].isnan(), torch.from_numpy((rows["bonus"] == 0).to_numpy()))
    back = codec.decode({"num": x["num"].nan_to_num(), "cat": x["cat"]})
    pd.testing.assert_frame_equal(back[["length", "bonus"]], rows[["length", "bonus"]], atol=0.02, rtol=1e-3)
    assert back["pet"].isna().equals(rows["pet"].isna())
    assert (back["pet"] == rows["pet"])[rows["pet"].notna()].all()
    mappings = codec.encode([row.to_dict() for _, row in rows.iterrows()])
    assert torch.equal(mappings["cat"], x["cat"])


def test_a_row_in_states_between_the_steps_of_a_sampler_has_empty_cells(codec):
    x = codec.encode(table().head(3))
    c = codec.table.categorical.index("pet")
    x["cat"][1, c] = max(codec.table.states)  # the mask
    shown = codec.decode({"num": x["num"].nan_to_num(), "cat": x["cat"]})
    assert shown["pet"].iloc[1] is None
    assert shown["length"].notna().all()


def test_a_codec_is_fitted_once_and_kept_in_its_file(codec):
    new = RowCodec(EncodingConfig())
    assert not new.is_fitted
    with pytest.raises(NotFitted):
        new.encode(table())
    again = RowCodec.from_files(codec.files())
    assert again.is_fitted
    assert again.files() == codec.files() == RowCodec.of(codec.table).files()
    for part, value in again.encode(table()).items():
        torch.testing.assert_close(value, codec.encode(table())[part], equal_nan=True)
    again.fit(table().head(30))
    assert again.files() == codec.files()


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"rows": 3, "columns": [{"column": {}}]}', b"\xff"])
def test_a_damaged_file(content):
    with pytest.raises(ValueError, match=r"^codec\.json is truncated or damaged$"):
        RowCodec.from_files({"codec.json": content})


def test_a_table_of_numbers_or_of_categories_has_one_part():
    for names, part in ((["length"], "num"), (["pet"], "cat")):
        codec = RowCodec(EncodingConfig())
        codec.fit(table()[names])
        x = codec.encode(table()[names])
        assert list(x) == [part]
        assert list(codec.decode({k: v.nan_to_num() if v.is_floating_point() else v for k, v in x.items()})) == names


def test_cells_that_are_conditions(codec):
    cells = codec.encode_cells([{"pet": "cat", "bonus": 0.0}, {"length": "171.5"}, {"pet": None, "bonus": 250.0}])
    (tokens, known), (z, known_z) = cells["cat"], cells["num"]
    at = {name: codec.table.categorical.index(name) for name in codec.table.categorical}
    d = {name: codec.table.numerical.index(name) for name in codec.table.numerical}
    assert known[:, at["pet"]].tolist() == [True, False, False]
    assert known[:, at["bonus"]].tolist() == known_z[:, d["bonus"]].tolist() == [True, False, True]
    assert known_z[:, d["length"]].tolist() == [False, True, False]
    assert not known[:, at["mixed"]].any()
    bonus = codec.table.columns["bonus"]
    assert bonus.states[tokens[0, at["bonus"]]] == ["v", 0.0]
    assert bonus.states[tokens[2, at["bonus"]]] == REGULAR
    assert codec.table.columns["length"].quantiles.decode(z[1:2, d["length"]].numpy())[0] == pytest.approx(
        171.5, abs=0.02
    )
    assert z.isfinite().all()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"pett": "cat"}, "unknown column 'pett'; there are mixed, length"),
        ({"pet": "cow"}, "column 'pet' has no value 'cow'; it has cat, dog"),
        ({"length": "tall"}, "column 'length': 'tall' is not a number"),
    ],
)
def test_wrong_conditions(codec, row, message):
    with pytest.raises(ValueError, match=message):
        codec.encode_cells([row])


def test_values_written_as_text(codec):
    """A value that occurs in training means itself, also where another one is written like it."""
    column = codec.table.columns["mixed"]
    given = pd.Series(["x", "2.5", "True", 1, "1", True, None], index=list("abcdefg"), dtype=object)
    found = as_in_training(column, given)
    assert found.index.equals(given.index)
    assert [type(v) for v in found] == [str, float, bool, int, str, bool, type(None)]
    assert list(found)[:6] == ["x", 2.5, True, 1, "1", True]
    number = codec.table.columns["length"]
    assert as_in_training(number, given) is given


def test_conditions_of_a_sampler_take_the_same_values(codec):
    """Also pooled categories are recognized, and refused as too rare to be given."""
    column = codec.table.columns["mixed"]
    assert RARE in column.states
    for token, state in enumerate(column.states):
        if state != RARE:
            value = as_in_training(column, pd.Series([str(state[1]).partition(":")[2]], dtype=object))[0]
            region = Region.of(column, value)
            assert region.spans == []
            assert region.token == token or str(value) == "1"
    pooled = column.rare[0][0].partition(":")[2]
    assert Region.of(column, pooled).rare.sum() == 1
    with pytest.raises(ValueError, match="column 'pet' has no value 'None'; it has cat, dog"):
        Region.of(codec.table.columns["pet"], "None")
    assert Region.of(codec.table.columns["pet"], None).token == codec.table.columns["pet"].state(MISSING)
