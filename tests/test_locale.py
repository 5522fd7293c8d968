"""Files are UTF-8 and commands print, whatever the locale."""

import ast
import csv
import json
import os
import pathlib
import subprocess
import sys

import richhf_jax
from richhf_jax.datasets import raters, scenes

ROOT = pathlib.Path(richhf_jax.__file__).resolve().parents[1]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}

COMMANDS = """
import sys
from richhf_jax.datasets import balance, consolidate
from richhf_jax.datasets.describe import __main__ as describe
from richhf_jax.pages import report
assert sys.stdout.encoding.lower() in ("ascii", "ansi_x3.4-1968"), sys.stdout.encoding
consolidate.main([sys.argv[1], "out.tfrecord", "--on-error=skip"])
describe.main([f"--raw={sys.argv[1]}", "--json=d.json", "--html=d.html"])
balance.main(["--attributes=a.csv", "--count=2", "--out=b.csv"])
print(report.format_tables([report.Row("a", {"score/plcc/overall": 0.5})]))
"""


def test_commands_in_a_locale_of_ascii(tmp_path):
    config, name = scenes.CONFIGS["default"], scenes.filename("train", 0)
    lines = raters.raw_lines(config, name, scenes.truth(name, config))
    lines = [json.dumps(json.loads(line) | {"image_id": "猫\x1b[31m"}, ensure_ascii=False) for line in lines]
    (tmp_path / "rä.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    attributes = ["id,photorealistic,category", "=猫,true,animal", "ü,false,animal"]
    (tmp_path / "a.csv").write_text("".join(f"{line}\n" for line in attributes), encoding="utf-8")
    result = subprocess.run(
        [sys.executable, "-c", COMMANDS, "rä.jsonl"],
        cwd=tmp_path, env=os.environ | ASCII | {"PYTHONPATH": str(ROOT)}, capture_output=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr.decode()
    assert b"1 images (1 with 3 raters)" in result.stdout
    assert rb"PLCC \u2191" in result.stdout
    assert b"1 ids look like formulas" in result.stderr
    assert b"set PYTHONUTF8=1" in result.stderr
    with (tmp_path / "b.csv").open(encoding="utf-8", newline="") as file:
        assert {row["id"] for row in csv.DictReader(file)} == {"=猫", "ü"}
    assert json.loads((tmp_path / "d.json").read_text(encoding="utf-8"))["records"] == 1


def calls_without_encoding(tree: ast.AST) -> list[int]:
    """Lists the lines of calls that leave a text file's encoding to the locale.

    Ruff's PLW1514 sees `open` and paths whose type it knows.
    """
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    place = {"read_text": 1, "write_text": 2}
    return [
        node.lineno
        for node in calls
        if isinstance(node.func, ast.Attribute)
        and len(node.args) < place.get(node.func.attr, 0)
        and all(word.arg != "encoding" for word in node.keywords)
    ]


def test_calls_without_encoding():
    code = "f(p).read_text()\nq.write_text(a, encoding='utf-8')\nq.write_text(a)\nq.read_text('utf-8')"
    assert calls_without_encoding(ast.parse(code)) == [1, 3]


def test_text_files_are_utf8():
    sources = [path for name in ("richhf_jax", "tasks", "torch_twin") for path in (ROOT / name).rglob("*.py")]
    found = {path: calls_without_encoding(ast.parse(path.read_text(encoding="utf-8"))) for path in sources}
    assert {path: lines for path, lines in found.items() if lines} == {}
