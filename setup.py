"""Metadata of the package; pyproject.toml holds only the build system and the tools' tables.

The ranges are open on purpose: a cluster brings its own torch. constraints-cpu.txt pins what `make test` runs on.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read_version() -> str:
    """The version has one home, megatron_lrc/__init__.py; importing it here would need the dependencies."""
    match = re.search(r'^__version__ = "([^"]+)"', (ROOT / "megatron_lrc/__init__.py").read_text(), re.MULTILINE)
    assert match, "megatron_lrc/__init__.py has no __version__"
    return match.group(1)


def read_description() -> str:
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


setup(
    name="megatron-lrc",
    version=read_version(),
    description="Low-Rank Clone pretraining: a small language model generated from a large one, on megatron-core",
    long_description=read_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["megatron_lrc", "megatron_lrc.*"]),
    entry_points={"console_scripts": ["megatron-lrc = megatron_lrc.commands.main:main"]},
    package_data={"megatron_lrc.report": ["page.css", "page.js"]},
    python_requires=">=3.10",
    install_requires=[
        # From 2.6 and 0.16 on, the pre-releases of these included, as containers have them (torch 2.6.0a0+....nv25.01,
        # megatron-core 0.16.0rc0): ">=2.6" would make pip replace them, and ">=2.6.0a0" would ask it for pre-releases.
        "torch>2.5.9999",
        "megatron-core>0.15.9999,<0.20",  # tested: 0.16.1 (Python 3.10, 3.11) and 0.19.2 (Python 3.12, 3.13)
        "transformers>=5.0",
        "sentencepiece",
        "safetensors",
        "tensorboard",
        "psutil",  # needed by megatron-core's checkpoint writer, which does not declare it
        "pyyaml",
        "numpy",
        "tiktoken",  # tools/preprocess_data.py: rank files, and byte-level BPE several times as fast as tokenizers
        "zstandard",  # .zst input of tools/preprocess_data.py
    ],
    extras_require={
        # The GPU path. To be installed with --no-build-isolation, after torch, setuptools, wheel, ninja and pybind11:
        # Transformer Engine's extension is compiled during installation, and pip would otherwise compile it against a
        # torch of its own choice. NVIDIA's PyTorch container has it already (docs/support.md).
        # NVIDIA apex, if wanted (fused Adam without Transformer Engine), has no release on the package index: build it
        # from its source repository with --cpp_ext --cuda_ext.
        "cuda": ["transformer-engine[pytorch]"],
        "parquet": ["pyarrow"],  # .parquet input of tools/preprocess_data.py
        "gguf": ["gguf", "accelerate"],  # GGUF input of tools/convert_from_hf.py
        "eval": ["lm_eval[hf]>=0.4.13"],  # --tasks of tools/evaluate.py
        "watch": ["wandb"],  # --wandb-project
        "resiliency": ["nvidia-resiliency-ext"],  # ft_launcher, instead of torchrun
        "test": [
            "pytest>=9",  # faulthandler_exit_on_timeout
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "matplotlib",
            "pyarrow",
            "gguf",
            "accelerate",
        ],
        "check": ["ruff", "pyright[nodejs]"],
        "demo": ["gguf", "accelerate"],
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
