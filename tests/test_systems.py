"""Systems that predict only some outputs go through the same programs, from training to export."""

import dataclasses
import itertools
import json
import pathlib
import shutil
import subprocess
import sys
import tarfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import seqio
from flax import linen as nn
from flax import struct, traverse_util
from flax.linen import partitioning as partitioning_axes
from PIL import Image

import tasks  # noqa: F401 (registers them)
from richhf_jax import (
    RahfPredictor,
    checkpoints,
    errors,
    feedback,
    infer,
    input_pipeline,
    losses,
    model_description,
    models,
    partitioning,
    train,
    weights_file,
)
from richhf_jax import eval as eval_script
from richhf_jax.export import __main__ as export
from richhf_jax.predict import __main__ as predict
from richhf_jax.predict import forward

TASK = "synthetic_rich_hf_multi_head"
SIDE = 64  # That of the scenes.
LENGTHS = {"image": SIDE, "inputs": 8, "targets": 8, "heatmaps": 2, "scores": 4, "texts": 0}
STATISTICS = ("batch_stats", "norm", "mean")


@struct.dataclass
class TinyConfig:
    """The kinds of outputs."""

    score_kinds: tuple[str, ...] = ()
    heatmap_kinds: tuple[str, ...] = ()


class Tiny(nn.Module):
    """Batch-normalised pixels, and a linear layer for each kind of output."""

    tiny_config: TinyConfig

    def describe(self) -> dict[str, Any]:
        return {"tiny_config": dataclasses.asdict(self.tiny_config)}

    def with_attention_kernel(self, kernel):
        return self

    @nn.compact
    def __call__(self, image, train=False):
        pixels = nn.BatchNorm(use_running_average=not train, momentum=0.5, name="norm")(image / 255.0)
        outputs = {}
        if kinds := self.tiny_config.score_kinds:
            means = jnp.mean(pixels, axis=(1, 2))
            outputs["scores"] = nn.sigmoid(nn.Dense(len(kinds), name="scores")(means))
        if kinds := self.tiny_config.heatmap_kinds:
            maps = nn.sigmoid(nn.Dense(len(kinds), name="heatmaps")(pixels))
            outputs["heatmaps"] = jnp.moveaxis(maps, -1, 1)
        return outputs


class TinyModel(models.BaseModel):
    """The squared error of `Tiny`'s outputs."""

    def __init__(self, module: Tiny, optimizer_def=None):
        super().__init__(optimizer_def)
        self.module = module
        config = module.tiny_config
        self.outputs = feedback.Outputs(config.score_kinds, config.heatmap_kinds, keywords=False)

    def describe(self, feature_lengths, batch_shapes, fit):
        return models.describe_system("tiny", self.module, {"image": feature_lengths["image"]}, fit)

    def get_initial_variables(self, rng, input_shapes, input_types=None):
        variables = self.module.init(rng, jnp.zeros(input_shapes["image"], jnp.uint8))
        axes = {
            (*path[:-1], f"{path[-1]}_axes"): partitioning_axes.AxisMetadata((None,) * leaf.ndim)
            for path, leaf in traverse_util.flatten_dict(variables["params"]).items()
        }
        return {**variables, "params_axes": traverse_util.unflatten_dict(axes)}

    def loss_weights(self, batch):
        return {"loss": jnp.float32(batch["image"].shape[0])}

    def loss_fn(self, params, batch, dropout_rng, normalizers=None, *, flax_mutables):
        outputs, mutables = self.module.apply(
            {"params": params, **flax_mutables},
            batch["image"],
            train=dropout_rng is not None,
            mutable=["batch_stats"],
        )
        total = 0.0
        for name, kinds, known in (
            ("score", self.outputs.scores, feedback.SCORES),
            ("heatmap", self.outputs.heatmaps, feedback.HEATMAPS),
        ):
            if kinds:
                targets = jnp.stack([batch[f"{name}_targets"][:, known.index(kind)] for kind in kinds], 1)
                targets /= 255 if name == "heatmap" else 1
                total += jnp.sum(jnp.square(outputs[f"{name}s"] - targets))
        loss = total / (normalizers or self.loss_weights(batch))["loss"]
        return loss, ({"loss": losses.WeightedMean(loss, jnp.ones(()))}, dict(mutables))

    def predict_batch_with_aux(self, params, batch, rng=None, *, flax_mutables):
        return self.module.apply({"params": params, **flax_mutables}, batch["image"]), {}

    def score_batch(self, params, batch):
        raise NotImplementedError


