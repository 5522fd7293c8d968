"""model.json and vocabulary.model are read as written; what is missing, damaged or another's is named."""

import dataclasses
import json
import math
import os
import pathlib

import pytest

from richhf_jax import clip_tokens, errors, feedback, model_description
from tasks import vocabulary

FILE, VOCABULARY = model_description.FILE, model_description.VOCABULARY_FILE
CLIP = clip_tokens.FILE


@pytest.fixture
def copy(model_dir, tmp_path):
    for name in (FILE, VOCABULARY):
        (tmp_path / name).write_bytes((model_dir / name).read_bytes())
    return tmp_path


@pytest.mark.parametrize("variant", feedback.VARIANTS)
def test_what_is_written_is_read(make_model_dir, tmp_path, variant):
    first = model_description.read(make_model_dir(variant, fit="letterbox"))
    assert (first.network.variant, first.fit) == (variant, "letterbox")
    assert hash(first.network.t5_config)  # jit wants it so.
    first.write(tmp_path)
    assert model_description.read(tmp_path) == first


def test_another_type_of_activations(model_dir):
    network = model_description.read(model_dir, "bfloat16").network
    assert (network.t5_config.dtype, network.vit_config.dtype) == ("bfloat16", "bfloat16")
    assert model_description.read(model_dir).network.t5_config.dtype == "float32"


def test_a_kernel_of_attention_binds_no_file_to_a_device(copy):
    description = model_description.read(copy)
    assert description.network.vit_config.attention_kernel == "auto"
    network = description.network.with_attention_kernel("cudnn")
    other = dataclasses.replace(description, network=network)
    assert other.checksum() == description.checksum()
    other.write(copy)
    assert model_description.read(copy) == description
    # Who wants another one writes it into the file.
    content = json.loads((copy / FILE).read_text())
    del content["checksums"]
    content["vit_config"]["attention_kernel"] = content["t5_config"]["attention_kernel"] = "xla"
    (copy / FILE).write_text(json.dumps(content))
    assert model_description.read(copy).network == description.network.with_attention_kernel("xla")


def test_stochastic_depth_is_of_training_alone(copy):
    description = model_description.read(copy)
    network = description.network
    configs = {name: getattr(network, name) for name in ("t5_config", "vit_config")}
    trained = network.clone(**{name: one.replace(stochastic_depth_rate=0.2) for name, one in configs.items()})
    assert dataclasses.replace(description, network=trained).checksum() == description.checksum()


def test_a_description_without_vocabulary_writes_none(model_dir, tmp_path):
    dataclasses.replace(model_description.read(model_dir), vocabulary=None).write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


@pytest.mark.parametrize(
    ("name", "message"),
    [(FILE, f"has no {FILE}.*training's command"), (VOCABULARY, f"has no {VOCABULARY}: copy the")],
)
def test_a_missing_file_is_named(copy, name, message):
    (copy / name).unlink()
    with pytest.raises(errors.UserError, match=message):
        model_description.read(copy)


@pytest.mark.parametrize("name", [FILE, VOCABULARY])
@pytest.mark.parametrize(
    ("maker", "fix"),
    [
        ("train_log", "or give the training's command again"),
        ("conversion.txt", "or convert the weights again, to a new directory"),
        ("SHA256SUMS", "or export the checkpoint again, to a new directory"),
    ],
)
def test_the_fix_is_that_of_the_directorys_maker(copy, name, maker, fix):
    (copy / maker).touch()
    (copy / name).write_bytes((copy / name).read_bytes()[:-9])
    for _ in range(2):
        with pytest.raises(errors.UserError, match=f"{name}.* copy.*; {fix}"):
            model_description.read(copy)
        (copy / name).unlink(missing_ok=True)


