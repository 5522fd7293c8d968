"""Values of gin files and flags: each macro and parameter has a type, and each number a range."""

import ast
import pathlib
import typing

import gin
import pytest

import tasks  # noqa: F401 (registers gin's functions)
from richhf_jax import allowed_values, errors, gin_utils, gin_values
from richhf_jax.network import attention_kernel, stack, t5

GIN = pathlib.Path(gin_utils.__file__).resolve().parents[1] / "gin"
GIVEN = ("MODEL_DIR = 'none'", "MIXTURE_OR_TASK_NAME = 'none'", "TRAIN_STEPS = 1", "NUM_MICROBATCHES = None")
QUICKSTART = ("experiments/quickstart.gin", "runs/infer.gin", "runs/calibrate.gin")


def parse(*flags: str, files: tuple[str, ...] = QUICKSTART) -> None:
    bindings = [arg.removeprefix("--gin_bindings=") for arg in gin_utils.rewrite_gin_args(flags)]
    gin_utils.parse_gin_flags(gin_utils.DEFAULT_SEARCH_PATHS, files, [*GIVEN, *bindings])


def message(*flags: str) -> str:
    with pytest.raises(errors.UserError) as refused:
        parse(*flags)
    return str(refused.value)


@pytest.mark.parametrize("name", sorted(path.name for path in (GIN / "partitioning").glob("*.gin")))
def test_the_values_of_a_layout_are_allowed(name):
    """Those of experiments are parsed by test_gin_files.py."""
    parse(files=("experiments/rich_hf_18k.gin", f"partitioning/{name}"))


COUNT, MAYBE_COUNT = "a whole number of at least 1", "a whole number of at least 1 or None"
BOOL, TEXT, SHARE = "True or False", "a text", "a number from 0 to 1"
BELOW_1, AMOUNT, SEED = (
    "a number from 0 to below 1",
    "a number of at least 0",
    "a whole number from 0 to 4294967295",
)
# Macro -> what it must be, and wrong values.
MACROS = {
    **dict.fromkeys(
        ("TRAIN_STEPS", "BATCH_SIZE", "EVAL_BATCH_SIZE", "INFER_BATCH_SIZE"), (COUNT, "0 -1 1.5 True 1/2")
    ),
    **dict.fromkeys(
        ("LOG_PERIOD", "EVAL_PERIOD", "EVAL_STEPS", "CHECKPOINT_PERIOD"), (COUNT, "0 -5 None 1e-3 -1e3")
    ),
    **dict.fromkeys(("WARMUP_STEPS", "NUM_DECODES"), (COUNT, "0 -1 x 64px")),
    "IMAGE_SIDE": ("a whole number from 1 to 8192", "0 -1 x 64px 8193"),
    **dict.fromkeys(("KEEP_CHECKPOINTS", "KEEP_BEST"), (MAYBE_COUNT, "0 -1 all False")),
    "EMA_DECAY": ("a number from 0 to below 1 or None", "1 -.1 1.5 True off"),
    "NUM_MICROBATCHES": ("a whole number of at least 0 or None", "-1 all False 1.5"),
    **dict.fromkeys(("TEXT_LENGTH", "TARGET_LENGTH"), ("a whole number from 2 to 65536", "1 0 -1 24.5")),
    **dict.fromkeys(
        ("NUM_HEATMAPS", "NUM_SCORES", "NUM_TEXTS", "EVAL_NUM_TEXTS"),
        ("a whole number of at least 0", "-1 1.5 None"),
    ),
    **dict.fromkeys(
        ("DROPOUT_RATE", "STOCHASTIC_DEPTH_RATE", "ADAM_BETA2"),
        (BELOW_1, "7 1 -.1 .1x 0,1 None nan inf 1e999 [0.1]"),
    ),
    "MISALIGNMENT_THRESHOLD": (SHARE, "1.1 -1 50%"),
    "BASE_LEARNING_RATE": (AMOUNT, "-1e-3 None 1e-3x"),
    "RANDOM_SEED": (SEED, "-1 4294967296 0.5 None"),
    **dict.fromkeys(
        ("AUGMENT", "USE_HARDWARE_RNG", "SCAN_LAYERS", "RESAMPLE_POSITIONS", "SCORE_UNCERTAINTY"),
        (BOOL, "yes 1 0 None"),
    ),
    **dict.fromkeys(("CONSTRAINED_KEYWORDS", "WRITE_HEATMAPS"), (BOOL, "true no off 0.0")),
    "VARIANT": ("'multi_head' or 'augmented_prompt'", "foo multi-head None 1"),
    "FIT": ("'resize' or 'letterbox' or 'centre_crop'", "crop None 1"),
    "ATTENTION_KERNEL": ("'auto' or 'xla' or 'cudnn'", "flash None 1"),
    "REMAT_POLICY": ("'none' or 'minimal' or 'full'", "1 True Full"),
    **dict.fromkeys(("MODEL_DIR", "CHECKPOINT_PATH", "EVAL_OUTPUT_DIR"), (TEXT, "2024 None ('a','b')")),
    **dict.fromkeys(
        (
            *("MIXTURE_OR_TASK_NAME", "EVAL_SPLIT", "INFER_SPLIT", "CALIBRATION_SPLIT", "BEST_METRIC"),
            "MODEL_NAME",
        ),
        (TEXT, "1 None"),
    ),
    **dict.fromkeys(
        ("INITIAL_CHECKPOINT_PATH", "VOCABULARY", "INFER_OUTPUT_DIR"), ("a text or None", "1 False none")
    ),
    "LEARNING_RATE_MULTIPLIERS": ("a dictionary or None", "2 x"),
    **dict.fromkeys(("TASK_FEATURE_LENGTHS", "EVAL_FEATURE_LENGTHS"), ("a dictionary", "64 [64]")),
    **dict.fromkeys(("OPTIMIZER", "DECODE_FN", "MODEL"), ("a reference, such as @name()", "adamw 1")),
}


