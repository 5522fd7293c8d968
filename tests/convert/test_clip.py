"""Compares CLIP, as our converter reads it, with transformers and open_clip's layout, and refuses what isn't.

The models are small and random, made and saved by transformers itself.
"""

import functools
import json
import shutil
import types

import gin
import jax
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from flax import traverse_util

from richhf_jax import checkpoints, clip_tokens, errors, gin_utils, model_description, train_state
from richhf_jax.convert import __main__ as command
from richhf_jax.convert import clip as reader
from richhf_jax.convert import mapping
from richhf_jax.convert.source import ConvertError
from richhf_jax.network import clip, grad_cam
from tasks import vocabulary

torch.set_num_threads(1)

VOCAB, LENGTH, SIDE = 774, 16, 24
TEXT = {"vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 3, "max_position_embeddings": LENGTH, "bos_token_id": VOCAB - 2}
TEXT |= {"eos_token_id": VOCAB - 1, "pad_token_id": 0}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
VISION |= {"image_size": SIDE, "patch_size": 4}
BINDINGS = (
    f"IMAGE_SIDE = {SIDE}",
    f"TEXT_LENGTH = {LENGTH}",
    "clip.Clip.projection_dim = 20",
    "clip.TextConfig.emb_dim = 24",
    "clip.TextConfig.num_layers = 2",
    "clip.TextConfig.num_heads = 3",
    "clip.TextConfig.mlp_dim = 40",
    f"clip.TextConfig.max_length = {LENGTH}",
    "clip.VisionConfig.emb_dim = 32",
    "clip.VisionConfig.num_layers = 3",
    "clip.VisionConfig.num_heads = 4",
    "clip.VisionConfig.mlp_dim = 48",
    "clip.VisionConfig.patch_size = 4",
    "clip.VisionConfig.grid = (6, 6)",
)


@functools.cache
def model(activation, end=VOCAB - 1):
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config=TEXT | {"hidden_act": activation, "eos_token_id": end},
        vision_config=VISION | {"hidden_act": activation},
        projection_dim=20,
    )
    made = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        # A scale of one or a bias of zero would hide its misuse.
        for parameter in made.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    return made


@functools.cache
def network(activation, end=None):
    quick = activation == "quick_gelu"
    return clip.Clip(
        clip.TextConfig(24, 2, 3, 40, quick, vocab_size=VOCAB, max_length=LENGTH, end_id=end),
        clip.VisionConfig(32, 3, 4, 48, quick, patch_size=4, grid=(6, 6)),
        projection_dim=20,
    )


@pytest.fixture
def inputs(rng):
    tokens = rng.integers(1, VOCAB - 1, (5, LENGTH))
    ends = rng.integers(2, LENGTH, 5)
    tokens[np.arange(LENGTH) > ends[:, None]] = 0
    tokens[np.arange(5), ends] = VOCAB - 1
    return rng.integers(0, 256, (5, SIDE, SIDE, 3), dtype=np.uint8), tokens


def theirs(made, image, tokens):
    """Runs transformers' model, with the mean and the deviation that are written in its own processor."""
    mean, deviation = transformers.image_utils.OPENAI_CLIP_MEAN, transformers.image_utils.OPENAI_CLIP_STD
    pixels = (torch.tensor(image) / 255 - torch.tensor(mean)) / torch.tensor(deviation)
    return made(input_ids=torch.tensor(tokens), pixel_values=pixels.permute(0, 3, 1, 2))


def params(tensors):
    return traverse_util.unflatten_dict({name: t.read() for name, t in tensors.items()}, sep="/")