TINY = model_description.System(
    network=Tiny,
    configs={"tiny_config": TinyConfig},
    model=lambda description: TinyModel(description.network),
)
SCORES = {"score_kinds": ("alignment", "overall")}
THREE_SCORES = {"score_kinds": feedback.SCORES[:3]}
ONE_SCORE = {"score_kinds": ("alignment",)}
HEATMAPS = {"heatmap_kinds": ("misalignment",)}
PARTITIONER = partitioning.PjitPartitioner(devices=jax.devices()[:1])


@pytest.fixture(autouse=True)
def tiny_system(monkeypatch):
    monkeypatch.setitem(model_description.SYSTEMS, "tiny", TINY)


@pytest.fixture
def make_dir(tmp_path):
    """Makes a MODEL_DIR of random parameters and statistics."""

    def make(**kinds) -> pathlib.Path:
        directory = tmp_path / "_".join(itertools.chain(*kinds.values()))
        directory.mkdir()
        model = TinyModel(Tiny(TinyConfig(**kinds)))
        shapes = {"image": (1, SIDE, SIDE, 3)}
        variables = model.get_initial_variables(jax.random.key(0), shapes)
        statistics = jax.tree.map(lambda leaf: leaf + 0.25, variables["batch_stats"])
        checkpoints.save_params(
            str(directory), variables["params"], flax_mutables={"batch_stats": statistics}
        )
        content = model.describe(LENGTHS, shapes, "resize")
        model_description.write(directory, content | {"training": {"task": "none"}}, b"not its own")
        return directory

    return make


@pytest.fixture(scope="module")
def trained(tmp_path_factory, synthetic_data_dir):
    """Trains a model of two scores for a few steps."""
    seqio.set_tfds_data_dir_override(str(synthetic_data_dir))
    directory = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model_description.SYSTEMS, "tiny", TINY)
        train.train(
            model=TinyModel(Tiny(TinyConfig(**SCORES)), optax.sgd(0.5)),
            model_dir=str(directory),
            train_dataset_cfg=config("train"),
            train_eval_dataset_cfg=config("validation"),
            partitioner=PARTITIONER,
            checkpoint_cfg=checkpoints.CheckpointConfig(checkpoints.SaveCheckpointConfig(period=2), None),
            total_steps=3,
            eval_steps=1,
        )
    return directory


def config(split: str) -> input_pipeline.DatasetConfig:
    return input_pipeline.DatasetConfig(TASK, LENGTHS, split, batch_size=4, shuffle=False)


