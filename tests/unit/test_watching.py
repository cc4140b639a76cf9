"""What a run shows of itself, piece by piece: speed, memory, the console's line, starts, boards."""

import gc
import json
import math
import mmap
from importlib.util import find_spec

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_lrc.config import CLONE_TERMS, Config, ConfigError, ModelShape
from megatron_lrc.estimate.devices import known_peak_tflops
from megatron_lrc.estimate.flops import step_flops
from megatron_lrc.estimate.spans import span
from megatron_lrc.methods import method_of
from megatron_lrc.train.boards import check_boards, scalars
from megatron_lrc.train.jsonl import drop_records_after, read_records
from megatron_lrc.train.metrics import RunLog
from megatron_lrc.train.process_memory import GIB, memory_bytes
from megatron_lrc.train.progress import Progress, agreement_text, duration, gap_text, steady_text
from megatron_lrc.train.starts import lost_work
from megatron_lrc.train.stragglers import OwnTime, find_slowest
from megatron_lrc.train.throughput import Throughput

SHAPE = ModelShape(
    num_layers=28,
    hidden_size=3072,
    num_attention_heads=24,
    num_query_groups=8,
    head_dim=128,
    ffn_hidden_size=8192,
    vocab_size=128256,
    norm_epsilon=1e-5,
    is_tied=True,
)


def step_record(**changes) -> dict:
    """A record of a large run."""
    record = {
        "step": 12345,
        "tokens": 19_876_543_210,
        "loss": 3.456789,
        "lm_loss": 2.654321,
        "kl_loss": 0.312345,
        "clone_loss": 0.785432,
        "grad_norm": 0.41234,
        "lr": 9.876e-5,
        "step_seconds": 3.0,
        "tokens_per_second": 123_456.7,
        "tflops": {"total": 412.3},
        "mfu": {"total": 0.41234},
        "memory_gib": {"peak": 123.4, "now": 99.0},
    }
    return {**record, **changes}


def own_times(*seconds: tuple[float, float], stages: tuple[int, ...] | None = None) -> list[OwnTime]:
    stages = stages or (0,) * len(seconds)
    return [OwnTime(rank, stages[rank], f"node{rank}", *pair) for rank, pair in enumerate(seconds)]


# ---- speed ----


def test_parts_of_the_throughput_add_up_and_are_those_of_the_step_per_device():
    config = Config()
    config.training.global_batch_size, config.training.seq_length = 64, 2048
    student = Config()
    student.model.student_hidden_size = 1536
    flops = step_flops(config, SHAPE, method_of(student).student_shape(SHAPE))
    throughput = Throughput(config, SHAPE, method_of(student).student_shape(SHAPE), world_size=8, peak=989.4)
    record = throughput.record(2.0)
    assert record["tokens_per_second"] == 64 * 2048 / 2.0
    tflops, mfu = record["tflops"], record["mfu"]
    assert tflops["teacher_forward"] == pytest.approx(flops.teacher_forward / 8 / 2.0 / 1e12)
    assert tflops["total"] == pytest.approx(flops.total / 8 / 2.0 / 1e12)
    parts = ("teacher_forward", "student_forward", "student_backward", "projections")
    assert sum(tflops[part] for part in parts) == pytest.approx(tflops["total"])
    assert sum(mfu[part] for part in parts) == pytest.approx(mfu["total"]) == pytest.approx(tflops["total"] / 989.4)


def test_without_a_known_peak_there_is_no_mfu():
    config = Config()
    config.training.global_batch_size = 8
    unknown = Throughput(config, SHAPE, SHAPE, world_size=1, peak=None)
    assert "mfu" not in unknown.record(1.0) and unknown.seconds_per_step(0.5) is None


def test_a_step_takes_what_its_flops_take_at_a_share_of_the_peak():
    config = Config()
    config.training.global_batch_size = 8
    throughput = Throughput(config, SHAPE, SHAPE, world_size=4, peak=100.0)
    seconds = throughput.seconds_per_step(0.35)
    assert seconds is not None and throughput.record(seconds)["mfu"]["total"] == pytest.approx(0.35)


