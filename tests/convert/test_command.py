"""The whole conversion: it recognises formats, writes the result, and leaves nothing after an error."""

import dataclasses
import functools
import os
import pathlib
import shutil
import subprocess
import sys

import gin
import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from flax import traverse_util

from richhf_jax import checkpoints, errors, gin_utils, model_description, train_state
from richhf_jax.convert import __main__ as command
from richhf_jax.convert import layers, own, zarr_arrays
from richhf_jax.convert.source import ConvertError, Tensor

ROOT = pathlib.Path(command.__file__).resolve().parents[2]
LENGTHS = {"image": 16, "inputs": 8, "targets": 8}
TWO_LAYERS = (
    "t5.T5Config.num_encoder_layers = 2",
    "t5.T5Config.num_decoder_layers = 2",
    "vit.ViTConfig.num_layers = 2",
)
SCANNED = (*TWO_LAYERS, "t5.T5Config.scan_layers = True", "vit.ViTConfig.scan_layers = True")


@pytest.fixture(scope="module", autouse=True)
def _remembered_shapes():
    """Caches the shapes of a model, because tracing takes half a second and tests need them several times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "model_shapes", functools.cache(command.model_shapes))
        yield


@pytest.fixture(scope="module")
def huggingface(tmp_path_factory):
    """Saves a T5 and a ViT with small.gin's sizes; the ViT's images are smaller."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    t5 = transformers.T5Config(
        vocab_size=32, **sizes, feed_forward_proj="gated-gelu", tie_word_embeddings=False
    )
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
    vit = transformers.ViTConfig(image_size=12, patch_size=2, **sizes)
    directory = tmp_path_factory.mktemp("huggingface")
    transformers.T5ForConditionalGeneration(t5).save_pretrained(directory / "t5")
    transformers.ViTModel(vit).save_pretrained(directory / "vit")
    return directory


@pytest.fixture(scope="module")
def random_params(random_values):
    """Makes random parameters of a model, by name."""

    def make(model):
        return {n: np.asarray(x) for n, x in random_values(command.model_shapes(model)).items()}

    return make


@pytest.fixture
def saved(tmp_path, make_model, random_params):
    """Makes a checkpoint with random parameters; returns its path, the model and the parameters."""

    def make(*bindings):
        model = make_model("multi_head", *bindings)
        params = random_params(model)
        tree = traverse_util.unflatten_dict(params, sep="/")
        checkpoints.save_params(str(tmp_path / "saved"), jax.tree.map(jax.numpy.asarray, tree))
        return str(tmp_path / "saved"), model, params

    return make


