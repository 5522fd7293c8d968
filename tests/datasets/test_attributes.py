"""Tests attributes by a VQA model: answers, sources of images, stops and resumes, transformers' pipeline."""

import io
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from richhf_jax import errors
from richhf_jax.datasets import attributes, balance, sample_sources


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("yes", True),
        ("Yes, it is.", True),
        ("NO", False),
        ("It is not; no.", False),
        ("It is not.", None),
        ("yes and no", None),
        ("nobody knows", None),  # "no" isn't a word here
        ("", None),
    ],
)
def test_photorealistic_answers(answer, expected):
    assert attributes.parse_photorealistic(answer) is expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        *((category, category) for category in attributes.CATEGORIES),
        ("'Human'", "human"),
        ("Animals.", "animal"),
        ("The best category is: outdoor", "outdoor scene"),
        ("indoors", "indoor scene"),
        ("a scene", None),
        ("objective", None),
        ("human or animal", None),
        (attributes.CATEGORY_QUESTION, None),  # a model that repeats the question
        ("", None),
    ],
)
def test_category_answers(answer, expected):
    assert attributes.parse_category(answer) == expected


def test_questions_are_the_papers():
    assert attributes.PHOTOREALISTIC_QUESTION == "Is the image photorealistic?"
    assert all(f"'{category}'" in attributes.CATEGORY_QUESTION for category in attributes.CATEGORIES)


class Oracle:
    """Answers by the image's colour: red is a photo of an animal, blue is neither photo nor animal."""

    def __init__(self, fail_after: int | None = None):
        self.batches, self.fail_after = [], fail_after

    def __call__(self, images, questions):
        if self.fail_after == len(self.batches):
            raise KeyboardInterrupt
        self.batches.append(len(images))
        answers = []
        for image, question in zip(images, questions, strict=True):
            assert image.mode == "RGB"
            red = image.getpixel((0, 0))[0] > 128
            if question == attributes.PHOTOREALISTIC_QUESTION:
                answers.append("Yes." if red else "No.")
            else:
                assert question == attributes.CATEGORY_QUESTION
                answers.append("an animal" if red else "no idea")
        return answers


