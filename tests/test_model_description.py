"""model.json and vocabulary.model are read as written, and a missing part is named."""

import dataclasses
import json

import pytest

from richhf_jax import errors, feedback, model_description

FILE, VOCABULARY = model_description.FILE, model_description.VOCABULARY_FILE


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fit": None}, "model.json lacks 'fit'"),
        ({"fit": "stretch"}, "makes no sense: fit must be one of .*'stretch'"),
        ({"variant": "two_head"}, "makes no sense: variant must be"),
        ({"feature_lengths": {"image": 32, "inputs": 24}}, "lacks 'targets'"),
        ({"t5_config": {"vocab_size": 8, "depth": 3}}, "unknown 'depth'"),
        ({"vit_config": 3}, "makes no sense"),
    ],
)
def test_an_entry_that_is_missing_or_wrong_is_named(copy, change, message):
    content = json.loads((copy / FILE).read_text()) | change
    (copy / FILE).write_text(
        json.dumps({name: value for name, value in content.items() if value is not None})
    )
    with pytest.raises(errors.UserError, match=message):
        model_description.read(copy)


def test_a_file_that_is_cut_off(copy):
    (copy / FILE).write_text((copy / FILE).read_text()[:100])
    with pytest.raises(errors.UserError, match="makes no sense"):
        model_description.read(copy)