@pytest.mark.parametrize(("activation", "end"), [("quick_gelu", 2), ("gelu", VOCAB - 1), ("gelu", 5)])
def test_embeddings_and_similarity_are_those_of_transformers(activation, end, inputs, tmp_path):
    image, tokens = inputs
    if end == 5:  # Not the highest: it is the first of several.
        tokens[:, 1], tokens[:3, 4] = 5, 5
    made = model(activation, end)
    made.save_pretrained(tmp_path)
    source = reader.open_huggingface(str(tmp_path))
    assert not source.unused
    assert source.settings == {
        "text_config.num_heads": 3,
        "vision_config.num_heads": 4,
        **{f"{tower}_config.quick_gelu": activation == "quick_gelu" for tower in ("text", "vision")},
        **{f"{tower}_config.layer_norm_epsilon": 1e-5 for tower in ("text", "vision")},
        "text_config.end_id": 5 if end == 5 else None,
    }
    ours = network(activation, source.settings["text_config.end_id"])
    configs = {name: getattr(ours, name) for name in ("text_config", "vision_config")}
    assert mapping.check_settings(configs, [source]) == []
    found = jax.jit(ours.apply)({"params": params(source.tensors)}, image, tokens)
    with torch.no_grad():
        expected = theirs(made, image, tokens)
    for name, embeddings in (("image", expected.image_embeds), ("text", expected.text_embeds)):
        np.testing.assert_allclose(clip.unit(found[name]), embeddings, atol=1e-5)
    cosines = (expected.image_embeds * expected.text_embeds).sum(-1)
    np.testing.assert_allclose(found["scores"][:, 0], cosines, atol=1e-5)
    logits = np.exp(found["logit_scale"]) * clip.unit(found["image"]) @ clip.unit(found["text"]).T
    np.testing.assert_allclose(logits, expected.logits_per_image, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_grad_cam_is_that_of_hooks_on_transformers(activation, inputs, tmp_path):
    made = model(activation)
    made.save_pretrained(tmp_path)
    # The recipe of pytorch-grad-cam: activations and gradients of the last layer's first norm.
    kept = []
    norm = made.vision_model.encoder.layers[-1].layer_norm1
    hook = norm.register_forward_hook(lambda module, args, output: kept.append(output))
    try:
        outputs = theirs(made, *inputs)
    finally:
        hook.remove()
    cosine = (outputs.image_embeds * outputs.text_embeds).sum()
    (gradient,) = torch.autograd.grad(cosine, kept)
    activations = kept[0][:, 1:].reshape(5, 6, 6, 32).permute(0, 3, 1, 2)
    weights = gradient[:, 1:].reshape(5, 6, 6, 32).permute(0, 3, 1, 2).mean((2, 3), keepdim=True)
    expected = []
    for cam in torch.relu((weights * activations).sum(1)).detach().numpy():
        cam = cam - cam.min()
        expected.append(cam / (cam.max() + 1e-7))
    weights = params(reader.open_huggingface(str(tmp_path)).tensors)
    found = jax.jit(functools.partial(grad_cam.grad_cam, network(activation)))(weights, *inputs)
    np.testing.assert_allclose(found, np.stack(expected), atol=1e-4)


OPEN_CLIP_NAMES = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "text_model.encoder.layers": "transformer.resblocks",
    "vision_model.encoder.layers": "visual.transformer.resblocks",
    "text_model.final_layer_norm": "ln_final",
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.post_layernorm": "visual.ln_post",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm": "ln_",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def as_open_clip(state):
    """Renames transformers' state to open_clip's layout."""
    renamed = {"text_projection": state["text_projection.weight"].T.contiguous()}
    renamed["visual.proj"] = state["visual_projection.weight"].T.contiguous()
    for name, array in state.items():
        if name.endswith("_projection.weight") or ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            array = torch.cat([state[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
            name = name.replace("self_attn.q_proj.", "attn.in_proj_")
        for theirs, opens in OPEN_CLIP_NAMES.items():
            name = name.replace(theirs, opens)
        renamed[name] = array
    return renamed


def write_open_clip(folder, kind):
    state = as_open_clip(model("gelu").state_dict())
    if kind == "safetensors":
        safetensors.torch.save_file(state, folder / "open_clip_model.safetensors")
        return folder
    if kind == "bin":
        torch.save(state, folder / "open_clip_pytorch_model.bin")
        return folder
    # As its own trainer saves it.
    state = {f"module.{name}": array for name, array in state.items()}
    torch.save({"epoch": 3, "state_dict": state}, folder / "epoch_3.pt")
    return folder / "epoch_3.pt"


@pytest.mark.parametrize("kind", ["safetensors", "bin", "pt"])
def test_open_clip_has_the_same_parameters(kind, tmp_path):
    model("gelu").save_pretrained(tmp_path / "theirs")
    expected = reader.open_huggingface(str(tmp_path / "theirs")).tensors
    path = str(write_open_clip(tmp_path, kind))
    assert reader.is_open_clip(path)
    source = command.open_weights(path)
    assert not source.unused
    assert source.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(source.tensors[name].read(), tensor.read(), err_msg=name)
    assert "aren't checked" in source.note


def test_open_clips_configuration_is_checked(tmp_path):
    cfg = {"embed_dim": 20, "vision_cfg": {"head_width": 8}, "text_cfg": {"heads": 3}, "quick_gelu": True}
    write_open_clip(tmp_path, "bin")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg}))
    source = reader.open_open_clip(str(tmp_path))
    configs = {name: getattr(network("gelu"), name) for name in ("text_config", "vision_config")}
    with pytest.raises(ConvertError, match=r"quick_gelu is False in the model, True in .*clip.TextConfig"):
        mapping.check_settings(configs, [source])
    configs = {name: getattr(network("quick_gelu"), name) for name in ("text_config", "vision_config")}
    assert mapping.check_settings(configs, [source]) == []
    of_vision = cfg | {"vision_cfg": {"head_width": 8, "norm_kwargs": {"eps": 1e-6}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": of_vision}))
    with pytest.raises(ConvertError, match=r"give --gin.clip.VisionConfig.layer_norm_epsilon=1e-06"):
        mapping.check_settings(configs, [reader.open_open_clip(str(tmp_path))])
    pixels = {"model_cfg": cfg, "preprocess_cfg": {"mean": list(clip.MEAN), "std": [0.5, 0.5, 0.5]}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(pixels))
    with pytest.raises(ConvertError, match=r"config.json: the weights take pixels of the deviation \[0.5, 0"):
        reader.open_open_clip(str(tmp_path))
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {"text_cfg": 3}}')
    with pytest.raises(ConvertError, match="open_clip_config.json makes no sense"):
        reader.open_open_clip(str(tmp_path))


def test_an_older_configuration_counts_as_in_transformers(tmp_path):
    made = model("gelu", 2)
    made.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    # Both of these are in OpenAI's config.json of ViT-L/14.
    config["text_config_dict"] = {**TEXT, "hidden_act": "gelu", "eos_token_id": 7}
    config["vision_config_dict"] = {**VISION, "hidden_act": "gelu"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    effective = transformers.CLIPConfig.from_pretrained(tmp_path)
    settings = reader.open_huggingface(str(tmp_path)).settings
    assert settings["text_config.end_id"] == effective.text_config.eos_token_id == 7
    assert settings["text_config.num_heads"] == effective.text_config.num_attention_heads


@pytest.fixture
def clip_directory(tmp_path):
    """Saves a CLIP with the small vocabulary in its older form."""
    folder = tmp_path / "clip"
    model("quick_gelu").save_pretrained(folder)
    content = json.loads(clip_tokens.read(vocabulary.SMALL_CLIP).content)["model"]
    (folder / "vocab.json").write_text(json.dumps(content["vocab"]))
    (folder / "merges.txt").write_text("\n".join(map(" ".join, content["merges"])))
    return folder


def configure(preset="clip_score", *bindings):
    gin.clear_config()
    vocab = f"clip.TextConfig.vocab_size = {VOCAB}"
    files = [f"models/{preset}.gin"]
    gin_utils.parse_gin_flags(gin_utils.DEFAULT_SEARCH_PATHS, files, [*BINDINGS, vocab, *bindings])
    return gin_utils.macro("MODEL")


def convert(folder, to, preset="clip_score", *bindings, length=LENGTH):
    made = configure(preset, *bindings)
    lengths = {"image": gin_utils.macro("IMAGE_SIDE"), "inputs": length, "targets": 8}
    fit = gin_utils.macro("FIT")
    description = command.describe(made, [str(folder)], lengths, gin_utils.macro("VOCABULARY"), False, fit)
    command.convert(made, [str(folder)], str(to), description=description)
    return made


@pytest.mark.parametrize("preset", ["clip_score", "pickscore", "clip_finetuned", "clip_gradient"])
def test_the_model_directory_has_all_that_predictions_need(preset, clip_directory, tmp_path, capsys):
    quick = ("QUICK_GELU = True",) if preset == "pickscore" else ()
    made = convert(clip_directory, tmp_path / "to", preset, *quick)
    shown = capsys.readouterr().out
    assert "unused          0 arrays" in shown
    assert ("initialised     0 arrays" in shown) == (preset != "clip_finetuned")
    description = model_description.read(tmp_path / "to")
    assert (description.system, description.network) == (preset, made.module)
    assert description.fit == ("resize" if preset == "clip_gradient" else "centre_crop")
    assert description.model.outputs == made.outputs
    assert description.encoder.content == clip_tokens.read(clip_directory).content
    shapes = command.model_shapes(made)
    wanted = traverse_util.unflatten_dict(
        {
            name: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
            )
            for name, leaf in shapes.items()
            if not name.startswith("score_head")
        },
        sep="/",
    )
    found, _ = checkpoints.restore_matching(str(tmp_path / "to"), train_state.InferenceState(wanted))
    expected = reader.open_huggingface(str(clip_directory)).tensors
    assert {"/".join(name) for name in found} == expected.keys()


def config_with(folder, **changed):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changed))


