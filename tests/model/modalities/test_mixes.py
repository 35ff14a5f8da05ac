"""Several modalities in one network: names of processes, shared and aligned streams."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from anystate import parse_config
from anystate.model.build import build_codecs, build_network, build_space, part_names
from anystate.sample.pipeline import build_pipeline

RNG = np.random.default_rng(0)
ROWS = pd.DataFrame({"height": RNG.normal(size=60), "group": RNG.choice(["a", "b", "c"], 60)})
COLUMNS = {"kind": "columns"}
PLACES = {"kind": "series", "channels": 3, "length": 6, "standardize": False, "stream": {"width": 8, "patch": 1}}
TYPES = {"kind": "text", "alphabet": "CNOH", "length": 6}
VECTOR = {"kind": "vector", "size": 4, "standardize": False}


def mix(**sections):
    raw = {"name": "mix", "train": {"steps": 1, "batch": 2}, "network": {"depth": 1, "heads": 2, "head_dim": 4}}
    modalities = {m: {"stream": {"width": 8}, **section} for m, section in sections.items()}
    return parse_config({**raw, "modalities": modalities}, "mix")


def fitted(config):
    codecs = build_codecs(config)
    for codec in codecs.values():
        if not codec.is_fitted:
            codec.fit(ROWS)
    return codecs


def sharing(m: str, **more) -> dict:
    return {"stream": {"share": m, **more}}


@pytest.mark.parametrize(
    ("sections", "names"),
    [
        ({"row": COLUMNS}, {"row": {"num": "num", "cat": "cat"}}),
        (
            {"row": COLUMNS, "other": VECTOR},
            {"row": {"num": "row_num", "cat": "row_cat"}, "other": {"": "other"}},
        ),
        ({"other": VECTOR, "text": TYPES}, {"other": {"": "other"}, "text": {"": "text"}}),
    ],
)
def test_names_of_processes(sections, names):
    config = mix(**sections)
    codecs = fitted(config)
    assert part_names(config, codecs) == names
    assert list(build_space(config, codecs)) == [name for parts in names.values() for name in parts.values()]


def test_a_part_named_like_another_modality():
    config = mix(row=COLUMNS, row_num=VECTOR)
    with pytest.raises(ValueError, match=r"modalities.row_num: its process row_num is named like one before") as error:
        build_space(config, fitted(config))
    assert "\n" not in str(error.value)


def inputs(space, n: int = 3) -> tuple[dict, dict]:
    generator = torch.Generator().manual_seed(0)
    x = {}
    for name, process in space.items():
        shape = (n, *process.shape)
        tokens = torch.randint(getattr(process, "states", 2), shape, generator=generator)
        x[name] = tokens if process.discrete else torch.randn(shape, generator=generator)
    return x, {name: torch.full((n,), 0.5) for name in space}


def shaken(config, codecs):
    """The network with random heads: they begin at zero, with which nothing would depend on anything."""
    net = build_network(config, codecs)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return net.double()


def outputs(net, x: dict, t: dict) -> dict:
    x = {m: v.double() if v.is_floating_point() else v for m, v in x.items()}
    out = net(x, {m: v.double() for m, v in t.items()})
    return {m: v if isinstance(v, torch.Tensor) else v.values() for m, v in out.items()}


@pytest.mark.parametrize("aligned", [False, True])
def test_two_modalities_in_one_stream(aligned):
    """Each has its own embedder, time and head, and the stream's blocks once; every output depends on every input."""
    config = mix(types=TYPES, places={**PLACES, **sharing("types", aligned=aligned, patch=1)}, other=VECTOR)
    codecs = fitted(config)
    space, net = build_space(config, codecs), shaken(config, codecs)
    assert net.members == {"types": ["types", "places"], "other": ["other"]}
    assert set(net.embed) == set(net.time) == set(net.head) == {"types", "places", "other"}
    assert set(net.trunk[0].streams) == {"types", "other"}
    x, t = inputs(space)
    out = outputs(net, x, t)
    assert out["types"].shape == (3, 6, 5)
    assert out["places"].shape == (3, 3, 6)
    for m in space:
        changed = {**x, m: (x[m] + 1) % space[m].states if space[m].discrete else x[m] + 1.0}
        moved = outputs(net, changed, t)
        assert all((moved[k] - out[k]).abs().max() > 1e-6 for k in space), m
        later = outputs(net, x, {**t, m: t[m] + 0.3})
        assert all((later[k] - out[k]).abs().max() > 1e-6 for k in space), m


