"""The reference implementation of sampling against `sample.sample`, and what the references may import."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import anystate
from anystate.bench.reference.sample import sample as reference_sample
from anystate.sample import Sampler, sample
from anystate.sample.pipeline import build_pipeline

REFERENCE = Path(anystate.__file__).parent / "bench" / "reference"
N = 8


@pytest.fixture(scope="module")
def pipeline(tiny):
    """A tiny digits model with noise on all weights, those that are initialized with zero included."""
    made, generator = build_pipeline(tiny()), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in made.net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    made.net.eval()
    return made


def conditions_of(pipeline, case: str) -> dict:
    text = pipeline.codecs["text"].encode(["a seven"] * N)
    image = 2 * torch.rand(N, 1, 8, 8, generator=torch.Generator().manual_seed(1)) - 1
    return {
        "joint": {},
        "text": {"text": text},
        "image": {"image": image},
        "half-noised text": {"text": (text, 0.5)},
        "half-noised image": {"image": (image, 0.3)},
    }[case]


@pytest.mark.parametrize(
    "methods",
    [("dpmpp_2m", "first_hitting"), ("heun", "tau_leap"), ("euler_sde", "ancestral"), ("euler", "euler")],
    ids="-".join,
)
@pytest.mark.parametrize("case", ["joint", "text", "image", "half-noised text", "half-noised image"])
def test_samples_agree_with_the_reference(pipeline, methods, case):
    """The same random numbers: equal tokens, images within 1e-4 (float32 rounding)."""
    conditions, guidance = conditions_of(pipeline, case), pipeline.guidance(case != "joint")
    assert guidance.scale != 1.0 or case == "joint"
    image, text = methods
    samplers = {"image": Sampler(image, "logsnr"), "text": Sampler(text)}
    drawn = sample(pipeline.net, pipeline.space, conditions, n=N, steps=6, guidance=guidance, samplers=samplers)
    samplers = {"image": (image, "logsnr"), "text": (text, "linear")}
    expected = reference_sample(pipeline.net, pipeline.space, conditions, N, 6, samplers, guidance)
    assert list(drawn) == list(expected)
    assert torch.equal(drawn["text"], expected["text"])
    assert (drawn["image"] - expected["image"]).abs().max() < 1e-4
    for m in {"image", "text"} - conditions.keys():
        assert len(drawn[m].unique(dim=0)) > 1


def test_seeds_and_guidance_change_the_reference(pipeline):
    """The test above would also pass if both ignored them."""
    samplers = {"image": ("heun", "linear"), "text": ("tau_leap", "linear")}
    conditions = conditions_of(pipeline, "text")

    def draw(seed=0, guidance=None):
        return reference_sample(pipeline.net, pipeline.space, conditions, N, 4, samplers, guidance, seed)["image"]

    plain = draw()
    assert torch.equal(plain, draw())
    assert not torch.equal(plain, draw(seed=1))
    assert not torch.equal(plain, draw(guidance=pipeline.guidance(True)))


def imported_modules(path: Path) -> set[str]:
    """The modules that a file of bench/reference imports, with their full names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ["anystate", "bench", "reference"][: 4 - node.level] if node.level else []
            module = ".".join([*package, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def test_references_import_neither_sample_nor_train():
    modules = {name for path in REFERENCE.glob("*.py") for name in imported_modules(path)}
    assert any(name.startswith("anystate.diffusion.") for name in modules)
    assert not [name for name in modules if name.split(".")[:2] in (["anystate", "sample"], ["anystate", "train"])]


@pytest.mark.parametrize(("file", "function", "lines"), [("sample", "sample", 60), ("train", "training_step", 80)])
def test_length_of_the_references(file, function, lines):
    tree = ast.parse((REFERENCE / f"{file}.py").read_text(encoding="utf-8"))
    (found,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function)
    assert found.end_lineno - found.lineno + 1 <= lines