def without(folder, beginning):
    state = safetensors.torch.load_file(folder / "model.safetensors")
    state = {name: array for name, array in state.items() if not name.startswith(beginning)}
    safetensors.torch.save_file(state, folder / "model.safetensors")


BAD = {
    "text alone": (
        lambda folder: config_with(folder, model_type="clip_text_model"),
        "config.json: the model is CLIP's text tower alone",
    ),
    "vision alone": (
        lambda folder: config_with(folder, model_type="clip_vision_model"),
        "config.json: the model is CLIP's image tower alone",
    ),
    "siglip": (
        lambda folder: config_with(folder, model_type="siglip"),
        "the model is SigLIP, which isn't CLIP",
    ),
    "no text weights": (lambda folder: without(folder, "text_model."), "the weights hold no text tower"),
    "no image weights": (lambda folder: without(folder, "vision_model."), "the weights hold no image tower"),
    "a lost layer": (
        lambda folder: without(folder, "vision_model.encoder.layers.2.mlp.fc1"),
        "the weights lack 2 of the .* vision_model.encoder.layers.2.mlp.fc1",
    ),
    "no class token": (
        lambda folder: without(folder, "vision_model.embeddings.class"),
        "the weights lack vision_model.embeddings.class_embedding",
    ),
    "another activation": (
        lambda folder: config_with(folder, text_config={**TEXT, "hidden_act": "relu"}),
        "hidden_act is 'relu'; our CLIP has 'quick_gelu', 'gelu'",
    ),
    "another vocabulary": (
        lambda folder: shutil.copy(vocabulary.SMALL_MODEL, folder / "tokenizer.json"),
        "tokenizer.json is damaged, or no file of the tokenizers library.*Take the tokenizer.json that was",
    ),
    "no vocabulary": (
        lambda folder: (folder / "vocab.json").unlink(),
        "clip: beside the weights is no tokenizer.json, nor vocab.json and merges.txt.*--gin.VOCABULARY=PATH",
    ),
    "another start": (
        lambda folder: config_with(folder, text_config={**TEXT, "bos_token_id": 5}),
        "vocab.json begins a text with the id 772, but in .*/config.json bos_token_id is 5: .*Take the",
    ),
    "other pixels": (
        lambda folder: (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}'),
        r"preprocessor_config.json: the weights take pixels of the mean \[0.5, 0.5, 0.5\]; our CLIP has Op",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused(name, clip_directory, tmp_path):
    damage, message = BAD[name]
    damage(clip_directory)
    with pytest.raises(errors.UserError, match=message):
        convert(clip_directory, tmp_path / "to")
    assert not (tmp_path / "to").exists()


# Of gin/sizes/clip_tiny.gin, which is for the synthetic data.
SMALL = "VOCABULARY = 'clip_small'"


def other_vocabulary(path):
    """Writes a vocabulary of as many tokens in CLIP's order: two letters change places in all merges."""
    content = json.loads(clip_tokens.read(vocabulary.SMALL_CLIP).content)["model"]
    swap = str.maketrans("xo", "ox")
    merges = [tuple(part.translate(swap) for part in pair) for pair in content["merges"]]
    bytes_ = [*content["vocab"]][:512]
    pieces = [*bytes_, *map("".join, merges), clip_tokens.START, clip_tokens.END]
    path.write_bytes(clip_tokens.build({piece: i for i, piece in enumerate(pieces)}, merges))
    return path


def test_the_weights_own_vocabulary_goes_before_the_one_of_the_gin_file(clip_directory, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        (clip_directory / name).unlink()
    with pytest.raises(errors.UserError, match="beside the weights is no tokenizer.json"):
        convert(clip_directory, tmp_path / "to", "clip_score", SMALL)
    own = other_vocabulary(clip_directory / "tokenizer.json").read_bytes()
    for name, binding in {"with": SMALL, "without": "VOCABULARY = None"}.items():
        convert(clip_directory, tmp_path / name, "clip_score", binding)
        assert (tmp_path / name / "tokenizer.json").read_bytes() == own


def test_a_vocabulary_that_is_no_path(clip_directory, tmp_path):
    with pytest.raises(errors.UserError, match="VOCABULARY = 7 is no text"):
        convert(clip_directory, tmp_path / "to", "clip_score", "VOCABULARY = 7")


def with_rules(source, path, **rules):
    """Writes a tokenizer.json with other rules, which aren't CLIP's."""
    path.write_text(json.dumps(json.loads(source.read_text()) | rules))
    return path


@pytest.mark.parametrize("is_ours", [False, True])
@pytest.mark.parametrize("differs", ["beside", "named"])
def test_rules_of_a_file_change_no_conversion(clip_directory, tmp_path, is_ours, differs):
    named = tmp_path / "named.json"
    own = other_vocabulary(clip_directory / "tokenizer.json")
    for name in ("vocab.json", "merges.txt"):
        (clip_directory / name).unlink()
    expected = own.read_bytes()
    shutil.copy(own, named)
    folder = clip_directory
    if is_ours:
        convert(clip_directory, folder := tmp_path / "first")
        content = json.loads((folder / "model.json").read_text())
        content.pop("checksums")
        (folder / "model.json").write_text(json.dumps(content))
    changed = folder / "tokenizer.json" if differs == "beside" else named
    with_rules(changed, changed, normalizer=None, added_tokens=[])
    convert(folder, tmp_path / "to", "clip_score", f"VOCABULARY = '{named}'")
    assert (tmp_path / "to/tokenizer.json").read_bytes() == expected
    shutil.copy(vocabulary.SMALL_CLIP, named)
    with pytest.raises(errors.UserError, match="named.json isn't the vocabulary of the weights"):
        convert(folder, tmp_path / "not", "clip_score", f"VOCABULARY = '{named}'")


def test_a_forgotten_size_is_named(clip_directory, tmp_path, monkeypatch):
    flags = {"_FROM": [str(clip_directory)], "_TO": str(tmp_path / "to"), "_TEXT_LENGTH": None}
    flags |= {"_FORMAT": "orbax", "_ALLOW_MISMATCHED_SHAPES": False}
    for name, value in flags.items():
        monkeypatch.setattr(command, name, types.SimpleNamespace(value=value))
    monkeypatch.setattr(gin_utils, "configure", lambda gin_files: gin_files)
    monkeypatch.setattr(gin_utils, "given_flags", lambda gin_files: "")
    configure("clip_score", "clip.TextConfig.vocab_size = 800")
    message = "clip is of another size: it has 774 tokens, the model 800. Give the gin file of its size"
    with pytest.raises(errors.UserError, match=message):
        command.main()
    monkeypatch.setattr(command, "_ALLOW_MISMATCHED_SHAPES", types.SimpleNamespace(value=True))
    with pytest.raises(errors.UserError, match="vocab.json has 774 tokens, the model 800"):
        command.main()


def test_a_vocabulary_that_is_named(clip_directory, tmp_path):
    # The same one in another form is none; another one is.
    convert(clip_directory, tmp_path / "same", "clip_score", f"VOCABULARY = '{vocabulary.SMALL_CLIP}'")
    other = other_vocabulary(tmp_path / "other.json")
    with pytest.raises(
        errors.UserError, match="other.json isn't the vocabulary of the weights, .*vocab.json"
    ):
        convert(clip_directory, tmp_path / "to", "clip_score", f"VOCABULARY = '{other}'")
    (clip_directory / "vocab.json").unlink()
    convert(clip_directory, tmp_path / "named", "clip_score", f"VOCABULARY = '{other}'")
    assert (tmp_path / "named/tokenizer.json").read_bytes() == other.read_bytes()


def test_a_checkpoint_of_ours_keeps_its_vocabulary(clip_directory, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        (clip_directory / name).unlink()
    own = other_vocabulary(clip_directory / "tokenizer.json").read_bytes()
    first = tmp_path / "first"
    convert(clip_directory, first)
    for place in (first, first / "checkpoint_0"):
        to = tmp_path / f"of_{place.name}"
        convert(place, to, "clip_score", SMALL)
        assert (to / "tokenizer.json").read_bytes() == own
    shutil.copy(vocabulary.SMALL_CLIP, first / "tokenizer.json")
    message = "tokenizer.json isn't the vocabulary that came with the model.*or convert the weights again"
    with pytest.raises(errors.UserError, match=message):
        convert(first, tmp_path / "to", "clip_score", SMALL)
    (first / "tokenizer.json").unlink()
    with pytest.raises(errors.UserError, match="has no tokenizer.json: .*or convert the weights again"):
        convert(first, tmp_path / "to", "clip_score", f"VOCABULARY = '{vocabulary.SMALL_CLIP}'")


def test_older_configurations_have_other_ids_than_the_vocabulary(clip_directory, tmp_path):
    # As in OpenAI's and PickScore's, where they mean nothing.
    older = {**TEXT, "hidden_act": "quick_gelu", "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    config_with(clip_directory, text_config=older)
    convert(clip_directory, tmp_path / "to")
    assert model_description.read(tmp_path / "to").encoder.start_id == VOCAB - 2


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("clip.Clip.projection_dim = 24", r"image_projection/kernel: \(32, 24\) in the model, \(32, 20\) in"),
        ("QUICK_GELU = False", "quick_gelu is False in the model, True in"),
        ("clip.VisionConfig.num_heads = 8", "num_heads is 8 in the model, 4 in"),
        ("clip.TextConfig.layer_norm_epsilon = 1e-6", r"epsilon is 1e-06 in the model, 1e-05 .*clip.TextC"),
        ("clip.VisionConfig.layer_norm_epsilon = 1e-6", r"give --gin.clip.VisionConfig.layer_norm_eps"),
        (
            "clip.TextConfig.vocab_size = 800",
            "vocab.json has 774 tokens, the model 800: it is another",
        ),
        ("clip.TextConfig.max_length = 20", r"text/position_embedding/embedding: \(20, 24\) in the model"),
    ],
)
def test_a_model_that_does_not_fit(binding, message, clip_directory, tmp_path):
    with pytest.raises(errors.UserError, match=message):
        convert(clip_directory, tmp_path / "to", "clip_score", binding)
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize(
    ("preset", "bindings", "length", "message"),
    [
        (
            "clip_score",
            (),
            LENGTH + 1,
            f"is {LENGTH + 1}, but .* has {LENGTH} rows.*--gin.TEXT_LENGTH={LENGTH}",
        ),
        (
            "clip_score",
            ("FIT = 'banana'",),
            LENGTH,
            "fit must be 'resize' or 'letterbox' or 'centre_crop', got",
        ),
        ("clip_gradient", ("FIT = 'centre_crop'",), LENGTH, "the model predicts heatmaps, but crops"),
        ("clip_score", ("clip.VisionConfig.grid = (5, 5)",), LENGTH, "--gin.IMAGE_SIDE=20"),
    ],
)
def test_what_predictions_would_refuse_is_refused_before(
    preset, bindings, length, message, clip_directory, tmp_path
):
    with pytest.raises(errors.UserError, match=message):
        convert(clip_directory, tmp_path / "to", preset, *bindings, length=length)
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize(
    ("preset", "fit", "noted"),
    [
        ("clip_score", "letterbox", True),
        ("clip_score", "centre_crop", False),
        ("clip_gradient", "letterbox", False),
    ],
)
def test_pictures_that_are_fitted_in_another_way_are_noted(
    preset, fit, noted, clip_directory, tmp_path, capsys
):
    convert(clip_directory, tmp_path / "to", preset, f"FIT = '{fit}'")
    assert ("note: FIT is 'letterbox', but " in capsys.readouterr().out) == noted


def test_images_of_another_size_resample_the_image_towers_positions_alone(clip_directory, tmp_path, capsys):
    convert(
        clip_directory, tmp_path / "to", "clip_score", "clip.VisionConfig.grid = (3, 3)", "IMAGE_SIDE = 12"
    )
    assert "resampled       1 arrays" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state | {"logit_bias": torch.zeros(())}, "the model is SigLIP, which isn't CLIP"),
        (
            lambda state: state | {"text.ln_final.weight": torch.zeros(3)},
            "text tower is that of a CustomTextCLIP",
        ),
        (
            lambda state: {name: x for name, x in state.items() if name.startswith("visual")},
            "the weights hold no text tower",
        ),
        (
            lambda state: {name: x for name, x in state.items() if not name.startswith("visual")},
            "the weights hold no image tower",
        ),
        (
            lambda state: state | {"visual.layer1.0.conv1.weight": torch.zeros(3)},
            "its image tower is a ResNet; our CLIP's is a ViT",
        ),
        (
            lambda state: state | {"transformer.resblocks.0.attn.in_proj_weight": torch.zeros(5, 3)},
            r"in_proj_weight has shape \(5, 3\), no query, key and value",
        ),
    ],
)
def test_what_is_refused_of_open_clip(change, message, tmp_path):
    torch.save(change(as_open_clip(model("gelu").state_dict())), tmp_path / "weights.pt")
    with pytest.raises(ConvertError, match=message):
        command.open_weights(str(tmp_path / "weights.pt"))


def test_the_default_model_for_clip(clip_directory):
    assert command.default_gin_file([str(clip_directory)]) == "models/clip_score.gin"
