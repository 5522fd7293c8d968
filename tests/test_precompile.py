"""Plans of small models for this machine; topologies and steps that don't fit, without a TPU compiler."""

import importlib.util
import itertools
import json
import pathlib
import re
import types

import gin
import jax
import jax.numpy as jnp
import optax
import pytest
from absl import flags
from absl.testing import flagsaver
from flax.linen import partitioning as flax_partitioning
from jax.experimental import topologies

from richhf_jax import errors, gin_utils, input_pipeline, losses, models, partitioning, precompile
from richhf_jax.costs import counter, plan

HERE = pathlib.Path(__file__).parent
FILES = ("models/rahf.gin", "small.gin", "losses/default.gin", "runs/train.gin", "runs/eval.gin")
LENGTHS = {"image": 16, "inputs": 9, "targets": 5, "heatmaps": 2, "scores": 4, "texts": 1}
MATRIX = jax.ShapeDtypeStruct((64, 64), jnp.float32)
FEWER_SLOTS = {**LENGTHS, "heatmaps": 1, "scores": 2}


def configure(variant="multi_head", lengths=LENGTHS, *bindings):
    gin.clear_config()
    given = {
        "MODEL_DIR": "none",
        "MIXTURE_OR_TASK_NAME": f"synthetic_rich_hf_{variant}",
        "TASK_FEATURE_LENGTHS": lengths,
        "EVAL_FEATURE_LENGTHS": LENGTHS,
        "TRAIN_STEPS": 1,
        "BATCH_SIZE": 4,
        "EVAL_BATCH_SIZE": 2,
    }
    given = [f"{name} = {value!r}" for name, value in given.items()]
    gin_utils.parse_gin_flags(
        [str(HERE), *gin_utils.DEFAULT_SEARCH_PATHS], [*FILES, f"variants/{variant}.gin"], [*given, *bindings]
    )


@pytest.mark.parametrize(
    ("variant", "lengths", "fit"),
    [("multi_head", LENGTHS, "resize"), ("augmented_prompt", FEWER_SLOTS, "letterbox")],
)
def test_batch_shapes_are_those_of_the_data(variant, lengths, fit, synthetic_data_dir, monkeypatch):
    import seqio

    configure(variant, lengths, f"augmentation.show.fit = '{fit}'")
    monkeypatch.setattr(seqio.utils, "_TFDS_DATA_DIR_OVERRIDE", str(synthetic_data_dir))
    cfg = input_pipeline.DatasetConfig(f"synthetic_rich_hf_{variant}", lengths, "train", batch_size=4)
    expected = input_pipeline.data_shapes(cfg)
    found = precompile.step_shapes("train")
    assert {name: (array.shape, array.dtype) for name, array in found.items()} == {
        name: (array.shape, array.dtype) for name, array in expected.items()
    }
    assert ("image_box" in found) == (fit == "letterbox")


@pytest.mark.parametrize("constrained", [True, False])
def test_batch_of_a_prediction(constrained):
    configure("augmented_prompt", FEWER_SLOTS, f"CONSTRAINED_KEYWORDS = {constrained}")
    batch = precompile.step_shapes("predict")
    assert batch["encoder_input_tokens"].shape == (2, 7, 9)  # All seven outputs.
    assert ("keyword_pieces" in batch) == constrained
    if constrained:
        # The small vocabulary writes "_0" in one piece.
        shapes = [batch[f"keyword_{name}"].shape for name in ("pieces", "words", "suffix")]
        assert shapes == [(2, 1, 5), (2, 1, 5), (2, 1)]


@pytest.mark.parametrize("step", ["train", "predict"])
def test_images_of_another_size_than_the_vits_are_refused(step):
    lengths = LENGTHS | {"image": 8}
    configure("multi_head", lengths, f"EVAL_FEATURE_LENGTHS = {lengths}")
    with pytest.raises(errors.UserError, match="IMAGE_SIDE: images have 8x8 pixels, .* for 16x16"):
        precompile.plan_step(step, None)


