"""The authors' release against a PyTorch model of the same architecture and names, small and random.

It is put together from transformers' ViT and T5 and plain torch layers. Channels come from the shipped
preset, each made smaller by `SMALL`: which layers there are, and in which order, is the preset's own.
"""

import functools
import pathlib

import flax
import gin
import jax
import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_outputs import BaseModelOutput

from richhf_jax import feedback, gin_utils, models
from richhf_jax.convert import mapping, rahf_pytorch
from richhf_jax.convert.source import ConvertError, Tensor

VARIANTS = pytest.mark.parametrize("variant", ["multi_head", "augmented_prompt"])
# The release's numbers of channels -> the test's. They all differ, so that a mistaken one doesn't fit.
SMALL = {768: 16, 384: 10, 192: 6, 96: 5, 48: 4, 12: 3, 512: 9, 128: 7}
HEATMAPS, SCORES = len(feedback.HEATMAPS), len(feedback.SCORES)
LOSS_WEIGHTS = {"heatmap": 25.0, "score": 20.0, "keywords": 4.0}
BATCH, LENGTH, TARGET_LENGTH = 3, 8, 6

VIT = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 6, "d_ff": 28, "num_layers": 2, "num_heads": 2}
OVERLAY = (
    "t5.T5Config.vocab_size = 40",
    "t5.T5Config.emb_dim = 16",
    "t5.T5Config.head_dim = 6",
    "t5.T5Config.mlp_dim = 28",
    "t5.T5Config.num_heads = 2",
    "t5.T5Config.num_encoder_layers = 2",
    "t5.T5Config.num_decoder_layers = 2",
    "t5.T5Config.dtype = 'float32'",
    "t5.T5Config.scan_layers = False",
    "vit.ViTConfig.emb_dim = 24",
    "vit.ViTConfig.num_heads = 3",
    "vit.ViTConfig.num_layers = 2",
    "vit.ViTConfig.mlp_dim = 20",
    "vit.ViTConfig.grid = (3, 3)",
    "vit.ViTConfig.dtype = 'float32'",
    "vit.ViTConfig.scan_layers = False",
    *(f"models.RahfModel.{kind}_loss_weight = {weight}" for kind, weight in LOSS_WEIGHTS.items()),
)


class ChannelNorm(nn.Module):
    """Divides by the root mean square of the channels, then scales each."""

    def __init__(self, channels: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x):
        return self.scale * x / torch.sqrt(torch.mean(x**2, dim=1, keepdim=True) + 1e-8)


def conv(inputs: int, filters: int) -> nn.Module:
    return nn.Conv2d(inputs, filters, 3, padding=1)


class HeatmapPredictor(nn.Module):
    def __init__(self, width: int, first=(768, 384), deconvs=(768, 384, 384, 192), last=192):
        super().__init__()
        steps, channels = [], width
        for filters in first:
            steps += [conv(channels, filters), nn.ReLU(), ChannelNorm(filters)]
            channels = filters
        self.conv_layers = nn.Sequential(*steps)
        self.deconv_layers, self.conv_layers2 = nn.ModuleList(), nn.ModuleList()
        for filters in deconvs:
            doubled = nn.ConvTranspose2d(channels, filters, 3, stride=2, padding=1, output_padding=1)
            block = [conv(filters, filters), ChannelNorm(filters), nn.ReLU()]
            block += [conv(filters, filters), ChannelNorm(filters)]
            self.deconv_layers.append(nn.Sequential(doubled, ChannelNorm(filters), nn.ReLU()))
            self.conv_layers2.append(nn.Sequential(*block))
            channels = filters
        self.last_conv1, self.last_conv2 = conv(channels, last), conv(last, 1)

    def forward(self, x):
        x = self.conv_layers(x)
        for double, block in zip(self.deconv_layers, self.conv_layers2, strict=True):
            x = double(x)
            x = torch.relu(x + block(x))
        return torch.sigmoid(self.last_conv2(torch.relu(self.last_conv1(x))))[:, 0]


