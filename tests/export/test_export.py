"""Exports, run in fresh processes that can't import richhf_jax, give the predictor's outputs."""

import contextlib
import dataclasses
import io
import json
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from flax import traverse_util
from PIL import Image

from richhf_jax import RahfPredictor, checkpoints, errors, feedback, model_description, train_state
from richhf_jax.export import __main__ as export
from richhf_jax.export import card, program
from richhf_jax.network import attention_kernel
from richhf_jax.predict import forward

PROMPTS = [
    "a red circle, and two blue stars",
    "x",
    'one "big" cat\u200b \u200b ring',
    "x " * 40,
    "drawing of Ünï 猫",
]
FORMATS = ("stablehlo", "savedmodel", "safetensors", "orbax")
CASES = [("multi_head", "resize"), ("augmented_prompt", "letterbox")]

# Code that runs first in a fresh process.
BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {blocked}:
            raise ModuleNotFoundError('blocked: ' + name, name=name)
sys.meta_path.insert(0, Blocker())
"""
TRAINING_LIBRARIES = ("seqio", "gin")
TEXT_LIBRARIES = ("tensorflow_text", *TRAINING_LIBRARIES)


def run_elsewhere(code: str, folder: pathlib.Path, *arguments: str, blocked: tuple = ()) -> str:
    """Runs code in a folder, in a process without richhf_jax. Returns the printed text."""
    names = repr({"richhf_jax", "tasks", *blocked})
    result = subprocess.run(
        [sys.executable, "-c", BLOCKER.format(blocked=names) + code, *arguments],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case[0])
def case(request, make_model_dir, tmp_path_factory):
    """Makes a model, its exports, images and the predictor's outputs; see the attributes set below."""

    class Case:
        variant, fit = request.param

    case = Case()
    case.model_dir = make_model_dir(*request.param)
    metrics = case.model_dir / "inference_eval/my_task/test/0/metrics.json"
    metrics.parent.mkdir(parents=True)
    metrics.write_text(json.dumps({"score/plcc/overall": 0.75}))
    case.folder = tmp_path_factory.mktemp("exports")
    for name in FORMATS:
        export.export(str(case.model_dir), name, str(case.folder / name))
    rng = np.random.default_rng(0)
    case.images = [rng.integers(0, 256, (30 + i, 40, 3)).astype(np.uint8) for i in range(len(PROMPTS))]
    case.predictor = RahfPredictor.from_checkpoint(case.model_dir)
    case.records = case.predictor(case.images, PROMPTS)
    prepared = [case.predictor.prepare(*pair) for pair in zip(case.images, PROMPTS, strict=True)]
    features = case.predictor.features(prepared, len(prepared))
    case.inputs = {
        "word_pieces": features["keyword_pieces"][:, 0],
        "word_numbers": features["keyword_words"][:, 0],
        **{name: features[name] for name in features if not name.startswith("keyword")},
    }
    np.savez(case.folder / "inputs.npz", **case.inputs)
    case.outputs = jax.device_get(case.predictor.dispatch(prepared, 16))
    return case


def assert_outputs(case, path: pathlib.Path) -> None:
    """Checks that the arrays saved by a process are the predictor's."""
    names = {"misaligned": "keyword_misaligned", "misaligned_probability": "keyword_probability"}
    with np.load(path) as found:
        assert sorted(found) == ["heatmaps", "misaligned", "misaligned_probability", "scores"]
        for name in found:
            expected = case.outputs[names.get(name, name)][: len(PROMPTS)]
            np.testing.assert_allclose(found[name], expected, atol=1e-5, err_msg=name)
            assert np.nanstd(expected) > 1e-3  # Constant outputs could hide mistakes.


def of_card(directory: pathlib.Path) -> str:
    """Returns the code in a model card."""
    return re.search(r"```python\n(.*?)```", (directory / "MODEL_CARD.md").read_text(), re.DOTALL)[1]


STABLEHLO = """
import jax, jax.export, numpy as np, pathlib
program = jax.export.deserialize(pathlib.Path('stablehlo/rahf.stablehlo').read_bytes())
assert program.platforms == ('cpu', 'cuda', 'tpu'), program.platforms
inputs = dict(np.load('inputs.npz'))
{load}
np.savez('outputs.npz', **program.call(params, inputs))
one = program.call(params, {{name: value[1:2] for name, value in inputs.items()}})
np.testing.assert_allclose(one['scores'][0], np.load('outputs.npz')['scores'][1], atol=1e-5)
"""


