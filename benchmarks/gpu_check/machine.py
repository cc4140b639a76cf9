"""Stage 1: what is installed here, and whether the two things that are compiled on the spot can be."""

import importlib.metadata
import importlib.util
import subprocess
import sys

import torch

from benchmarks.gpu_check.checks import Check, Checks, Figures, Skip, need_cuda
from benchmarks.gpu_check.settings import Settings
from megatron_lrc.config import ConfigError

PACKAGES = ("megatron-core", "transformer-engine", "apex", "triton", "flash-attn", "transformers")
INSTALL_ENGINE = (
    "Install it against the torch that is here: pip install --no-build-isolation 'megatron-lrc[cuda]'; or give "
    "--without-te."
)


def checks(settings: Settings) -> Checks:
    yield Check("versions", lambda: versions(settings))
    yield Check("Transformer Engine", lambda: engine(settings))
    yield Check("probe compile", lambda: probe_compile(settings))


def versions(settings: Settings) -> Figures:
    found: Figures = {"python": sys.version.split()[0], "torch": torch.__version__, "CUDA of torch": torch.version.cuda}
    found |= {name: version_of(name) for name in PACKAGES}
    if settings.is_cuda:
        card = torch.cuda.get_device_properties(0)
        found |= {
            "card": card.name,
            "capability": f"{card.major}.{card.minor}",
            "GiB": round(card.total_memory / 2**30, 1),
            "driver": driver_version(),
        }
    return found


def version_of(distribution: str) -> str | None:
    """None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver_version() -> str | None:
    """The first card's; None where nvidia-smi cannot be asked."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return asked.stdout.splitlines()[0].strip()


def engine_problem() -> str | None:
    """Why Transformer Engine cannot compute here, in a sentence; None if it can be imported."""
    if importlib.util.find_spec("transformer_engine") is None:
        return f"The package transformer-engine is not installed. {INSTALL_ENGINE}"
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as problem:  # a missing extension, or one built for another torch: whatever that raises
        version, said = version_of("transformer-engine"), " ".join(str(problem).split())[:300]
        return f"transformer-engine {version} is installed and cannot be imported ({said}). {INSTALL_ENGINE}"
    return None


def need_engine(settings: Settings) -> None:
    """Skip on a CPU, and without Transformer Engine if --without-te allows that; else ConfigError without it."""
    need_cuda(settings)
    if problem := engine_problem():
        raise ConfigError(problem) if settings.needs_engine else Skip("needs Transformer Engine; --without-te")


def engine(settings: Settings) -> Figures:
    """A product in bf16 and its gradient by one of its layers."""
    need_engine(settings)
    module = importlib.import_module("transformer_engine.pytorch")
    layer = module.Linear(64, 64, bias=False, params_dtype=torch.bfloat16, device="cuda")
    inputs = torch.randn(32, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    layer(inputs).sum().backward()
    assert inputs.grad is not None and inputs.grad.isfinite().all(), "the gradient is not finite"
    return {"version": version_of("transformer-engine")}


def probe_compile(settings: Settings) -> Figures:
    """What torch.compile needs on a GPU: Triton, a C compiler, Python's headers, the driver's library."""
    need_cuda(settings)
    values = torch.arange(4096.0, device=settings.device)
    found = torch.compile(lambda x: (2 * x + 1).sum(), fullgraph=True)(values)
    return {"sum": found.item(), "expected": 4096.0**2}