class ScorePredictor(nn.Module):
    def __init__(self, width: int, patches: int, filters=(768, 384, 192, 96, 48, 12), dense=(512, 128)):
        super().__init__()
        steps = []
        for inputs, outputs in zip((width, *filters), filters, strict=False):
            steps += [conv(inputs, outputs), ChannelNorm(outputs), nn.ReLU()]
        self.conv_layers = nn.Sequential(*steps)
        first, second = dense
        self.linear_layers = nn.Sequential(
            *(nn.Linear(filters[-1] * patches, first), nn.ReLU()),
            *(nn.Linear(first, second), nn.ReLU()),
            *(nn.Linear(second, 1), nn.Sigmoid()),
        )

    def forward(self, x):
        return self.linear_layers(self.conv_layers(x).flatten(1))[:, 0]


class Release(nn.Module):
    """The release's network; its parts have the names of the release's state dict."""

    def __init__(self, vit_config, t5_config, variant, heatmap_channels=(), score_channels=()):
        super().__init__()
        width = t5_config.d_model
        self.side = vit_config.image_size // vit_config.patch_size
        self.vit = transformers.ViTModel(vit_config)
        self.t5 = transformers.T5ForConditionalGeneration(t5_config)
        self.visual_token_projection = nn.Linear(vit_config.hidden_size, width)
        heatmap = functools.partial(HeatmapPredictor, width, *heatmap_channels)
        score = functools.partial(ScorePredictor, width, self.side**2, *score_channels)
        self.multi_head = variant == "multi_head"
        if self.multi_head:
            self.heatmap_predictor = nn.ModuleDict({kind: heatmap() for kind in feedback.HEATMAPS})
            self.score_predictor = nn.ModuleDict({kind: score() for kind in feedback.SCORES})
        else:
            self.heatmap_predictor, self.score_predictor = heatmap(), score()

    def encode(self, pixels, tokens):
        """Encodes [1, 3, height, width] and [1, length] to a map [1, embed, rows, columns] and a text."""
        image = self.visual_token_projection(self.vit(pixel_values=pixels).last_hidden_state)
        both = torch.cat([image, self.t5.shared(tokens)], dim=1)
        encoded = self.t5.encoder(inputs_embeds=both).last_hidden_state
        patches = encoded[:, 1 : image.shape[1]]  # without the class token
        feature_map = patches.transpose(1, 2).reshape(1, -1, self.side, self.side)
        return feature_map, BaseModelOutput(last_hidden_state=encoded[:, image.shape[1] :])

    def forward(self, pixels, prompts, target):
        """Predicts for one image, the variant's prompts ([1, length] each) and a target text [1, length]."""
        encoded = [self.encode(pixels, tokens) for tokens in prompts]
        maps = [feature_map for feature_map, _ in encoded]
        if self.multi_head:
            heatmaps = [head(maps[0]) for head in self.heatmap_predictor.values()]
            scores = [head(maps[0]) for head in self.score_predictor.values()]
        else:
            heatmaps = [self.heatmap_predictor(x) for x in maps[:HEATMAPS]]
            scores = [self.score_predictor(x) for x in maps[HEATMAPS : HEATMAPS + SCORES]]
        loss = self.t5(encoder_outputs=encoded[-1][1], labels=target).loss
        return torch.cat(heatmaps), torch.cat(scores), loss

    def write(self, pixels, prompt, length):
        """Decodes greedily; returns the tokens after the first."""
        _, text = self.encode(pixels, prompt)
        return self.t5.generate(encoder_outputs=text, max_new_tokens=length, do_sample=False)[0, 1:]