@pytest.mark.parametrize(
    "load",
    [
        "import safetensors.numpy; params = safetensors.numpy.load_file('stablehlo/model.safetensors')",
        "import safetensors.numpy; params = safetensors.numpy.load_file('safetensors/model.safetensors')",
        "from flax import traverse_util; import os; os.chdir('orbax'); {card}; os.chdir('..')\n"
        "params = traverse_util.flatten_dict(params, sep='/')",
    ],
    ids=["stablehlo", "safetensors", "orbax"],
)
def test_the_program_with_the_parameters_of_each_format(case, load):
    load = load.replace("; {card}; ", "\n" + of_card(case.folder / "orbax") + "\n")
    # Orbax asks whether TensorFlow is there.
    blocked = TEXT_LIBRARIES if "orbax" in load else ("tensorflow", *TEXT_LIBRARIES)
    run_elsewhere(STABLEHLO.format(load=load), case.folder, blocked=blocked)
    assert_outputs(case, case.folder / "outputs.npz")


SAVED_MODEL = """
import json, numpy as np, tensorflow as tf, tensorflow_text
model = tf.saved_model.load('savedmodel/saved_model')
assert sorted(model.signatures) == ['arrays', 'serving_default']
inputs = {name: tf.constant(value) for name, value in np.load('inputs.npz').items()}
outputs = model.signatures['arrays'](**inputs)
np.savez('outputs.npz', **{name: value.numpy() for name, value in outputs.items()})
images = [open(f'{i}.png', 'rb').read() for i in range(5)]
prompts = json.load(open('prompts.json'))
outputs = model.signatures['serving_default'](image_bytes=tf.constant(images), prompts=tf.constant(prompts))
np.savez('strings.npz', **{name: value.numpy() for name, value in outputs.items()})
"""


def test_a_saved_model_serves_arrays_and_strings(case):
    for i, image in enumerate(case.images):
        (case.folder / f"{i}.png").write_bytes(png(image))
    (case.folder / "prompts.json").write_text(json.dumps(PROMPTS))
    run_elsewhere(SAVED_MODEL, case.folder, blocked=("jax", "flax", *TRAINING_LIBRARIES))
    assert_outputs(case, case.folder / "outputs.npz")
    with np.load(case.folder / "strings.npz", allow_pickle=True) as found:
        for i, record in enumerate(case.records):
            np.testing.assert_allclose(found["scores"][i], list(record.scores.values()), atol=1e-5)
            np.testing.assert_allclose(found["heatmaps"][i], case.outputs["heatmaps"][i], atol=1e-5)
            words = [word.decode() for word in found["words"][i] if word]
            assert words == [token.text for token in record.tokens]
            for j, token in enumerate(record.tokens):
                probability = found["misaligned_probability"][i, j]
                assert found["misaligned"][i, j] == token.misaligned
                if token.probability is None:
                    assert np.isnan(probability)
                else:
                    assert probability == pytest.approx(token.probability, abs=1e-5)
        decided = ~np.isnan(found["misaligned_probability"])
        assert 0 < decided[3].sum() < decided.shape[1]  # The long prompt's last words are not decided.


UNKNOWN_OPERATIONS = """
import json, tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow.python.framework import op_def_registry
saved = saved_model_pb2.SavedModel.FromString(open('savedmodel/saved_model/saved_model.pb', 'rb').read())
(graph,) = (meta.graph_def for meta in saved.meta_graphs)
nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
functions = {function.signature.name for function in graph.library.function}
ops = {node.op for node in nodes} - functions
print(json.dumps(sorted(name for name in ops if op_def_registry.get(name) is None)))
"""


