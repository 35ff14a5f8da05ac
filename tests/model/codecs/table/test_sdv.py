"""SDV's metadata as a schema, by the examples of its specification, and back without loss."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from anystate.model.codecs.table import sdv
from anystate.model.codecs.table.schema import Schema, infer

HOTEL = {  # the example of docs.sdv.dev, "Single Table Metadata JSON"
    "primary_key": "guest_email",
    "alternate_keys": ["credit_card_number"],
    "METADATA_SPEC_VERSION": "SINGLE_TABLE_V1",
    "columns": {
        "guest_email": {"sdtype": "email", "pii": True},
        "has_rewards": {"sdtype": "boolean"},
        "room_type": {"sdtype": "categorical"},
        "amenities_fee": {"sdtype": "numerical", "computer_representation": "Float"},
        "nights": {"sdtype": "numerical", "computer_representation": "Int64"},
        "checkin_date": {"sdtype": "datetime", "datetime_format": "%d %b %Y"},
        "booking": {"sdtype": "id", "regex_format": "HID_[0-9]{3}"},
        "billing_address": {"sdtype": "address", "pii": True},
        "credit_card_number": {"sdtype": "credit_card_number", "pii": True},
    },
}


def guests(n: int = 60) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    days = pd.Timestamp("2020-01-01") + pd.to_timedelta(rng.integers(0, 300, n), "D")
    return pd.DataFrame({
        "guest_email": [f"a{i}@b.c" for i in range(n)], "has_rewards": rng.random(n) < 0.5,
        "room_type": rng.choice(["BASIC", "DELUXE"], n), "amenities_fee": rng.gamma(2, 9, n).round(2),
        "nights": rng.integers(1, 9, n), "checkin_date": days.strftime("%d %b %Y"),
        "booking": [f"HID_{i:03d}" for i in range(n)], "billing_address": rng.choice(["Main Street 1", "Elm 2"], n),
        "credit_card_number": rng.integers(4e15, 5e15, n),
    })  # fmt: skip


def kinds(schema: Schema) -> dict:
    return {column.name: column.kind for column in schema.columns}


EXPECTED = {
    "guest_email": "identifier", "has_rewards": "boolean", "room_type": "categorical", "amenities_fee": "continuous",
    "nights": "integer", "checkin_date": "datetime", "booking": "identifier", "billing_address": "categorical",
    "credit_card_number": "identifier",
}  # fmt: skip


def test_the_kinds_of_the_specification():
    found = infer(guests(), Schema.load(HOTEL))
    assert kinds(found) == EXPECTED
    assert found.columns[5].format == "%d %b %Y"
    dated = guests().assign(checkin_date=lambda t: pd.to_datetime(t["checkin_date"], format="%d %b %Y"))
    assert infer(dated, Schema.load(HOTEL)).columns[5].format is None, "only text needs a format"


def test_metadata_comes_back_as_it_was(tmp_path):
    """Through our schema, complete or not, and through the file of a complete one."""
    complete = infer(guests(), Schema.load(HOTEL))
    assert json.loads(complete.to_sdv()) == HOTEL
    (tmp_path / "metadata.json").write_text(complete.to_sdv())
    (tmp_path / "schema.yaml").write_text(complete.dump())
    assert json.loads(Schema.load(tmp_path / "schema.yaml").to_sdv()) == HOTEL
    again = infer(guests(), Schema.load(tmp_path / "metadata.json"))
    assert again == complete
    (tmp_path / "tabs.json").write_text(json.dumps(HOTEL, indent="\t"))
    assert Schema.load(tmp_path / "tabs.json") == Schema.load(HOTEL)
    (tmp_path / "torn.json").write_text('{"columns": ')
    with pytest.raises(ValueError, match=r"torn\.json: not valid JSON"):
        Schema.load(tmp_path / "torn.json")


def test_the_form_of_several_tables():
    form = {"METADATA_SPEC_VERSION": "V1", "tables": {"guests": HOTEL}, "relationships": []}
    schema = Schema.load(form)
    assert schema.name == "guests"
    assert kinds(infer(guests(), schema)) == EXPECTED
    with pytest.raises(ValueError, match="metadata of one table is needed, this has 2: a, b"):
        Schema.load({"METADATA_SPEC_VERSION": "V1", "tables": {"a": HOTEL, "b": HOTEL}})


def test_an_inferred_schema_in_the_form_of_sdv():
    table = (
        guests()
        .drop(columns="guest_email")
        .assign(checkin_date=lambda t: pd.to_datetime(t["checkin_date"], format="%d %b %Y"))
    )
    metadata = json.loads(infer(table).to_sdv())
    assert metadata["METADATA_SPEC_VERSION"] == "SINGLE_TABLE_V1"
    assert {name: entry["sdtype"] for name, entry in metadata["columns"].items()} == {
        "has_rewards": "boolean", "room_type": "categorical", "amenities_fee": "numerical", "nights": "numerical",
        "checkin_date": "datetime", "booking": "id", "billing_address": "categorical",
        "credit_card_number": metadata["columns"]["credit_card_number"]["sdtype"],
    }  # fmt: skip
    assert metadata["columns"]["nights"]["computer_representation"] == "Int64"
    assert kinds(infer(table, Schema.load(metadata))) == kinds(infer(table))


def test_meanings_keep_the_text_of_a_file():
    """Phone numbers of digits alone are read as text, and categories if they repeat."""
    schema = Schema.load({"columns": {"phone": {"sdtype": "phone_number"}, "x": {"sdtype": "unknown"}}})
    assert schema.text_columns == ["phone"]
    table = pd.DataFrame({"phone": ["0301", "0302"] * 30, "x": range(60)})
    assert kinds(infer(table, schema)) == {"phone": "categorical", "x": "identifier"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"METADATA_SPEC_VERSION": "V1"}, "needs the key columns"),
        ({"columns": {"a": {"kind": "integer"}}}, "column 'a' needs an sdtype"),
        ({"columns": {"a": {"sdtype": "id"}}, "primary_key": "b"}, "the key 'b' is not one of the columns"),
        ({"tables": {}}, "metadata of one table is needed, this has 0"),
    ],
)
def test_wrong_metadata_is_named(content, message):
    assert sdv.is_metadata(content)
    with pytest.raises(ValueError, match=message):
        Schema.load(content)