def picture(colour: str, image_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(buffer, image_format)
    return buffer.getvalue()


def read_table(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    for number in range(5):
        (folder / f"red-{number}.png").write_bytes(picture("red"))
    (folder / "more/blue.JPG").write_bytes(picture("blue", "JPEG"))
    (folder / "more/broken.webp").write_bytes(picture("blue", "WEBP")[:20])
    (folder / "more/notes.txt").write_text("no image")
    return folder


RED = {
    "photorealistic": True,
    "category": "animal",
    "answers": {"photorealistic": "Yes.", "category": "an animal"},
}
BLUE = {
    "photorealistic": False,
    "category": None,
    "answers": {"photorealistic": "No.", "category": "no idea"},
}


def test_a_folder_becomes_a_table(folder, tmp_path):
    out, vqa = tmp_path / "table.jsonl", Oracle()
    report = attributes.make_table(attributes.read_images(folder, set()), out, vqa, batch_size=4)
    blue = {"id": "blue", **BLUE}
    assert read_table(out) == [blue, *({"id": f"red-{n}", **RED} for n in range(5))]
    assert vqa.batches == [8, 4]  # two questions per image
    assert report == attributes.Report(rows=6, unknown=1, first_unknown=[blue], undecodable=1)
    (failure,) = read_table(tmp_path / "table.jsonl.errors.jsonl")
    assert failure["id"] == "broken"
    assert failure["reason"]


def test_the_table_is_what_balance_takes(folder, tmp_path):
    out = tmp_path / "table.jsonl"
    attributes.make_table(attributes.read_images(folder, set()), out, Oracle())
    subset = balance.draw(out, 5)
    assert sorted(subset.rows) == [(f"red-{n}", True, "animal") for n in range(5)]
    assert subset.unknown == 1


@pytest.mark.parametrize("torn", ["", '{"id": "red-1", "photo'])
def test_a_stop_loses_one_batch_and_the_rest_goes_on(folder, tmp_path, torn):
    out = tmp_path / "table.jsonl"
    with pytest.raises(KeyboardInterrupt):
        attributes.make_table(attributes.read_images(folder, set()), out, Oracle(fail_after=1), batch_size=2)
    assert len(read_table(out)) == 2
    out.write_text(out.read_text() + torn)
    done = attributes.finished_ids(out)
    assert done == {"blue", "red-0"}
    vqa = Oracle()
    report = attributes.make_table(attributes.read_images(folder, done), out, vqa)
    assert (report.rows, vqa.batches) == (4, [8])
    assert [row["id"] for row in read_table(out)] == ["blue", *(f"red-{n}" for n in range(5))]


def test_a_mended_image_leaves_the_list_of_errors(folder, tmp_path):
    out = tmp_path / "table.jsonl"
    attributes.make_table(attributes.read_images(folder, set()), out, Oracle())
    (folder / "more/broken.webp").write_bytes(picture("red", "WEBP"))
    report = attributes.make_table(
        attributes.read_images(folder, attributes.finished_ids(out)), out, Oracle()
    )
    assert (report.rows, report.undecodable) == (1, 0)
    assert not (tmp_path / "table.jsonl.errors.jsonl").exists()


def test_pick_a_pic_has_each_image_once_and_read_groups_are_skipped(tmp_path, monkeypatch):
    samples = sample_sources.make_samples(12)
    sample_sources.write_pick_a_pic(tmp_path / "data", samples)
    tables = [pq.read_table(path) for path in sorted((tmp_path / "data").iterdir())]
    expected = {}
    for row in pa.concat_tables(tables).to_pylist():
        expected |= {row["image_0_uid"]: row["jpg_0"], row["image_1_uid"]: row["jpg_1"]}
    found = list(attributes.read_images(tmp_path / "data", set()))
    assert len(found) == len(expected)
    assert dict(found) == expected
    some = set(list(expected)[:7])
    assert dict(attributes.read_images(tmp_path / "data", some)) == {
        uid: data for uid, data in expected.items() if uid not in some
    }
    # No image is read if all ids are known.
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", None)
    assert list(attributes.read_images(tmp_path / "data", set(expected))) == []


@pytest.mark.parametrize("as_struct", [False, True])
def test_a_plain_table_of_images(tmp_path, as_struct):
    data = [picture("red"), picture("blue"), None]
    column = [d and {"bytes": d, "path": None} for d in data] if as_struct else data
    table = pa.table({"id": [7, 8, 9], "image": column, "more": ["x"] * 3})
    pq.write_table(table, tmp_path / "images.parquet")
    found = attributes.read_images(tmp_path / "images.parquet", {"8"})
    out = tmp_path / "table.jsonl"
    report = attributes.make_table(found, out, Oracle())
    assert read_table(out) == [{"id": "7", **RED}]
    assert report.undecodable == 1


def test_images_that_cannot_be_read_are_listed(folder, tmp_path):
    os.mkfifo(folder / "pipe.png")
    (folder / "phone.HEIC").write_bytes(b"")
    found = dict(attributes.read_images(folder, set()))
    assert len(found) == 9
    assert found["pipe"] == f"{folder}/pipe.png: not a file but a named pipe"
    assert found["phone.HEIC"] == f"{folder}/phone.HEIC: .heic isn't read; convert it to PNG or JPEG"
    report = attributes.make_table(list(found.items()), tmp_path / "table.jsonl", Oracle())
    assert (report.rows, report.undecodable) == (6, 3)


def test_ids_that_pandas_wrote_as_floats(tmp_path):
    table = pa.table({"id": [7.0, None, float("nan"), 0.5], "image": [picture("red")] * 4})
    pq.write_table(table, tmp_path / "images.parquet")
    assert dict(attributes.read_images(tmp_path / "images.parquet", set())) == {
        "7": picture("red"),
        "images.parquet:1:id": "`id` is empty",
        "images.parquet:2:id": "`id` is empty",
        "images.parquet:3:id": "`id` is a float, not a string or whole number",
    }


def test_floats_in_a_table_that_an_earlier_version_began(tmp_path):
    """It wrote 7.0 as "7.0"; a text "8.0" is no number."""
    table = pa.table({"id": [7.0, 8.0], "image": [picture("red")] * 2})
    pq.write_table(table, tmp_path / "images.parquet")
    assert list(attributes.read_images(tmp_path / "images.parquet", {"7.0", "8"})) == []
    pq.write_table(table.set_column(0, "id", pa.array(["7.0", "8.0"])), tmp_path / "images.parquet")
    found = attributes.read_images(tmp_path / "images.parquet", {"7.0", "8"})
    assert list(found) == [("8.0", picture("red"))]


@pytest.mark.parametrize("done", [set(), {"a", "b"}])
def test_a_second_row_of_an_id_is_listed(tmp_path, done):
    table = pa.table({"id": ["a", "b", "a"], "image": [picture("red"), picture("blue"), picture("blue")]})
    pq.write_table(table, tmp_path / "images.parquet", row_group_size=1)
    images = {"a": picture("red"), "b": picture("blue")}
    assert dict(attributes.read_images(tmp_path / "images.parquet", done)) == {
        **({} if done else images),
        "images.parquet:2:id": "the id 'a' was there before",
    }


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "images: no .jpg, .jpeg, .jpe, "),
        (
            lambda folder: [(folder / name).write_bytes(b"") for name in ("a.jpg", "a.png")],
            "a.png: its id, the name without ending, is also that of ",
        ),
        (
            lambda folder: pq.write_table(pa.table({"uid": ["a"], "image": [b""]}), folder / "a.parquet"),
            "a.parquet: has neither Pick-a-Pic's columns nor id and image, only uid, image",
        ),
        (lambda folder: (folder / "a.parquet").write_bytes(b"PAR1"), "a.parquet: "),
    ],
)
def test_images_that_cannot_be_read(tmp_path, make, message):
    folder = tmp_path / "images"
    folder.mkdir()
    make(folder)
    with pytest.raises(errors.UserError, match=re.escape(message)):
        list(attributes.read_images(folder, set()))