def test_a_saved_model_says_which_packages_it_needs(case):
    interface = json.loads((case.folder / "savedmodel/interface.json").read_text())
    assert interface.pop("requires") == ["tensorflow", "tensorflow-text"]
    other = json.loads((case.folder / "stablehlo/interface.json").read_text())
    assert other.pop("requires") == [f"jax>={jax.__version__}"]
    assert interface == other
    assert "import tensorflow_text" in (case.folder / "savedmodel/MODEL_CARD.md").read_text()
    # Of the operations that TensorFlow lacks, TensorFlow Serving links only tensorflow-text's.
    unknown = json.loads(run_elsewhere(UNKNOWN_OPERATIONS, case.folder, blocked=TEXT_LIBRARIES))
    assert unknown == ["SentencepieceOp", "SentencepieceTokenizeOp"]


@pytest.mark.parametrize("name", ["stablehlo", "savedmodel"])
def test_the_example_scores_an_image(case, name):
    # The image has the square's height, so its letterbox needs no resampling; Pillow rounds differently.
    width = 12 if case.fit == "letterbox" else 32
    [image] = np.random.default_rng(1).integers(0, 256, (1, 32, width, 3)).astype(np.uint8)
    (case.folder / "image.png").write_bytes(png(image))
    code = (case.folder / name / "example.py").read_text()
    code = code.replace("__file__", repr(str(case.folder / name / "example.py")))
    blocked = ("tensorflow", *TEXT_LIBRARIES) if name == "stablehlo" else ("jax", *TRAINING_LIBRARIES)
    printed = run_elsewhere(code, case.folder, "image.png", PROMPTS[0], blocked=blocked)
    expected = case.predictor(image, PROMPTS[0])
    found = json.loads(printed)
    assert found["scores"] == pytest.approx(expected.scores, abs=1e-5)
    for word, token in zip(found["words"], expected.tokens, strict=True):
        assert (word["text"], word["misaligned"]) == (token.text, token.misaligned)
        assert word["probability"] == pytest.approx(token.probability, abs=1e-5)
    peaks = {kind: heatmap.max() for kind, heatmap in expected.heatmaps.items()}
    assert found["heatmap_peaks"] == pytest.approx(peaks, abs=1e-5)
    assert found["heatmaps"] == str(case.folder / "heatmaps.npy")
    left = (32 - width) // 2
    heatmaps = np.load(found["heatmaps"])[:, :, left : left + width]
    np.testing.assert_allclose(heatmaps, list(expected.heatmaps.values()), atol=1e-5)
    (case.folder / "heatmaps.npy").unlink()


@pytest.mark.parametrize("name", ["stablehlo", "safetensors", "orbax"])
def test_an_export_is_a_checkpoint_for_the_predictor(case, name):
    again = RahfPredictor.from_checkpoint(case.folder / name)
    assert again.description == case.predictor.description
    jax.tree.map(np.testing.assert_array_equal, again.params, case.predictor.params)


def test_weights_are_bit_by_bit_the_checkpoints(case):
    expected = forward.flatten(jax.device_get(case.predictor.state))
    found = safetensors.numpy.load_file(case.folder / "safetensors/model.safetensors")
    reader, path = ocp.PyTreeCheckpointer(), case.folder / "orbax/checkpoint_0/state"
    tree = reader.metadata(path).item_metadata.tree
    assert set(tree) == {"params"}
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    params = reader.restore(path, restore_args=as_numpy)["params"]
    for arrays in (found, traverse_util.flatten_dict(params, sep="/")):
        assert arrays.keys() == expected.keys()
        for name, array in expected.items():
            assert array.dtype == np.float32
            np.testing.assert_array_equal(arrays[name], array)


@pytest.mark.parametrize("name", FORMATS)
def test_the_card_says_what_it_is(case, name):
    written = (case.folder / name / "MODEL_CARD.md").read_text()
    count = sum(array.size for array in jax.tree.leaves(case.predictor.params))
    for part in (
        f"| variant | {case.variant} |", f'fitted by "{case.fit}"', f"| parameters | {count:,}, float32 |",
        r"- task: synthetic\_rich\_hf\_multi\_head", "- initial checkpoint: none",
        r"my\_task, test, by the paper's",
        "| score/plcc/overall | 0.75 |", "## Limits", "Apache-2.0", "## How to load it",
    ):  # fmt: skip
        assert part in written
    assert "{{" not in written
    assert "{%" not in written
    # The card names every file, and every named file exists.
    for place in (case.folder / name).iterdir():
        assert place.name == "MODEL_CARD.md" or f"- `{place.name}{'/' if place.is_dir() else ''}`" in written


