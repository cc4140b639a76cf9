#!/usr/bin/env bash
""":"
# Trains a Low-Rank Clone. FLAGS are those of `python -m megatron_lrc train --help`. Three ways to start it:
#
#   bash examples/pretrain_lrc.sh FLAGS                       checks FLAGS, then starts torchrun on this node
#   torchrun ... examples/pretrain_lrc.sh FLAGS               torchrun hands this file to Python
#   torchrun --no-python ... examples/pretrain_lrc.sh FLAGS   torchrun runs this file
#
# The file is valid bash and valid Python. To bash, line 2 is a no-op and the Python part a here-document; to Python,
# the bash part is a docstring. So the bash part has no triple quotes, and no backslash but in front of n or t.
#
# Read from the environment (the first way only):
#   GPUS_PER_NODE   processes on this node; without GPUs, CPU processes      default: Slurm's, the visible GPUs, or 1
#   NNODES          nodes                                                    default: Slurm's, else 1
#   NODE_RANK       this node, from 0                                        default: Slurm's, else 0
#   MASTER_ADDR     first node's name or address, if there are several       default: Slurm's first node
#   MASTER_PORT     a free port there, if there are several nodes            default: from Slurm's job id, else 29500
#   MAX_RESTARTS    how often torchrun starts all processes again after one  default: 3 with --load auto, else 0
#                   has failed; they go on from the newest checkpoint
#   LAUNCHER        torchrun, or ft_launcher of NVIDIA's resiliency          default: torchrun
#                   extension, which restarts ranks that go silent too
#   LAUNCHER_FLAGS  more flags for it, such as --ft-rank-heartbeat-timeout=600
#   PYTHON          interpreter                                              default: python3
# With --dry-run nothing is started: FLAGS are checked for these processes (or --dry-run N for N), and estimates printed.
# Several nodes: once per node, as in `srun --ntasks-per-node=1 bash examples/pretrain_lrc.sh FLAGS`.

set -euo pipefail

fail() {
    echo "error: $1" >&2
    exit 2
}

python=${PYTHON:-python3}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

# One of torchrun's processes already (the third way), or a question that needs one process only.
if [[ -n ${RANK:-} && -n ${WORLD_SIZE:-} && -n ${LOCAL_RANK:-} ]]; then
    exec "$python" -m megatron_lrc train "$@"
fi
for flag in "$@"; do
    case $flag in -h | --help | --version) exec "$python" -m megatron_lrc train "$flag" ;; esac
done

visible_gpus() {
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true
    elif command -v nvidia-smi >/dev/null; then
        nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true
    fi
}

first_slurm_node() {
    # Read to the end: closing the pipe early would end scontrol with an error.
    scontrol show hostnames "$SLURM_JOB_NODELIST" | { read -r first; cat >/dev/null; echo "$first"; }
}

nodes=${NNODES:-${SLURM_JOB_NUM_NODES:-${SLURM_NNODES:-1}}}
node_rank=${NODE_RANK:-${SLURM_NODEID:-0}}
gpus=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-$(visible_gpus)}}
[[ -n $gpus && $gpus != 0 ]] || gpus=1
case " $* " in
    *" --load auto "* | *" --load=auto "*) restarts=${MAX_RESTARTS:-3} ;;
    *) restarts=${MAX_RESTARTS:-0} ;; # nobody said that this run is to go on by itself
esac

[[ $nodes =~ ^[1-9][0-9]*$ ]] || fail "NNODES is '$nodes'; it must be a whole number of nodes."
[[ $gpus =~ ^[1-9][0-9]*$ ]] || fail "GPUS_PER_NODE is '$gpus'; it must be a whole number of processes."
[[ $restarts =~ ^[0-9]+$ ]] || fail "MAX_RESTARTS is '$restarts'; it must be a whole number, 0 for never."
case ${LAUNCHER:=torchrun} in
    torchrun) launcher=torch.distributed.run ;;
    ft_launcher)
        launcher=nvidia_resiliency_ext.fault_tolerance.launcher
        "$python" -c "import ${launcher%%.*}" 2>/dev/null ||
            fail "LAUNCHER is ft_launcher, whose package is missing: pip install 'megatron-lrc[resiliency]'."
        ;;
    *) fail "LAUNCHER is '$LAUNCHER'; it must be torchrun or ft_launcher." ;;
esac
[[ ${SLURM_LOCALID:-0} == 0 ]] || fail "Slurm started several tasks on this node; start one: srun --ntasks-per-node=1."

for flag in "$@"; do
    case $flag in --dry-run | --dry-run=*) WORLD_SIZE=$((nodes * gpus)) exec "$python" -m megatron_lrc train "$@" ;; esac
done

if [[ $nodes == 1 ]]; then
    # Standalone finds a free port by itself, so that two runs on one machine do not meet.
    rendezvous=(--standalone --local-addr 127.0.0.1)
else
    master=${MASTER_ADDR:-}
    [[ -n $master || -z ${SLURM_JOB_NODELIST:-} ]] || master=$(first_slurm_node)
    [[ -n $master ]] || fail "NNODES is $nodes but MASTER_ADDR is not set. Set it to the first node's name or address."
    port=${MASTER_PORT:-${SLURM_JOB_ID:+$((20000 + SLURM_JOB_ID % 10000))}}
    rendezvous=(--nnodes "$nodes" --node-rank "$node_rank" --master-addr "$master" --master-port "${port:-29500}")
fi

# Without this torch gives each process every core (or torchrun gives each process one).
if [[ -z ${OMP_NUM_THREADS:-} ]]; then
    threads=$(($(nproc) / gpus))
    export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
fi

# torchrun hands these on to the training processes; by itself it would die of SIGUSR1 and leave them behind.
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}

# A user's error should cost one sentence, not torchrun's traceback.
WORLD_SIZE=$((nodes * gpus)) "$python" -m megatron_lrc check "$@" || exit

launch=("${rendezvous[@]}" --nproc-per-node "$gpus" --max-restarts "$restarts")
# LAUNCHER_FLAGS is unquoted: several flags.
exec "$python" -m "$launcher" "${launch[@]}" ${LAUNCHER_FLAGS:-} -m megatron_lrc train "$@"

: <<'# End of the Python part.'
"""

import os
import sys

# Helper processes (checkpoint writing, data loading) import this file again, under another name, and need the package.
root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, root)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))

if __name__ == "__main__":
    from megatron_lrc.commands.main import main

    sys.exit(main(["train", *sys.argv[1:]]))
# End of the Python part.