def published_names(release: Release, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames the ViT's parts: transformers 5 has new names in memory, but those of 4.32 in files."""
    vit = {name.removeprefix("vit."): x for name, x in values.items() if name.startswith("vit.")}
    vit = revert_weight_conversion(release.vit, vit)
    others = {name: x for name, x in values.items() if not name.startswith("vit.")}
    return {f"vit.{name}": x for name, x in vit.items()} | others


def randomise(release: Release) -> None:
    """Makes random parameters, also biases and scales, which would hide a mistake if they were 0 or 1.

    Larger than new weights: or the heads' many layers would leave little of what came in, and every text
    would repeat one token. With this seed the texts differ, and one ends early.
    """
    generator = torch.Generator().manual_seed(35)
    gains = {"heatmap_predictor": 2, "score_predictor": 2, "t5.decoder": 3}
    for name, parameter in release.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "shared" in name or "embeddings" in name or "relative" in name:
            value = noise
        elif parameter.ndim in (2, 4):
            gain = next((gain for part, gain in gains.items() if name.startswith(part)), 1)
            value = gain * noise / parameter[0].numel() ** 0.5
        else:
            value = 0.3 * noise if name.endswith("bias") else 1 + 0.3 * noise
        parameter.data.copy_(value)


def smaller(layers):
    """Replaces every number of channels in a preset's layers, at any depth, by that in `SMALL`."""
    if isinstance(layers, tuple | list):
        return tuple(smaller(layer) for layer in layers)
    return SMALL.get(layers, layers)


def make_model(variant: str, *bindings: str) -> models.RahfModel:
    files = ["models/rahf_pytorch_release.gin", "losses/default.gin"]
    if variant != "multi_head":
        files.insert(1, f"variants/{variant}.gin")
    gin.clear_config()
    gin_utils.parse_gin_flags(gin_utils.DEFAULT_SEARCH_PATHS, files, bindings)
    return gin.get_configurable(models.RahfModel)()


def make_small_model(variant: str) -> models.RahfModel:
    make_model(variant)
    names = ("heatmap_layers", "score_conv_layers", "score_dense_layers")
    heads = {name: gin.query_parameter(f"HeadsConfig.{name}") for name in names}
    bindings = (f"rahf.HeadsConfig.{name} = {smaller(layers)!r}" for name, layers in heads.items())
    return make_model(variant, *OVERLAY, *bindings)


def make_release(variant: str) -> Release:
    release = Release(
        transformers.ViTConfig(**VIT, image_size=48, patch_size=16),
        transformers.T5Config(**T5, dropout_rate=0.0, decoder_start_token_id=0),
        variant,
        heatmap_channels=((16, 10), (16, 10, 10, 6), 6),
        score_channels=((16, 10, 6, 5, 4, 3), (9, 7)),
    ).eval()
    randomise(release)
    return release


def make_inputs(variant: str) -> dict[str, np.ndarray]:
    """Makes a batch with labels; prompts and targets have several lengths and are padded."""
    rng = np.random.default_rng(0)
    prompts = 1 if variant == "multi_head" else HEATMAPS + SCORES + 1
    tokens = rng.integers(2, 40, (BATCH, prompts, LENGTH), dtype=np.int32)
    tokens[np.arange(LENGTH) >= rng.integers(2, LENGTH, (BATCH, prompts, 1))] = 0
    lengths = np.array([3, 5, 2])[:, None, None]
    targets = rng.integers(2, 40, (BATCH, 1, TARGET_LENGTH), dtype=np.int32)
    places = np.arange(TARGET_LENGTH)
    targets = np.where(places < lengths, targets, np.where(places == lengths, 1, 0)).astype(np.int32)
    return {
        "image": rng.integers(0, 256, (BATCH, 48, 48, 3), dtype=np.uint8),
        "encoder_input_tokens": tokens,
        "heatmap_targets": rng.integers(0, 256, (BATCH, HEATMAPS, 48, 48), dtype=np.uint8),
        "heatmap_weights": np.ones((BATCH, HEATMAPS), np.float32),
        "score_targets": rng.random((BATCH, SCORES), dtype=np.float32),
        "score_weights": np.ones((BATCH, SCORES), np.float32),
        "decoder_input_tokens": np.pad(targets[..., :-1], ((0, 0), (0, 0), (1, 0))),
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets > 0).astype(np.float32),
    }


