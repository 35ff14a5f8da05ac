"""Command-line options that several commands share."""

from __future__ import annotations


def choose_device(name: str | None):
    """The `torch.device` of that name; default a GPU if there is one. ValueError if this machine has none such."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(device)  # streams and graphs are made on the current one
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # where Triton launches kernels, and graphs are captured, whatever tensors say
    return device


def parse_pairs(option: str, values: list[str] | None) -> list[tuple[str, str]]:
    """(name, value) of options of the form NAME=VALUE."""
    pairs = []
    for value in values or []:
        name, separator, rest = value.partition("=")
        if not separator or not name:
            raise ValueError(f"{option} {value!r} is not of the form NAME=VALUE")
        pairs.append((name, rest))
    return pairs
