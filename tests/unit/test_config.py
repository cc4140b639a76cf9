"""Impossible configurations are refused with flag, value and what would do; derived sizes follow their rules."""

import math
from dataclasses import replace

import pytest

from config_cases import SMOLLM2, change, errors_of
from megatron_lrc.config import (
    Config,
    ConfigError,
    divisors,
    flag_of,
    parse_split,
    validate,
    validate_against_teacher,
)
from megatron_lrc.methods import method_of


def test_the_fixture_is_valid(valid_config):
    validate(method_of(valid_config), world_size=1)
    assert validate_against_teacher(method_of(valid_config), SMOLLM2) == []


@pytest.mark.parametrize(
    ("values", "world_size", "expected"),
    [
        ({"teacher": None}, 1, "--teacher is missing"),
        ({"teacher": "/no/such"}, 1, "--teacher /no/such is not a directory"),
        ({"student_hidden_size": None}, 1, "--student-hidden-size is missing"),
        ({"student_hidden_size": 0}, 1, "--student-hidden-size is 0; it must be at least 1"),
        ({"student_hidden_size": -3}, 1, "--student-hidden-size is -3; it must be at least 1"),
        ({"seq_length": 0}, 1, "--seq-length is 0"),
        ({"lr": -1e-4}, 1, "--lr is -0.0001; it must be at least 0"),
        ({"lr": math.nan}, 1, "--lr is nan"),
        ({"lr": 1e38}, 1, "--lr is 1e+38; it must be at least 0 and below 1e+15"),
        ({"seed": 2**32}, 1, "--seed is 4294967296; it must be at least 0 and below 4294967296"),
        ({"log_interval": 10**30}, 1, "it must be at least 1 and below 1e+15"),
        ({"adam_beta2": 1.0}, 1, "--adam-beta2 is 1.0; it must be at least 0 and below 1"),
        ({"kl_temperature": 0.0}, 1, "--kl-temperature is 0.0; it must be above 0"),
        ({"tensor_model_parallel_size": 2, "sequence_parallel": False}, 2, "Leave --no-sequence-parallel out"),
        ({"tensor_model_parallel_size": 3, "sequence_parallel": True}, 3, "Use --seq-length 2049"),
        ({"context_parallel_size": 3}, 3, "Use --seq-length 2052"),
        (
            {"context_parallel_size": 3, "tensor_model_parallel_size": 4, "sequence_parallel": True},
            12,
            "Use --seq-length 2052",
        ),
        ({"context_parallel_size": 2, "pipeline_model_parallel_size": 2}, 6, "Start a multiple of 4 processes"),
        ({"pipeline_model_parallel_layout": "EttL"}, 1, "--pipeline-model-parallel-layout needs several"),
        (
            {
                "pipeline_model_parallel_layout": "Et|tL",
                "pipeline_model_parallel_size": 2,
                "account_for_loss_in_pipeline_split": True,
            },
            2,
            "two ways to divide the layers",
        ),
        ({"ddp_bucket_size": 1000}, 1, "--ddp-bucket-size is for --overlap-grad-reduce"),
        ({"overlap_param_gather": True}, 1, "needs --use-distributed-optimizer and --overlap-grad-reduce"),
        (
            {"overlap_param_gather": True, "use_distributed_optimizer": True},
            1,
            "--overlap-param-gather needs --overlap-grad-reduce",
        ),
        ({"bf16": True, "fp16": True}, 1, "--bf16 and --fp16 are both given"),
        ({"loss_scale": 2.0}, 1, "--loss-scale 2.0 means nothing without --fp16"),
        ({"fp16": True, "min_loss_scale": 4.0, "initial_loss_scale": 2.0}, 1, "--min-loss-scale 4.0 is above"),
        ({"spike_factor": 1.0}, 1, "--spike-factor is 1.0; it must be above 1"),
        ({"pipeline_model_parallel_size": 2}, 3, "3 processes cannot hold whole copies"),
        ({"pipeline_model_parallel_size": 2}, 1, "Start a multiple of 2 processes"),
        (
            {"global_batch_size": 10, "micro_batch_size": 2},
            4,
            "replicas. Use --global-batch-size 8 (1.64M tokens) or 16 (3.28M tokens), instead of 2.05M tokens.",
        ),
        ({"decoder_last_pipeline_num_layers": 3}, 1, "--decoder-last-pipeline-num-layers needs several"),
        ({"lr_warmup_iters": 3, "lr_warmup_fraction": 0.1}, 1, "--lr-warmup-iters and --lr-warmup-fraction are both"),
        ({"lr_warmup_iters": 100}, 1, "--lr-warmup-iters 100 leaves nothing of the 100 decay steps"),
        ({"min_lr": 1.0}, 1, "--min-lr 1.0 is above the peak --lr 0.0001"),
        ({"split": "90;10"}, 1, "--split 90;10 is not up to three parts"),
        ({"split": "100,0,0"}, 1, "or --eval-iters 0"),
        ({"split": "0,1,0"}, 1, "leaves no training data"),
        ({"data_path": []}, 1, "--train-iters 100 needs training data"),
        ({"data_path": [], "train_iters": 0, "save": "run", "init": "pca"}, 1, "--init pca runs the teacher"),
        ({"data_path": [], "train_iters": 0, "save": "run", "init": "channel"}, 1, "--init channel runs the teacher"),
        ({"calibration_tokens": 512}, 1, "--calibration-tokens 512 means nothing with --init random"),
        ({"calibration_tokens": 512, "init": "orthogonal"}, 1, "or ridge, or --clone-normalization token."),
        ({"train_data_path": ["more"]}, 1, "--data-path goes with --split and cannot be combined"),
        ({"data_path": [], "train_data_path": ["a"]}, 1, "--train-data-path without --valid-data-path"),
        ({"load": "/no/such"}, 1, "--load /no/such is not a directory"),
        ({"tokenizer_model": "/no/such"}, 1, "--tokenizer-model /no/such does not exist"),
        ({"save_interval": 5}, 1, "--save-interval 5 without --save"),
        ({"mask_last_label": True, "seq_length": 1}, 1, "--mask-last-label with --seq-length 1 leaves no label"),
        ({"train_iters": 0}, 1, "--train-iters 0 without --save does nothing"),
        (
            {"init": "pca", "untie_embeddings_and_output_weights": False},
            1,
            "--no-untie-embeddings-and-output-weights cannot go with --init pca",
        ),
        (
            {"init": "orthogonal", "untie_embeddings_and_output_weights": False},
            1,
            "--no-untie-embeddings-and-output-weights cannot go with --init orthogonal",
        ),
    ],
)
def test_validate_refuses_with_one_line(valid_config, values, world_size, expected):
    change(valid_config, **values)
    errors = errors_of(validate, method_of(valid_config), world_size=world_size)
    assert len(errors) == 1, errors
    assert expected in errors[0]


