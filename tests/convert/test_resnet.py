"""Compares ResNets, as our converter reads them, with those of transformers and torchvision.

The models are small and random; one of their stages has two blocks.
"""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from flax import traverse_util

from richhf_jax import baselines, checkpoints, feedback, train_state
from richhf_jax.convert import __main__ as command
from richhf_jax.convert import own
from richhf_jax.convert import resnet as converter
from richhf_jax.convert.source import ConvertError, Tensor
from richhf_jax.network import resnet

torch.set_num_threads(1)

DEPTHS, WIDTHS, STEM = (1, 2, 1, 1), (16, 32, 40, 48), 8
HUGGINGFACE_DEPTHS, HUGGINGFACE_WIDTHS = (1, 2, 1), (16, 32, 40)
HUGGINGFACE = transformers.ResNetConfig(
    embedding_size=STEM, hidden_sizes=[*HUGGINGFACE_WIDTHS], depths=[*HUGGINGFACE_DEPTHS]
)


class Block(torch.nn.Module):
    """A bottleneck block with the names that torchvision and timm give its parts."""

    def __init__(self, inputs, width, stride):
        super().__init__()
        sizes = [(inputs, width // 4, 1, 1), (width // 4, width // 4, 3, stride), (width // 4, width, 1, 1)]
        for i, (channels, filters, side, step) in enumerate(sizes, 1):
            conv = torch.nn.Conv2d(channels, filters, side, step, side // 2, bias=False)
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", torch.nn.BatchNorm2d(filters))
        if stride > 1 or inputs != width:
            conv = torch.nn.Conv2d(inputs, width, 1, stride, bias=False)
            self.downsample = torch.nn.Sequential(conv, torch.nn.BatchNorm2d(width))

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        return torch.relu(self.bn3(self.conv3(y)) + getattr(self, "downsample", torch.nn.Identity())(x))


class TorchResNet(torch.nn.Module):
    """ResNet v1.5 as torchvision defines it, of any width.

    Torchvision itself isn't used: PyPI's is compiled for one build of torch, and beside another one it breaks
    transformers, too.
    """

    def __init__(self, depths, widths, stem):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, stem, 7, 2, 3, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(stem)
        inputs = [stem, *widths]
        for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            stride = 2 if i else 1
            blocks = [Block(inputs[i], width, stride), *(Block(width, width, 1) for _ in range(depth - 1))]
            self.add_module(f"layer{i + 1}", torch.nn.Sequential(*blocks))
        self.fc = torch.nn.Linear(widths[-1], 10)

    def features(self, x):
        x = torch.nn.functional.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


def randomised(model):
    """Makes all parameters and statistics random: a scale of one or a mean of zero would hide its misuse."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                for array in (module.weight, module.bias, module.running_mean):
                    array += 0.2 * torch.randn(array.shape, generator=generator)
                module.running_var *= 0.5 + torch.rand(module.running_var.shape, generator=generator)
    return model.eval()


@functools.cache
def torch_model(kind):
    torch.manual_seed(0)
    if kind == "huggingface":
        return randomised(transformers.ResNetModel(HUGGINGFACE))
    return randomised(TorchResNet(DEPTHS, WIDTHS, STEM))


def saved(kind, directory):
    """Saves a model as it is published; returns its path and our network of its size."""
    model = torch_model(kind)
    if kind == "huggingface":
        model.save_pretrained(directory)
        return directory, resnet.ResNetConfig(HUGGINGFACE_DEPTHS, HUGGINGFACE_WIDTHS, STEM)
    if kind == "torchvision":
        path = directory / "resnet50-11ad3fa6.pth"
        torch.save(model.state_dict(), path)
    else:  # Timm's ResNets have torchvision's names.
        path = directory / "model.safetensors"
        safetensors.torch.save_file(model.state_dict(), path)
    return path, resnet.ResNetConfig(DEPTHS, WIDTHS, STEM)


def features_of(kind, model, pixels):
    pixels = torch.tensor(pixels.transpose(0, 3, 1, 2))
    return model(pixels).last_hidden_state if kind == "huggingface" else model.features(pixels)


def variables(tensors):
    """Reads tensors to a network's variables."""
    arrays = {}
    for name, tensor in tensors.items():
        arrays[name] = array = tensor.read()
        assert (array.shape, array.dtype) == (tensor.shape, tensor.dtype), name
    tree = traverse_util.unflatten_dict(arrays, sep="/")
    return {"params": tree["resnet"], "batch_stats": tree["flax_mutables"]["batch_stats"]["resnet"]}


def in_our_names(kind, named_arrays, depths):
    """Converts torch's arrays, which may lack some, by the converter's own names."""
    modules = {"huggingface": converter._huggingface_modules}.get(kind, converter._torchvision_modules)
    state = {name: array.detach().numpy().copy() for name, array in named_arrays}
    tensors = {
        ours: converter.huggingface.from_torch(
            ours, Tensor(theirs, array.shape, array.dtype, lambda a=array: a)
        )
        for ours, theirs in converter._names(depths, modules).items()
        if (array := state.get(theirs)) is not None
    }
    return {
        name.replace("resnet/", "").removeprefix("flax_mutables/"): tensor.read()
        for name, tensor in tensors.items()
    }


def assert_close(ours, theirs, tolerance):
    """Compares trees; the tolerance is a share of the largest number of each array."""
    flat = traverse_util.flatten_dict(dict(ours), sep="/")
    assert flat.keys() == theirs.keys()
    for name, value in theirs.items():
        scale = max(np.abs(value).max(), 1e-3)
        np.testing.assert_allclose(flat[name], value, rtol=0, atol=tolerance * scale, err_msg=name)


@pytest.mark.parametrize("kind", ["huggingface", "torchvision", "timm"])
def test_features_gradients_and_statistics_are_torchs(kind, rng, tmp_path):
    path, config = saved(kind, tmp_path)
    given = variables(converter.open_resnet(str(path)).tensors)
    # Sides that stages halve to odd ones, so that padding at the wrong end shows.
    pixels = rng.standard_normal((3, 72, 50, 3)).astype(np.float32)
    model = torch_model(kind)
    theirs = features_of(kind, model, pixels).detach().numpy().transpose(0, 2, 3, 1)
    network = resnet.ResNet(config)
    ours = jax.jit(network.apply)(given, pixels)
    assert ours.shape == theirs.shape
    assert_close({"features": ours}, {"features": theirs}, 1e-5)

    weights = rng.standard_normal(theirs.shape).astype(np.float32)

    def loss_fn(params):
        variables = {**given, "params": params}
        features, new = network.apply(variables, pixels, train=True, mutable=["batch_stats"])
        return jnp.mean(features * weights), (features, new["batch_stats"])

    (_, (ours, statistics)), gradient = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(given["params"])
    before = {name: array.clone() for name, array in model.state_dict().items()}
    model.train().zero_grad()
    theirs = features_of(kind, model, pixels)
    (theirs * torch.tensor(weights.transpose(0, 3, 1, 2))).mean().backward()
    after = {name: array.clone() for name, array in model.state_dict().items()}
    model.load_state_dict(before)
    model.eval()
    assert_close({"features": ours}, {"features": theirs.detach().numpy().transpose(0, 2, 3, 1)}, 1e-5)
    grads = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    assert_close(gradient, in_our_names(kind, grads, config.depths), 1e-4)
    expected = {
        n: a for n, a in in_our_names(kind, after.items(), config.depths).items() if "batch_stats" in n
    }
    assert_close({"batch_stats": statistics}, expected, 1e-6)


def test_names_of_trainers_are_taken_off(tmp_path):
    state = {f"module.{name}": array for name, array in torch_model("torchvision").state_dict().items()}
    torch.save({"model": state, "epoch": 7}, tmp_path / "checkpoint.pth")
    source = converter.open_resnet(str(tmp_path / "checkpoint.pth"))
    assert source.description == "ResNet of torchvision or timm, 1+2+1+1 blocks"
    assert [*source.unused] == ["module.fc.weight", "module.fc.bias"]
    assert "'module.'" in source.note


def test_a_classifier_of_hugging_face(tmp_path):
    model = transformers.ResNetForImageClassification(HUGGINGFACE)
    model.save_pretrained(tmp_path)
    source = converter.open_resnet(str(tmp_path))
    assert source.description == "Hugging Face ResNet, 1+2+1 blocks"
    assert sorted(source.unused) == ["classifier.1.bias", "classifier.1.weight"]
    kernel = source.tensors["resnet/stage_1_block_1/conv_1/kernel"].read()
    theirs = model.resnet.encoder.stages[1].layers[1].layer[1].convolution.weight.detach().numpy()
    np.testing.assert_array_equal(kernel, theirs.transpose(2, 3, 1, 0))


def saved_state(directory, state):
    torch.save(state, directory / "resnet.pth")
    return str(directory / "resnet.pth")


def without(state, *names):
    return {name: array for name, array in state.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: without(s, "layer2.1.bn2.running_var"),
            "lack 1 of the 100 arrays .*layer2.1.bn2.running_var",
        ),
        (lambda s: without(s, "conv1.weight"), "lack 1 of the 100 arrays .*: conv1.weight"),
        (
            lambda s: s | {"layer1.0.se.fc1.weight": s["fc.weight"]},
            "1 arrays .*hasn't.*layer1.0.se.fc1.weight",
        ),
        (
            lambda s: {name: array for name, array in s.items() if not name.startswith("layer2.0.")},
            r"a stage has the blocks \[1\], not all from 0 on",
        ),
        (
            lambda s: {name: array for name, array in s.items() if not name.startswith("layer4.")},
            r"no whole ResNet: the numbers of blocks of its stages are \[1, 2, 1, 0\]",
        ),
        # ResNet-18 and -34 have blocks of two convolutions.
        (
            lambda s: {n: a for n, a in s.items() if not re.search(r"\.(conv|bn)3\.", n)},
            "lack 25 of the 100 arrays of a ResNet v1.5 with bottleneck blocks",
        ),
    ],
)
def test_weights_of_other_networks(change, message, tmp_path):
    path = saved_state(tmp_path, change(torch_model("torchvision").state_dict()))
    assert converter.is_resnet(path)
    with pytest.raises(ConvertError, match=message):
        converter.open_resnet(path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layer_type": "basic"}, "layer_type is 'basic'; our ResNet has 'bottleneck' only"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; our ResNet has 'relu' only"),
        ({"downsample_in_bottleneck": True}, "downsample_in_bottleneck is True; our ResNet has False only"),
        ({"downsample_in_first_stage": True}, "downsample_in_first_stage is True"),
        ({"depths": [1, 3, 1]}, r"stages of \(1, 2, 1\) blocks, its config.json says \[1, 3, 1\]"),
        ({"depths": "many"}, "config.json makes no sense: depths is 'many'"),
        ({"depths": [1, 2]}, "20 arrays that a ResNet v1.5 hasn't, .*encoder.stages.2"),
    ],
)
def test_configurations_that_are_not_ours(changed, message, tmp_path):
    torch_model("huggingface").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changed), "utf-8")
    with pytest.raises(ConvertError, match=message):
        converter.open_resnet(str(tmp_path))


