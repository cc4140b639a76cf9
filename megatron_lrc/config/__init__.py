"""What a run is made from: its settings, how they are read, and what of them can be refused at once.

The one door: whoever is outside imports from here. `settings/` has the fields, a flag each; `config.py` what follows
from them; `arguments.py` reads flags and YAML; `validation.py`, `layout_checks.py` and `precision_checks.py` refuse.
Nothing in this package imports torch, so that `--help` answers at once.
"""

from .arguments import (
    TRAINING,
    DryRun,
    build_parser,
    describe_changes,
    given_values,
    load_yaml,
    parse_config,
    presets_of,
    save_yaml,
    take_dry_run,
)
from .budget import budgets_of, check_budget, count_steps, describe_budgets, describe_training, is_counted
from .config import MATRICES, Config, ConfigError, ModelShape, RunFailed, RunStopped, flag_of, parse_clone_term
from .counts import exact_count, parse_count, short_count
from .departures import describe_departures, propose_batches
from .divergence import FORWARD, REVERSE, parse_divergence
from .layer_map import (
    check_layers,
    check_layers_against,
    describe_layers,
    most_important,
    refuse_layers,
    spread_evenly,
    student_layers,
)
from .layer_sizes import check_kept_sizes, is_slimmer, kept_sizes, refuse_kept_sizes
from .layout_checks import check_batches, check_layout, divisors
from .model_role import CONVERTED, STUDENT, TEACHER, ModelRole
from .precision_checks import check_precision
from .presets import PRESETS, PUBLISHED_RUNS
from .rates import describe_rate, recommended_lr, start_of
from .schedule import DEFAULT_WARMUP_FRACTION, check_schedule, describe_jump, describe_schedule
from .schema import SETTINGS, check_kinds, convert, suggest
from .settings import (
    CLONE_TERMS,
    TINYBERT_TERMS,
    CheckpointConfig,
    LossConfig,
    ModelConfig,
    ProjectionConfig,
    PruningConfig,
    TrainingConfig,
)
from .validation import (
    check_directory,
    check_losses,
    check_ranges,
    fields_of,
    flags_set,
    parse_split,
    raise_all,
    validate,
    validate_against_teacher,
)
from .yaml_limits import check_yaml