def lines(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_model_of_two_scores_is_trained_evaluated_and_predicts(trained, tmp_path):
    assert not (trained / "vocabulary.model").exists()  # It reads no text.
    model = TinyModel(Tiny(TinyConfig(**SCORES)))  # Evaluation needs no optimizer.
    given = {"model": model, "checkpoint_path": str(trained), "partitioner": PARTITIONER}
    metrics = eval_script.evaluate(
        **given, dataset_cfg=config("test"), output_dir=str(tmp_path), baseline_fns=()
    )
    kinds = {name.rpartition("/")[2] for name in metrics if name.startswith("score/mse")}
    assert kinds == {"alignment", "overall"}
    assert not [name for name in metrics if name.startswith(("heatmap/", "keywords/", "synthetic/"))]
    (written,) = tmp_path.rglob("predictions.jsonl")
    assert all(line.keys() == {"id", "prompt", "scores"} for line in lines(written))

    infer.infer(**given, dataset_cfg=config("test"), output_dir=str(tmp_path / "infer"), write_heatmaps=True)
    (inferred,) = (tmp_path / "infer").glob("*-predict.jsonl-*")
    assert [line["prediction"] for line in lines(inferred)] == lines(written)

    # The predictor has the trained statistics, and so the same scores.
    predictor = RahfPredictor.from_checkpoint(trained)
    statistics = traverse_util.flatten_dict(jax.device_get(predictor.state.flax_mutables))[STATISTICS]
    assert np.abs(statistics).min() > 0.01
    examples, _ = next(input_pipeline.evaluation_batches(config("test"), seqio.ShardInfo(0, 1)))
    for example, line in zip(examples, lines(written), strict=False):
        record = predictor(example["image"], example["prompt"].decode())
        assert record.scores == pytest.approx(line["scores"], abs=1e-6)
        assert (record.tokens, record.heatmaps) == (None, {})


def test_a_training_of_a_model_without_an_optimizer_is_refused(tmp_path):
    with pytest.raises(errors.UserError, match="the model has no optimizer, because it only predicts"):
        train.train(
            model=TinyModel(Tiny(TinyConfig())),
            model_dir=str(tmp_path),
            train_dataset_cfg=config("train"),
            train_eval_dataset_cfg=None,
            partitioner=PARTITIONER,
            checkpoint_cfg=checkpoints.CheckpointConfig(None, None),
            total_steps=1,
        )


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)).save(path)
    return path


def run(*arguments: Any, command: Any = predict) -> int | str:
    """Returns the exit code, or the message that ends the command."""
    cache = ["--no-compilation-cache"] if command is predict else []
    with pytest.raises(SystemExit) as exit_info:
        command.main([*map(str, arguments), *cache])
    return exit_info.value.code


def test_an_image_needs_no_prompt(make_dir, image, tmp_path):
    directory = make_dir(**SCORES)
    predictor = RahfPredictor.from_checkpoint(directory)
    alone, captioned = predictor(image), predictor(image, "a cat")
    assert (alone.prompt, captioned.prompt) == ("", "a cat")
    assert [one.scores for one in predictor([image, image])] == [alone.scores] * 2
    assert alone.scores == captioned.scores
    pixels = np.random.default_rng(0).random((2, 20, 30, 3), np.float32)
    score = predictor.score_fn("overall")
    np.testing.assert_array_equal(score(pixels), score(pixels, ["a cat", "a dog"]))
    assert score(pixels[0]).shape == ()
    # The command takes every kind of input without prompts.
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in "abc":
        shutil.copy(image, folder / f"{name}.png")
    (folder / "b.txt").write_text("a caption")
    (folder / "t.csv").write_text("image\na.png\n")
    (folder / "t.jsonl").write_text('{"image": "b.png"}\n')
    with tarfile.open(folder / "t.tar", "w") as tar:
        tar.add(image, "in_tar.png")
    inputs = folder / "c.png", folder, *(folder / f"t.{kind}" for kind in ("csv", "jsonl", "tar"))
    flags = "--checkpoint", directory, "--report"
    for number, place in enumerate(inputs):
        assert run(*flags, "--out", tmp_path / f"out{number}", place) == 0
    written = lines(tmp_path / "out1/predictions.jsonl")
    assert [(line["id"], line["prompt"]) for line in written] == [
        *(("a.png", ""), ("b.png", "a caption"), ("c.png", ""))
    ]
    assert all(line["scores"] == pytest.approx(alone.scores, abs=1e-6) for line in written)
    page = (tmp_path / "out0/report.html").read_text()
    assert "Image generated from" not in page
    assert 'name="search"' not in page


def untrained(make_dir, form: str = "checkpoint") -> tuple[pathlib.Path, pathlib.Path]:
    """Makes a MODEL_DIR as conversion does, without the head. Returns it, and the place of its parameters."""
    directory = make_dir(**SCORES)
    state = jax.device_get(RahfPredictor.from_checkpoint(directory).state)
    shutil.rmtree(directory / "checkpoint_0")
    params = {name: part for name, part in state.params.items() if name != "scores"}
    if form == "checkpoint":
        params, mutables = jax.tree.map(jnp.asarray, (params, state.flax_mutables))
        checkpoints.save_params(str(directory), params, flax_mutables=mutables)
        return directory, directory / "checkpoint_0"
    arrays = forward.flatten(dataclasses.replace(state, params=params))
    weights_file.write(directory / weights_file.FILE, arrays, {})
    return directory, directory / weights_file.FILE


