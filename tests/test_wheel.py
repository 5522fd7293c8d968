"""The wheel has all its files, and scores an image with only the core's packages."""

import importlib.metadata
import json
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

import richhf_jax

ROOT = pathlib.Path(richhf_jax.__file__).resolve().parents[1]

# Without site-packages: there is what the folder holds, and nothing else.
CODE = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import richhf_jax
from richhf_jax.predict import __main__ as predict
print(richhf_jax.__file__)
predict.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Builds the wheel from a copy, because the build writes beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    names = ("setup.py", "pyproject.toml", "README.md", "LICENSE")
    source.mkdir()
    for name in names:
        shutil.copy(ROOT / name, source)
    for name in ("richhf_jax", "tasks", "torch_twin"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        f"--wheel-dir={folder}",
        str(source),
    ]
    subprocess.run([*pip, *build], check=True)
    [found] = folder.glob("*.whl")
    return found


def core_distributions() -> list[importlib.metadata.Distribution]:
    """Returns the packages that the core requires, and their requirements."""
    text = (ROOT / "setup.py").read_text()
    core = re.search(r"^CORE = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)[1]
    waiting = re.findall(r'^    "(.+)",$', core, re.MULTILINE)
    found: dict[str, importlib.metadata.Distribution] = {}
    while waiting:
        name, extras = re.match(r"([\w.-]+)(?:\[(.+?)\])?", waiting.pop()).groups()
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # Of another platform.
            continue
        if name in found and not extras:
            continue
        found[name] = distribution
        for line in distribution.requires or ():
            extra = re.search(r"extra == ['\"](.+?)['\"]", line)
            if not extra or (extras and extra[1] in extras.split(",")):
                waiting.append(line)
    return list(found.values())


def test_the_wheel_holds_templates_vocabulary_and_examples(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in (
        "pages/templates/report.html", "pages/templates/look.css", "export/MODEL_CARD.md",
        "export/example_stablehlo.py", "annotate/templates/annotate.html", "annotate/static/annotate.js",
        "annotate/static/annotate.css", "annotate/static/icon.svg", "annotate/static/rater.js",
        "survey/templates/survey.html", "survey/static/survey.js", "survey/static/survey.css",
    ):  # fmt: skip
        assert f"richhf_jax/{name}" in names
    assert "tasks/sentencepiece_small.model" in names
    assert not [name for name in names if name.startswith(("tests/", "gin/", "torch_twin/"))]


def test_it_scores_an_image_with_the_cores_packages_alone(wheel, model_dir, tmp_path):
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    for distribution in core_distributions():
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    absent = {"tensorflow", "seqio", "gin", "pyarrow", "torch", "tensorflow_datasets"}
    assert not absent & {path.name for path in site.iterdir()}
    image = np.random.default_rng(0).integers(0, 256, (20, 20, 3)).astype(np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    arguments = [f"--checkpoint={model_dir}", "--out=out", "a.png", "--prompt=a red cat", "--report"]
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", CODE, str(site), *arguments],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{site}/richhf_jax/__init__.py\n1 images scored")
    assert json.loads((tmp_path / "out/predictions.jsonl").read_text())["id"] == "a.png"