def restored(directory, model):
    """Returns the parameters that a model finds in a checkpoint."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)
        for name, leaf in command.model_shapes(model).items()
    }
    wanted = train_state.InferenceState(traverse_util.unflatten_dict(wanted, sep="/"))
    found, _ = checkpoints.restore_matching(str(directory), wanted)
    return {"/".join(name): np.asarray(array) for name, array in found.items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_t5_and_vit_become_a_checkpoint(huggingface, make_model, tmp_path, capsys):
    make_model("multi_head")
    model = gin_utils.macro("MODEL")
    paths = [str(huggingface / part) for part in ("t5", "vit")]
    table = command.convert(model, paths, str(tmp_path / "to"))
    assert capsys.readouterr().out == table + "\n"
    assert (tmp_path / "to/conversion.txt").read_text() == table + "\n"
    lines = [line.split()[0] for line in table.split("\n\n")[1].splitlines()]
    assert {status: lines.count(status) for status in ("loaded", "resampled", "unused")} == {
        "loaded": 49,
        "resampled": 1,
        "unused": 3,  # class token, and the pooler's two
    }
    found = restored(tmp_path / "to", model)
    assert {name.split("/")[0] for name in found} == {"token_embedder", "encoder", "decoder", "vit"}
    state = {
        part: safetensors.numpy.load_file(huggingface / part / "model.safetensors") for part in ("t5", "vit")
    }
    kernel = "encoder.block.0.layer.1.DenseReluDense.wi_1.weight"
    np.testing.assert_array_equal(found["encoder/layers_0/mlp/wi_1/kernel"], state["t5"][kernel].T)
    kernel = "encoder.layer.0.intermediate.dense.weight"
    np.testing.assert_array_equal(found["vit/layers_0/mlp/wi/kernel"], state["vit"][kernel].T)
    # The result's own configuration describes the same model.
    gin.clear_config()
    gin_utils.parse_gin_flags([], [str(tmp_path / "to/config.gin")], [])
    assert gin_utils.macro("MODEL").module == model.module


def test_of_a_checkpoint_with_an_average_of_the_parameters_that_is_converted(saved, tmp_path, capsys):
    _, model, params = saved()
    averaged = {name: array + 1 for name, array in params.items()}
    trees = [traverse_util.unflatten_dict(tree, sep="/") for tree in (params, averaged)]
    trees = jax.tree.map(jax.numpy.asarray, trees)
    state = train_state.TrainState(jax.numpy.int32(7), trees[0], (), ema_params=trees[1])
    with checkpoints.Checkpointer(str(tmp_path / "run")) as checkpointer:
        checkpointer.save(state, {}, 7)
    command.convert(model, [str(tmp_path / "run")], str(tmp_path / "file"), "safetensors")
    assert_equal(safetensors.numpy.load_file(tmp_path / "file/model.safetensors"), averaged)
    assert "our checkpoint of step 7, average of the parameters, without" in capsys.readouterr().out
    command.convert(model, [str(tmp_path / "run")], str(tmp_path / "to"))
    assert_equal(restored(tmp_path / "to", model), averaged)


def test_to_safetensors_and_back(saved, tmp_path):
    path, model, params = saved(*SCANNED)
    command.convert(model, [path], str(tmp_path / "file"), "safetensors")
    file = safetensors.numpy.load_file(tmp_path / "file/model.safetensors")
    flat = traverse_util.flatten_dict(
        layers.unstack_layers(traverse_util.unflatten_dict(params, sep="/")), sep="/"
    )
    assert_equal(file, flat)
    command.convert(model, [str(tmp_path / "file")], str(tmp_path / "again"))
    assert_equal(restored(tmp_path / "again", model), params)


def test_scanned_and_unscanned_layers(saved, make_model, tmp_path):
    path, _, params = saved(*SCANNED)
    single = make_model("multi_head", *TWO_LAYERS)
    command.convert(single, [path], str(tmp_path / "single"))
    found = restored(tmp_path / "single", single)
    stacked = layers.stack_layers(traverse_util.unflatten_dict(found, sep="/"))
    assert_equal(traverse_util.flatten_dict(stacked, sep="/"), params)
    scanned = make_model("multi_head", *SCANNED)
    command.convert(scanned, [str(tmp_path / "single")], str(tmp_path / "scanned"))
    assert_equal(restored(tmp_path / "scanned", scanned), params)


def test_to_hugging_face(saved, tmp_path, capsys):
    path, model, params = saved("vit.ViTConfig.class_token = True", *SCANNED)
    command.convert(model, [path], str(tmp_path / "to"), "huggingface")
    t5 = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "to/t5")
    vit = transformers.ViTModel.from_pretrained(tmp_path / "to/vit", add_pooling_layer=False)
    kernel = t5.decoder.block[1].layer[1].EncDecAttention.k.weight.detach().numpy().T
    np.testing.assert_array_equal(kernel, params["decoder/layers/encoder_decoder_attention/key/kernel"][1])
    token = vit.embeddings.cls_token + vit.embeddings.position_embeddings[:, :1]
    np.testing.assert_array_equal(token.detach().numpy()[0, 0], params["vit/class_token"])
    left_out = "left out, as they are parts of neither T5 nor ViT: heatmap_head_"
    assert left_out in capsys.readouterr().out


@pytest.mark.parametrize("output", ["orbax", "safetensors", "huggingface"])
def test_a_read_that_fails_leaves_nothing(output, saved, monkeypatch, tmp_path):
    path, model, _ = saved()

    class Arrays(zarr_arrays.ZarrArrays):
        def tensor(self, name, origin):
            tensor = super().tensor(name, origin)
            return dataclasses.replace(tensor, read=lambda: fail(tensor))

    def fail(tensor):
        if tensor.origin == "encoder/encoder_norm/scale":
            raise ConvertError("damaged")
        return tensor.read()

    monkeypatch.setattr(zarr_arrays, "ZarrArrays", Arrays)
    with pytest.raises(ConvertError, match="damaged"):
        command.convert(model, [path], str(tmp_path / "to/dir"), output)
    assert list((tmp_path / "to").iterdir()) == []


def test_what_is_there_stays(saved, tmp_path):
    path, model, _ = saved()
    (tmp_path / "to").mkdir()
    (tmp_path / "to/mine").touch()
    for place, reason in (("to", "is not empty: name a new directory"), ("to/mine", "is no directory")):
        with pytest.raises(errors.UserError, match=f"{place} {reason}"):
            command.convert(model, [path], str(tmp_path / place))
    assert [p.name for p in (tmp_path / "to").iterdir()] == ["mine"]
    (tmp_path / "to/mine").unlink()
    command.convert(model, [path], str(tmp_path / "to"))
    assert sorted(p.name for p in (tmp_path / "to").iterdir()) == [
        "checkpoint_0",
        "config.gin",
        "conversion.txt",
    ]


def test_a_damaged_checkpoint_is_named(saved, tmp_path):
    path, model, _ = saved()
    metadata = pathlib.Path(path) / "checkpoint_0/state/_METADATA"
    content = metadata.read_text()
    metadata.write_text(content[: len(content) // 2])
    with pytest.raises(ConvertError, match="checkpoint_0/state/_METADATA is truncated"):
        command.convert(model, [path], str(tmp_path / "to"))
    metadata.write_text(content)
    for file in pathlib.Path(path).glob("checkpoint_0/state/**/d/*"):
        file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ConvertError, match="checkpoint_0/state/"):
        command.convert(model, [path], str(tmp_path / "to"))
    assert not (tmp_path / "to").exists()


def test_what_is_recognised(huggingface, saved, tmp_path):
    path, _, _ = saved()
    np.savez(tmp_path / "vit.npz", x=np.ones(2))
    safetensors.numpy.save_file({"x": np.ones(2)}, tmp_path / "x.safetensors")
    (tmp_path / "file").mkdir()
    safetensors.numpy.save_file({"x": np.ones(2)}, tmp_path / "file/model.safetensors")
    torch.save({"visual_token_projection.weight": torch.ones(2, 2)}, tmp_path / "rahf_model.pt")
    (tmp_path / "t5x").mkdir()
    (tmp_path / "t5x/checkpoint").touch()
    places = {
        "t5x": "a checkpoint of T5X",
        path: "a checkpoint of ours",
        f"{path}/checkpoint_0": "a checkpoint of ours",
        str(huggingface / "t5"): "a directory of Hugging Face's T5 or ViT",
        "x.safetensors": "our .safetensors",
        "file": "our .safetensors",
        "vit.npz": "a ViT's .npz",
        "rahf_model.pt": "the PyTorch release of RAHF",
    }
    found = {place: command.find_format(str(tmp_path / place)).name for place in places}
    assert found == places


def test_the_default_model_is_that_of_the_release_where_it_is_alone(huggingface, tmp_path):
    torch.save({"visual_token_projection.weight": torch.ones(2, 2)}, tmp_path / "rahf_model.pt")
    release, t5 = str(tmp_path / "rahf_model.pt"), str(huggingface / "t5")
    assert command.default_gin_file([release]) == "models/rahf_pytorch_release.gin"
    assert command.default_gin_file([t5]) == "models/rahf_base.gin"
    assert command.default_gin_file([release, t5]) == "models/rahf_base.gin"


def test_what_is_not_recognised(tmp_path):
    (tmp_path / "weights.h5").write_bytes(b"\x89HDF....")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/readme.md").touch()
    messages = {
        "nothing": "nothing: no such file or directory",
        "weights.h5": r"weights.h5 is a file of 8 bytes that begins with b'\\x89HDF....', in none of",
        "folder": "folder is a directory with readme.md, in none of the known formats: a checkpoint of T5X; ",
    }
    for place, message in messages.items():
        with pytest.raises(ConvertError, match=message):
            command.find_format(str(tmp_path / place))


@pytest.mark.parametrize("name", ["x.pt", "x.npz", "x.safetensors", "checkpoint"])
def test_a_pipe_is_not_opened(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(errors.UserError, match=f"{name} is a named pipe: a regular file is needed"):
        command.find_format(str(tmp_path / name))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "checkpoint", "state/_METADATA"])
def test_a_pipe_in_a_directory_is_not_opened(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(ConvertError, match="in none of the known formats"):
        command.find_format(str(tmp_path))


def test_a_pipe_in_a_checkpoint_is_not_opened(saved):
    path, _, _ = saved()
    os.mkfifo(pathlib.Path(path, "checkpoint_0/state/d/pipe"))
    with pytest.raises(errors.UserError, match="pipe is a named pipe"):
        command.open_weights(path)


def test_an_unexpected_error_names_the_file(tmp_path, monkeypatch):
    np.savez(tmp_path / "x.npz", a=np.ones(2))

    def fail(_):
        raise RecursionError("too deep")

    monkeypatch.setattr(command, "FORMATS", [command.Format("any", lambda _: True, fail)])
    with pytest.raises(ConvertError, match=r"x.npz is damaged, or in none .* \(RecursionError: too deep\)"):
        command.open_weights(str(tmp_path / "x.npz"))


def test_the_result_is_not_written_into_a_checkpoint(saved):
    path, model, _ = saved()
    for to in (f"{path}/checkpoint_0/a/new", f"{path}/checkpoint_1"):
        with pytest.raises(errors.UserError, match=f"--to={to} lies in the checkpoint {path}/checkpoint_"):
            command.convert(model, [path], to)
    assert sorted(os.listdir(path)) == ["checkpoint_0"]


def test_a_nan_is_refused_and_leaves_nothing(saved, tmp_path):
    _, model, params = saved()
    name = "encoder/encoder_norm/scale"
    params[name] = np.full_like(params[name], np.nan)
    safetensors.numpy.save_file(params, tmp_path / "x.safetensors", own.SAFETENSORS_METADATA)
    for output in ("orbax", "safetensors", "huggingface"):
        with pytest.raises(ConvertError, match=f"x.safetensors: .* numbers of {name} are NaN or infinite"):
            command.convert(model, [str(tmp_path / "x.safetensors")], str(tmp_path / "to"), output)
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("output", ["safetensors", "huggingface"])
def test_a_flipped_bit_in_a_result_is_found(output, saved, tmp_path):
    path, model, params = saved("vit.ViTConfig.class_token = True")
    command.convert(model, [path], str(tmp_path / "to"), output)
    file = tmp_path / "to" / ("t5/model.safetensors" if output == "huggingface" else "model.safetensors")
    content = bytearray(file.read_bytes())
    content[content.index(params["encoder/encoder_norm/scale"].tobytes())] ^= 1
    file.write_bytes(content)
    message = "model.safetensors: .* isn't the array that was written"
    with pytest.raises(errors.UserError, match=message):
        command.convert(model, [str(file.parent)], str(tmp_path / "again"))


def test_a_safetensors_file_of_others(huggingface):
    with pytest.raises(
        ConvertError, match="not of this project; if it is Hugging Face's, give its directory"
    ):
        own.open_safetensors(str(huggingface / "t5/model.safetensors"))


def run(*args):
    return subprocess.run(
        [sys.executable, "-m", "richhf_jax.convert", *args],
        cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_command(huggingface, tmp_path):
    files = ["models/rahf.gin", "tests/small.gin", "variants/multi_head.gin"]
    args = [*(f"--gin_file={file}" for file in files), f"--from={huggingface}/t5", f"--to={tmp_path}/to"]
    result = run(*args, "--text_length=64")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"model: {' '.join(files)}\n[1] {huggingface}/t5: Hugging Face T5")
    assert result.stdout.endswith(f"written to {tmp_path}/to\n")
    description = model_description.read(tmp_path / "to")
    assert description.feature_lengths == {"image": 16, "inputs": 64, "targets": 64}
    assert description.training == {
        "converted_from": f"{huggingface}/t5",
        "gin_flags": " ".join(f"--gin_file={file}" for file in files),
    }
    assert description.vocabulary == (ROOT / "tasks/sentencepiece_small.model").read_bytes()
    result = run(*args[:-1], f"--to={tmp_path}/gin", "--gin.TEXT_LENGTH=11")
    assert result.returncode == 0, result.stderr
    lengths = model_description.read(tmp_path / "gin").feature_lengths
    flags = model_description.training_flags(tmp_path / "gin")
    assert flags.endswith(
        f"multi_head.gin --gin.TEXT_LENGTH=11 --gin.VOCABULARY={tmp_path}/gin/vocabulary.model"
    )
    assert lengths == {"image": 16, "inputs": 11, "targets": 5}
    shutil.rmtree(tmp_path / "gin")
    result = run(*args[:-1], f"--to={tmp_path}/other", "--gin.IMAGE_SIDE=20")
    assert result.returncode == 1
    assert "IMAGE_SIDE: images have 20x20 pixels" in result.stderr
    result = run(*args[:-1], f"--to={tmp_path}/other", "--gin.t5.T5Config.mlp_dim=20")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert (
        "encoder/layers_0/mlp/wo/kernel: (20, 16) in the model, (24, 16) in [1] encoder.block"
        in result.stderr
    )
    assert [p.name for p in tmp_path.iterdir()] == ["to"]


def test_a_description_of_single_layers_is_of_single_layers(make_model):
    model = make_model("multi_head", *SCANNED, "rahf.HeadsConfig.scan_layers = True")
    for unstacked in (False, True):
        network = command.describe(model, ["a"], LENGTHS, "gs://far/away.model", unstacked).network
        configs = network.t5_config, network.vit_config, network.heads_config
        assert {config.scan_layers for config in configs} == {not unstacked}


def test_a_vocabulary_that_is_far_away_is_asked_for(saved, tmp_path, capsys):
    path, model, _ = saved()
    description = command.describe(model, [path], LENGTHS, "gs://far/away.model", unstacked=False)
    command.convert(model, [path], str(tmp_path / "to"), description=description)
    assert f"copy the SentencePiece model to {tmp_path}/to/vocabulary.model" in capsys.readouterr().out
    with pytest.raises(errors.UserError, match="has no vocabulary.model: copy"):
        model_description.read(tmp_path / "to")


def test_a_checkpoint_of_ours_keeps_its_vocabulary(saved, tmp_path):
    path, model, _ = saved()
    small = ROOT / "tasks/sentencepiece_small.model"
    other = tmp_path / "other.model"
    other.write_bytes(small.read_bytes() + b"\x9a\x06\x00")  # A field of protobuf that nobody knows.
    command.describe(model, [path], LENGTHS, str(other), unstacked=False).write(path)
    for place in (path, f"{path}/checkpoint_0"):
        # None stands for the small one of `tasks/`.
        for named in (None, "gs://far/away.model", str(other)):
            description = command.describe(model, [place], LENGTHS, named, unstacked=False)
            assert description.vocabulary == other.read_bytes()
    message = f"{small} isn't the vocabulary of the weights, {path}/vocabulary.model. Leave VOCABULARY out"
    with pytest.raises(ConvertError, match=message):
        command.describe(model, [path], LENGTHS, str(small), unstacked=False)


def test_a_tensor_is_cast_when_it_is_read(rng):
    array = rng.standard_normal(3)
    cast = Tensor("x", (3,), array.dtype, lambda: array).astype(np.float32)
    assert cast.dtype == cast.read().dtype == np.float32
    np.testing.assert_array_equal(cast.read(), array.astype(np.float32))


def test_slices_of_a_stack_read_it_once(rng):
    array, reads = rng.standard_normal((3, 2)), []
    stacked = Tensor("w", (3, 2), array.dtype, lambda: reads.append(1) or array)
    slices = stacked.unstacked()
    assert [(t.origin, t.shape) for t in slices] == [("w[0]", (2,)), ("w[1]", (2,)), ("w[2]", (2,))]
    np.testing.assert_array_equal([t.read() for t in slices], array)
    assert len(reads) == 1


@pytest.mark.parametrize("file", ["array", "_METADATA"])
def test_a_flipped_bit_in_a_checkpoint_is_found(file, saved, tmp_path, monkeypatch):
    path, model, _ = saved()
    if file == "_METADATA":
        place = pathlib.Path(path, "checkpoint_0/state/_METADATA")
        place.write_bytes(place.read_bytes().replace(b'"write_shape": [', b'"write_shape":  ['))
    else:
        read = own.zarr_arrays.ZarrArrays.tensor

        def tensor(self, name, origin):
            found = read(self, name, origin)
            return dataclasses.replace(found, read=lambda: found.read() + np.float32(1e-3))

        monkeypatch.setattr(own.zarr_arrays.ZarrArrays, "tensor", tensor)
    message = "_METADATA: it is cut off" if file == "_METADATA" else "isn't the array that was written"
    with pytest.raises(errors.UserError, match=message):
        command.convert(model, [path], str(tmp_path / "to"))