@pytest.mark.parametrize("form", ["checkpoint", "safetensors"])
@pytest.mark.parametrize("command", [predict, export], ids=["predict", "export"])
def test_a_conversion_without_heads_is_to_be_trained(make_dir, image, tmp_path, form, command):
    directory, place = untrained(make_dir, form)
    flags = [image] if command is predict else ["--to", "safetensors"]
    message = str(run("--checkpoint", directory, "--out", tmp_path / "out", *flags, command=command))
    assert f"{place} doesn't fit this model: scores/bias (2,): not in the checkpoint; scores/" in message
    assert "It lacks 2 arrays and has all others" in message
    if form == "safetensors":
        assert f"python -m richhf_jax.convert --from={place} --to=DIR --gin_file=..., then python" in message
    start = place if form == "checkpoint" else "DIR"
    assert f"runs/train.gin --gin.INITIAL_CHECKPOINT_PATH={start} --gin.MODEL_DIR=RUN" in message
    assert f"If this one is trained, bring {directory}/model.json back" in message
    assert "the same gin files" not in message
    assert not (tmp_path / "out").exists()


def test_the_advice_has_the_flags_that_the_checkpoint_knows(make_dir, image, tmp_path):
    directory, _ = untrained(make_dir)
    content = json.loads((directory / "model.json").read_text())
    content.pop("checksums")
    recorded = "--gin_file=models/clip_finetuned.gin '--gin.FIT=a; b' --gin.VOCABULARY=clip_small"
    content["training"] = {"gin_flags": recorded}
    (directory / "model.json").write_text(json.dumps(content))
    (directory / "tokenizer.json").touch()  # This system doesn't read it.
    message = str(run("--checkpoint", directory, "--out", tmp_path / "out", image))
    flags = "--gin_file=models/clip_finetuned.gin '--gin.FIT=a; b'"
    vocabulary = f"--gin.VOCABULARY={directory}/tokenizer.json"
    assert f"richhf_jax.train {flags} {vocabulary} --gin_file=runs/train.gin --gin.INITIAL_CHECKP" in message


def test_evaluation_tells_of_training_and_of_gin(make_dir):
    given = {"model": TinyModel(Tiny(TinyConfig(**SCORES))), "partitioner": PARTITIONER, "baseline_fns": ()}
    with pytest.raises(errors.UserError) as caught:
        eval_script.evaluate(
            checkpoint_path=str(untrained(make_dir)[0]), dataset_cfg=config("test"), output_dir="no", **given
        )
    message = str(caught.value)
    assert "python -m richhf_jax.train --gin_file=... --gin_file=runs/train.gin" in message
    assert message.endswith("trained, give the same gin files and the same --gin. flags as in training")


def test_parameters_of_another_shape_are_another_models(make_dir, image, tmp_path):
    directory = make_dir(**SCORES)
    shutil.copy(make_dir(**THREE_SCORES) / "model.json", directory)
    message = str(run("--checkpoint", directory, "--out", tmp_path / "out", image))
    assert "scores/bias (3,): (2,) in the checkpoint" in message
    assert f"\nBring {directory}/model.json back" in message
    assert "richhf_jax.train" not in message


