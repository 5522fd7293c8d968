"""The command on files of answers: the formats, the messages."""

import csv
import io
import json
import pathlib
import re

import pytest

from richhf_jax.survey import __main__ as survey
from richhf_jax.survey import answers, statistics

GOOD = {"prompt_id": "1", "prompt": "a cat", "rater_id": "anna", "left": "A", "right": "B", "answer": 2}


def lines(prompts: int = 8, raters: tuple[str, ...] = ("anna", "bert", "<b>cleo")) -> list[dict]:
    """Makes answers that differ by prompt and rater, and a passed check of each rater."""
    found = []
    for p in range(prompts):
        for r, rater in enumerate(raters):
            left, right = ("tuned", "plain_1") if (p + r) % 2 else ("plain_1", "tuned")
            answer = 1 + (p * 7 + r * 3) % 5
            pair = {"prompt_id": f"{p}", "prompt": f"a cat & {p} dogs", "rater_id": rater}
            found.append(pair | {"left": left, "right": right, "answer": answer})
    for rater in raters:
        check = {"prompt_id": "0", "prompt": "a cat & 0 dogs", "rater_id": rater, "answer": 3}
        found.append(check | {"left": "tuned", "right": "tuned", "check": "identical"})
    return found


def write(folder: pathlib.Path, rows: list[dict] | str) -> str:
    path = folder / "answers.jsonl"
    path.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(capsys, *arguments: str) -> str:
    survey.main(["result", *arguments])
    return capsys.readouterr().out


