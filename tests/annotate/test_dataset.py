"""From a project to a finetuned model: the answers become a data set, and training sees what was marked."""

import collections
import contextlib
import json
import pathlib

import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seqio
from PIL import Image

import tasks  # noqa: F401 (registers them)
from richhf_jax import checkpoints, feedback, gin_utils, input_pipeline, train, train_state
from richhf_jax import eval as eval_script
from richhf_jax.annotate import __main__ as command
from richhf_jax.annotate import dataset
from richhf_jax.annotate.store import Store
from richhf_jax.datasets.rich_hf_18k import __main__ as rich_hf_18k
from tasks import vocabulary

SIDE = 16  # pixels
LENGTHS = {"image": SIDE, "inputs": 24, "targets": 24, "heatmaps": 2, "scores": 4, "texts": 1}
RATERS = ("ann", "bob", "cid")
# Names that aren't uids: two of one stem, and one with a space.
NAMES = ("a/0.png", "b/0.png", "no 1.png", *(f"{i}.png" for i in range(2, 17)))
WORDS = ("red", "blue", "green", "old", "tiny")
PROMPTS = {name: f"a {WORDS[i % 5]} cat, {i // 2} dogs" for i, name in enumerate(NAMES)}
SPLITS = {"train": "train", "validation": "dev", "test": "test"}


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as end:
        command.main([str(argument) for argument in arguments])
    return end.value.code


def random_answer(empty: dict, rng) -> dict:
    points = {f"{kind}_points": rng.uniform(0, SIDE - 1, (rng.integers(3), 2)) for kind in feedback.HEATMAPS}
    return {
        **empty,
        **{name: [[round(x, 2), round(y, 2)] for x, y in found] for name, found in points.items()},
        "token_labels": rng.integers(0, 2, len(empty["token_labels"])).tolist(),
        "nothing": dict.fromkeys(empty["nothing"], True),
        "ratings": dict(zip(feedback.SCORES, rng.integers(1, 6, 4).tolist(), strict=True)),
    }


@pytest.fixture
def images(tmp_path, rng) -> pathlib.Path:
    for name, prompt in PROMPTS.items():
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)).save(path)
        path.with_suffix(".txt").write_text(prompt)
    return tmp_path / "images"


@pytest.fixture
def study(tmp_path, images, rng):
    """Makes a project that three raters have finished. Returns its folder and the answers by image."""
    folder, given = tmp_path / "study", {}
    assert run("init", folder, "--images", images, "--link") == 0
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"point_radius": "height/5"}))
    store = Store(folder)
    for name in RATERS:
        person = store.person(store.add_rater(name))
        while work := store.next_item(person):
            answer = random_answer(work.answer, rng)
            store.finish(person, work.item.id, work.revision, answer, 1.0)
            given.setdefault(work.item.id, []).append(answer)
    store.close()
    assert {name: len(answers) for name, answers in given.items()} == dict.fromkeys(NAMES, 3)
    return folder, given


def test_training_sees_what_was_marked(study, images, tmp_path, random_values):
    project, given = study
    out, data_dir = tmp_path / "study_set", tmp_path / "study_data"
    assert run("export", project, out, "--format=dataset") == 0
    rich_hf_18k.main(
        [
            f"--labels={out}",
            f"--images={out}/images",
            f"--prompts={out}/prompts.jsonl",
            f"--data_dir={data_dir}",
        ]
    )
    seqio.set_tfds_data_dir_override(str(data_dir))
    names = {
        row["uid"]: row["id"] for row in map(json.loads, (out / "prompts.jsonl").read_text().splitlines())
    }
    assert sorted(names.values()) == sorted(NAMES)

    splits, maps = collections.defaultdict(set), collections.defaultdict(list)
    for split, short in SPLITS.items():
        cfg = input_pipeline.DatasetConfig("rich_hf_18k_multi_head", LENGTHS, split, 4)
        for examples, batch in input_pipeline.evaluation_batches(cfg, seqio.ShardInfo(0, 1)):
            for row, example in enumerate(examples):
                folder, file = example[feedback.FILENAME_FIELD].decode().split("/")
                assert folder == short
                name = names.pop(file.removesuffix(".png"))
                splits[PROMPTS[name]].add(split)
                check_row({key: value[row] for key, value in batch.items()}, images / name, given[name])
                maps[split].append(heatmap_of(given[name], feedback.IMPLAUSIBILITY) / 255)
    assert not names
    assert {len(found) for found in splits.values()} == {1}

    configure(tmp_path)
    before = initial_checkpoint(tmp_path / "before", random_values)
    gin.get_configurable(train.train)()
    gin.get_configurable(eval_script.evaluate)()
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), before)
    wanted = train_state.InferenceState(shapes)
    trained = checkpoints.restore_inference_state(str(tmp_path / "run"), wanted).params
    # Training began with the checkpoint: the warm-up's first steps change little.
    changes = jax.tree.map(lambda a, b: np.abs(a - b).max(), trained, before)
    assert 0 < max(jax.tree.leaves(changes)) < 1e-4
    # The evaluation's simplest system predicts what was marked in the training images on average.
    folder = tmp_path / "run/inference_eval/rich_hf_18k_multi_head/test/2"
    (baseline,) = json.loads((folder / "baselines.json").read_text()).values()
    errors = np.array(maps["test"]) - np.mean(maps["train"], 0)
    assert baseline["heatmap/mse/implausibility"] == pytest.approx(np.mean(errors**2), rel=1e-5)


