"""README.md of a saved model: what the hub shows of it, all of it from the config and the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import yaml

from ..configs.config import Config
from ..diffusion import Space
from ..diffusion.processes import Discrete, Gaussian, Process
from ..model.build import Names, modalities_of

PAGE = """---
{head}---

# {name}

{about}

| modality | kind | process | shape | states | sampled |
|---|---|---|---|---|---|
{rows}

| | |
|---|---|
{facts}

## Use

```python
from anystate import Pipeline

pipe = Pipeline.from_pretrained({source!r})
{example}
```

Every modality goes in and comes out as raw values. `masks` says which elements of a condition are known, `noise_levels`
how noisy it is; see `help(Pipeline.__call__)`.
"""


def model_card(
    config: Config, space: Space, names: Names, generated: Sequence[str], parameters: int, source: str
) -> str:
    """The page.

    Args:
        generated: the modalities that the model can sample.
        parameters: their number.
        source: what `Pipeline.from_pretrained` loads the model from.
    """
    kinds = {m: getattr(modality, "kind", "") for m, modality in modalities_of(config).items()}
    tags = ["anystate", "diffusion", *(["multimodal"] if len(kinds) > 1 else [])]
    tags += sorted({kind for kind in kinds.values() if ":" not in kind} - set(tags))
    rows = [_row(names, m, kinds[m], part, space, m in generated) for m in names for part in names[m]]
    return PAGE.format(
        head=yaml.safe_dump({"library_name": "anystate", "tags": tags}, sort_keys=False),
        name=config.name,
        about=_about(list(kinds)),
        rows="\n".join(rows),
        facts="\n".join(f"| {name} | {value} |" for name, value in _facts(config, parameters).items()),
        source=source,
        example=_example(list(kinds), generated),
    )


def _about(names: list[str]) -> str:
    listed = ", ".join(f"`{m}`" for m in names)
    if len(names) == 1:
        return f"A diffusion model of {listed}, made with anystate."
    return f"One diffusion model of {listed}, made with anystate: any of them is sampled with or given the others."


def _row(names: Names, m: str, kind: str, part: str, space: Space, is_generated: bool) -> str:
    process = space[names[m][part]]
    cells = [m, kind, f"{part}: {_process(process)}" if part else _process(process)]
    cells += [" × ".join(map(str, process.shape)), str(process.states) if isinstance(process, Discrete) else ""]
    return f"| {' | '.join([*cells, 'yes' if is_generated else 'no, a condition'])} |"


def _process(process: Process) -> str:
    return "Gaussian" if isinstance(process, Gaussian) else type(process).__name__.lower()


def _facts(config: Config, parameters: int) -> Mapping[str, str]:
    facts = {"network": config.network.kind, "parameters": f"{parameters:,}"}
    facts["training"] = f"{config.train.steps:,} steps of {config.train.batch:,} examples, as configured"
    if config.data is not None:
        facts["data"] = f"`{config.data.source}`"
    return facts | {"sampling steps": str(config.sample.steps)}


def _example(names: list[str], generated: Sequence[str]) -> str:
    """Lines of Python: joint samples, and all else given one modality."""
    fixed = [m for m in names if m not in generated]
    if fixed:
        given = ", ".join(f'"{m}": {m}' for m in fixed)
        return f"out = pipe({{{given}}}, n=4, seed=0)  # {' and '.join(fixed)}: a raw value, or a list of them"
    joint = f"out = pipe(n=4, seed=0)  # {{{', '.join(f'{m!r}: …' for m in names)}}}"
    if len(names) == 1:
        return joint
    first = names[0]
    rest = " and ".join(names[1:])
    return f'{joint}\nout = pipe({{"{first}": out["{first}"]}}, n=2, seed=1)  # two of {rest} for each {first}'