class Affine(models.BaseModel):
    """score = weight * mean of the image + bias: a train step that compiles at once."""

    def __init__(self):
        super().__init__(optax.adam(1e-3))

    def get_initial_variables(self, rng, input_shapes, input_types=None):
        names = {"weight": ("embed", "mlp"), "bias": ("mlp",)}
        params = {"weight": jnp.zeros((3, 4)), "bias": jnp.zeros(4)}
        axes = {f"{name}_axes": flax_partitioning.AxisMetadata(names=names[name]) for name in params}
        return {"params": params, "params_axes": axes}

    def loss_weights(self, batch):
        return {"score": jnp.sum(batch["score_weights"])}

    def loss_fn(self, params, batch, dropout_rng, normalizers=None):
        means = jnp.mean(batch["image"].astype(jnp.float32), (1, 2))  # [batch, 3]
        scores = means @ params["weight"] + params["bias"][None]
        loss = losses.weighted_squared_error(scores, batch["score_targets"], batch["score_weights"])
        return loss, {"loss": losses.WeightedMean(loss, jnp.ones(()))}

    def predict_batch_with_aux(self, params, batch, rng=None):
        raise NotImplementedError

    def score_batch(self, params, batch):
        raise NotImplementedError


def test_plan_of_a_train_step(monkeypatch):
    configure("augmented_prompt", LENGTHS)
    macro = gin_utils.macro
    monkeypatch.setattr(gin_utils, "macro", lambda name: Affine() if name == "MODEL" else macro(name))
    made = precompile.plan_step("train", None)
    assert (made["step"], made["chips"], made["batch_images"], made["prompts_per_image"]) == (
        "train",
        2,
        4,
        7,
    )
    assert (made["fits"], made["hbm_bytes_per_chip"], made["roofline"]) == (None, None, None)  # A CPU.
    memory = made["bytes_per_chip"]
    assert made["parameters"] == 16
    assert memory["parameters"] == 16 * 4
    assert memory["optimizer"] == 2 * 16 * 4 + 4  # Adam's moments, and its count.
    batch = sum(array.nbytes for array in precompile.step_shapes("train").values())
    # What the step doesn't use isn't among its arguments: the tokens and the heatmaps.
    assert memory["parameters"] + memory["optimizer"] < memory["arguments"] < batch / 2
    assert memory["total"] == sum(memory[name] for name in ("arguments", "temporaries", "outputs", "program"))
    assert made["flops_per_image"] == made["flops_per_chip"] * 2 / 4
    forward = 4 * (16 * 16 * 3 + 2 * 3 * 4)
    assert 3 * forward < 4 * made["model_flops_per_image"] < 6 * forward
    assert made["collectives"]["all-reduce"]["bytes"] >= memory["parameters"]  # Two replicas' gradients.
    json.dumps(made)
    text = plan.table(made)
    for shown in ("train step of 4 images (7 prompts each) on 2 x cpu", "temporaries", "all-reduce x"):
        assert shown in text


def test_plan_of_a_train_step_with_an_average_of_the_parameters(monkeypatch):
    configure("augmented_prompt", LENGTHS, "trainer.Trainer.ema_decay = 0.9")
    macro = gin_utils.macro
    monkeypatch.setattr(gin_utils, "macro", lambda name: Affine() if name == "MODEL" else macro(name))
    made = precompile.plan_step("train", None)
    assert made["bytes_per_chip"]["average"] == made["bytes_per_chip"]["parameters"]
    [average] = [line for line in plan.table(made).splitlines() if "average of the parameters" in line]
    [parameters] = [line for line in plan.table(made).splitlines() if line.startswith("  parameters ")]
    assert average.split()[-2:] == parameters.split()[-2:]
    optimizer = dict(itertools.islice(precompile.parts_of_step("train", None), 2))["optimizer"]
    assert len(jax.tree.leaves(optimizer().out_info)) == len(jax.tree.leaves(optimizer().args_info[0][0]))