@pytest.fixture(scope="module")
def parsed() -> dict:
    """gin's configuration of the quickstart."""
    parse()
    return dict(gin.config._CONFIG)


def literal(value: str):
    """Reads a value of the command line as gin does."""
    (binding,) = gin_utils.rewrite_gin_args([f"--gin.X={value}"])
    return ast.literal_eval(binding.partition(" = ")[2])


@pytest.mark.parametrize("macro", MACROS)
def test_a_macro_has_a_type_and_a_range(parsed, macro):
    expected, values = MACROS[macro]
    for value in values.split():
        config = parsed | {(macro, "gin.macro"): {"value": literal(value)}}
        with pytest.raises(errors.UserError) as refused:
            gin_values.check(config)
        assert str(refused.value).startswith(f"{macro} must be {expected}"), value
        assert "\n" not in str(refused.value)


def test_the_table_has_every_macro():
    parse(files=("experiments/rich_hf_18k.gin", "runs/infer.gin", "runs/calibrate.gin"))
    macros = {scope for scope, selector in gin.config._CONFIG if selector == "gin.macro"}
    assert macros == set(MACROS)


def test_every_number_has_a_range(parsed):
    numbers = set()
    for _, selector in parsed:
        if selector.split(".")[0] in ("richhf_jax", "tasks"):
            hints = gin_values._hints(gin.get_configurable(selector))
            numbers |= {name for name, hint in hints.items() if {int, float} & {hint, *parts(hint)}}
    # The first may be any number; the program sets the others.
    assert numbers - set(allowed_values.RANGES) == {"heatmap_output_bias", "side", "cache_offset", "return"}


def parts(hint) -> set:
    """The types of a union, or those in a tuple."""
    return {part for part in typing.get_args(hint) if isinstance(part, type)}