@pytest.mark.parametrize("heatmaps", ["png", "npz"])
@pytest.mark.parametrize("kinds", [SCORES, ONE_SCORE, HEATMAPS], ids=["scores", "one", "heatmaps"])
def test_the_command_leaves_out_what_a_system_lacks(make_dir, image, tmp_path, kinds, heatmaps):
    directory, out = make_dir(**kinds), tmp_path / "out"
    flags = (
        "--checkpoint",
        directory,
        "--out",
        out,
        image,
        "--prompt=a cat",
        "--report",
        "--heatmaps",
        heatmaps,
    )
    assert run(*flags) == 0
    (line,) = lines(out / "predictions.jsonl")
    assert line["image_size"] == [30, 20]
    if "score_kinds" in kinds:
        assert list(line["scores"]) == list(kinds["score_kinds"])
        assert line.keys() == {"id", "prompt", "scores", "image_size", "position"}
        files = {"predictions.jsonl", "errors.jsonl", "run.json", "report.html"}
        assert {path.name for path in out.iterdir() if not path.name.startswith(".")} == files
    else:
        assert line.keys() == {*("id", "prompt", "heatmaps", "heatmap_peaks", "image_size", "position")}
        assert list(line["heatmap_peaks"]) == ["misalignment"]
    page = (out / "report.html").read_text()
    assert "implausibility" not in page
    assert "predicted misaligned" not in page  # It would mean that no word is.
    assert run(*flags) == 0  # A run that is done is known as such.


def test_what_a_system_lacks_is_named(make_dir, image, tmp_path):
    scores, heatmaps = make_dir(**SCORES), make_dir(**HEATMAPS)
    message = run("--checkpoint", scores, "--out", tmp_path / "out", image, "--overlay")
    assert f"--overlay: the model of {scores}/checkpoint_0 predicts no heatmaps" in str(message)
    assert not (tmp_path / "out").exists()
    predictor = RahfPredictor.from_checkpoint(scores)
    with pytest.raises(errors.UserError, match="there is no heatmap to draw; the model predicts: none"):
        predictor(image, "a cat").overlay()
    with pytest.raises(errors.UserError, match="tiny reads no text"):
        predictor.encode(["a cat"])
    with pytest.raises(errors.UserError, match="no score 'aesthetics', only alignment, overall"):
        predictor.score_fn("aesthetics")
    predictor = RahfPredictor.from_checkpoint(heatmaps)
    with pytest.raises(errors.UserError, match="no score 'overall', only none"):
        predictor.score_fn("overall")
    with pytest.raises(errors.UserError, match="no heatmap implausibility; the model predicts: misalignment"):
        predictor(image, "a cat").overlay("implausibility")
    assert predictor(image, "a cat").overlay().size == (30, 20)


def test_a_score_is_a_function_of_the_image(make_dir):
    predictor = RahfPredictor.from_checkpoint(make_dir(**SCORES))
    given = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3)).astype(np.uint8)
    expected = [record.scores["overall"] for record in predictor(given, ["a cat", "a dog"])]
    score = predictor.score_fn("overall")
    np.testing.assert_allclose(score(given / np.float32(255), ["a cat", "a dog"]), expected, atol=1e-6)
    gradient = jax.grad(lambda image: score(image, "a cat"))(given[0] / np.float32(255))
    assert np.abs(gradient).max() > 0


def test_a_description_names_its_system(make_dir, tmp_path):
    directory = make_dir(**SCORES)
    path = directory / "model.json"
    content = json.loads(path.read_text())
    assert content["system"] == "tiny"
    assert content["feature_lengths"] == {"image": SIDE}
    assert content["checksums"].keys() == {"model.json"}
    found = model_description.read(directory)
    found.write(tmp_path)
    assert (tmp_path / "model.json").read_text() == path.read_text()
    for change, message in (
        ({"system": "huge"}, "there is no system 'huge', only rahf, .*tiny"),
        ({"system": ["tiny"]}, "makes no sense"),
        ({"tiny_config": {"depth": 3}}, "tiny_config has an unknown 'depth'"),
        ({"tiny_config": {"score_kinds": 3}}, "tiny_config.score_kinds must be a tuple"),
    ):
        path.write_text(json.dumps({**content, **change, "checksums": None}))
        with pytest.raises(errors.UserError, match=message):
            model_description.read(directory)


def test_data_of_any_vocabulary_go_with_a_system_that_reads_no_text(make_dir):
    model_description.check_vocabulary(make_dir(**SCORES), b"any", "no fix")


