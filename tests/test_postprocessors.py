import numpy as np
import pytest

from richhf_jax import errors, feedback, postprocessors


def task_example(**changes):
    return {
        "heatmaps": np.stack([np.full((2, 2), 255, np.uint8), np.full((2, 2), 51, np.uint8)]),
        "heatmap_weights": np.float32([1, 1]),
        "scores": np.float32([0, 0.25, 0.5, 1]),
        "score_weights": np.float32([1, 1, 1, 1]),
        feedback.FILENAME_FIELD: b"train/1.png",
        feedback.PROMPT_FIELD: "a café, blue".encode(),
        feedback.KEYWORDS_FIELD: b"1 0 1",
        **changes,
    }


def test_target():
    target = postprocessors.rich_feedback(None, task_example(), is_target=True)
    assert target.id == "train/1.png"
    assert target.prompt == "a café, blue"
    assert target.scores == {"plausibility": 0.0, "alignment": 0.25, "aesthetics": 0.5, "overall": 1.0}
    np.testing.assert_array_equal(target.heatmaps["implausibility"], np.ones((2, 2), np.float32))
    np.testing.assert_allclose(target.heatmaps["misalignment"], 0.2, rtol=1e-6)
    assert target.heatmaps["misalignment"].dtype == np.float32
    assert [(t.text, t.misaligned) for t in target.tokens] == [("a", False), ("café", True), ("blue", False)]


def test_kinds_without_label_are_absent():
    target = postprocessors.target(
        task_example(heatmap_weights=np.float32([0, 1]), score_weights=np.float32([1, 1, 0, 1]))
    )
    assert target.heatmaps.keys() == {"misalignment"}
    assert target.scores.keys() == {"plausibility", "alignment", "overall"}


def test_labels_that_do_not_fit_leave_no_tokens_and_are_named(caplog):
    fields = {feedback.KEYWORDS_FIELD: b"1 0", feedback.FILENAME_FIELD: b"train/1\x1b[31m.png"}
    target = postprocessors.target(task_example(**fields))
    assert target.tokens == ()
    assert r"train/1\x1b[31m.png: the prompt has 3 tokens but there are 2 labels" in caplog.text


def test_output_of_a_model_is_left_as_it_is():
    output = object()
    assert postprocessors.rich_feedback(output, task_example(), is_target=False) is output


def test_prediction():
    tokens = [
        feedback.Token("a", False, 0.1),
        feedback.Token("café", True, 0.9),
        feedback.Token("blue", False),
    ]
    prediction = postprocessors.prediction(
        task_example(), np.full((2, 2, 2), 0.5), np.float32([0.1, 0.2, 0.3, 0.4]), tokens
    )
    assert prediction.id == "train/1.png"
    assert prediction.prompt == "a café, blue"
    assert prediction.labels == [1, 0, 1]
    assert prediction.to_dict()["tokens"][1] == {"text": "café", "misaligned": True, "probability": 0.9}
    assert list(prediction.scores) == list(feedback.SCORES)
    assert prediction.heatmaps["misalignment"].shape == (2, 2)


@pytest.mark.parametrize(("output", "value"), [("heatmaps", np.nan), ("scores", np.inf)])
def test_outputs_that_are_not_finite_are_no_prediction(output, value):
    outputs = {"heatmaps": np.full((2, 2, 2), 0.5), "scores": np.zeros(4)}
    outputs[output].flat[1] = value
    with pytest.raises(errors.NotFiniteError, match=rf"^the model's {output} aren't finite numbers"):
        postprocessors.prediction(task_example(), **outputs, tokens=())


def test_padding_of_a_letterbox_is_no_part_of_the_heatmaps():
    pixels = np.arange(32, dtype=np.uint8).reshape(2, 4, 4)
    example = task_example(heatmaps=pixels, image_box=np.int32([1, 0, 3, 4]))
    target = postprocessors.target(example)
    np.testing.assert_allclose(target.heatmaps["misalignment"] * 255, pixels[1, 1:3], rtol=1e-6)
    prediction = postprocessors.prediction(example, pixels / 255, np.zeros(4), ())
    assert prediction.heatmaps.keys() == target.heatmaps.keys()
    for kind, heatmap in prediction.heatmaps.items():
        assert heatmap.dtype == np.float32
        np.testing.assert_allclose(heatmap, target.heatmaps[kind], rtol=1e-6)


def test_a_freely_written_text_labels_the_prompts_tokens():
    tokens = postprocessors.written_tokens("a café, blue", "a cafe_0 blue")
    assert tokens == (feedback.Token("a", False), feedback.Token("café", True), feedback.Token("blue", False))