@pytest.mark.parametrize("name", FORMATS)
def test_a_standard_tool_checks_all_files(case, name):
    def check():
        return subprocess.run(
            ["sha256sum", "--check", "--quiet", "SHA256SUMS"],
            cwd=case.folder / name, capture_output=True, text=True, check=False,
        )  # fmt: skip

    assert check().returncode == 0
    listed = {line[66:] for line in (case.folder / name / "SHA256SUMS").read_text().splitlines()}
    files = [path for path in (case.folder / name).rglob("*") if path.is_file()]
    there = {str(path.relative_to(case.folder / name)) for path in files}
    assert listed == there - {"SHA256SUMS"}
    with flipped(case.folder / name / "model.json"):
        assert check().stdout == "model.json: FAILED\n"


@contextlib.contextmanager
def flipped(path: pathlib.Path):
    """Flips a bit in the middle of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]))
    with path.open("ab") as file:
        file.write(content[len(content) // 2 + 1 :])
    try:
        yield
    finally:
        path.write_bytes(content)


# Runs example.py with several arguments in one process, because loading its libraries takes seconds.
EXAMPLES = """
import contextlib, io, json, pathlib, runpy, sys
import numpy
if pathlib.Path('rahf.stablehlo').exists():
    import jax, jax.export
messages = []
for path, arguments in json.loads(sys.argv[1]):
    if path == 'not finite':
        numpy.isfinite = lambda values: numpy.zeros(1, bool)
        path = ''
    if path == 'old JAX':
        def refuse(*arguments):
            raise jax.errors.JaxRuntimeError('INVALID_ARGUMENT: Failed to deserialize StableHLO')
        jax.export.Exported.call = refuse
        path = ''
    flip = pathlib.Path(path) if path else None
    if flip:
        content = flip.read_bytes()
        flip.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    sys.argv[1:] = arguments
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            runpy.run_path('example.py', run_name='__main__')
        messages.append('no message')
    except SystemExit as error:
        messages.append(f"{error.code} {told.getvalue()}" if error.code == 2 else str(error.code))
    if flip:
        flip.write_bytes(content)