def test_plan_of_a_prediction():
    configure()
    made = precompile.plan_step("predict", None)
    assert (made["step"], made["batch_images"], made["bytes_per_chip"]["optimizer"]) == ("predict", 2, 0)
    assert made["uncounted_loops"] == []  # Decoding ends after at most 5 tokens.
    assert 0.5 < made["flops_per_image"] / made["model_flops_per_image"] < 2


@pytest.mark.parametrize(
    ("experiment", "step", "bindings"),
    [
        ("clip_finetuned", "train", ["clip.TextConfig.num_layers = 1", "clip.VisionConfig.num_layers = 1"]),
        ("clip_gradient", "predict", ["INITIAL_CHECKPOINT_PATH = 'clip'"]),
        ("resnet_heatmaps", "predict", []),
    ],
)
def test_plan_of_a_baseline(experiment, step, bindings):
    gin.clear_config()
    sizes = ["MODEL_DIR = 'none'", "BATCH_SIZE = 4", "EVAL_BATCH_SIZE = 4"]
    files = [f"experiments/synthetic_baselines/{experiment}.gin"]
    gin_utils.parse_gin_flags(gin_utils.DEFAULT_SEARCH_PATHS, files, [*sizes, *bindings])
    made = precompile.plan_step(step, None)
    assert (made["batch_images"], made["prompts_per_image"]) == (4, 1)
    assert made["bytes_per_chip"]["parameters"] == 4 * made["parameters"] > 4e5
    assert (made["bytes_per_chip"]["optimizer"] > 0) == (step == "train")
    # Muon's own work, on each chip, is much for 4 images.
    most = float("inf") if step == "train" else 1.5
    assert 0.8 < made["flops_per_image"] / made["model_flops_per_image"] < most


def train_flops(*bindings):
    deeper = ("t5.T5Config.num_encoder_layers = 2", "vit.ViTConfig.num_layers = 2", "REMAT_POLICY = 'full'")
    configure("multi_head", LENGTHS, *deeper, *bindings)
    partitioner = gin.get_configurable(partitioning.PjitPartitioner)()
    trainer = precompile.make_trainer("train", partitioner, precompile.step_shapes("train"))
    return counter.analyze(trainer.lower("train").as_text(dialect="hlo")).flops


def test_a_train_step_costs_as_much_in_loops():
    # Each of 2 parts computes the relative positions, and adds its gradient. If loops counted once, it would
    # be 50 % off for the parts, and more for the layers.
    in_loops = train_flops("SCAN_LAYERS = True", "NUM_MICROBATCHES = 2")
    assert in_loops == pytest.approx(train_flops(), rel=0.05)


def test_the_model_costs_the_same_in_loops():
    layers = "rahf.HeadsConfig.heatmap_layers = (('deconv', 6, 3), ('conv', 6, 3), ('conv', 6, 3))"

    def flops(scanned):
        configure("multi_head", LENGTHS, layers, f"SCAN_LAYERS = {scanned}", "vit.ViTConfig.num_layers = 2")
        partitioner = gin.get_configurable(partitioning.PjitPartitioner)()
        trainer = precompile.make_trainer("train", partitioner, precompile.step_shapes("train"))
        return counter.model_flops(trainer.lower("eval"), training=True)

    assert flops(True) == pytest.approx(flops(False), rel=1e-4)  # A loop counts its trips.


def test_both_trainings_of_the_quickstart_are_one_program():
    def program(experiment):
        gin.clear_config()
        files = [f"experiments/{experiment}.gin"]
        gin_utils.parse_gin_flags(gin_utils.DEFAULT_SEARCH_PATHS, files, ["MODEL_DIR = 'none'"])
        partitioner = gin.get_configurable(partitioning.PjitPartitioner)()
        trainer = precompile.make_trainer("train", partitioner, precompile.step_shapes("train"))
        return trainer.lower("train").as_text()

    assert program("quickstart_pretrain") == program("quickstart")