def test_a_vocabulary_without_the_rest_of_the_description(copy):
    own = (copy / VOCABULARY).read_bytes()
    assert model_description.read_vocabulary(copy, VOCABULARY) == own
    assert model_description.read_vocabulary(copy, "tokenizer.json") is None
    assert model_description.read_vocabulary(copy / "nowhere", VOCABULARY) is None
    (copy / VOCABULARY).write_bytes(own[:-1])
    with pytest.raises(errors.UserError, match="isn't the vocabulary that came with the model"):
        model_description.read_vocabulary(copy, VOCABULARY)
    (copy / VOCABULARY).unlink()
    with pytest.raises(errors.UserError, match=f"has no {VOCABULARY}: copy the model's"):
        model_description.read_vocabulary(copy, VOCABULARY)
    content = json.loads((copy / FILE).read_text())
    del content["checksums"]
    (copy / FILE).write_text(json.dumps(content))
    assert model_description.read_vocabulary(copy, VOCABULARY) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fit": None}, "model.json lacks 'fit'"),
        (
            {"fit": "stretch"},
            "makes no sense: fit must be 'resize' or 'letterbox' or 'centre_crop', got .*'stretch'",
        ),
        ({"variant": "two_head"}, "makes no sense: variant must be"),
        ({"feature_lengths": {"image": 32, "inputs": 24}}, "lacks 'targets'"),
        ({"t5_config": {"vocab_size": 8, "depth": 3}}, "unknown 'depth'"),
        ({"vit_config": 3}, "makes no sense"),
        ({"training": ["task"]}, "makes no sense: training must be a dictionary"),
    ],
)
def test_an_entry_that_is_missing_or_wrong_is_named(copy, change, message):
    content = json.loads((copy / FILE).read_text()) | change | {"checksums": None}
    (copy / FILE).write_text(
        json.dumps({name: value for name, value in content.items() if value is not None})
    )
    with pytest.raises(errors.UserError, match=message):
        model_description.read(copy)


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("t5_config.num_encoder_layers", 10**9, "must be a whole number from 1 to 1000, got 1000000000"),
        ("t5_config.emb_dim", "9", "must be a whole number from 1 to 1048576, got the text '9'"),
        ("t5_config.num_heads", 0, "must be a whole number from 1 to 1048576, got 0"),
        ("t5_config.dropout_rate", 7, "must be a number from 0 to below 1, got 7"),
        ("t5_config.dtype", "int8", "must be 'float32' or 'bfloat16' or 'float16', got the text 'int8'"),
        ("t5_config.dtype", 3, "must be 'float32' or"),
        ("t5_config.mlp_activations", "relu", "must be a tuple, got the text 'relu'"),
        ("vit_config.patch_size", 0, "must be a whole number from 1"),
        ("vit_config.grid", [4], "must be a tuple of 2, got"),
        ("vit_config.stem_filters", [-1], "must be a whole number from 1"),
        ("heads_config.score_dense_layers", None, "must be a tuple, got None"),
        ("feature_lengths.inputs", 10**9, "must be a whole number from 2 to 65536, got 1000000000"),
        ("feature_lengths.image", -64, "must be a whole number from 1 to 8192, got -64"),
        ("feature_lengths.targets", 8.5, "must be a whole number from 2 to 65536, got 8.5"),
        ("misalignment_threshold", "nan", "must be a number from 0 to 1, got the text 'nan'"),
        ("misalignment_threshold", math.nan, "must be a number from 0 to 1, got nan"),
        ("vit_config.attention_kernel", "flash", "must be 'auto' or 'xla' or 'cudnn', got the text 'flash'"),
        ("decoder_sees_image", 1, "must be True or False, got 1"),
        ("fit", None, "must be 'resize' or 'letterbox' or 'centre_crop', got None"),
    ],
)
def test_a_value_of_another_type_or_out_of_range_is_named(copy, entry, value, message):
    content = json.loads((copy / FILE).read_text())
    del content["checksums"]
    *folder, name = entry.split(".")
    (content[folder[0]] if folder else content)[name] = value
    (copy / FILE).write_text(json.dumps(content))
    with pytest.raises(errors.UserError, match=f"{FILE} makes no sense: (feature_lengths|{entry}) {message}"):
        model_description.read(copy)


