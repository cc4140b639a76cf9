"""A training run from a Config: check, build, steps with validation, logging and checkpoints between them."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from megatron_lrc.config import Config, ConfigError, RunStopped, describe_changes, save_yaml
from megatron_lrc.data.batches import BatchIterator, build_datasets
from megatron_lrc.mcore import distributed
from megatron_lrc.mcore.checkpoint import damage_on_any_rank, load_checkpoint, load_weights
from megatron_lrc.mcore.distributed import Groups
from megatron_lrc.mcore.kernels import (
    check_machine,
    choose_determinism,
    describe_kernels,
    start_userbuffers,
    stop_userbuffers,
)
from megatron_lrc.mcore.optimizer import build_optimizer, parameter_dtype
from megatron_lrc.mcore.stages import count_trained
from megatron_lrc.methods.lrc.paired_model import PairedModel
from megatron_lrc.methods.sheared.sheared_model import ShearedModel
from megatron_lrc.train.build import build_stages_of_method
from megatron_lrc.train.effective_rank import measure_effective_rank
from megatron_lrc.train.garbage import collect_what_was_replaced, what_is_there_stays
from megatron_lrc.train.guard import Guard
from megatron_lrc.train.heartbeat import Heartbeat
from megatron_lrc.train.metrics import RunLog, Stopwatch
from megatron_lrc.train.process_memory import largest_memory_gib
from megatron_lrc.train.records import Interval
from megatron_lrc.train.saving import Saving
from megatron_lrc.train.start_checks import CONFIG_FILE, Checked, check, describe_tying, naming_the_student
from megatron_lrc.train.step import Run, StepReport, evaluate, train_step
from megatron_lrc.train.stopping import Stopping
from megatron_lrc.train.stragglers import Stragglers, describe
from megatron_lrc.train.throughput import Throughput, peak_tflops
from megatron_lrc.train.votes import Votes


def train(config: Config) -> None:
    """Run the whole training on this process, one of the world that torchrun's environment describes."""
    choose_determinism(config)
    check_machine(config)
    checked = check(config, distributed.world_size())
    groups = distributed.start(config)
    distributed.watch_peers(groups)
    checked = _fall_back_past_damage(config, checked)
    start_userbuffers(config, config.student_shape(checked.teacher.shape), parameter_dtype(config))
    Trainer(checked.config, checked, groups).train()
    stop_userbuffers(config)
    distributed.stop()  # not after an error: the other ranks may never meet it, and torchrun ends them all


def _fall_back_past_damage(config: Config, checked: Checked) -> Checked:
    """Look at what the files of the checkpoint hold, all ranks together, and take an older one while it is damaged."""
    damaged: dict[Path, str] = {}
    while checked.resume_from and (damage := damage_on_any_rank(checked.resume_from)):
        damaged[checked.resume_from] = damage
        checked = check(config, distributed.world_size(), damaged)
    if checked.weights_from and (damage := damage_on_any_rank(checked.weights_from)):
        raise ConfigError(f"{checked.weights_from} is damaged ({damage}). Give an older checkpoint of that run.")
    return checked


