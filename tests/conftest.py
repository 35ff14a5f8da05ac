"""Shared fixtures: golden vectors, the official configuration, small models, and the command line."""

from __future__ import annotations

import functools
import http.server
import json
import os
import threading
from pathlib import Path

import pytest
import torch

# Without a GPU, Triton kernels run in its interpreter; Triton decides that when the kernels are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from safetensors.torch import load_file

from anystate.configs.load import load_config
from anystate.diffusion import Gaussian, LogLinear, Masked, ScaledLinear, Space

GOLDEN = Path(os.environ.get("ANYSTATE_GOLDEN", Path(__file__).parent / "golden"))


LONGEST = (
    "test_window.py",
    "test_text_image.py",
    "test_distributed.py",
    "test_absent.py",
    "test_in_use.py",
    "test_compiled.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take minutes first, so that no worker is left alone with one of them at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


class Golden:
    """Vectors computed by official code: `golden["net/masked/tokens"]`, hyper-parameters in `golden.config`."""

    def __init__(self, folder: Path):
        self.config = json.loads((folder / "config.json").read_text())
        self.tensors = load_file(folder / self.config.get("file", "golden.safetensors"))

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def below(self, prefix: str) -> dict[str, torch.Tensor]:
        """{rest of the name: tensor} for every name that starts with prefix."""
        return {key[len(prefix) :]: value for key, value in self.tensors.items() if key.startswith(prefix)}

    def official_space(self, model: str = "model_a", **text) -> Space:
        """The official text+image processes at a golden model's sizes."""
        c = self.config[model]["official_constructor"]
        size, states = c["img_resolution"], c["vocab_size"] - 1
        return Space(
            {
                "text": Masked(c["context_len"], states, LogLinear(1e-5), 1e-5, mask_logit="ignored", **text),
                "image": Gaussian((c["img_channels"], size, size), ScaledLinear(), 1e-5, "sigma"),
            }
        )


@pytest.fixture(scope="session")
def golden() -> Golden:
    """The text+image vectors."""
    return Golden(GOLDEN / "text_image")


@pytest.fixture(scope="session")
def golden_table():
    """golden_table("one_time") → the vectors of a tabular network."""
    return functools.cache(lambda case: Golden(GOLDEN / "tabular" / case))


def assert_close(actual, expected, atol: float, name: str = "") -> None:
    """Largest absolute difference within atol; says where it is not."""
    actual, expected = torch.as_tensor(actual).double(), torch.as_tensor(expected).double()
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    worst = (actual - expected).abs().max().item()
    assert worst <= atol, f"{name}: off by {worst:.3g}, allowed {atol:.3g}"


@pytest.fixture(scope="session")
def close():
    return assert_close


# A digits run small enough for tests
TINY = [
    "modalities.image.stream.width=16",
    "modalities.text.stream.width=16",
    "network.depth=1",
    "network.heads=2",
    "network.head_dim=8",
    "train.batch=16",
    "train.steps=6",
    "train.save_every=3",
    "train.log_every=1",
    "train.warmup_steps=2",
    "sample.steps=3",
    "sample.batch_size=8",
]


@pytest.fixture(scope="session")
def tiny():
    """tiny("train.steps=3") → Config."""
    return lambda *overrides: load_config("digits", [*TINY, *overrides])


@pytest.fixture(scope="session")
def tiny_overrides():
    return list(TINY)


@pytest.fixture(scope="session")
def vae(tmp_path_factory):
    """Folder of a small AutoencoderKL with random weights: it halves the side once and has 4 latent channels."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = diffusers.AutoencoderKL(
            block_out_channels=(4, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=2,
            layers_per_block=1,
        )
    folder = tmp_path_factory.mktemp("vae")
    net.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clip_tokenizer(tmp_path_factory):
    """Folder of a small CLIP tokenizer in its two-file format: letters, letters that end a word, "red" as a merge."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = [*letters, *(f"{c}</w>" for c in letters), "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    return folder


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.files` {name: bytes}, in ranges if `server.ranges` is set and `server.tag` has not changed.
    Responses for a name in `server.broken`, {name: [bytes, …]}, end after so many bytes, one after the other."""

    def do_GET(self):
        server, name = self.server, self.path[1:]
        requested, start = self.headers.get("Range"), 0
        server.seen.append((name, requested))
        if name not in server.files:
            return self.send_error(404)
        if requested and server.ranges and self.headers.get("If-Range") == server.tag:
            start = int(requested.split("=")[1].split("-")[0])
        data = server.files[name][start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", server.tag)
        self.end_headers()
        if server.broken.get(name):
            data = data[: server.broken[name].pop(0)]
        self.wfile.write(data)
        return None

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    """A file server on this machine, see `Handler`; `server.seen` lists the requests, [(name, range)]."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.seen, server.broken, server.ranges, server.tag = {}, [], {}, True, '"one"'
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="session")
def call():
    """call("train", …) → exit code of the command line."""
    from anystate.cli import main

    def run(*args) -> int:
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in args])
        return stop.value.code

    return run


@pytest.fixture
def refused(call, capsys):
    """refused("train", …) → the one line that a refused command prints."""

    def run(*args) -> str:
        capsys.readouterr()
        assert call(*args) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        return error

    return run
