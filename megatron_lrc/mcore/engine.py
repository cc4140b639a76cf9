"""Transformer Engine as it is installed here. Looked at before megatron-core, which breaks where it is broken.

`import transformer_engine` works without the extension for torch, and with one that was compiled for another torch. Of
megatron-core's modules that ask for it most ask no more than that, and then import from `transformer_engine.pytorch`,
so that importing megatron-core itself fails. Therefore `megatron_lrc.mcore`, which everything imports before
megatron-core, imports that first. Where this fails, megatron-core is not to find the package, and `broken_engine` says
why. The version is that of the package's metadata, which Transformer Engine itself goes by; so it can be read where the
module is hidden.

Nothing here imports megatron-core.
"""

import importlib
import importlib.metadata
import importlib.util
import sys
import warnings

import torch
from packaging.version import Version

from megatron_lrc.config import Config

_NAME, _EXTENSION = "transformer_engine", "transformer_engine_torch"

#: pip compiles the extension, in an environment of its own unless told not to: against the newest torch then.
INSTALL = (
    "Install the torch that you want first, then pip install --no-build-isolation 'megatron-lrc[cuda]', which compiles "
    "Transformer Engine for it; or use NVIDIA's PyTorch container, which has both (docs/support.md)."
)
_REINSTALL = (
    "Compile it for this torch: pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps {package}; "
    "or use NVIDIA's PyTorch container (docs/support.md)."
)

#: FP8 recipe -> the first Transformer Engine with which megatron-core takes it, as its get_fp8_recipe compares.
#: Delayed scaling it takes with every version that it can import; with older ones it takes nothing else.
_RECIPE_VERSIONS = {
    "tensorwise": Version("2.2.0.dev0"),
    "blockwise": Version("2.3.0.dev0"),
    "mxfp8": Version("2.1.0"),
    "delayed": Version("0"),
}

#: Why what is installed cannot be used, in a sentence; None where it can be, or nothing is installed.
_problem: str | None = None


def broken_engine() -> str | None:
    """Why Transformer Engine cannot be used though it is installed, and what to do about it; None otherwise."""
    return _problem


def hide_if_broken() -> None:
    """Import what megatron-core will; if that fails, note why, and have nobody else try."""
    global _problem
    if (error := _import_error()) is None:
        return
    _problem = _in_words(error)
    for name in [name for name in sys.modules if name.partition(".")[0] in (_NAME, _EXTENSION)]:
        del sys.modules[name]
    sys.modules[_NAME] = None  # type: ignore[assignment]


def _import_error() -> Exception | None:
    if sys.modules.get(_NAME, _NAME) is None or importlib.util.find_spec(_NAME) is None:
        return None
    try:
        with warnings.catch_warnings():  # of what is told here in a sentence
            warnings.filterwarnings("ignore", message="Detected a PyTorch installation but could not find")
            importlib.import_module(f"{_NAME}.pytorch")
    except Exception as error:  # seen in its sources: ImportError, FileNotFoundError, StopIteration, RuntimeError, ...
        return error
    return None


def _in_words(error: Exception) -> str:
    version = installed_version()
    cause = f"{type(error).__name__}: {error}".removesuffix(": ").partition("\n")[0][:300]
    if isinstance(error, FileNotFoundError | StopIteration) or getattr(error, "name", None) == _EXTENSION:
        what = "without its extension for torch"
    elif "undefined symbol" in str(error):
        what = f"but was compiled for another torch than {torch.__version__}"
    else:
        what = "but cannot be imported"
    package = f"transformer-engine-torch{f'=={version.public}' if version else ''}"
    return (
        f"Transformer Engine{f' {version}' if version else ''} is installed {what} ({cause}). "
        f"{_REINSTALL.format(package=package)}"
    )


def installed_version() -> Version | None:
    """Of the package, whether or not it can be imported; None where it is not installed."""
    try:
        return Version(importlib.metadata.version(_NAME))
    except importlib.metadata.PackageNotFoundError:
        return None


def too_old_for_recipe(config: Config) -> str | None:
    """In a sentence, that Transformer Engine is installed and older than --fp8-recipe needs; None otherwise. Asks no
    GPU."""
    compute, version = config.compute, installed_version()
    least = _RECIPE_VERSIONS[compute.fp8_recipe]
    if compute.fp8_format is None or version is None or version >= least:
        return None
    possible = [name for name, needed in _RECIPE_VERSIONS.items() if version >= needed]
    return (
        f"--fp8-recipe {compute.fp8_recipe} needs Transformer Engine {least.base_version}; {version} is installed. "
        f"Install a newer one (docs/support.md), or use --fp8-recipe {' or '.join(possible)}."
    )
