"""Packaging: the repository folder is the package `anystate`."""

from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (ROOT / "configs" / "version.py").read_text().splitlines()
    if line.startswith("__version__")
)
TOP = ["kernels", "diffusion", "model", "sample", "train", "bench", "configs"]
FOLDERS = sorted(".".join(p.parent.relative_to(ROOT).parts) for top in TOP for p in (ROOT / top).rglob("__init__.py"))

XGBOOST = [  # plain xgboost brings half a gigabyte of GPU libraries along on Linux
    "xgboost-cpu>=2; platform_system != 'Darwin'",
    "xgboost>=2; platform_system == 'Darwin'",
]
TABLE = ["pandas>=2.1", "xlrd>=2", "openpyxl>=3.1", "pyarrow>=15", *XGBOOST]
PAIRS = [  # packed images and captions
    *("webdataset>=1.0", "tokenizers>=0.20", "pyarrow>=15"),
    "nvidia-dali-cuda130>=1.52; platform_system == 'Linux'",
]
LATENTS = ["diffusers>=0.31", "transformers>=4.45", "huggingface_hub>=0.26"]  # autoencoders, weights from the hub
EVAL = ["torchmetrics>=1.6", "transformers>=4.45"]
PYTEST = ["pytest>=8", "pytest-benchmark>=5", "pytest-xdist>=3.6", "hypothesis>=6.100"]
TEST = [*TABLE, *PAIRS, *LATENTS, *EVAL, "sdmetrics>=0.11.1", *PYTEST]

setup(
    name="anystate",
    version=VERSION,
    description="One diffusion model over any mix of state spaces, any part sampled from any other",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    package_dir={"anystate": "."},
    packages=["anystate"] + [f"anystate.{folder}" for folder in FOLDERS],
    package_data={
        "anystate": ["py.typed"],
        "anystate.configs": ["*.yaml", "*/*.yaml"],
        "anystate.kernels": ["tiles.json"],
        "anystate.train": ["data/adult/*"],
        "anystate.bench": ["*/*.html", "*/*.json", "*/*.yaml"],
    },
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy>=1.26",
        "einops>=0.8",
        "safetensors>=0.5",
        "pyyaml>=6",
        "pydantic>=2.7",
        "typer>=0.19",
        "rich>=13",
        "jinja2>=3.1",
        "matplotlib>=3.9",
        "pillow>=10",
        "scipy>=1.11",
        "scikit-learn>=1.5",
    ],
    extras_require={
        "test": TEST,
        "flash": ["flash-attn-4>=4.0.0b30"],
        "pairs": PAIRS,
        "latents": LATENTS,
        "table": TABLE,
        "eval": EVAL,
        "inception": ["torch-fidelity>=0.3", "torchvision"],  # the usual FID network
        "log": ["tensorboard>=2.18", "wandb>=0.19"],
        "dev": [*TEST, "ruff>=0.9", "mypy>=1.15", "tensorboard>=2.18"],
    },
    entry_points={"console_scripts": ["anystate=anystate.cli:main"]},
)
