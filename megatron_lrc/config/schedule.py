"""The learning rate over a run: a linear warmup, then a decay; which lengths follow from which settings.

Its clock is optimizer steps, and it follows from the step and the flags alone. So a run that goes on with a larger
budget has its decay later: with WSD (warmup, stable, decay; arXiv 2404.06395), from a checkpoint of the stable phase,
nothing but the end has changed.
"""

from collections.abc import Iterator

from .settings import OptimizerConfig

#: The released code's warmup.
DEFAULT_WARMUP_FRACTION = 0.005
#: By itself that fraction is no step at all in runs of less than 100, where the first steps at the full rate destroy a
#: closed-form start: Adam's steps have their full size whatever the gradients are. It takes a fifth of a run at most.
LEAST_WARMUP, LARGEST_SHARE_OF_LEAST_WARMUP = 10, 5
#: Of the decay steps, with --lr-decay-style WSD.
DEFAULT_WSD_DECAY_FRACTION = 0.2
#: Settings that say the same thing, of which a source (a preset, a file, the flags) gives one: its takes the place of
#: another source's other one.
ALTERNATIVES = (("lr_warmup_iters", "lr_warmup_fraction"), ("lr_wsd_decay_iters", "lr_wsd_decay_fraction"))


def warmup_iters(optimizer: OptimizerConfig, decay_iters: int) -> int:
    """Steps of linear warmup, which count as decay steps: as given, or a fraction rounded to the nearest step."""
    if optimizer.lr_warmup_iters is not None:
        return optimizer.lr_warmup_iters
    if optimizer.lr_warmup_fraction is not None:
        return _rounded(optimizer.lr_warmup_fraction * decay_iters)
    least = min(LEAST_WARMUP, decay_iters // LARGEST_SHARE_OF_LEAST_WARMUP)
    return max(_rounded(DEFAULT_WARMUP_FRACTION * decay_iters), least)


def wsd_decay_iters(optimizer: OptimizerConfig, decay_iters: int) -> int:
    """With WSD: the last so many of the decay steps, as given, or a fraction and then at least one."""
    if optimizer.lr_wsd_decay_iters is not None:
        return optimizer.lr_wsd_decay_iters
    fraction = optimizer.lr_wsd_decay_fraction
    return max(_rounded((DEFAULT_WSD_DECAY_FRACTION if fraction is None else fraction) * decay_iters), 1)


def _rounded(steps: float) -> int:
    return int(steps + 0.5)


def check_schedule(optimizer: OptimizerConfig, decay_iters: int | None) -> Iterator[str]:
    """decay_iters: None before they are known, and for a run without a step."""
    if optimizer.lr_warmup_iters is not None and optimizer.lr_warmup_fraction is not None:
        yield "--lr-warmup-iters and --lr-warmup-fraction are both given. Keep one."
    elif optimizer.lr_warmup_iters and decay_iters and optimizer.lr_warmup_iters >= decay_iters:
        yield (
            f"--lr-warmup-iters {optimizer.lr_warmup_iters} leaves nothing of the {decay_iters} decay steps. "
            "Warmup counts as part of them: use fewer, or a larger --lr-decay-iters."
        )
    elif optimizer.lr_decay_style == "WSD":
        yield from _check_wsd(optimizer, decay_iters)
    elif given := _wsd_flags(optimizer):
        yield (
            f"{given} means nothing with --lr-decay-style {optimizer.lr_decay_style}. Use --lr-decay-style WSD, or "
            "leave it out."
        )
    if optimizer.lr is not None and optimizer.min_lr > optimizer.lr >= 0:
        yield f"--min-lr {optimizer.min_lr} is above the peak --lr {optimizer.lr}. It is where the decay ends."


def _check_wsd(optimizer: OptimizerConfig, decay_iters: int | None) -> Iterator[str]:
    if optimizer.lr_wsd_decay_iters is not None and optimizer.lr_wsd_decay_fraction is not None:
        yield "--lr-wsd-decay-iters and --lr-wsd-decay-fraction are both given. Keep one."
    elif decay_iters:
        last, warmup = wsd_decay_iters(optimizer, decay_iters), warmup_iters(optimizer, decay_iters)
        if last + warmup > decay_iters:
            yield (
                f"A decay of {last} steps (--lr-wsd-decay-iters or --lr-wsd-decay-fraction) after {warmup} of warmup "
                f"is longer than the {decay_iters} steps that there are (--lr-decay-iters, or else the whole run). Use "
                f"at most {decay_iters - warmup}."
            )


def _wsd_flags(optimizer: OptimizerConfig) -> str:
    """Those that differ from their defaults, joined by `and`."""
    names = ("lr_wsd_decay_iters", "lr_wsd_decay_fraction", "lr_wsd_decay_style")
    values = {name: getattr(optimizer, name) for name in names}
    given = {name: value for name, value in values.items() if value != getattr(type(optimizer)(), name)}
    return " and ".join(f"--{name.replace('_', '-')} {value}" for name, value in given.items())


def describe_schedule(optimizer: OptimizerConfig, decay_iters: int) -> str:
    """One line. The rate is a number by then."""
    assert optimizer.lr is not None, "the configuration has been resolved"
    warmup = warmup_iters(optimizer, decay_iters)
    line = f"learning rate: {optimizer.lr:g}" + (f" after {warmup:,} steps of warmup" if warmup else "")
    if optimizer.lr_decay_style == "constant":
        return f"{line}, constant"
    end = f"to {optimizer.min_lr:g} at step {decay_iters:,}"
    if optimizer.lr_decay_style == "WSD":
        held = decay_iters - wsd_decay_iters(optimizer, decay_iters)
        if held == decay_iters:
            return f"{line}, held to step {held:,}"
        return f"{line}, held to step {held:,}, then {optimizer.lr_wsd_decay_style} decay {end}"
    return f"{line}, then {optimizer.lr_decay_style} decay {end}"


def describe_jump(then: OptimizerConfig, now: OptimizerConfig, before: int, decay_iters: int, step: int) -> str | None:
    """Of a run that goes on in the middle of its WSD decay, with another budget: what that does to the rate, if the
    rate goes up. then, before: settings and decay steps of the run until `step`; now, decay_iters: those from there on.
    """
    begun, begins = before - wsd_decay_iters(then, before), decay_iters - wsd_decay_iters(now, decay_iters)
    if now.lr_decay_style != "WSD" or step <= begun or begins <= begun:
        return None
    return (
        f"step {step} is in the decay of the run so far, which began after step {begun}; with the budget given now the "
        f"decay begins after step {begins}, so the learning rate goes up again. To extend the stable phase go on from "
        f"a checkpoint of step {begun} or before"
    )