def test_parts_are_compiled_one_by_one(monkeypatch, capsys):
    configure()
    compiled = jax.jit(jnp.matmul).lower(MATRIX, MATRIX).compile()
    lowered = []
    monkeypatch.setattr(precompile, "compile_step", lambda one: lowered.append(one) or (compiled, 1.5, None))
    rows = precompile.compile_parts("predict", None) + precompile.compile_parts("train", None)
    assert len(rows) == len(lowered)
    assert {(row["compile_seconds"], row["flops"]) for row in rows} == {(1.5, 2 * 64**3)}
    names = {step: [row["part"] for row in rows if row["step"] == step] for step in ("predict", "train")}
    of_network = [
        "ViT",
        "ViT and encoder",
        "decoder",
        "heatmap head",
        "2 heatmap heads",
        "score head",
        "4 score heads",
    ]
    assert names["predict"] == [*of_network, "ViT, encoder and decoding", "predict step"]
    twice = [name for part in of_network for name in (part, f"{part}, with gradients")]
    count = len(twice) + 2
    assert names["train"][:count] == ["initialisation", "optimizer", *twice]
    assert names["train"][-1] == "train step"
    assert all(re.match(r"(heatmap|score) head: .* \(x[1-9]\)$", name) for name in names["train"][count:-1])
    # Each was traced as what it says it is, for a microbatch of this step.
    by_name = dict(zip(((row["step"], row["part"]) for row in rows), lowered, strict=True))
    assert by_name["predict", "2 heatmap heads"].out_info.shape == (2, 2, 16, 16)
    assert by_name["train", "2 heatmap heads"].out_info.shape == (4, 2, 16, 16)
    shown = capsys.readouterr().out
    assert all(row["part"] in shown for row in rows)


class Lowered:
    """A lowered step that libtpu refuses to compile unless an option says otherwise."""

    def __init__(self, message):
        self._message = message

    def compile(self, compiler_options=None):
        if compiler_options != {"xla_tpu_no_crash_on_oom": "true"}:
            raise jax.errors.JaxRuntimeError(self._message)
        return jax.jit(lambda x: jnp.tanh(x @ x)).lower(MATRIX).compile()


def step_on(device_kind):
    state = {"parameters": 16384, "optimizer": 0}
    return plan.Step("train", 8, 1, {"data": 2}, device_kind, 4096, state, model_flops=1e6)


def test_what_does_not_fit_lists_its_largest_buffers():
    message = "RESOURCE_EXHAUSTED: Ran out of memory on HBM: 17.00G of 15.75G.\nmore"
    compiled, seconds, refusal = precompile.compile_step(Lowered(message))
    made = plan.make(step_on("TPU v5 lite"), compiled, seconds, refusal)
    assert made["fits"] is False
    assert {one["shape"] for one in made["largest_buffers"]} == {"f32[64,64]"}
    text = plan.table(made)
    assert "IT DOES NOT FIT. RESOURCE_EXHAUSTED: Ran out of memory on HBM: 17.00G of 15.75G." in text
    assert "x f32[64,64]" in text


def test_another_error_of_the_compiler_is_not_hidden():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        precompile.compile_step(Lowered("INTERNAL: a bug"))


def test_too_low_a_limit_of_on_chip_memory_is_no_want_of_memory():
    message = (
        "RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom:\nRan out of memory in memory space vmem\nmore"
    )
    expected = "xla_tpu_scoped_vmem_limit_kib is too small .* memory space vmem$"
    with pytest.raises(errors.UserError, match=expected):
        precompile.compile_step(Lowered(message))


def test_roofline_on_a_known_chip():
    compiled = jax.jit(jnp.matmul).lower(MATRIX, MATRIX).compile()
    made = plan.make(step_on("TPU v5 lite"), compiled, compile_seconds=1.0)
    roofline = made["roofline"]
    assert made["fits"] is True
    assert roofline["compute"] == 2 * 64**3 / 197e12
    assert roofline["memory"] == 3 * 64**2 * 4 / 819e9 == roofline["step"]
    assert roofline["interconnect"] == 0
    assert roofline["images_per_second"] == 8 / roofline["step"]
    assert "It fits." in plan.table(made)