def test_sums_during_backward_are_refused_where_a_tied_embedding_is_on_two_stages(valid_config):
    change(valid_config, method="ordinary", teacher=None, student_hidden_size=None, overlap_grad_reduce=True)
    change(valid_config, student="model", use_distributed_optimizer=True)
    assert validate_against_teacher(method_of(valid_config), SMOLLM2) == []
    change(valid_config, pipeline_model_parallel_size=2)
    (error,) = errors_of(validate_against_teacher, method_of(valid_config), SMOLLM2)
    assert "--overlap-grad-reduce with --use-distributed-optimizer and several pipeline stages cannot" in error
    assert validate_against_teacher(method_of(valid_config), replace(SMOLLM2, is_tied=False)) == []


def test_validate_lists_every_error_at_once(valid_config):
    change(valid_config, teacher=None, student_hidden_size=-1, kl_temperature=-1.0, load="/no/such")
    errors = errors_of(validate, method_of(valid_config))
    flags = ("--teacher", "--student-hidden-size", "--kl-temperature", "--load")
    assert len(errors) == 4
    assert all(any(error.startswith(flag) for error in errors) for flag in flags)


def test_tensor_parallel_turns_sequence_parallel_on(valid_config):
    change(valid_config, tensor_model_parallel_size=2)
    validate(method_of(valid_config), world_size=2)
    assert valid_config.parallel.is_sequence_parallel
    assert "TP 2 with sequence parallel x PP 1" in valid_config.describe_layout(2, "2 GPUs")


def test_sequence_parallel_without_tensor_parallel_is_harmless(valid_config):
    change(valid_config, sequence_parallel=True)
    validate(method_of(valid_config), world_size=1)


def test_writing_the_untrained_student_needs_no_data(valid_config):
    change(valid_config, train_iters=0, save="run", data_path=[])
    validate(method_of(valid_config))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"tensor_model_parallel_size": 2}, "9 attention heads, 3 KV heads. "),
        ({"tensor_model_parallel_size": 2}, "Use --tensor-model-parallel-size 1."),
        ({"tensor_model_parallel_size": 4}, "the rest: 1 or 3. Use --tensor-model-parallel-size 3."),
        ({"tensor_model_parallel_size": 9}, "does not divide the teacher's 3 KV heads, 1536 FFN features"),
        ({"pipeline_model_parallel_size": 4}, "Sizes that do: 1, 2, 3, 5, 6, 10, 15 or 30."),
        ({"pipeline_model_parallel_size": 4}, "With 4: --decoder-last-pipeline-num-layers 6 alone gives the others 8"),
        ({"pipeline_model_parallel_size": 31}, "--pipeline-model-parallel-size 31 does not divide"),
        (
            {"pipeline_model_parallel_size": 2, "decoder_first_pipeline_num_layers": 30},
            "--decoder-first-pipeline-num-layers 30 leaves 0 of the teacher's 30 layers to 1 other pipeline stage",
        ),
        (
            {
                "pipeline_model_parallel_size": 2,
                "decoder_first_pipeline_num_layers": 14,
                "decoder_last_pipeline_num_layers": 15,
            },
            "leave 1 of the teacher's 30 layers to 0 other pipeline stages",
        ),
        ({"student_hidden_size": 600, "init": "pca"}, "Use at most 576."),
        ({"student_hidden_size": 600, "init": "orthogonal"}, "--init orthogonal takes that many"),
    ],
)
def test_validate_against_teacher_refuses(valid_config, values, expected):
    change(valid_config, **values)
    errors = errors_of(validate_against_teacher, method_of(valid_config), SMOLLM2)
    assert len(errors) == 1, errors
    assert expected in errors[0]


