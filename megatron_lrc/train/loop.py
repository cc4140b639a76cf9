"""A training run from a Config: check, build, steps with validation, logging and checkpoints between them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from megatron_lrc.checkpoints.run_directory import RunState
from megatron_lrc.config import (
    Config,
    ConfigError,
    RunStopped,
    describe_changes,
    describe_departures,
    describe_schedule,
    describe_training,
)
from megatron_lrc.console import say
from megatron_lrc.data.batches import BatchIterator
from megatron_lrc.data.counted_tokens import describe_counted_tokens
from megatron_lrc.data.datasets import build_datasets
from megatron_lrc.estimate.spans import span
from megatron_lrc.estimate.speed import DEFAULT_MFU
from megatron_lrc.mcore import distributed
from megatron_lrc.mcore.checkpoint import damage_on_any_rank, load_checkpoint, load_weights
from megatron_lrc.mcore.distributed import Groups, Meeting
from megatron_lrc.mcore.kernels import (
    check_machine,
    choose_determinism,
    describe_kernels,
    start_userbuffers,
    stop_userbuffers,
    warn_of_kernels,
)
from megatron_lrc.mcore.optimizer import build_optimizer, parameter_dtype
from megatron_lrc.mcore.stages import count_trained
from megatron_lrc.methods import method_of
from megatron_lrc.methods.method import Materials
from megatron_lrc.train.alike import check_alike, open_lock
from megatron_lrc.train.effective_rank import measure_effective_rank
from megatron_lrc.train.garbage import collect_after, collect_everything, collected_by_the_loop
from megatron_lrc.train.guard import Guard
from megatron_lrc.train.heartbeat import Heartbeat
from megatron_lrc.train.metrics import RunLog, Stopwatch
from megatron_lrc.train.out_of_memory import told_in_a_sentence
from megatron_lrc.train.process_memory import largest_memory_gib
from megatron_lrc.train.saving import Saving
from megatron_lrc.train.start_checks import Checked
from megatron_lrc.train.step import Interval, Run, StepReport, Votes, evaluate, train_step
from megatron_lrc.train.stopping import Stopping
from megatron_lrc.train.stragglers import Stragglers, describe
from megatron_lrc.train.throughput import Throughput, peak_tflops


def train(config: Config, presets: Sequence[str] = (), *, ends_process: bool = True) -> tuple[Config, RunState] | None:
    """Run the whole training on this process, one of the world that torchrun's environment describes.

    presets: the names given with --preset, of which warnings speak. ends_process: whether nothing but the process's end
    comes after it, so that signals are left alone. Gives what has been trained, and where it stands; None if the run
    was stopped before its end.
    """
    choose_determinism(config)
    check_machine(config)
    meeting = distributed.meet(config)
    with open_lock(config) as lock:
        checked = check_alike(config, meeting, lock)
        groups = distributed.start(config, meeting)
        distributed.watch_peers(groups)
        checked = _fall_back_past_damage(config, checked, meeting)
        checked.warnings.extend(describe_departures(checked.config, presets))
        start_userbuffers(config, method_of(config).student_shape(checked.teacher.shape), parameter_dtype(config))
        trainer, first = None, checked.state.step
        with told_in_a_sentence(checked.config, lambda: trainer and (first, trainer.state.step)):
            trainer = Trainer(checked.config, checked, groups)
            trainer.train(ends_process=ends_process)
        stop_userbuffers(config)
    distributed.stop()  # not after an error: the other ranks may never meet it, and torchrun ends them all
    is_finished = trainer.state.step == checked.config.train_iters
    return (checked.config, trainer.state) if is_finished else None


def _fall_back_past_damage(config: Config, checked: Checked, meeting: Meeting) -> Checked:
    """Look at what the files of the checkpoint hold, all ranks together, and take an older one while it is damaged."""
    damaged: dict[Path, str] = {}
    while checked.resume_from and (damage := damage_on_any_rank(checked.resume_from)):
        damaged[checked.resume_from] = damage
        checked = check_alike(config, meeting, None, damaged, checked.contents)
    if checked.weights_from and (damage := damage_on_any_rank(checked.weights_from)):
        raise ConfigError(f"{checked.weights_from} is damaged ({damage}). Give an older checkpoint of that run.")
    return checked


class Trainer:
    """One process's part of a run: the objects, and where it stands."""

    def __init__(self, config: Config, checked: Checked, groups: Groups):
        self.config, self.method, self.groups = config, method_of(config), groups
        self.state = replace(checked.state)
        self.stopping = Stopping(config, self.state, groups)
        self.heartbeat = Heartbeat()
        self.train_data, self.valid_data = build_datasets(
            config, step=self.state.step, consumed_samples=self.state.consumed_samples
        )
        materials = Materials(
            base=checked.teacher,
            reader=checked.reader,
            groups=groups,
            dtype=parameter_dtype(config),
            calibration=lambda: self._batches(self.train_data, 0),
            is_new=not checked.resume_from and not checked.weights_from,
            has_changed=self._has_changed,
            is_resumed=checked.resume_from is not None,
            checkpoint=checked.resume_from or checked.weights_from,
        )
        stages = self.method.build_stages(materials)
        optimizer = build_optimizer(self._config_of_phase, stages, groups)
        if checked.resume_from:
            load_checkpoint(checked.resume_from, stages, optimizer)
            # No step has been taken since the method changed what is trained.
            optimizer.is_to_start_moments = self._has_changed and self.state.grad_norm_count == 0
        elif checked.weights_from:
            load_weights(checked.weights_from, stages, optimizer)
        self.guard = Guard(config, self.state, stages)
        assert config.training.global_batch_size is not None, "the configuration has been resolved"
        self.global_batch_size = config.training.global_batch_size
        num_microbatches = config.num_microbatches(distributed.world_size())
        self.run = Run(self.method, groups, stages, optimizer, num_microbatches)
        # A run may also continue another one's checkpoint.
        save, resume_from = config.checkpoint.save, checked.resume_from
        is_same_run = save and resume_from and resume_from.parent.resolve() == Path(save).resolve()
        saved_step = self.state.step if is_same_run else None
        self.saving = Saving(config, groups, self.run, self.state, saved_step, self._say)
        self._started_from = resume_from or checked.weights_from
        self._read_weights = checked.reader.fingerprint(checked.contents) if checked.contents else None
        self.stragglers = Stragglers(groups, stages, is_on=config.logging.log_straggler)
        self._announce(checked)
        if self.train_data:
            self.state.data_order = self.train_data.order.identity

    def train(self, *, ends_process: bool = False) -> None:
        """Train to --train-iters, or until asked to stop (`stopping.py`), and save. RunStopped by the guard."""
        log = self._open_log()
        with collected_by_the_loop(), self.stopping:
            if self.state.step == 0:
                self._validate(log)
            if self.state.step < self.config.train_iters and not self.stopping.is_asked:
                self._train_steps(log)
            self.run.optimizer.await_parameters()
            self.saving.save_last()
            self.saving.close()
            self.stopping.note_saved(ends_process=ends_process)
            self.heartbeat.stop()
            if last_words := self.stopping.finish():
                self._say(last_words)
        if log:
            log.close()

    def _train_steps(self, log: RunLog | None) -> None:
        config, state = self.config, self.state
        batches = self.stragglers.watch(self._batches(self.train_data, state.consumed_samples))
        stopwatch = Stopwatch()
        interval = Interval(self.run.stages[0].sums.clone.shape, self.groups.device)
        while state.step < config.train_iters:
            if self._is_to_change():
                self._change()
                if log:
                    log.throughput = self._throughput()
            lr = self.run.optimizer.lr
            is_last = state.step + 1 == config.train_iters
            is_logged = is_last or _is_due(state.step + 1, config.logging.log_interval)
            with self.stragglers.step():
                report = train_step(
                    self.run,
                    batches,
                    with_group_norms=is_logged,
                    max_grad_norm=self.guard.largest_norm,
                    votes=lambda: Votes(self.stopping.requests(), self.saving.is_writing),
                )
            state.step += 1
            state.consumed_samples += self.global_batch_size
            state.tokens += self.global_batch_size * config.training.seq_length
            self.stopping.after_step(report.votes)
            self.saving.after_step(report.votes)
            self.heartbeat.beat()
            self._look_at(report)
            collect_after(state.step)
            interval.add(report)
            if is_logged:
                self._log_step(log, report, interval, lr, stopwatch)
                interval.reset()
            stopwatch.pause()
            if self.stopping.is_urgent:
                self._save()  # first, since a validation may take too long
            if is_last or (_is_due(state.step, config.logging.eval_interval) and not self.stopping.is_urgent):
                self._validate(log)
            if _is_due(state.step, config.checkpoint.save_interval) or self.saving.is_to_retry:
                self._save()
            if self.stopping.is_asked:
                return
            stopwatch.resume()

    @property
    def _has_changed(self) -> bool:
        """Whether the method has changed what is trained."""
        return self.state.changed_at is not None

    @property
    def _config_of_phase(self) -> Config:
        return self.method.config_of_phase(has_changed=self._has_changed)

    def _is_to_change(self) -> bool:
        step = self.method.change_step
        return step is not None and not self._has_changed and self.state.step >= step

    def _change(self) -> None:
        """From here on something else is trained: what trains it, and is saved, is new afterwards."""
        self.state.changed_at = self.state.step
        self.state.grad_norm_mean, self.state.grad_norm_count = 0.0, 0  # of other gradients
        self.saving.expect_other_tensors()
        before = self.run.optimizer
        before.await_parameters()
        self.method.change(self.run.stages)
        self.run.optimizer = build_optimizer(self._config_of_phase, self.run.stages, self.groups)
        self.run.optimizer.take_over(before, with_moments=self.method.keeps_moments)
        del before
        collect_everything()
        student = self.run.stages[0].shapes.student
        self._say(f"step {self.state.step}: {self.method.describe_change(student, self._count_trained())}")

    def _count_trained(self) -> int:
        """Over all ranks, each parameter once. Collective."""
        count = torch.tensor(count_trained(self.run.stages), dtype=torch.float64, device=self.groups.device)
        return round(distributed.sum_over_world(count).item() / self.groups.dp_cp.size())

    def _look_at(self, report: StepReport) -> None:
        """Say why a step was skipped; after too many in a row save what there is and stop."""
        if line := self.guard.look_at(report):
            self._say(line)
        if self.guard.is_over:
            self.saving.save_last()
            raise RunStopped(self.guard.last_words)

    def _log_step(
        self, log: RunLog | None, report: StepReport, interval: Interval, lr: float, stopwatch: Stopwatch
    ) -> None:
        """Write the record of the steps since the last one. Collective: memory is that of all ranks."""
        losses = interval.record(self.method)  # waits for the device, so before the clock is read
        seconds = stopwatch.lap(interval.steps)
        slowest = self.stragglers.record(interval.steps)
        memory = largest_memory_gib(self.groups.device)
        if not log:
            return
        log.step(
            {
                "step": self.state.step,
                "tokens": self.state.tokens,
                **losses,
                "grad_norm": report.grad_norm,
                "grad_norm_by_group": report.grad_norm_by_group,
                "lr": lr,
                **self.run.stages[0].record(),
                **({"loss_scale": report.loss_scale} if self.config.training.fp16 else {}),
                "step_seconds": seconds,
                "memory_gib": memory,
                **({"straggler": slowest} if slowest else {}),
            }
        )
        if slowest:
            self._say(describe(slowest))

    def _validate(self, log: RunLog | None) -> None:
        if self.valid_data is None or self.config.logging.eval_iters == 0:
            return
        batches = self._batches(self.valid_data, 0)

        def losses() -> dict[str, Any]:
            totals = evaluate(self.run, batches, num_batches=self.config.logging.eval_iters)
            return totals.means(self.method) | totals.agreement(self.method)

        if self.config.logging.log_effective_rank:
            found, ranks = measure_effective_rank(losses, self.run.stages, self.groups)
            found["effective_rank"] = ranks
        else:
            found = losses()
        if log:
            log.validation({"step": self.state.step, "tokens": self.state.tokens, **found})
        self.stopping.ask()

    def _save(self) -> None:
        self.saving.save()
        self.stopping.ask()

    def _batches(self, dataset: Dataset | None, consumed_samples: int) -> BatchIterator:
        assert dataset is not None, "check_data() has passed"
        assert self.config.training.global_batch_size is not None
        return BatchIterator(
            dataset,
            micro_batch_size=self.config.training.micro_batch_size,
            global_batch_size=self.config.training.global_batch_size,
            dp_rank=self.groups.dp.rank(),
            dp_size=self.groups.dp.size(),
            consumed_samples=consumed_samples,
            device=self.groups.device,
            num_workers=self.config.data.num_workers,
            finds_documents=self.config.data.reset_attention_mask,
        )

    def _open_log(self) -> RunLog | None:
        if not self.groups.is_main_rank:
            return None
        return RunLog(
            self.config,
            self._throughput(),
            resume_at=self.state.step,
            checkpoint=self._started_from,
            weights=self._read_weights,
            world_size=distributed.world_size(),
        )

    def _throughput(self) -> Throughput:
        shapes, world_size = self.run.stages[0].shapes, distributed.world_size()
        models, peak = (shapes.teacher, shapes.student), peak_tflops(self.config, self.groups.device)
        return Throughput(self.config, *models, world_size=world_size, peak=peak, has_changed=self._has_changed)

    def _announce(self, checked: Checked) -> None:
        """The lines at a run's start: what differs from the defaults, both models, the layout."""
        for line in describe_changes(self.config):
            self._say(line)
        shapes, trained = self.run.stages[0].shapes, self._count_trained()
        self._say(self.method.headline(shapes.teacher, shapes.student, trained, has_changed=self._has_changed))
        self._say(self.config.describe_layout(distributed.world_size(), self.groups.device.type))
        if self.config.parallel.share_compose:
            self._say(distributed.describe_sharing(self.groups))
        self._say(self._describe_training())
        if counted := describe_counted_tokens(self.config):
            self._say(counted)
        if self.config.decay_iters:
            self._say(describe_schedule(self.config.optimizer, self.config.decay_iters))
        dtype = parameter_dtype(self.config)
        if kernels := describe_kernels(self.config, dtype, shapes.student, self.method.noun, self.run.optimizer.kind):
            self._say(kernels)
        for warning in (*warn_of_kernels(self.config, dtype), *checked.warnings):
            self._say(f"warning: {warning}")
        if checked.weights_from:
            self._say(f"starts from the weights of {checked.weights_from}")
        if checked.resume_from:
            self._say(f"continues {checked.resume_from} at step {self.state.step}")
            # Other data is no error: a run may go on with a later stage's. A position in it is not what it was, though.
            if self.train_data and checked.state.data_order not in ("", self.train_data.order.identity):
                self._say(
                    "warning: the training data is not what the checkpoint was trained on (files, their order or "
                    "weights, --split, --seq-length, --seed); the position is kept: the next sample is number "
                    f"{self.state.consumed_samples} of the data given now"
                )

    def _describe_training(self) -> str:
        """The budget; hours where the device's peak is known, which is on no CPU."""
        state, steps = self.state, self.config.train_iters
        line = f"training: {describe_training(self.config.training, step=state.step, consumed_tokens=state.tokens)}"
        seconds = self._throughput().seconds_per_step(DEFAULT_MFU)
        if seconds is None:
            return line
        return f"{line}; {span(seconds * (steps - state.step))} at {DEFAULT_MFU:.0%} of the peak (assumed)"

    def _say(self, line: str) -> None:
        if self.groups.is_main_rank:
            say(line)


def _is_due(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0