@pytest.fixture
def square(tmp_path):
    """Makes a picture of the model's size: examples resize by Pillow, which rounds differently."""
    path = tmp_path / "square.png"
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize("kinds", [SCORES, HEATMAPS], ids=["scores", "heatmaps"])
@pytest.mark.parametrize("to", ["safetensors", "orbax", "stablehlo"])
def test_an_export_predicts_the_same(make_dir, square, tmp_path, to, kinds):
    directory, new = make_dir(**kinds), tmp_path / "new"
    export.export(str(directory), to, str(new))
    expected = RahfPredictor.from_checkpoint(directory)(square, "a cat")
    found = RahfPredictor.from_checkpoint(new)(square, "a cat")
    assert found.to_dict() == expected.to_dict()
    card = (new / "MODEL_CARD.md").read_text()
    assert card.startswith("# tiny\n")
    assert ("misalignment" in card, "overall" in card) == (kinds is HEATMAPS, kinds is SCORES)
    assert "words" not in card
    assert "vocabulary" not in card
    assert "PROMPT" not in card
    assert "prompt" not in card
    if to == "stablehlo":
        assert "python example.py IMAGE`" in card
        assert ("predicts: heatmaps' peaks. It writes heatmaps.npy" in card) == (kinds is HEATMAPS)
        check_printed(example(new, square), found)
        assert (new / "heatmaps.npy").exists() == (kinds is HEATMAPS)
        usage = example(new, square, "a cat", code=2)
        assert usage == "usage: python example.py IMAGE\n"


def check_printed(printed: str, expected: Any) -> None:
    """Checks what example.py prints against a prediction, and the heatmaps that it writes."""
    found = json.loads(printed)
    if expected.scores:
        assert found == {"scores": pytest.approx(expected.scores, abs=1e-5)}
        return
    assert found.keys() == {"heatmap_peaks", "heatmaps"}
    peaks = {kind: heatmap.max() for kind, heatmap in expected.heatmaps.items()}
    assert found["heatmap_peaks"] == pytest.approx(peaks, abs=1e-5)
    np.testing.assert_allclose(np.load(found["heatmaps"]), [*expected.heatmaps.values()], atol=1e-5)


def example(directory: pathlib.Path, *arguments: Any, code: int = 0) -> str:
    """Runs an export's example.py where no library for texts can be imported. Returns what it prints."""
    for name in ("sentencepiece", "tensorflow_text"):
        (directory / f"{name}.py").write_text(f"raise ModuleNotFoundError({name!r})")
    command = [sys.executable, "example.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done.stderr if code else done.stdout


@pytest.mark.parametrize("kinds", [SCORES, HEATMAPS], ids=["scores", "heatmaps"])
def test_a_saved_model_of_a_system_that_reads_no_text(make_dir, square, tmp_path, kinds):
    directory, new = make_dir(**kinds), tmp_path / "new"
    export.export(str(directory), "savedmodel", str(new))
    assert json.loads((new / "interface.json").read_text())["requires"] == ["tensorflow"]
    card = (new / "MODEL_CARD.md").read_text()
    assert "python example.py IMAGE`" in card
    assert "tensorflow-text" not in card
    assert "prompt" not in card.lower()
    check_printed(example(new, square), RahfPredictor.from_checkpoint(directory)(square))


def test_an_example_sees_the_picture_as_the_predictor_does(make_dir, square, tmp_path):
    directory, new = make_dir(**SCORES), tmp_path / "new"
    content = json.loads((directory / "model.json").read_text()) | {"fit": "centre_crop"}
    content.pop("checksums")
    (directory / "model.json").write_text(json.dumps(content))
    export.export(str(directory), "stablehlo", str(new))
    wide = tmp_path / "wide.png"
    # The ends, which are cropped off, are white.
    picture = Image.new("RGB", (SIDE * 4 + 1, SIDE * 2), "white")
    picture.paste(Image.open(square).resize((SIDE * 2, SIDE * 2)), (SIDE, 0))
    picture.save(wide)
    expected = RahfPredictor.from_checkpoint(directory)(wide).scores
    assert json.loads(example(new, wide))["scores"] == pytest.approx(expected, abs=1e-6)