def test_an_encoder_of_too_many_tokens(copy):
    content = json.loads((copy / FILE).read_text())
    del content["checksums"]
    content["feature_lengths"]["image"] = 8192
    (copy / FILE).write_text(json.dumps(content))
    with pytest.raises(errors.UserError, match="makes no sense: an image and its text have .* are the most"):
        model_description.read(copy)


def test_a_file_that_is_cut_off(copy):
    (copy / FILE).write_text((copy / FILE).read_text()[:100])
    with pytest.raises(errors.UserError, match="makes no sense"):
        model_description.read(copy)


def test_a_changed_entry_is_refused_until_the_change_is_meant(copy):
    content = json.loads((copy / FILE).read_text()) | {"misalignment_threshold": 0.25}
    (copy / FILE).write_text(json.dumps(content))
    with pytest.raises(errors.UserError, match=f"{copy}/{FILE} isn't as it was.*remove the entry \"checks"):
        model_description.read(copy)
    del content["checksums"]
    (copy / FILE).write_text(json.dumps(content))
    assert model_description.read(copy).misalignment_threshold == 0.25


def test_another_layout_of_the_text_is_no_change(copy):
    (copy / FILE).write_text(json.dumps(json.loads((copy / FILE).read_text()), sort_keys=True))
    model_description.read(copy)


def test_another_vocabulary_is_refused_until_the_change_is_meant(copy):
    (copy / VOCABULARY).write_bytes((copy / VOCABULARY).read_bytes() + b"\0")
    with pytest.raises(errors.UserError, match=f"{copy}/{VOCABULARY} isn't the vocabulary that.*remove the"):
        model_description.read(copy)
    content = json.loads((copy / FILE).read_text())
    del content["checksums"]
    (copy / FILE).write_text(json.dumps(content))
    model_description.read(copy)


def test_data_must_have_the_vocabulary_of_the_training(copy):
    own = (copy / VOCABULARY).read_bytes()

    def check(vocabulary):
        model_description.check_vocabulary(copy, vocabulary, "Do this")

    check(own)
    check(None)
    with pytest.raises(errors.UserError, match=f"data's vocabulary isn't {copy}/{VOCABULARY}, .* Do this"):
        check(own + b"\0")
    (copy / VOCABULARY).write_bytes(own[:-1])  # model.json knows the right one.
    check(own)
    with pytest.raises(errors.UserError, match="data's vocabulary isn't"):
        check(own[:-1])
    (copy / FILE).write_text("{")
    check(own[:-1])
    with pytest.raises(errors.UserError, match="data's vocabulary isn't"):
        check(own)
    (copy / VOCABULARY).unlink()
    check(own)


def test_data_of_clip_may_have_the_vocabulary_written_in_another_way(tmp_path):
    data = pathlib.Path(vocabulary.SMALL_CLIP).read_bytes()
    (tmp_path / CLIP).write_text(json.dumps(json.loads(data), indent=2))
    assert (tmp_path / CLIP).read_bytes() != data
    model_description.check_vocabulary(tmp_path, data, "Do this")
    content = json.loads(data)
    content["model"]["vocab"]["more"] = 774
    other = clip_tokens.ClipTokens(json.dumps(content).encode()).content
    with pytest.raises(errors.UserError, match=f"data's vocabulary isn't {tmp_path}/{CLIP}, .* Do this"):
        model_description.check_vocabulary(tmp_path, other, "Do this")


