"""From a project to a finetuned model: the answers become a data set, and training sees what was marked."""

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
from richhf_jax import checkpoints, errors, feedback, gin_utils, input_pipeline, train
from richhf_jax.annotate import __main__ as command
from richhf_jax.annotate import dataset
from richhf_jax.annotate.store import Store
from richhf_jax.datasets.rich_hf_18k import __main__ as rich_hf_18k
from tasks import vocabulary

SIDE = 16  # pixels
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
        [f"--labels={out}", f"--images={out}/images", f"--prompts={out}/prompts.jsonl", f"--data_dir={data_dir}"]
    )
    seqio.set_tfds_data_dir_override(str(data_dir))
    names = {row["uid"]: row["image"] for row in map(json.loads, (out / "prompts.jsonl").read_text().splitlines())}
    assert sorted(names.values()) == sorted(NAMES)

    configure(tmp_path)
    prompts = {}
    for split, short in SPLITS.items():
        with gin.config_scope("train"):
            cfg = gin.get_configurable(input_pipeline.DatasetConfig)(split=split)
        for examples, batch in input_pipeline.evaluation_batches(cfg, seqio.ShardInfo(0, 1)):
            for row, example in enumerate(examples):
                folder, file = example[feedback.FILENAME_FIELD].decode().split("/")
                assert folder == short
                name = names.pop(file.removesuffix(".png"))
                prompts[PROMPTS[name]] = short
                check_row({key: value[row] for key, value in batch.items()}, images / name, given[name])
    assert not names
    assert set(prompts.values()) == set(SPLITS.values())

    params = initial_checkpoint(tmp_path / "before", random_values)
    gin.get_configurable(train.train)()
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), params)
    trained = checkpoints.restore_params(str(tmp_path / "run"), shapes)
    # Two steps of the warm-up change little: training began with the checkpoint.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), trained, params)
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), trained, params)))


def configure(folder: pathlib.Path) -> None:
    """Sets what the recipe of docs/annotation.md sets, for the smallest network."""
    settings = {
        "MODEL_DIR": str(folder / "run"),
        "INITIAL_CHECKPOINT_PATH": str(folder / "before"),
        "TRAIN_STEPS": 2,
        "BATCH_SIZE": 4,
        "EVAL_PERIOD": 2,
        "AUGMENT": False,
        "TEXT_LENGTH": 24,
        "TARGET_LENGTH": 24,
        "SCAN_LAYERS": False,
        "VOCABULARY": None,
    }
    paths = [str(pathlib.Path(__file__).parents[1]), *gin_utils.DEFAULT_SEARCH_PATHS]
    bindings = [f"{name} = {value!r}" for name, value in settings.items()]
    files = ["experiments/rich_hf_18k.gin", "small.gin", "partitioning/cpu.gin"]
    gin_utils.parse_gin_flags(paths, files, [*bindings, "T5Config.vocab_size = 512"])


def initial_checkpoint(folder: pathlib.Path, random_values):
    model = gin_utils.macro("MODEL")
    shapes = {"image": (1, SIDE, SIDE, 3)}
    shapes |= dict.fromkeys(("encoder_input_tokens", "decoder_input_tokens"), (1, 1, 24))
    tree = jax.eval_shape(lambda: model.get_initial_variables(jax.random.key(0), shapes))
    params = jax.tree.map(jnp.asarray, random_values(tree["params"]))
    checkpoints.save_params(str(folder), params)
    return params


def check_row(features, image: pathlib.Path, answers) -> None:
    """Compares an image's features with what its raters gave."""
    with Image.open(image) as picture:
        np.testing.assert_array_equal(features["image"], np.asarray(picture))
    rows, columns = np.mgrid[:SIDE, :SIDE]
    for heatmap, kind in zip(features["heatmap_targets"], feedback.HEATMAPS, strict=True):
        marked = np.zeros((len(answers), SIDE, SIDE), bool)
        for own, answer in zip(marked, answers, strict=True):
            for x, y in answer[f"{kind}_points"]:
                own |= np.hypot(columns - x, rows - y) <= SIDE / 5
        np.testing.assert_array_equal(heatmap, np.rint(255 * marked.mean(0)))
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
