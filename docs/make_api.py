"""Write docs/api.md, the reference of the public names, from signatures and docstrings: `python docs/make_api.py`."""

from __future__ import annotations

import enum
import importlib
import inspect
from pathlib import Path

PATH = Path(__file__).with_name("api.md")
HEAD = """# Reference

The public names of the package, by folder; `python docs/make_api.py` writes this page from signatures and docstrings,
of which it shows the first paragraph. `help(name)` in Python shows the rest: shapes, units, errors, sources.
"""
MODULES = {
    "anystate": "Models of tables in the manner of scikit-learn, and trained models of any kind.",
    "anystate.sample.pipeline": "Trained models: loading, sampling.",
    "anystate.sample": "Sampling of any network over any space.",
    "anystate.diffusion": "State spaces, noise schedules, guidance, training times.",
    "anystate.kernels": "Operations, each with a Triton kernel and a reference in plain PyTorch (`backend=`).",
}
ONLY = {"anystate.sample.pipeline": ["Pipeline"]}


def page() -> str:
    """The text of the page."""
    parts, shown = [HEAD], set()
    for name, about in MODULES.items():
        module = importlib.import_module(name)
        values = [(n, getattr(module, n)) for n in ONLY.get(name) or module.__all__]
        new = [(n, value) for n, value in values if callable(value) and id(value) not in shown]
        shown |= {id(value) for _, value in new}
        if new:
            parts += [f"## {name}\n\n{about}\n", *(describe(n, value) for n, value in new)]
    return "\n".join(parts)


class Annotation(str):
    """An annotation that is printed as it is written, without quotes."""

    __repr__ = str.__str__


def describe(name: str, value: object) -> str:
    """One class with its public methods, or one function."""
    text = f"### {name}\n\n```python\n{signature(name, value, 110)}\n```\n\n{first_paragraph(value)}\n"
    if not inspect.isclass(value):
        return text
    own = {n: getattr(m, "__func__", m) for n, m in vars(value).items() if not n.startswith("_")}
    methods = {n: m for n, m in own.items() if inspect.isfunction(m) and m.__doc__}
    lines = [f"- `{signature(n, m)}`: {first_paragraph(m)}\n" for n, m in methods.items()]
    return text + "\n" * bool(lines) + "".join(lines)


def signature(name: str, value: object, width: int | None = None) -> str:
    """`name(parameters) -> result` without `self`; beyond `width` characters, one parameter a line."""
    if isinstance(value, enum.EnumMeta):
        return f"{name}: {', '.join(value.__members__)}"
    shown = inspect.signature(value)
    parameters = [with_annotation(p) for p in shown.parameters.values() if p.name not in ("self", "cls")]
    result = "" if inspect.isclass(value) else annotation(shown.return_annotation)
    arrow = f" -> {result}" if result not in ("", "None") else ""
    line = f"{name}({', '.join(parameters)}){arrow}"
    if width is None or len(line) <= width:
        return line
    return f"{name}(\n" + "".join(f"    {p},\n" for p in parameters) + f"){arrow}"


def with_annotation(parameter: inspect.Parameter) -> str:
    if parameter.annotation is parameter.empty:
        return str(parameter)
    return str(parameter.replace(annotation=Annotation(annotation(parameter.annotation))))


def annotation(value: object) -> str:
    """An annotation, which is text or an object, as text; empty where there is none."""
    if value is inspect.Signature.empty:
        return ""
    text = value if isinstance(value, str) else inspect.formatannotation(value)
    return text.replace("torch.Tensor", "Tensor")


def first_paragraph(value: object) -> str:
    return " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())


if __name__ == "__main__":
    PATH.write_text(page(), encoding="utf-8")