def test_a_bad_line_of_the_table(tmp_path):
    (tmp_path / "table.jsonl").write_text('{"id": "a"}\n{"uid": "b"}\n')
    with pytest.raises(errors.UserError, match=r"table.jsonl:2: this isn't a line of a table of attributes"):
        attributes.finished_ids(tmp_path / "table.jsonl")
    assert attributes.finished_ids(tmp_path / "none.jsonl") == set()


@pytest.mark.parametrize("answers", [["yes"], ["yes", None], ["yes"] * 3])
def test_a_model_that_does_not_answer(answers):
    with pytest.raises(errors.UserError, match="--vqa: 2 questions need as many strings, got "):
        attributes.ask(lambda images, questions: answers, ["a"], [Image.new("RGB", (2, 2))])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blip", "--vqa must be transformers:MODEL or MODULE:FUNCTION, got 'blip'"),
        (".vqa:answer", "--vqa must be transformers:MODEL or MODULE:FUNCTION, got '.vqa:answer'"),
        (":answer", "--vqa must be transformers:MODEL or MODULE:FUNCTION, got ':answer'"),
        ("no_such_module:answer", "--vqa=no_such_module:answer: No module named 'no_such_module'"),
        ("json:answer", "--vqa=json:answer: module 'json' has no attribute 'answer'"),
    ],
)
def test_a_model_that_is_not_there(name, message):
    with pytest.raises(errors.UserError, match=re.escape(message)):
        attributes.load_vqa(name)


def test_command_line_with_a_function_of_ones_own(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "my_vqa.py").write_text(
        "def answer(images, questions):\n    return ['yes' if 'photo' in q else 'scene' for q in questions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "table.jsonl"
    attributes.main([f"--images={folder}", f"--out={out}", "--vqa=my_vqa:answer"])
    printed = capsys.readouterr()
    assert printed.out == (
        f"{out}: 0 images were there, 6 added; 6 of these lack an attribute; 1 can't be decoded,"
        f" see {out}.errors.jsonl\n"
    )
    assert printed.err.count("no attribute: ") == 5
    with pytest.raises(SystemExit, match="Is a directory. Name another --out"):
        attributes.main([f"--images={folder}", f"--out={tmp_path}", "--vqa=my_vqa:answer"])
    with pytest.raises(SystemExit, match="no/table.jsonl: No such file or directory"):
        attributes.main([f"--images={folder}", f"--out={tmp_path / 'no/table.jsonl'}", "--vqa=my_vqa:answer"])


def test_torch_and_transformers_load_when_they_are_needed():
    code = (
        "import sys; from richhf_jax.datasets import attributes, balance;"
        "assert not {'torch', 'transformers', 'jax', 'tensorflow'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


SPECIAL_WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
WORDS = [*SPECIAL_WORDS, *("USER", "ASSISTANT", ":", "yes", "no", "human", "is", "it", "a", "photo", "?")]
# A template like LLaVA's.
CHAT_TEMPLATE = (
    "{% for message in messages %}USER : {% for part in message.content %}"
    "{% if part.type == 'image' %}<image> {% else %}{{ part.text }}{% endif %}{% endfor %} ASSISTANT :"
    "{% endfor %}"
)


@pytest.fixture(scope="module")
def tiny_llava(tmp_path_factory):
    """Makes a random LLaVA of 16-pixel images and 16 words; returns its folder, model and processor."""
    import tokenizers
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()  # It warns that torchvision is missing.
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {f"{name}_token": f"<{name}>" for name in ("pad", "unk")}
    special |= {"bos_token": "<s>", "eos_token": "</s>", "extra_special_tokens": {"image_token": "<image>"}}
    size = {"height": 16, "width": 16}
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size=size, do_center_crop=False),
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    width = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            **width, num_hidden_layers=2, image_size=16, patch_size=8
        ),
        text_config=transformers.LlamaConfig(
            **width,
            num_hidden_layers=1,
            vocab_size=len(WORDS),
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        image_token_index=WORDS.index("<image>"),
        image_seq_length=4,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    # Larger weights make the answers depend on image and question.
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.5)
    folder = tmp_path_factory.mktemp("llava")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, model, processor


def test_transformers_answers_are_the_models(tiny_llava):
    folder, model, processor = tiny_llava
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)) for _ in range(3)]
    images.append(images[0])
    questions = ["is it a photo ?"] * 3 + ["human"]
    answers = attributes.load_vqa(f"transformers:{folder}")(images, questions)
    for image, question, answer in zip(images, questions, answers, strict=True):
        inputs = processor(images=image, text=f"USER : <image> {question} ASSISTANT :", return_tensors="pt")
        generated = model.generate(**inputs, max_new_tokens=20, do_sample=False)
        new = generated[0, inputs["input_ids"].shape[1] :]
        assert answer.split() == processor.decode(new, skip_special_tokens=True).split()
    assert len(set(answers)) > 1


def test_a_model_that_transformers_does_not_have(tmp_path):
    with pytest.raises(errors.UserError, match=f"--vqa=transformers:{tmp_path}: "):
        attributes.load_vqa(f"transformers:{tmp_path}")