@pytest.mark.parametrize(
    ("name", "half", "full"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4, 66.9),
        ("NVIDIA H100 PCIe", 756.5, 51.2),
        ("NVIDIA H200 NVL", 835.5, 60.0),
        ("NVIDIA A100-SXM4-80GB", 312.0, 19.5),
        ("NVIDIA GB200", 2500.0, 80.0),
        ("NVIDIA A10", None, None),  # not taken for an A100
        ("NVIDIA L40", None, None),  # no L4
        ("NVIDIA GeForce RTX 4090", None, None),
    ],
)
def test_the_peak_follows_from_the_name_of_well_known_devices_only(name, half, full):
    assert known_peak_tflops(name, is_half=True) == half
    assert known_peak_tflops(name, is_half=False) == full


# ---- memory ----


def test_peak_memory_stays_when_memory_is_given_back():
    cpu = torch.device("cpu")
    gc.collect()  # what earlier tests left is not to be given back meanwhile
    _, before = memory_bytes(cpu)
    block = mmap.mmap(-1, GIB // 2)  # malloc may keep what is freed (`mcore/cpu.py`)
    torch.frombuffer(block, dtype=torch.uint8).fill_(1)
    _, with_block = memory_bytes(cpu)
    block.close()
    peak, after = memory_bytes(cpu)
    assert with_block - before > 0.7 * GIB / 2
    assert peak > with_block - GIB / 100  # the kernel keeps them a little behind
    assert with_block > after + 0.7 * GIB / 2


# ---- the console's line ----


def test_the_progress_line_of_a_large_run_is_short_and_has_the_teacher_beside_the_student():
    line = Progress(23456).line(step_record(teacher_lm_loss=2.412345))
    assert line == (
        "step 12345/23456 | loss 3.457 lm 2.654 (teacher 2.412) kl 0.312 clone 0.785 | grad 0.412 | "
        "123K tok/s | ETA 9h15m"
    )
    assert len(line) <= 115


@pytest.mark.parametrize("without", [{}, {"teacher_lm_loss": None}])  # no teacher; its logits not computed
def test_without_a_teachers_loss_the_line_names_none(without):
    assert "| loss 3.457 lm 2.654 kl 0.312 clone 0.785 |" in Progress(23456).line(step_record(**without))


def test_without_a_label_that_counts_a_line_has_no_nan():
    losses = dict.fromkeys(("loss", "lm_loss", "kl_loss", "clone_loss"), math.nan)
    line = Progress(20000).line(step_record(**losses, teacher_lm_loss=math.nan))
    assert "| no loss: all labels are masked, or no loss was finite |" in line and "nan" not in line
    assert agreement_text({"teacher_kl": math.nan, "top1_agreement": math.nan}) == ""


def test_losses_of_any_size_stay_short():
    record = step_record(loss=1234.5678, lm_loss=12.3456, kl_loss=0.0123456, clone_loss=math.nan)
    assert "| loss 1,235 lm 12.35 kl 0.0123 clone nan |" in Progress(23456).line(record)


def test_what_hardly_changes_is_said_once_when_the_run_is_warm():
    progress = Progress(300)
    said = [list(progress.lines(step_record(step=step))) for step in (100, 200, 300)]
    assert [len(lines) for lines in said] == [1, 2, 1]
    assert said[1][1] == "at 123K tok/s: MFU 41%, 412 TFLOP/s per device; peak memory 123 GiB"
    assert len(list(Progress(100).lines(step_record(step=100)))) == 2  # there is no second record


def test_without_mfu_there_are_tflops_alone():
    record = step_record()
    del record["mfu"]
    assert "tok/s: 412 TFLOP/s per device" in steady_text(record)


def test_the_time_left_counts_what_lies_between_steps(monkeypatch):
    """Validations and saving take time that `step_seconds` leaves out."""
    clock = iter((1000.0, 1400.0))
    monkeypatch.setattr("megatron_lrc.train.progress.time.monotonic", lambda: next(clock))
    progress = Progress(300)
    assert progress.line(step_record(step=100, step_seconds=3.0)).endswith("ETA 10m00s")
    assert progress.line(step_record(step=200, step_seconds=3.0)).endswith("ETA 6m40s")  # 100 steps took 400 s


def test_durations_read_as_minutes_hours_or_days():
    assert [duration(seconds) for seconds in (9.4, 605, 10_920, 442_800)] == ["0m09s", "10m05s", "3h02m", "5d03h"]


@pytest.mark.parametrize(
    ("first", "last", "words"),
    [
        (4.5, 3.5, "50% of the way to the teacher's 2.500"),
        (4.5, 4.5, "0% of the way to the teacher's 2.500"),
        (4.5, 2.4, "not above the teacher's 2.500"),
        (2.6, 1.2, "not above the teacher's 2.500"),  # 1348% and the like
        (2.4, 2.3, "not above the teacher's 2.500"),
        (2.4, 2.7, "above the teacher's 2.500, and at first it was not"),
        (4.5, 4.7, "above the 4.500 it began with; the teacher's is 2.500"),
        (4.5, math.nan, ""),
        (math.inf, 3.5, ""),
    ],
)
def test_the_way_to_the_teacher_is_a_share_only_between_start_and_teacher(first, last, words):
    assert gap_text(first, last, 2.5) == words


def test_spans_to_come_read_in_the_unit_of_their_size():
    spans = (20, 59 * 60, 3600, 7.26 * 3600, 47 * 3600, 49 * 3600, 400 * 86400)
    said = ["under a minute", "59 minutes", "1.0 hours", "7.3 hours", "47.0 hours", "2.0 days", "400.0 days"]
    assert list(map(span, spans)) == said


# ---- the slowest rank ----


def test_the_rank_furthest_above_its_peers_is_the_slowest():
    slowest = find_slowest(own_times((0.1, 1.0), (0.1, 1.1), (0.5, 1.0), (0.1, 0.9)))
    assert slowest is not None and (slowest["rank"], slowest["host"]) == (2, "node2")
    assert (slowest["data_seconds"], slowest["compute_seconds"]) == (0.5, 1.0)
    assert slowest["peers_seconds"] == pytest.approx(1.1) and slowest["percent_over"] == pytest.approx(100 * 0.4 / 1.1)


def test_a_stage_with_more_work_is_no_straggler():
    """The last stage has the LM heads: all of its ranks take long, one of the first stage's is slow."""
    times = own_times(
        (0.0, 1.0), (0.0, 1.2), (0.0, 1.0), (0.0, 2.0), (0.0, 2.0), (0.0, 2.05), stages=(0, 0, 0, 1, 1, 1)
    )
    slowest = find_slowest(times)
    assert slowest is not None and slowest["rank"] == 1


def test_stages_of_one_rank_each_are_compared_with_each_other():
    slowest = find_slowest(own_times((0.0, 1.0), (0.0, 1.5), stages=(0, 1)))
    assert slowest is not None and slowest["rank"] == 1 and slowest["percent_over"] == pytest.approx(50)


def test_a_single_rank_has_no_slowest():
    assert find_slowest(own_times((0.1, 1.0))) is None


# ---- records and starts ----


def test_what_was_logged_past_the_checkpoint_is_lost_work():
    records = [{"step": step, "step_seconds": seconds} for step, seconds in ((10, 1.0), (20, 2.0), (25, 4.0))]
    assert lost_work(records, 25) == (0, 0.0)
    assert lost_work(records, 12) == (13, 8 * 2.0 + 5 * 4.0)  # steps 13 to 20, 21 to 25
    assert lost_work(records, 0) == (25, 10 * 1.0 + 10 * 2.0 + 5 * 4.0)
    assert lost_work([], 12) == (0, 0.0)


def test_records_past_a_step_and_a_line_cut_by_a_crash_are_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    kept = "".join(json.dumps({"step": step}) + "\n" for step in (1, 2))
    file.write_text(kept + '{"step": 3}\n{"step": 4, "los')
    assert [record["step"] for record in read_records(file)] == [1, 2, 3]
    drop_records_after(file, 2)
    assert file.read_text() == kept
    drop_records_after(tmp_path / "missing.jsonl", 2)
    assert list(read_records(tmp_path / "missing.jsonl")) == []


# ---- boards ----


def test_boards_get_every_number_and_no_text():
    record = {
        "step": 3,
        "loss": 1.0,
        "time": "2025-01-31T12:00:00+00:00",
        "mfu": {"total": 0.4},
        "memory_gib": {"peak": 2.0},
        "straggler": {"host": "node7", "percent_over": 12.0},
    }
    assert scalars("train", record) == {
        "train/loss": 1.0,
        "train_mfu/total": 0.4,
        "train_memory_gib/peak": 2.0,
        "train_straggler/percent_over": 12.0,
    }
    assert not any(math.isnan(value) for value in scalars("train", record).values())


@pytest.mark.parametrize("with_layers", [False, True])
def test_layers_are_on_the_boards_only_if_asked_for_and_in_the_records_always(with_layers, tmp_path):
    """Through the event file, as TensorBoard reads it: a model of 30 layers."""
    config = Config()
    config.checkpoint.save, config.logging.log_layers_to_tensorboard = str(tmp_path), with_layers
    config.training.global_batch_size, config.training.train_iters = 8, 20000
    throughput = Throughput(config, SHAPE, SHAPE, world_size=1, peak=None)
    log = RunLog(config, throughput, resume_at=0, checkpoint=None, weights=None, world_size=1)
    clone = {term: [0.5] * 30 for term in CLONE_TERMS}
    log.step(step_record(clone_by_layer=clone))
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    names = events.Tags()["scalars"]
    assert len([name for name in names if name.startswith("train_layers/")]) == (210 if with_layers else 0)
    assert [name for name in names if name.startswith("train_clone/")] == [
        f"train_clone/{term}" for term in CLONE_TERMS
    ]
    assert events.Scalars("train_clone/q")[0].value == 15.0
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["clone_by_layer"] == clone


def test_a_validation_worse_than_the_first_is_a_warning_on_console_and_record_also_after_a_restart(tmp_path, capsys):
    config = Config()
    config.checkpoint.save = str(tmp_path)
    config.training.global_batch_size, config.training.train_iters = 8, 20000
    throughput = Throughput(config, SHAPE, SHAPE, world_size=1, peak=None)
    for resume_at, values in ((0, {0: 1.1, 10: 0.9}), (10, {20: 1.2, 30: 1.3})):
        log = RunLog(config, throughput, resume_at=resume_at, checkpoint=None, weights=None, world_size=1)
        for step, kl in values.items():
            losses = {"loss": 7.0, "lm_loss": 4.0, "kl_loss": 3.0, "teacher_kl": kl, "top1_agreement": 0.5}
            log.validation({"step": step, "tokens": 1024 * step, **losses})
        log.close()
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert warning.startswith(
        "warning: at step 20 the KL from the teacher on the validation data is 1.2, above the 1.1 "
    )
    records = list(read_records(tmp_path / "validation.jsonl"))
    assert [record.get("warning") for record in records] == [None, None, warning.removeprefix("warning: "), None]


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_wandb_is_refused_in_a_sentence_where_it_is_not_installed():
    config = Config()
    config.logging.wandb_project = "clones"
    with pytest.raises(ConfigError, match=r"--wandb-project clones needs the package wandb.*pip install"):
        check_boards(config)


def test_a_wandb_name_without_a_project_is_refused():
    config = Config()
    config.logging.wandb_exp_name = "first"
    with pytest.raises(ConfigError, match="--wandb-exp-name first names a run of no project"):
        check_boards(config)