print(json.dumps(messages))
"""


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("stablehlo", ["interface.json", "vocabulary.model", "rahf.stablehlo", "model.safetensors"]),
        ("savedmodel", ["saved_model/saved_model.pb", "saved_model/variables/variables.index"]),
    ],
)
def test_the_example_says_what_is_wrong(case, name, files):
    (case.folder / name / "image.png").write_bytes(png(case.images[0]))
    (case.folder / name / "no image.png").write_bytes(b"no image")
    (case.folder / name / "small.png").write_bytes(png(case.images[0][:1, :9]))
    good = ["image.png", "a cat"]
    refused = [["", arguments] for arguments in (["small.png", "x"], ["image.png", " \u200b"], ["image.png"])]
    runs = [
        ["", []],
        *refused,
        ["", ["no image.png", "x"]],
        *([file, good] for file in files),
        ["not finite", good],
    ]
    if name == "stablehlo":
        runs.append(["old JAX", good])
    try:
        printed = run_elsewhere(EXAMPLES, case.folder / name, json.dumps(runs), blocked=TRAINING_LIBRARIES)
    finally:
        (case.folder / name / "image.png").unlink()
        (case.folder / name / "no image.png").unlink()
        (case.folder / name / "small.png").unlink()
    messages = json.loads(printed.splitlines()[-1])
    if name == "stablehlo":
        required = f"pip install 'jax>={jax.__version__}'"
        assert messages.pop() == f"JAX {jax.__version__} is too old for this program: {required}"
    usage, small, blank, no_prompt, no_image, *damaged, not_finite = messages
    assert usage == "2 usage: python example.py IMAGE PROMPT\n"
    assert no_prompt == usage
    # As the predictor says.
    for message, pair in (
        (small.removeprefix("small.png: "), (case.images[0][:1, :9], "x")),
        (blank, (case.images[0], " \u200b")),
    ):
        with pytest.raises(forward.PredictionError, match=f"0: {re.escape(message)}$"):
            case.predictor([pair[0]], [pair[1]])
    assert no_image.startswith("no image.png is no image that can be read: ")
    assert not_finite == "image.png: the model's outputs aren't finite, so they say nothing of the image"
    for file, message in zip(files, damaged, strict=True):
        assert message.endswith(f"{file} is damaged: copy the export again")


def test_damaged_parameters_are_named(case):
    with (
        flipped(case.folder / "safetensors/model.safetensors"),
        pytest.raises(errors.UserError, match="model.safetensors: .* isn't the array that was written"),
    ):
        RahfPredictor.from_checkpoint(case.folder / "safetensors")


def test_other_peoples_text_is_no_markup(make_model_dir, tmp_path):
    directory = make_model_dir()
    description = json.loads((directory / "model.json").read_text())
    description.pop("checksums", None)  # Whoever changes the file on purpose removes it.
    description["training"] = {
        "note\n\n## Licence\n\nPublic domain": "[x](javascript:alert(1))",
        "<img src=x>": "{{ 7 * 6_007 }}{% raw %}",
        "| a |": "`code`",
    }
    (directory / "model.json").write_text(json.dumps(description))
    metrics = directory / "inference_eval/t<img src=x>/test/0/metrics.json"
    metrics.parent.mkdir(parents=True)
    metrics.write_text(json.dumps({"x | 1.0 |\n| forged": 0.5, "y": "<b>", "z": None, "n": 12_345_678}))
    facts = card.evaluations(str(directory / "checkpoint_0"))
    card.write(tmp_path, model_description.read(directory), str(directory / "checkpoint_0"), 1, "orbax", 0)
    written = (tmp_path / "MODEL_CARD.md").read_text()
    assert [*facts] == ["t<img src=x>, test"]
    for markup in ("<img", "](javascript", "\n| forged", "<b>", "`code`", "42049"):
        assert markup not in written
    assert written.count("\n## Licence\n") == 1
    assert "| z | none |\n" in written
    assert "| n | 12345678 |\n" in written
    metrics.write_text("[" * 100_000)
    with pytest.raises(errors.UserError, match="metrics.json is truncated, or no JSON: .* are nested"):
        card.evaluations(str(directory / "checkpoint_0"))


def test_a_card_without_evaluations(make_model_dir, tmp_path):
    export.export(str(make_model_dir()), "safetensors", str(tmp_path / "new"))
    assert "There are no metrics beside the checkpoint" in (tmp_path / "new/MODEL_CARD.md").read_text()


def test_a_checkpoint_keeps_its_step(make_model_dir, tmp_path):
    directory = make_model_dir()
    (directory / "checkpoint_0").rename(directory / "checkpoint_70")
    export.export(str(directory), "orbax", str(tmp_path / "new"))
    assert checkpoints.find_checkpoint(str(tmp_path / "new"))[1] == 70


def test_of_a_checkpoint_with_an_average_of_the_parameters_that_predicts_and_is_exported(model_dir, tmp_path):
    params = RahfPredictor.from_checkpoint(model_dir).params
    average = jax.tree.map(lambda leaf: leaf * 0.9, params)
    shutil.copytree(model_dir, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint_*"))
    state = train_state.TrainState(jax.numpy.int32(3), params, (), ema_params=average)
    with checkpoints.Checkpointer(str(tmp_path / "run")) as checkpointer:
        checkpointer.save(state, {}, 3)
    found = RahfPredictor.from_checkpoint(tmp_path / "run").params
    jax.tree.map(np.testing.assert_array_equal, found, average)
    export.export(str(tmp_path / "run"), "safetensors", str(tmp_path / "out"))
    exported = safetensors.numpy.load_file(tmp_path / "out/model.safetensors")
    for name, array in forward.flatten(train_state.InferenceState(jax.device_get(average))).items():
        np.testing.assert_array_equal(exported[name], array)


def test_in_bfloat16(make_model_dir, tmp_path):
    export.export(str(make_model_dir()), "stablehlo", str(tmp_path / "new"), dtype="bfloat16")
    coarse = RahfPredictor.from_checkpoint(tmp_path / "new")
    assert coarse.description.network.t5_config.dtype == "bfloat16"
    assert "| activations | bfloat16 |" in (tmp_path / "new/MODEL_CARD.md").read_text()


def test_uncertainties_are_an_output_calibrated_or_not(make_model_dir, tmp_path, capsys):
    directory = make_model_dir(uncertainty=True)
    raw = model_description.read(directory)
    export.export(str(directory), "safetensors", str(tmp_path / "raw"))
    assert "export: the uncertainties aren't calibrated" in capsys.readouterr().err
    factors = dict(zip(feedback.SCORES, (0.5, 1, 2, 4), strict=True))
    calibration = model_description.Calibration(0, factors, "task", "validation", 8)
    calibrated = dataclasses.replace(raw, calibration=calibration)
    calibrated.write(directory)
    export.export(str(directory), "stablehlo", str(tmp_path / "new"))
    assert "calibrated" not in capsys.readouterr().err
    assert json.loads((tmp_path / "new/interface.json").read_text()) == {
        **program.interface(calibrated),
        "requires": [f"jax>={jax.__version__}"],
        "uncertainty": {"calibrated": True},
    }
    assert program.interface(raw)["uncertainty"] == {"calibrated": False}
    assert "; it is not calibrated" in (tmp_path / "raw/MODEL_CARD.md").read_text()
    written = (tmp_path / "new/MODEL_CARD.md").read_text()
    assert "`uncertainty` [batch, scores] are the scores' standard deviations, calibrated." in written
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    (tmp_path / "new/a.png").write_bytes(png(image))
    expected = RahfPredictor.from_checkpoint(directory)(image, "a cat").uncertainty
    printed = run_elsewhere(EXAMPLE, tmp_path / "new", "a.png", "a cat", blocked=("tensorflow",))
    assert json.loads(printed)["uncertainty"] == pytest.approx(expected, rel=1e-4)


EXAMPLE = """
import runpy, sys
sys.argv[0] = 'example.py'
runpy.run_path('example.py', run_name='__main__')
"""


def test_a_gpus_kernel_is_no_part_of_the_program(make_model_dir, monkeypatch):
    description = model_description.read(make_model_dir(dtype="bfloat16"))
    params = forward.flatten(forward.abstract_state(description))
    gpu = attention_kernel.Device("gpu", (9, 0))
    monkeypatch.setattr(attention_kernel, "current_device", lambda: gpu)
    monkeypatch.setattr(attention_kernel, "flash", fail)
    jax.eval_shape(program.make(description), params, program.input_shapes(description, 2))


def fail(*_):
    """Fails as Orbax does, whose message is TensorStore's."""
    raise ValueError("OUT_OF_RANGE: Error writing \"/new/checkpoint_7/d/1\": Failed [os_error_code='27']")