def test_the_images_can_be_annotated_again(study, images, tmp_path):
    project, _ = study
    assert run("export", project, tmp_path / "study_set", "--format=dataset") == 0
    assert run("init", tmp_path / "again", "--images", tmp_path / "study_set/prompts.jsonl", "--link") == 0
    stores = [Store(folder) for folder in (project, tmp_path / "again")]
    first, again = ({item.id: item for item in store.items()} for store in stores)
    for store in stores:
        store.close()
    assert first == again
    assert {name: item.prompt for name, item in again.items()} == PROMPTS


def test_what_gives_no_data_set(study, images, tmp_path):
    project, _ = study
    out = tmp_path / "study_set"
    assert "a data set doesn't say who rated" in run("export", project, out, "--format=dataset", "--names")
    (images / "7.png").unlink()
    assert f"a link to {images}/7.png: No such file" in run("export", project, out, "--format=dataset")
    with contextlib.closing(Store(project)) as store:
        for answer in store.answers():
            if dataset.split_of(answer.item.prompt) == "dev":
                store.exclude(answer.id, "a test")
    assert "a split would be empty (10 train, 0 dev, 4 test)" in run(
        "export", project, out, "--format=dataset"
    )
    config = json.loads((project / "config.json").read_text())
    (project / "config.json").write_text(json.dumps(config | {"words": ""}))
    assert "config.json asks only some" in run("export", project, out, "--format=dataset")
    assert not out.exists()


def test_a_prompt_is_in_one_split():
    prompts = [f"a cat, {i} dogs" for i in range(3000)]
    found = [dataset.split_of(prompt) for prompt in prompts]
    # Other capitals and marks are the same words.
    assert [dataset.split_of(f"{prompt.upper()}!") for prompt in prompts] == found
    counts = collections.Counter(found)
    # Four standard deviations of a binomial distribution.
    assert counts["train"] == pytest.approx(2400, abs=88)
    assert counts["dev"] == pytest.approx(300, abs=66)
    # Never to change: a model of an earlier export would know the test images of a later one.
    assert {i: split for i, split in enumerate(found[:24]) if split != "train"} == {1: "test", 10: "dev"}


def configure(folder: pathlib.Path) -> None:
    """Sets what the recipe of docs/annotation.md sets, for a small network."""
    settings = {
        "MODEL_DIR": str(folder / "run"),
        "INITIAL_CHECKPOINT_PATH": str(folder / "before"),
        "TRAIN_STEPS": 2,
        "BATCH_SIZE": 4,
        "EVAL_BATCH_SIZE": 4,
        "EVAL_PERIOD": 2,
        "IMAGE_SIDE": SIDE,
        "VOCABULARY": None,
        "USE_HARDWARE_RNG": True,
    }
    network = {
        "ResNetConfig.depths": (1, 1),
        "ResNetConfig.widths": (8, 16),
        "ResNetConfig.stem_width": 4,
        "ResNetHeadsConfig.heatmap_layers": (("deconv", 8, 3), ("deconv", 4, 3)),
    }
    bindings = [f"{name} = {value!r}" for name, value in {**settings, **network}.items()]
    files = ["experiments/rich_hf_18k.gin", "models/resnet_tiny_heatmaps.gin", "partitioning/cpu.gin"]
    gin_utils.parse_gin_flags(gin_utils.DEFAULT_SEARCH_PATHS, files, bindings)


def initial_checkpoint(folder: pathlib.Path, random_values):
    """Makes a checkpoint to start from. Returns its parameters."""
    model, shapes = gin_utils.macro("MODEL"), {"image": (1, SIDE, SIDE, 3)}
    tree = jax.eval_shape(lambda: model.get_initial_variables(jax.random.key(0), shapes))
    params = jax.tree.map(jnp.asarray, random_values(tree["params"]))
    statistics = jax.tree.map(lambda leaf: 0.5 + jnp.abs(leaf), random_values(tree["batch_stats"]))
    checkpoints.save_params(str(folder), params, flax_mutables={"batch_stats": statistics})
    return params


def heatmap_of(answers, kind: str) -> np.ndarray:
    """Averages the raters' disks of radius height / 5, from each pixel's distance to the points."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    marked = np.zeros((len(answers), SIDE, SIDE), bool)
    for own, answer in zip(marked, answers, strict=True):
        for x, y in answer[f"{kind}_points"]:
            own |= np.hypot(columns - x, rows - y) <= SIDE / 5
    return np.rint(255 * marked.mean(0))


def check_row(features, image: pathlib.Path, answers) -> None:
    """Compares an image's features with what its raters gave."""
    with Image.open(image) as picture:
        np.testing.assert_array_equal(features["image"], np.asarray(picture))
    for heatmap, kind in zip(features["heatmap_targets"], feedback.HEATMAPS, strict=True):
        np.testing.assert_array_equal(heatmap, heatmap_of(answers, kind))
    assert features["heatmap_weights"].tolist() == [1, 1]
    ratings = np.array([[answer["ratings"][kind] for kind in feedback.SCORES] for answer in answers])
    np.testing.assert_allclose(features["score_targets"], ((ratings - 1) / 4).mean(0), rtol=1e-6)
    assert features["score_weights"].tolist() == [1, 1, 1, 1]
    prompt = image.with_suffix(".txt").read_text()
    aligned = np.sum([answer["token_labels"] for answer in answers], 0) >= 2
    words = prompt.replace(",", "").split()
    target = " ".join(word if good else f"{word}_0" for word, good in zip(words, aligned, strict=True))
    assert text_of(features["encoder_input_tokens"][0]) == prompt
    assert text_of(features["decoder_target_tokens"][0]) == target


def text_of(tokens) -> str:
    return vocabulary.get_vocabulary().decode(tokens[tokens > 1].tolist())