class Trainer:
    """One process's part of a run: the objects, and where it stands."""

    def __init__(self, config: Config, checked: Checked, groups: Groups):
        self.config, self.groups = config, groups
        self.state = replace(checked.state)
        self.stopping = Stopping(config, self.state, groups)
        self.heartbeat = Heartbeat()
        self.train_data, self.valid_data = build_datasets(
            config, step=self.state.step, consumed_samples=self.state.consumed_samples
        )
        with naming_the_student(config):
            stages = build_stages_of_method(
                config,
                checked.teacher,
                checked.reader,
                groups,
                parameter_dtype(config),
                lambda: self._batches(self.train_data, 0),
                is_new=not checked.resume_from and not checked.weights_from,
                is_open=self.state.opened_at is not None,
                is_pruned=self.state.pruned_at is not None,
            )
        optimizer = build_optimizer(self._config_of_phase(), stages, groups)
        if checked.resume_from:
            load_checkpoint(checked.resume_from, stages, optimizer)
            has_changed = self.state.opened_at is not None or self.state.pruned_at is not None
            optimizer.is_to_start_moments = has_changed and self.state.grad_norm_count == 0  # no step since then
        elif checked.weights_from:
            load_weights(checked.weights_from, stages, optimizer)
        self.guard = Guard(config, self.state, stages)
        at_once = config.training.micro_batch_size * groups.dp.size()
        assert config.training.global_batch_size is not None, "the configuration has been resolved"
        self.global_batch_size = config.training.global_batch_size
        self.run = Run(config, groups, stages, optimizer, self.global_batch_size // at_once)
        # A run may also continue another one's checkpoint.
        save, resume_from = config.checkpoint.save, checked.resume_from
        is_same_run = save and resume_from and resume_from.parent.resolve() == Path(save).resolve()
        saved_step = self.state.step if is_same_run else None
        self.saving = Saving(config, groups, self.run, self.state, saved_step, self._say)
        self._started_from = resume_from or checked.weights_from
        self.stragglers = Stragglers(groups, stages, is_on=config.logging.log_straggler)
        self._announce(checked)
        if self.train_data:
            self.state.data_order = self.train_data.order.identity

    def train(self) -> None:
        """Train to --train-iters, or until asked to stop (`stopping.py`), and save. RunStopped by the guard."""
        log = self._open_log()
        with what_is_there_stays(is_on=self.config.checkpoint.async_save), self.stopping:
            if self.state.step == 0:
                self._validate(log)
            if self.state.step < self.config.training.train_iters and not self.stopping.is_asked:
                self._train_steps(log)
            self.run.optimizer.await_parameters()
            self.saving.save_last()
            self.saving.close()
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
        while state.step < config.training.train_iters:
            if self._is_to_open() or self._is_to_prune():
                if self.config.is_sheared:
                    self._prune()
                else:
                    self._open()
                if log:
                    log.throughput = self._throughput()
            lr = self.run.optimizer.lr
            is_last = state.step + 1 == config.training.train_iters
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
            interval.add(report)
            if is_logged:
                record = interval.record(config)  # waits for the device, so before the clock is read
                seconds = stopwatch.lap(interval.steps)
                slowest = self.stragglers.record(interval.steps)
                self._log_step(log, report, record, lr, seconds, slowest)
                interval.reset()
            stopwatch.pause()
            if self.stopping.is_urgent:
                self._save()  # first, since a validation may take too long
            if is_last or (_is_due(state.step, config.logging.eval_interval) and not self.stopping.is_urgent):
                self._validate(log)
            if _is_due(state.step, config.checkpoint.save_interval):
                self._save()
            if self.stopping.is_asked:
                return
            stopwatch.resume()

    def _config_of_phase(self) -> Config:
        """With the learning rate of now."""
        open_lr = self.config.projection.open_lr
        if self.state.opened_at is None or open_lr is None:
            return self.config
        return replace(self.config, optimizer=replace(self.config.optimizer, lr=open_lr))

    def _is_to_open(self) -> bool:
        step = self.config.open_step
        return step is not None and self.state.opened_at is None and self.state.step >= step

    def _open(self) -> None:
        """--open-after: from here on the student's own matrices are trained, from the values that they have."""
        self.state.opened_at = self.state.step
        with self._training_something_else(with_moments=True):
            for stage in self.run.stages:
                assert isinstance(stage, PairedModel), "validate() has passed"
                stage.open(self.config.own_matrices(is_open=True))
        what = {"mlp": "the MLPs", "all": "all layers and both ends"}[self.config.projection.open_matrices]
        self._say(
            f"step {self.state.step}: projections of {what} dropped, the student's own matrices are trained from here "
            f"on; trained: {self._count_trained() / 1e6:.1f}M parameters"
        )

    def _is_to_prune(self) -> bool:
        step = self.config.prune_step
        return step is not None and self.state.pruned_at is None and self.state.step >= step

    def _prune(self) -> None:
        """--method sheared: from here on what the masks leave of the model is trained, by itself."""
        self.state.pruned_at = self.state.step
        shapes = self.run.stages[0].shapes
        student = self.config.student_shape(shapes.student)
        with self._training_something_else(with_moments=False):
            for stage in self.run.stages:
                assert isinstance(stage, ShearedModel), "build_stages_of_method() has made them"
                stage.prune(replace(shapes, teacher=student, student=student))
        self._say(
            f"step {self.state.step}: cut to hidden size {student.hidden_size}, {student.num_query_groups} KV groups, "
            f"FFN width {student.ffn_hidden_size}; trained from here on: {self._count_trained() / 1e6:.1f}M parameters"
        )

    @contextlib.contextmanager
    def _training_something_else(self, *, with_moments: bool) -> Iterator[None]:
        """Round a change of the stages in the middle of the run: what trains them, and is saved, is new afterwards."""
        self.saving.expect_other_tensors()
        self.state.grad_norm_mean, self.state.grad_norm_count = 0.0, 0  # of other gradients
        before = self.run.optimizer
        before.await_parameters()
        yield
        self.run.optimizer = build_optimizer(self._config_of_phase(), self.run.stages, self.groups)
        self.run.optimizer.take_over(before, with_moments=with_moments)
        del before
        collect_what_was_replaced()

    def _count_trained(self) -> float:
        """Over all ranks, each parameter once. Collective."""
        count = torch.tensor(count_trained(self.run.stages), dtype=torch.float64, device=self.groups.device)
        return distributed.sum_over_world(count).item() / self.groups.dp_cp.size()

    def _look_at(self, report: StepReport) -> None:
        """Say why a step was skipped; after too many in a row save what there is and stop."""
        line = self.guard.look_at(report)
        if line:
            self._say(line)
        if self.guard.is_over:
            self.saving.save_last()
            raise RunStopped(self.guard.last_words)

    def _log_step(
        self,
        log: RunLog | None,
        report: StepReport,
        interval: dict[str, Any],
        lr: float,
        seconds: float,
        slowest: dict[str, Any] | None,
    ) -> None:
        """Write the record. Collective: memory is that of all ranks."""
        memory = largest_memory_gib(self.groups.device)
        if not log:
            return
        log.step(
            {
                "step": self.state.step,
                "tokens": self.state.tokens,
                **interval,
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
            return totals.means(self.config) | totals.agreement(self.config)

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
        )

    def _open_log(self) -> RunLog | None:
        if not self.groups.is_main_rank:
            return None
        save = self.config.checkpoint.save
        log = RunLog(
            self.config,
            self._throughput(),
            resume_at=self.state.step,
            checkpoint=self._started_from,
            world_size=distributed.world_size(),
        )
        if save:
            save_yaml(self.config, Path(save) / CONFIG_FILE)
        return log

    def _throughput(self) -> Throughput:
        shapes, peak = self.run.stages[0].shapes, peak_tflops(self.config, self.groups.device)
        world_size = distributed.world_size()
        is_open = self.state.opened_at is not None
        return Throughput(
            self.config, shapes.teacher, shapes.student, world_size=world_size, peak=peak, is_open=is_open
        )

    def _announce(self, checked: Checked) -> None:
        """The lines at a run's start: what differs from the defaults, both models, the layout."""
        for line in describe_changes(self.config):
            self._say(line)
        shapes = self.run.stages[0].shapes
        trained = self._count_trained()
        student = f"{shapes.student.hidden_size} ({describe_tying(shapes.student)}), {shapes.student.num_layers} layers"
        if self.config.is_clone and self.state.opened_at is not None:
            models, where = f"teacher d_T {shapes.teacher.hidden_size}, student d_S", ", opened"
        elif self.config.has_teacher and not self.config.is_clone:
            models, where = f"teacher d_T {shapes.teacher.hidden_size}, student d_S", ", all of the student's"
        elif self.config.is_sheared and self.state.pruned_at is None:
            models, where = f"pruning to d {self.config.model.student_hidden_size} a model of hidden size", ""
        elif self.config.has_teacher:
            models, where = f"teacher d_T {shapes.teacher.hidden_size}, student d_S", " in projections and norm gains"
        else:
            models, where = "ordinary training of a model of hidden size", ", all that there are"
        self._say(f"{models} {student}; trained: {trained / 1e6:.1f}M parameters{where}")
        cp = f" x CP {self.groups.cp.size()}" if self.groups.cp.size() > 1 else ""
        self._say(
            f"TP {self.groups.tp.size()} x PP {self.groups.pp.size()}{cp} x DP {self.groups.dp.size()} on "
            f"{self.groups.device.type}; {self.run.num_microbatches} micro-batches of "
            f"{self.config.training.micro_batch_size} x {self.config.training.seq_length} tokens per step"
        )
        if kernels := describe_kernels(self.config, parameter_dtype(self.config)):
            self._say(kernels)
        for warning in checked.warnings:
            self._say(f"warning: {warning}")
        if checked.weights_from:
            self._say(f"starts from the weights of {checked.weights_from}")
        if checked.resume_from:
            self._say(f"continues {checked.resume_from} at step {self.state.step}")
            self._warn_of_other_data(checked.state.data_order)

    def _warn_of_other_data(self, order_before: str) -> None:
        """Other data is no error: a run may go on with a later stage's. A position in it is not what it was, though."""
        if self.train_data and order_before not in ("", self.train_data.order.identity):
            self._say(
                "warning: the training data is not what the checkpoint was trained on (files, their order or weights, "
                "--split, --seq-length, --seed); the position is kept: the next sample is number "
                f"{self.state.consumed_samples} of the data given now"
            )

    def _say(self, line: str) -> None:
        if self.groups.is_main_rank:
            print(line, flush=True)


def _is_due(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0