def test_choices_are_those_of_the_code():
    assert allowed_values.CHOICES["remat_policy"] == tuple(stack.REMAT_POLICIES)
    assert allowed_values.CHOICES["attention_kernel"] == attention_kernel.KERNELS
    assert allowed_values.CHOICES["image_positions"] == t5.IMAGE_POSITIONS


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        (".1", 0.1),
        ("0", 0),
        ("1e-3", 0.001),
        ("+.5e-1", 0.05),
        ("1_6", 16),
        ("None", None),
        ("0x2", 2),
        ("2024-run", "2024-run"),
        ("1/2", "1/2"),
        ("1or2", "1or2"),
        ("2024-11", "2024-11"),
        (".hidden/x", ".hidden/x"),
        ("'2024'", "2024"),
        ("runs/lr=.1, it's a", "runs/lr=.1, it's a"),
        ("{'a': 2}", {"a": 2}),
    ],
)
def test_what_users_write(flag, value):
    assert literal(flag) == value


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("AUGMENT=yes", "got the text 'yes': write True"),
        ("AUGMENT=off", "got the text 'off': write False"),
        ("KEEP_BEST=none", "got the text 'none': write None"),
        ("VOCABULARY=null", "got the text 'null': write None"),
        ("MODEL_DIR=2024", """got 2024: write "'2024'", with both quotes"""),
        ("T5Config.dropout_rate=7", "T5Config.dropout_rate must be a number from 0 to below 1, got 7"),
        (
            "ViTConfig.dtype=float33",
            "ViTConfig.dtype must be 'float32' or 'bfloat16' or 'float16', got the text",
        ),
        ("ViTConfig.grid=(8,)", "ViTConfig.grid must be a tuple of 2, got (8,)"),
        ("ViTConfig.grid=(8,0)", "ViTConfig.grid must be a whole number from 1 to 1048576, got 0"),
        ("T5Config.mlp_activations=gelu", "T5Config.mlp_activations must be a tuple, got the text 'gelu'"),
        ("train/DatasetConfig.batch_size=0", "train/DatasetConfig.batch_size must be a whole number"),
        (
            "LEARNING_RATE_MULTIPLIERS={'a': 'b'}",
            "LEARNING_RATE_MULTIPLIERS must be a number of at least 0, got",
        ),
        (
            "EVAL_FEATURE_LENGTHS={'image': 0}",
            "EVAL_FEATURE_LENGTHS must be a whole number from 1 to 8192, got 0",
        ),
        ("NUM_MICROBATCHES=3", "NUM_MICROBATCHES, 3, must divide BATCH_SIZE, 16"),
    ],
)
def test_messages(parsed, flag, words):
    name, _, value = flag.partition("=")
    scope, _, binding = name.rpartition("/")
    *selector, name = binding.split(".")
    (key,) = [
        key
        for key in parsed
        if key == (name, "gin.macro") or (key[0] == scope and selector == [key[1].rpartition(".")[2]])
    ]
    name = name if selector else "value"
    with pytest.raises(errors.UserError) as refused:
        gin_values.check(parsed | {key: parsed[key] | {name: literal(value)}})
    assert words in str(refused.value)


def test_all_faults_are_told_at_once():
    assert message("--gin.BATCH_SIZE=0", "--gin.AUGMENT=no").count(" must be ") == 2


def test_a_gin_file_is_checked_too(tmp_path):
    (tmp_path / "mine.gin").write_text("TEXT_LENGTH = '24'\n")
    with pytest.raises(errors.UserError, match="TEXT_LENGTH must be .*, got the text '24'"):
        parse(files=(*QUICKSTART, str(tmp_path / "mine.gin")))


def test_whole_numbers_may_be_written_as_floats():
    parse("--gin.TRAIN_STEPS=1e3", "--gin.train/DatasetConfig.batch_size=32.0", "--gin.NUM_MICROBATCHES=2.0")
    values = [gin.query_parameter("TRAIN_STEPS/macro.value"), gin_utils.macro("TRAIN_STEPS")]
    values += [gin.query_parameter("train/DatasetConfig.batch_size"), gin_utils.macro("NUM_MICROBATCHES")]
    assert [repr(value) for value in values] == ["1000", "1000", "32", "2"]


@pytest.mark.parametrize("flag", ["evaluate.gallery_size=0", "NUM_MICROBATCHES=0"])
def test_none_of_something_optional(flag):
    parse(f"--gin.{flag}", files=(*QUICKSTART, "runs/eval.gin"))


def test_macros_in_a_circle():
    parse("--gin.BATCH_SIZE=%EVAL_BATCH_SIZE", "--gin.EVAL_BATCH_SIZE=%BATCH_SIZE")


def test_functions_of_others_are_not_checked():
    def theirs(size: int = 0):
        return size

    gin.external_configurable(theirs, module="others")
    parse("--gin.theirs.size=x")
    assert gin.query_parameter("theirs.size") == "x"