def test_aligned_positions_are_one_token():
    """Aligned, a joint sequence is as long as without the second modality; else longer by its positions."""
    lengths = {}
    for aligned in (False, True):
        config = mix(types=TYPES, places={**PLACES, **sharing("types", aligned=aligned, patch=1)})
        net, seen = shaken(config, fitted(config)), []
        net.trunk_norm["types"].register_forward_hook(lambda module, args, out, seen=seen: seen.append(out.shape[1]))
        outputs(net, *inputs(build_space(config, fitted(config))))
        lengths[aligned] = seen[0]
    assert lengths == {False: 12, True: 6}


def test_a_shared_stream_has_the_sizes_of_the_first():
    config = mix(
        types={**TYPES, "stream": {"width": 12, "cond": 6, "single_stream_depth": 2}},
        places={**PLACES, **sharing("types", aligned=True, patch=1)},
    )
    net = build_network(config, fitted(config))
    parts = net.parts["places"]
    assert (parts.width, parts.condition_width, parts.single_stream_depth) == (12, 6, 2)
    assert set(net.tower) == {"types"}
    assert len(net.tower["types"]) == 2


def test_columns_share_the_stream_of_another_modality_and_others_theirs():
    """Numbers and categories of a row are one stream; joined to another's, all are in that one."""
    config = mix(row=COLUMNS, other={**VECTOR, **sharing("row")})
    assert build_network(config, fitted(config)).members == {"row_num": ["row_num", "row_cat", "other"]}
    config = mix(other=VECTOR, row={**COLUMNS, **sharing("other")}, last={**VECTOR, **sharing("row")})
    codecs = fitted(config)
    net = build_network(config, codecs)
    assert net.members == {"other": ["other", "row_num", "row_cat", "last"]}
    x, t = inputs(build_space(config, codecs))
    assert {m: tuple(v.shape) for m, v in outputs(net.double(), x, t).items()} == {
        "other": (3, 4),
        "row_num": (3, 1),
        "row_cat": (3, 1, 3),
        "last": (3, 4),
    }


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"a": {**VECTOR, **sharing("b")}, "b": VECTOR}, "modalities.a.stream.share names 'b', no modality that comes"),
        ({"b": VECTOR, "a": {**VECTOR, **sharing("c")}}, "before a: there are b"),
        ({"a": {**VECTOR, **sharing("a")}}, "modalities.a.stream.share names 'a'"),
        (
            {"types": TYPES, "a": {**VECTOR, **sharing("types", aligned=True)}},
            "a has 1 positions, types has 6: they cannot be aligned",
        ),
        ({"row_extra": VECTOR, "a": {**VECTOR, **sharing("row")}}, "modalities.a.stream.share names 'row'"),
    ],
)
def test_streams_that_cannot_be_shared(sections, message):
    config = mix(**sections)
    with pytest.raises(ValueError, match=message) as error:
        build_network(config, fitted(config))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({**COLUMNS, "stream": None}, "modalities.row: columns in an mmdit need a stream"),
        ({**COLUMNS, "categorical": {"mask_logit": "kept"}}, "modalities.row: categorical.mask_logit is for"),
    ],
)
def test_columns_that_do_not_fit_an_mmdit(section, message):
    config = mix(row=section, other=VECTOR)
    with pytest.raises(ValueError, match=message):
        build_network(config, fitted(config))


def test_a_table_dit_is_for_columns():
    raw = mix(other=VECTOR).model_dump(mode="json")
    config = parse_config({**raw, "network": {"kind": "table_dit", "width": 8, "depth": 1, "heads": 2}}, "mix")
    with pytest.raises(
        ValueError,
        match="table_dit takes table columns, kind vector has none: use mmdit",
    ):
        build_pipeline(config)


def test_cells_of_a_row_that_are_known_are_seen_by_the_network():
    """With `conditioning_prob`, an mmdit is told which numbers are clean, and sampling keeps them."""
    config = mix(row={**COLUMNS, "conditioning_prob": 0.5}, other=VECTOR)
    codecs = fitted(config)
    net = shaken(config, codecs)
    assert net.observes == ["row_num"]
    x, t = inputs(build_space(config, codecs))
    x = {m: v.double() if v.is_floating_point() else v for m, v in x.items()}
    t = {m: v.double() for m, v in t.items()}
    known = net(x, t, observed={"row_num": torch.ones_like(x["row_num"], dtype=torch.bool)})
    assert (known["other"] - net(x, t)["other"]).abs().max() > 1e-6
    assert build_network(mix(row=COLUMNS, other=VECTOR), fitted(mix(row=COLUMNS, other=VECTOR))).observes == []