@pytest.fixture
def libtpu(monkeypatch):
    """Pretends that libtpu is installed; holds the arguments of the call, and an error to raise."""
    asked = types.SimpleNamespace(options=None, error=None)

    def get_topology_desc(**options):
        if asked.error:
            raise jax.errors.JaxRuntimeError(asked.error)
        asked.options = options
        return types.SimpleNamespace(devices=["chips"])

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(topologies, "get_topology_desc", get_topology_desc)
    return asked


@pytest.mark.parametrize(
    ("name", "num_slices", "options"),
    [
        ("v5e:4x4", 1, {"chips_per_host_bounds": (2, 2, 1)}),
        ("v5e:1x1", 1, {"chips_per_host_bounds": (1, 1, 1)}),
        ("v4:2x2x4", 1, {"chips_per_host_bounds": (2, 2, 1), "chip_config_name": "megacore"}),
        ("v6e:2x4", 2, {"chips_per_host_bounds": (2, 2, 1), "num_slices": 2}),
    ],
)
def test_a_topology(libtpu, name, num_slices, options):
    assert precompile.topology_devices(name, num_slices) == ["chips"]
    assert libtpu.options == {"platform": "tpu", "topology_name": name, **options}


def test_no_such_topology(libtpu):
    with pytest.raises(
        errors.UserError, match="--topology=v5e-16: no topology has such a name; write .*v5e:4x4"
    ):
        precompile.topology_devices("v5e-16")
    libtpu.error = "INVALID_ARGUMENT: Invalid TPU external name: TPU v9\nstack"
    with pytest.raises(errors.UserError, match="--topology=v9:2x2: .* TPU v9 .examples: .*v5e:4x4"):
        precompile.topology_devices("v9:2x2")


def test_libtpu_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(errors.UserError, match=r"pip install -e '\.\[tpu\]'"):
        precompile.topology_devices("v5e:4x4")


@pytest.fixture
def command_line(tmp_path):
    """Makes a function that runs the program's main with flags, on given plans."""

    def run(monkeypatch, fits, **given):
        made = {"fits": fits, "step": "train"}
        monkeypatch.setattr(precompile, "plan_step", lambda step, devices: made | {"step": step})
        monkeypatch.setattr(plan, "table", lambda made: f"table of {made['step']}")
        files = ["models/rahf_tiny.gin", "losses/default.gin", "runs/train.gin", "runs/eval.gin"]
        bindings = ["MIXTURE_OR_TASK_NAME = 'none'", "TRAIN_STEPS = 1"]
        flags.FLAGS.mark_as_parsed()
        with flagsaver.flagsaver(**{"gin_file": files, "gin_bindings": bindings, **given}):
            precompile.main()

    return run


def test_main_writes_both_plans(command_line, monkeypatch, tmp_path, capsys):
    command_line(monkeypatch, fits=True, step="both", json=str(tmp_path / "plan.json"))
    assert capsys.readouterr().out == "table of train\ntable of predict\n"
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written == {step: {"fits": True, "step": step} for step in ("train", "predict")}
    assert list(tmp_path.iterdir()) == [tmp_path / "plan.json"]


def test_main_exits_with_1_where_it_does_not_fit(command_line, monkeypatch, tmp_path):
    with pytest.raises(SystemExit) as exit_:
        command_line(monkeypatch, fits=False, json=str(tmp_path / "plan.json"))
    assert exit_.value.code == 1
    assert json.loads((tmp_path / "plan.json").read_text()) == {"fits": False, "step": "train"}


def test_main_says_what_is_missing(command_line, monkeypatch, tmp_path):
    with pytest.raises(errors.UserError, match="plan.json: No such file or directory. Make the folder"):
        command_line(monkeypatch, fits=True, json=str(tmp_path / "no" / "plan.json"))
    gin.clear_config()
    with pytest.raises(errors.UserError, match="give an experiment's"):
        command_line(monkeypatch, fits=True, gin_file=["models/rahf_tiny.gin"], gin_bindings=[])