def unpadded(tokens: np.ndarray) -> torch.Tensor:
    """Removes padding: [length] -> [1, shorter length]."""
    return torch.from_numpy(tokens[tokens > 0]).long()[None]


def pixels_of(image: np.ndarray) -> torch.Tensor:
    """Converts uint8 [height, width, 3] as the ViT's image processor: [1, 3, height, width] in [-1, 1]."""
    return ((torch.from_numpy(image).float() / 255 - 0.5) / 0.5).permute(2, 0, 1)[None]


def run_release(release: Release, inputs: dict) -> dict[str, torch.Tensor]:
    """Predicts image by image without padding, because the release doesn't mask it."""
    heatmaps, scores, losses, written = [], [], [], []
    for image, prompts, (target,) in zip(
        inputs["image"], inputs["encoder_input_tokens"], inputs["decoder_target_tokens"], strict=True
    ):
        pixels, prompts = pixels_of(image), [unpadded(tokens) for tokens in prompts]
        outputs = release(pixels, prompts, unpadded(target))
        for outputs_so_far, output in zip((heatmaps, scores, losses), outputs, strict=True):
            outputs_so_far.append(output)
        written.append(release.write(pixels, prompts[-1], TARGET_LENGTH))
    return {
        "heatmaps": torch.stack(heatmaps),
        "scores": torch.stack(scores),
        "losses": torch.stack(losses),
        "tokens": nn.utils.rnn.pad_sequence(written, batch_first=True),
    }


def total_loss(outputs: dict[str, torch.Tensor], inputs: dict) -> torch.Tensor:
    """Computes the loss as `models.RahfModel` does: means over maps, scores and tokens."""
    labels = {name: torch.from_numpy(array) for name, array in inputs.items()}
    tokens = labels["decoder_loss_weights"].sum(dim=(1, 2))
    losses = {
        "heatmap": torch.mean((outputs["heatmaps"] - labels["heatmap_targets"] / 255) ** 2),
        "score": torch.mean((outputs["scores"] - labels["score_targets"]) ** 2),
        "keywords": torch.sum(outputs["losses"] * tokens) / torch.sum(tokens),
    }
    return sum(LOSS_WEIGHTS[kind] * loss for kind, loss in losses.items())


