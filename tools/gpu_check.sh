#!/usr/bin/env bash
# Checks a machine with an NVIDIA GPU, and measures it: correctness, FP8, resume, and the speed of a step. With two GPUs
# or more also layouts and overlapped communication, on two of them.
#
#     bash tools/gpu_check.sh              everything, in the Python that $PYTHON names (default python3)
#     INSTALL=1 bash tools/gpu_check.sh    first makes .venv-gpu and installs this package with Transformer Engine there
#                                          (compiled on the spot, some ten minutes; needs a CUDA toolkit: CUDA_HOME)
#
# Ends with a table of what was measured beside what is allowed, and the time of a step in bf16 and in FP8 at the sizes
# of LRC-1.5B, with random weights: no model or data set is needed. Exit code 0 if everything passed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}

if [[ ${INSTALL:-0} == 1 ]]; then
  [[ -x .venv-gpu/bin/python ]] || "$python" -m venv .venv-gpu
  python=$PWD/.venv-gpu/bin/python
  "$python" -m pip install --quiet -e '.[test]'
  # Transformer Engine compiles against the torch that is installed.
  "$python" -m pip install --quiet pybind11 ninja setuptools wheel
  "$python" -m pip install --quiet --no-build-isolation -e '.[cuda]'
fi

"$python" - <<'CHECK'
import sys
import torch
if not torch.cuda.is_available():
    sys.exit("error: torch sees no CUDA GPU here. Run this on a machine that has one, with a CUDA build of torch.")
print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, {torch.cuda.get_device_name()}, "
      f"capability {'.'.join(map(str, torch.cuda.get_device_capability()))}")
CHECK

status=0
"$python" -m pytest -q -m gpu tests/gpu || status=$?

# The step of LRC-1.5B (Llama-3.2-3B to a hidden size of 1536): against ordinary training, in bf16 and in FP8, and
# against a naive LRC, whose copies of everything leave room for shorter sequences only.
shape=(--shape Llama-3.2-3B-Instruct --student-hidden-size 1536 --num-microbatches 8 --bf16)
pair=(--contestants lrc,ordinary --seq-length 2048)
"$python" tools/benchmark.py step "${shape[@]}" "${pair[@]}" --profile || status=$?
"$python" tools/benchmark.py step "${shape[@]}" "${pair[@]}" --fp8-format hybrid --teacher-fp8 || status=$?
"$python" tools/benchmark.py step "${shape[@]}" --contestants lrc,naive --seq-length 1024 || status=$?
exit "$status"