def test_mistakes_are_one_message_and_leave_nothing(model_dir, tmp_path, monkeypatch):
    def message(*arguments):
        with pytest.raises(SystemExit) as exit_info:
            export.main([f"--checkpoint={model_dir}", f"--out={tmp_path / 'new'}", *arguments])
        return str(exit_info.value.code)

    assert "no checkpoint_<step>" in message("--to=orbax", f"--checkpoint={tmp_path}")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").touch()
    assert "is not empty: name a new directory with --out" in message(
        "--to=orbax", f"--out={tmp_path / 'full'}"
    )
    inside = message("--to=orbax", f"--out={model_dir}/checkpoint_0/new")
    assert f"lies in the checkpoint {model_dir}/checkpoint_0: name" in inside
    assert "--out=gs://a/b: a local directory is needed" in message("--to=orbax", "--out=gs://a/b")
    with monkeypatch.context() as patch:
        full = shutil.disk_usage(tmp_path)._replace(free=10)
        patch.setattr(shutil, "disk_usage", lambda _: full)
        assert "No space left on device. Make" in message("--to=orbax")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_params", fail)
        assert "new/checkpoint_7/d/1: File too large. Make the folder" in message("--to=orbax")
    monkeypatch.setitem(sys.modules, "tensorflow_text", None)
    monkeypatch.delitem(sys.modules, "richhf_jax.export.saved_model", raising=False)
    assert "a SavedModel needs tensorflow_text: pip install" in message("--to=savedmodel")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


assert {variant for variant, _ in CASES} == set(feedback.VARIANTS)