def test_errors_about_sizes_say_teacher_only_where_the_flag_is_teacher(valid_config):
    change(valid_config, tensor_model_parallel_size=2, sequence_parallel=True)
    change(valid_config, pipeline_model_parallel_size=4, seq_length=9000)
    assert all(
        " the teacher's " in error for error in errors_of(validate_against_teacher, method_of(valid_config), SMOLLM2)
    )
    change(valid_config, method="ordinary", student="DIR", teacher=None, student_hidden_size=None)
    errors = errors_of(validate_against_teacher, method_of(valid_config), SMOLLM2)
    assert len(errors) == 2 and all(" the model's " in error for error in errors)
    change(valid_config, tensor_model_parallel_size=1, pipeline_model_parallel_size=1)
    (warning,) = validate_against_teacher(method_of(valid_config), SMOLLM2)
    assert "positions the model was made for" in warning


@pytest.mark.parametrize("pipeline_size", range(2, 31))
def test_the_suggested_last_stage_is_accepted(valid_config, pipeline_size):
    change(valid_config, pipeline_model_parallel_size=pipeline_size)
    if 30 % pipeline_size == 0:
        validate_against_teacher(method_of(valid_config), SMOLLM2)
        return
    (error,) = errors_of(validate_against_teacher, method_of(valid_config), SMOLLM2)
    last = int(error.split("--decoder-last-pipeline-num-layers ")[1].split()[0])
    change(valid_config, decoder_last_pipeline_num_layers=last)
    validate_against_teacher(method_of(valid_config), SMOLLM2)


def test_uneven_stages_are_accepted_when_the_rest_divides(valid_config):
    change(valid_config, pipeline_model_parallel_size=4, decoder_first_pipeline_num_layers=5)
    with pytest.raises(ConfigError):
        validate_against_teacher(method_of(valid_config), SMOLLM2)  # 25 layers on 3 stages
    change(valid_config, decoder_last_pipeline_num_layers=7)
    validate_against_teacher(method_of(valid_config), SMOLLM2)  # 18 layers on 2 stages


def test_a_student_as_wide_as_its_teacher_warns_with_random_and_passes_with_pca(valid_config):
    change(valid_config, student_hidden_size=576)
    (warning,) = validate_against_teacher(method_of(valid_config), SMOLLM2)
    assert "--student-hidden-size 576 is not below the teacher's 576" in warning
    change(valid_config, init="pca")
    assert validate_against_teacher(method_of(valid_config), SMOLLM2) == []


def test_a_start_that_no_norm_behind_blocks_lets_through_is_warned_of(valid_config):
    behind = replace(SMOLLM2, norms=("after_attention", "after_mlp"))
    for init, is_warned_of in (("random", False), ("channel", False), ("pca", True), ("ridge", True)):
        change(valid_config, init=init)
        warnings = validate_against_teacher(method_of(valid_config), behind)
        assert any("only --init channel passes exactly" in warning for warning in warnings) == is_warned_of, init
    assert validate_against_teacher(method_of(valid_config), SMOLLM2) == []


def test_a_sequence_beyond_the_teachers_positions_warns(valid_config):
    change(valid_config, seq_length=8193)
    (warning,) = validate_against_teacher(method_of(valid_config), SMOLLM2)
    assert "--seq-length 8193 is above the 8192 positions" in warning


def test_an_untied_teacher_cannot_have_a_tied_student(valid_config):
    untied = replace(SMOLLM2, is_tied=False)
    change(valid_config, untie_embeddings_and_output_weights=False)
    (error,) = errors_of(validate_against_teacher, method_of(valid_config), untied)
    assert "cannot tie the student" in error