def read_tree(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads the parameters of a file, by their names in our tree."""
    return {name: tensor.read() for name, tensor in rahf_pytorch.open_rahf_pytorch(path).tensors.items()}


def assert_close(ours, theirs, tolerance: float) -> None:
    """Returns the largest difference, relative to the largest value."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Makes, and keeps, what the tests compare: (ours, the release's) predictions, and for the published
    variant loss and gradients."""
    torch.set_num_threads(1)

    @functools.cache
    def make(variant):
        release, inputs, model = make_release(variant), make_inputs(variant), make_small_model(variant)
        folder = tmp_path_factory.mktemp(variant)
        theirs = run_release(release, inputs)
        loss = total_loss(theirs, inputs)
        loss.backward()
        torch.save(published_names(release, release.state_dict()), folder / "rahf_model.pt")
        gradients = {name: x.grad for name, x in release.named_parameters(remove_duplicate=False)}
        gradients |= {name: torch.zeros(()) for name in gradients if name.startswith("vit.pooler")}
        torch.save(published_names(release, gradients), folder / "gradients.pt")
        theirs = {name: x.detach().numpy() for name, x in theirs.items()}
        theirs |= {"loss": loss.item(), "gradients": read_tree(folder / "gradients.pt")}

        params = flax.traverse_util.unflatten_dict(read_tree(folder / "rahf_model.pt"), sep="/")
        ours = dict(jax.jit(model.predict_batch)(params, inputs))
        if variant == "multi_head":
            loss_and_gradients = jax.jit(jax.value_and_grad(model.eval_fn, has_aux=True))
            (ours["loss"], _), gradients = loss_and_gradients(params, inputs)
            ours["gradients"] = flax.traverse_util.flatten_dict(gradients, sep="/")
        return ours, theirs

    return make


@VARIANTS
def test_predictions(both, variant):
    ours, theirs = both(variant)
    for name in ("heatmaps", "scores"):
        assert_close(ours[name], theirs[name], 1e-4)
        # Predictions that are all alike would agree whatever the heads do.
        assert np.ptp(theirs[name]) > 0.3
    np.testing.assert_array_equal(ours["tokens"][:, 0], theirs["tokens"])
    assert len(np.unique(theirs["tokens"])) > 4
    assert len(np.unique(theirs["tokens"], axis=0)) == BATCH
    assert 1 in theirs["tokens"]  # the end of a text


def test_loss(both):
    ours, theirs = both("multi_head")
    assert_close(ours["loss"], theirs["loss"], 1e-4)


def test_gradients(both):
    ours, theirs = (outputs["gradients"] for outputs in both("multi_head"))
    # The class token is a sum of two parameters; each has the sum's gradient.
    theirs = theirs | {"vit/class_token": theirs["vit/class_token"] / 2}
    assert ours.keys() == theirs.keys()
    largest = max(np.abs(gradient).max() for gradient in theirs.values())
    for name, gradient in theirs.items():
        # A key's bias moves all logits alike, so its gradient is 0 except for rounding.
        scale = largest if name.endswith("key/bias") else np.abs(gradient).max()
        assert scale > 0, name
        np.testing.assert_allclose(ours[name], gradient, rtol=0, atol=1e-3 * scale, err_msg=name)


def shapes_only(state: dict[str, torch.Tensor]) -> dict[str, Tensor]:
    def no_values():
        raise AssertionError("the values are of no use here")

    return {name: Tensor(name, tuple(x.shape), np.dtype(np.float32), no_values) for name, x in state.items()}


def parameter_shapes(model: models.RahfModel, pixels: int) -> dict[str, tuple[int, ...]]:
    shapes = {"image": (1, pixels, pixels, 3), "encoder_input_tokens": (1, 1, 4)}
    shapes["decoder_input_tokens"] = (1, 1, 4)
    variables = jax.eval_shape(lambda: model.get_initial_variables(jax.random.key(0), shapes))
    flat = flax.traverse_util.flatten_dict(variables["params"], sep="/")
    return {name: array.shape for name, array in flat.items()}


def test_the_published_sizes_fit_the_preset():
    """Makes ViT-L/16-384, T5-base and the release's heads, without values."""
    vit = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    vit |= {"intermediate_size": 4096, "image_size": 384, "patch_size": 16}
    t5 = {"vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
    with torch.device("meta"):
        release = Release(transformers.ViTConfig(**vit), transformers.T5Config(**t5), "multi_head")
    state = published_names(release, release.state_dict())
    source = rahf_pytorch.map_state("rahf_model.pt", shapes_only(state))
    model = make_model("multi_head")
    ours = parameter_shapes(model, 384)
    assert {name: tensor.shape for name, tensor in source.tensors.items()} == ours
    # Shapes don't show these settings, and a norm's epsilon is too small for outputs to show it.
    configs = {"t5_config": model.module.t5_config, "vit_config": model.module.vit_config}
    assert mapping.check_settings(configs, [source]) == []
    assert source.settings["vit_config.layer_norm_epsilon"] == release.vit.config.layer_norm_eps
    # Every entry is loaded, or is listed as unused.
    used = {name for tensor in source.tensors.values() for name in tensor.origin.split(" + ")}
    assert used.isdisjoint([*source.unused, *source.copies])
    assert {*used, *source.unused, *source.copies} == state.keys()
    assert [*source.unused] == ["vit.pooler.dense.bias", "vit.pooler.dense.weight"]
    for name in source.copies:
        assert release.get_parameter(name) is release.t5.shared.weight


def test_what_is_the_release(tmp_path):
    release = tmp_path / "rahf_model.pt"
    torch.save(make_release("multi_head").state_dict(), release)
    assert rahf_pytorch.is_rahf_pytorch(release)
    other = tmp_path / "other.pt"
    torch.save({"weight": torch.ones(2)}, other)
    text = tmp_path / "text.pt"
    text.write_text("not a file of torch")
    for path in (other, text, tmp_path, tmp_path / "missing.pt"):
        assert not rahf_pytorch.is_rahf_pytorch(path)
    with pytest.raises(ConvertError, match=r"other\.pt: not RAHF's PyTorch release"):
        rahf_pytorch.open_rahf_pytorch(other)
    release.write_bytes(release.read_bytes()[:-100])
    with pytest.raises(ConvertError, match=r"rahf_model\.pt: truncated"):
        rahf_pytorch.is_rahf_pytorch(release)


def without_one(state):
    del state["score_predictor.overall.conv_layers.4.scale"]


def of_another_rank(state):
    state["heatmap_predictor.misalignment.last_conv1.weight"] = torch.ones(2, 2)


def of_no_square(state):
    state["score_predictor.overall.linear_layers.0.weight"] = torch.ones(9, 30)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_one, "has no 'score_predictor.overall.conv_layers.4.scale'"),
        (of_another_rank, r"'heatmap_predictor.misalignment.last_conv1.weight' .* \(2, 2\), expected 4 axes"),
        (of_no_square, "'score_predictor.overall.linear_layers.0' takes 30 values, no square map of 3"),
    ],
)
def test_a_release_that_does_not_fit(tmp_path, change, message):
    release = make_release("multi_head")
    state = published_names(release, release.state_dict())
    change(state)
    torch.save(state, tmp_path / "rahf_model.pt")
    with pytest.raises(ConvertError, match=rf"rahf_model\.pt.*{message}"):
        rahf_pytorch.open_rahf_pytorch(tmp_path / "rahf_model.pt")