def test_each_flipped_bit_of_the_description_is_seen(copy):
    text = (copy / FILE).read_bytes()
    whole, wrong = model_description.read(copy), []
    for bit in range(3, len(text) * 8, 97):  # 97 is prime: every kind of bit comes.
        flipped = bytearray(text)
        flipped[bit // 8] ^= 1 << bit % 8
        (copy / FILE).write_bytes(flipped)
        found = read_or_message(copy)
        if found != whole and str(copy / FILE) not in str(found):
            wrong.append((bit, found))
    assert wrong == []


def read_or_message(directory):
    try:
        return model_description.read(directory)
    except errors.UserError as error:
        return str(error)


def test_json_nested_without_end(copy):
    (copy / FILE).write_text("[" * 100_000)
    with pytest.raises(errors.UserError, match=f"{FILE} makes no sense: .* nested more than 200 deep"):
        model_description.read(copy)


@pytest.mark.parametrize("name", [FILE, VOCABULARY])
def test_a_pipe_and_a_device_are_named_and_not_read(copy, name):
    (copy / name).unlink()
    os.mkfifo(copy / name)
    with pytest.raises(errors.UserError, match=f"{copy}/{name} is a named pipe: a regular file"):
        model_description.read(copy)
    (copy / name).unlink()
    (copy / name).symlink_to("/dev/zero")
    with pytest.raises(errors.UserError, match=f"{copy}/{name} is a device: a regular file"):
        model_description.read(copy)


def test_a_file_without_end(copy):
    with (copy / FILE).open("r+") as file:
        file.truncate(2**40)
    with pytest.raises(errors.UserError, match=f"{copy}/{FILE} is larger than"):
        model_description.read(copy)


@pytest.fixture
def calibrated(make_model_dir):
    """Makes a MODEL_DIR of a model with uncertainties that are calibrated for step 7."""
    directory = make_model_dir(uncertainty=True)
    description = model_description.read(directory)
    factors = dict(zip(feedback.SCORES, (0.5, 1.0, 1.5, 2.0), strict=True))
    calibration = model_description.Calibration(7, factors, "task", "validation", 500)
    dataclasses.replace(description, calibration=calibration).write(directory)
    return directory


def test_a_calibration_is_kept_and_belongs_to_one_step(calibrated, tmp_path):
    found = model_description.read(calibrated)
    assert found.deviation_factors == dict(zip(feedback.SCORES, (0.5, 1.0, 1.5, 2.0), strict=True))
    assert found.not_calibrated == ""
    found.write(tmp_path)
    assert model_description.read(tmp_path) == found == found.of_step(7)
    other = found.of_step(8)
    assert set(other.deviation_factors.values()) == {1.0}
    assert "python -m richhf_jax.calibrate" in other.not_calibrated
    # Predictions depend on it, so runs must not mix.
    assert found.checksum() != other.checksum()


def test_a_description_without_uncertainty_is_as_before(model_dir):
    content = json.loads((model_dir / "model.json").read_text())
    assert "calibration" not in content
    assert "score_variance" not in content["heads_config"]
    assert model_description.read(model_dir).not_calibrated == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": "7"}, "calibration.step must be a whole number, got the text '7'"),
        ({"deviation_factors": {"overall": 1.0}}, "deviation_factors must have plausibility, alignment,"),
        (
            {"deviation_factors": dict.fromkeys(feedback.SCORES, 0)},
            "calibration.deviation_factors must be a number above 0, got 0",
        ),
        ({"more": 1}, "unexpected keyword argument 'more'"),
    ],
)
def test_a_calibration_that_is_wrong_is_named(calibrated, change, message):
    path = calibrated / "model.json"
    content = json.loads(path.read_text())
    del content["checksums"]
    path.write_text(json.dumps(content | {"calibration": content["calibration"] | change}))
    with pytest.raises(errors.UserError, match=f"model.json makes no sense: .*{message}"):
        model_description.read(calibrated)


def test_a_changed_factor_is_refused(calibrated):
    path = calibrated / "model.json"
    path.write_text(path.read_text().replace('"overall": 2.0', '"overall": 1.0'))
    with pytest.raises(errors.UserError, match="isn't as it was written: its checksum differs"):
        model_description.read(calibrated)