def test_a_directory_of_timm(tmp_path):
    safetensors.torch.save_file(torch_model("torchvision").state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet50", "num_classes": 10}))
    assert converter.is_resnet(str(tmp_path))
    assert converter.open_resnet(str(tmp_path)).settings == {"resnet_config.depths": DEPTHS}
    # It has the same arrays, and other strides.
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnetaa50"}))
    with pytest.raises(ConvertError, match="config.json: architecture is 'resnetaa50'; our ResNet is timm's"):
        converter.open_resnet(str(tmp_path))


def test_other_files_are_no_resnets(tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit/config.json").write_text(json.dumps({"model_type": "vit"}))
    (tmp_path / "text.txt").write_text("text")
    for name in ("other.pt", "vit", "text.txt", "none"):
        assert not converter.is_resnet(str(tmp_path / name))


def our_model(config):
    heads = resnet.ResNetHeadsConfig(score_kinds=feedback.SCORES, score_dense_layers=(4,))
    return baselines.ResNetModel(resnet.ResNetFeedback(config, heads), None)


def test_a_conversion_is_a_checkpoint_with_statistics(tmp_path):
    path, config = saved("torchvision", tmp_path)
    model = our_model(config)
    command.convert(model, [str(path)], str(tmp_path / "to"))
    expected = {name: tensor.read() for name, tensor in converter.open_resnet(str(path)).tensors.items()}
    shapes = command.model_shapes(model)
    # The head alone is left to training.
    assert {name.split("/")[0] for name in shapes.keys() - expected.keys()} == {"scores_head"}

    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = traverse_util.unflatten_dict(
        {n: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device) for n, leaf in shapes.items()},
        sep="/",
    )
    wanted = train_state.InferenceState(wanted, wanted.pop("flax_mutables"))
    params, mutables = checkpoints.restore_matching(str(tmp_path / "to"), wanted)
    found = {"/".join(name): array for name, array in params.items()}
    found |= {"/".join(("flax_mutables", *name)): array for name, array in mutables.items()}
    again = {
        name: tensor.read() for name, tensor in own.open_checkpoint(str(tmp_path / "to")).tensors.items()
    }
    for arrays in (found, again):
        assert arrays.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(arrays[name], array, err_msg=name)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"depths": (1, 1, 1, 1)},
            r"depths is \(1, 1, 1, 1\) in the model, \(1, 2, 1, 1\) in .*ResNetConfig",
        ),
        ({"depths": (1, 2, 2, 1)}, r"depths is \(1, 2, 2, 1\) in the model"),
        (
            {"widths": (16, 32, 40, 64)},
            r"(?s)these shapes do not fit the model:.*stage_3_block_0/conv_0/kernel",
        ),
    ],
)
def test_a_model_of_another_size(changed, message, tmp_path):
    path, config = saved("torchvision", tmp_path)
    with pytest.raises(ConvertError, match=message):
        command.convert(our_model(config.replace(**changed)), [str(path)], str(tmp_path / "to"))
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("kind", ["huggingface", "torchvision", "timm"])
@pytest.mark.parametrize(
    ("value", "message"), [(-1e-6, "negative, which no variance"), (np.inf, "NaN or inf")]
)
def test_variances_that_are_none(kind, value, message, tmp_path):
    path, config = saved(kind, tmp_path)
    file = path / "model.safetensors" if kind == "huggingface" else path
    load = (
        functools.partial(torch.load, weights_only=True)
        if kind == "torchvision"
        else safetensors.torch.load_file
    )
    save = torch.save if kind == "torchvision" else safetensors.torch.save_file
    state = load(file)
    name = [name for name in state if name.endswith("running_var")][3]
    state[name][2] = value
    save(state, file)
    with pytest.raises(ConvertError, match=f"1 of the .* numbers of {name} are {message}"):
        command.convert(our_model(config), [str(path)], str(tmp_path / "to"))
    assert not (tmp_path / "to").exists()


def test_a_text_only_checkpoint(tmp_path):
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 16}
    transformers.T5EncoderModel(transformers.T5Config(**sizes)).save_pretrained(tmp_path / "t5")
    _, config = saved("torchvision", tmp_path)
    message = r"t5 \(Hugging Face T5, relu, .*\): no parameter in common with the model"
    with pytest.raises(ConvertError, match=message):
        command.convert(our_model(config), [str(tmp_path / "t5")], str(tmp_path / "to"))