def test_the_release_with_a_trainers_prefix(tmp_path):
    release = make_release("multi_head")
    state = published_names(release, release.state_dict())
    torch.save({"state_dict": {f"module._orig_mod.{n}": a for n, a in state.items()}}, tmp_path / "ddp.pt")
    assert rahf_pytorch.is_rahf_pytorch(tmp_path / "ddp.pt")
    opened = rahf_pytorch.open_rahf_pytorch(tmp_path / "ddp.pt")
    torch.save(state, tmp_path / "plain.pt")
    plain = rahf_pytorch.open_rahf_pytorch(tmp_path / "plain.pt")
    assert {n: t.shape for n, t in opened.tensors.items()} == {n: t.shape for n, t in plain.tensors.items()}
    assert opened.note == "all names begin with 'module._orig_mod.', which is taken off"
    assert [*opened.unused] == [f"module._orig_mod.{name}" for name in plain.unused]


def test_a_prefix_that_no_trainer_has_is_named(tmp_path):
    torch.save({"net.visual_token_projection.weight": torch.ones(2, 2)}, tmp_path / "x.pt")
    assert rahf_pytorch.is_rahf_pytorch(tmp_path / "x.pt")
    with pytest.raises(ConvertError, match="but its names begin with 'net.': save"):
        rahf_pytorch.open_rahf_pytorch(tmp_path / "x.pt")


def test_another_token_table_in_the_release_is_refused(tmp_path):
    release = make_release("multi_head")
    state = published_names(release, release.state_dict())
    state["t5.lm_head.weight"] = state["t5.lm_head.weight"] + 1
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ConvertError, match="t5.lm_head.weight .* has other values than t5.shared.weight"):
        mapping.check_copies([rahf_pytorch.open_rahf_pytorch(tmp_path / "x.pt")])