@pytest.mark.parametrize(
    ("is_teacher_tied", "init", "untie", "is_student_tied"),
    [
        (True, "random", None, True),
        (True, "random", True, False),
        (True, "pca", None, False),
        (True, "orthogonal", None, False),
        (True, "ridge", None, False),
        (False, "random", None, False),
        (False, "pca", None, False),
    ],
)
def test_tying_of_the_student(valid_config, is_teacher_tied, init, untie, is_student_tied):
    teacher = replace(SMOLLM2, is_tied=is_teacher_tied)
    change(valid_config, init=init, untie_embeddings_and_output_weights=untie)
    student = method_of(valid_config).student_shape(teacher)
    assert (student.hidden_size, student.is_tied) == (384, is_student_tied)
    assert (student.num_layers, student.head_dim, student.ffn_hidden_size) == (30, 64, 1536)


def test_batch_sizes_follow_from_the_world_size(valid_config):
    change(valid_config, tensor_model_parallel_size=2, pipeline_model_parallel_size=2, micro_batch_size=3)
    assert valid_config.data_parallel_size(16) == 4
    assert valid_config.global_batch_size(16) == 12
    assert valid_config.num_microbatches(16) == 1
    assert valid_config.resolved(16).training.global_batch_size == 12
    assert valid_config.training.global_batch_size is None
    change(valid_config, global_batch_size=60)
    assert valid_config.num_microbatches(16) == 5


def test_config_survives_its_dict(valid_config):
    change(valid_config, data_path=["0.3", "a"], lr_warmup_iters=4)
    assert Config.from_dict(valid_config.to_dict()) == valid_config


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("969,30,1", (969, 30, 1)),
        ("9/1", (9, 1, 0)),
        ("1", (1, 0, 0)),
        ("0.9,0.1,0", (0.9, 0.1, 0)),
        ("", None),
        ("1,2,3,4", None),
        ("1,-1", None),
        ("0,0,0", None),
        ("nan,1", None),
        ("a,b", None),
    ],
)
def test_split(text, parts):
    assert parse_split(text) == parts


def test_small_helpers():
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert flag_of("student_hidden_size") == "--student-hidden-size"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"clone_terms": ["query"]}, "--clone-terms query: 'query' is none of q k v o gate up down"),
        ({"clone_terms": ["q:3-1"]}, "'3-1' holds no layer"),
        ({"clone_terms": ["q:x"]}, "each alone or with layers"),
        ({"recompute_modules": ["attn"]}, "--recompute-modules attn: expected are any of core_attn mlp"),
        ({"alpha": 0.0, "kl_weight": 0.0, "lm_weight": 0.0}, "nothing is left to train on"),
        ({"kl_divergence": "jsd"}, "--kl-divergence jsd: expected is forward, reverse, or jsd:BETA with"),
        ({"kl_weight": 0.0, "kl_top_k": 8}, "--kl-top-k cannot go with --kl-weight 0"),
    ],
)
def test_losses_that_cannot_be_meant_are_refused(valid_config, values, expected):
    change(valid_config, **values)
    (error,) = errors_of(validate, method_of(valid_config))
    assert expected in error


def test_clone_terms_cover_the_layers_they_name(valid_config):
    change(valid_config, clone_terms=["q", "gate:0-2,7"])
    assert [method_of(valid_config).terms_of(layer) for layer in (2, 3, 7)] == [{"q", "gate"}, {"q"}, {"q", "gate"}]
    (error,) = errors_of(validate_against_teacher, method_of(valid_config), replace(SMOLLM2, num_layers=7))
    assert "--clone-terms gate:0-2,7 names a layer" in error and "0-6" in error
    change(valid_config, alpha=0.0)
    assert method_of(valid_config).terms_of(0) == set()


def test_the_released_codes_kl_is_the_sum_over_a_sequence(valid_config):
    change(valid_config, kl_reduction="sequence-sum", seq_length=2048)
    assert valid_config.total_kl_weight == pytest.approx(1.28)


def test_interleaving_wants_equal_chunks_and_whole_rounds_of_micro_batches(valid_config):
    change(valid_config, pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=2, global_batch_size=3)
    (error,) = errors_of(validate, method_of(valid_config), world_size=2)
    assert "multiples of --pipeline-model-parallel-size 2" in error
    assert "Use --global-batch-size 2 (410K tokens) or 4 (819K tokens), instead of 614K tokens." in error
    (error,) = errors_of(validate_against_teacher, method_of(valid_config), SMOLLM2)
    assert "30 layers cannot be divided alike over the 4 stages" in error
    validate_against_teacher(method_of(valid_config), replace(SMOLLM2, num_layers=8))
    change(valid_config, account_for_embedding_in_pipeline_split=True)
    validate_against_teacher(method_of(valid_config), replace(SMOLLM2, num_layers=7))
    change(valid_config, global_batch_size=4, decoder_first_pipeline_num_layers=2)
    (error,) = errors_of(validate, method_of(valid_config), world_size=2)
    assert "two ways to divide the layers" in error