def refusal(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        survey.main(["result", *arguments])
    assert capsys.readouterr().out == ""
    return str(stop.value)


@pytest.fixture
def path(tmp_path) -> str:
    return write(tmp_path, lines())


@pytest.fixture
def result(path) -> dict:
    return statistics.result(survey.read(pathlib.Path(path), ()), ["tuned", "plain_1"])


def test_formats_have_the_same_figures(path, result, capsys):
    order = ["--order", "tuned", "plain_1"]
    assert json.loads(run(capsys, path, *order, "--format=json")) == result
    [pair] = result["pairs"]
    low, high = pair["win_rate_interval"]
    shown = f"{pair['win_rate']:.1%} [{low:.1%}, {high:.1%}]"
    terminal = run(capsys, path, *order)
    assert shown in terminal
    assert "24 answers of 3 raters on 8 prompts." in terminal
    assert "By prompt" not in terminal
    latex = run(capsys, path, *order, "--format=latex")
    assert shown.replace("%", r"\%").replace("[", "{[}").replace("]", "{]}") in latex
    assert r"$\gg$ & \textgreater{} & $\approx$ & \textless{} & $\ll$" in latex
    assert r"tuned vs plain\_1" in latex
    html = run(capsys, path, *order, "--format=html")
    assert f"{pair['win_rate']:.1%}<br><small>[{low:.1%}, {high:.1%}]</small>" in html
    assert "a cat &amp; 3 dogs" in html
    assert "&lt;b&gt;cleo" in html
    assert "<b>cleo" not in html
    table = list(csv.DictReader(io.StringIO(run(capsys, path, *order, "--format=csv"))))
    assert float(table[0]["preference/win_rate"]) == pair["win_rate"]
    assert float(table[0]["preference/win_rate/low"]) == low
    assert len(table) == 1 + 3 + 8
    rates = [float(row["prompt/win_rate"]) for row in table[4:]]
    assert rates == sorted(rates, reverse=True) != sorted(rates)


def test_default_order_is_by_name_and_out_writes_a_file(path, result, tmp_path, capsys):
    out = tmp_path / "result.json"
    assert run(capsys, path, "--format=json", f"--out={out}") == f"{out}\n"
    content = json.loads(out.read_text())
    assert content["generators"] == ["plain_1", "tuned"]
    assert content["pairs"][0]["win_rate"] == pytest.approx(1 - result["pairs"][0]["win_rate"])


def test_left_out_raters_are_named(path, capsys):
    printed = run(capsys, path, "--leave-out", "bert")
    assert "16 answers of 2 raters" in printed
    assert "Left out: bert." in printed
    assert not re.search("^bert", printed, re.MULTILINE)


def test_one_rater_has_no_intervals(tmp_path, capsys):
    printed = run(capsys, write(tmp_path, lines(raters=("anna",))))
    assert "[" not in printed
    assert "Without brackets: an interval needs two raters or more, who share prompts." in printed


def test_generators_that_cannot_be_rated(tmp_path, capsys):
    rows = [
        GOOD | {"prompt_id": f"{p}", "rater_id": rater, "left": left, "right": right}
        for p in range(3)
        for rater in ("anna", "bert")
        for left, right in ("AB", "AC", "BC")
    ]
    assert "No Bradley-Terry ratings: some generators won, or lost" in run(capsys, write(tmp_path, rows))
    rows[0]["answer"], rows[2]["answer"], rows[4]["answer"] = 4, 4, 5
    printed = run(capsys, write(tmp_path, rows))
    assert "No Bradley-Terry" not in printed
    assert "Bradley-Terry ratings" in printed


def test_the_schema_takes_what_json_writes():
    answer = answers.parse_answer(json.dumps(GOOD | {"answer": 2.0, "check": None, "more": 1}))
    assert answer == answers.Answer("1", "a cat", "anna", "A", "B", 2)
    assert (answer.of("A"), answer.of("B")) == (2, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 6}, "answer must be 1 to 5, got 6"),
        ({"answer": True}, "answer must be 1 to 5, got True"),
        ({"answer": None}, "answer must be 1 to 5, got None"),
        ({"answer": 2.5}, "answer must be 1 to 5, got 2.5"),
        ({"rater_id": " "}, "rater_id must be a text that isn't empty, got ' '"),
        ({"left": 7}, "left must be a text that isn't empty, got 7"),
        ({"prompt": "\ud800"}, "prompt can't be written as UTF-8"),
        ({"check": "twice"}, "check must be identical or swapped, or absent, got 'twice'"),
        ({"check": ["swapped"]}, "check must be identical or swapped"),
        ({"right": "A"}, "left and right are 'A' and 'A': they are the same in a check 'identical'"),
        ({"check": "identical"}, "left and right are 'A' and 'B'"),
    ],
)
def test_a_bad_line_is_named(change, message, tmp_path, capsys):
    path = write(tmp_path, [GOOD, GOOD | {"rater_id": "bert"} | change])
    assert refusal(capsys, path).startswith(f"survey: {path}:2: {message}")


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            GOOD | {"left": "B", "right": "A"},
            "rater 'anna' has already answered on this pair of '1' in line 1",
        ),
        (GOOD | {"rater_id": "bert", "prompt": "a dog"}, "prompt of '1' differs from line 1"),
    ],
)
def test_lines_that_contradict_each_other(second, message, tmp_path, capsys):
    path = write(tmp_path, [GOOD, second])
    assert refusal(capsys, path).startswith(f"survey: {path}:2: {message}")


def test_other_mistakes_are_named(path, tmp_path, capsys):
    assert "answers.jsonl has no answer of rater 'dora'" in refusal(capsys, path, "--leave-out", "dora")
    message = refusal(capsys, path, "--order", "tuned", "flat")
    assert message == "survey: --order must name each generator once: plain_1, tuned"
    assert "No such file" in refusal(capsys, str(tmp_path / "none.jsonl"))
    for content in ("", json.dumps(GOOD | {"right": "A", "check": "identical"})):
        assert refusal(capsys, write(tmp_path, content)).endswith(
            "no answer to count; checks alone give no result"
        )
    assert "answers.jsonl:1: no JSON" in refusal(capsys, write(tmp_path, "{"))
    assert "answers.jsonl:1: a line must be a JSON object, got [1]" in refusal(capsys, write(tmp_path, "[1]"))
