"""order.csv: which images come first, and how the file looks."""

import json

import pytest

from richhf_jax.predict import order


def written(tmp_path, rows, count=None):
    """Writes predictions and the order. Returns the order's text; None: there is no file."""
    predictions = tmp_path / "predictions.jsonl"
    lines = [
        json.dumps({"id": id, "prompt": prompt} | ({"uncertainty": uncertainty} if uncertainty else {}))
        for id, prompt, uncertainty in rows
    ]
    predictions.write_text("".join(f"{line}\n" for line in lines))
    order.write(tmp_path / order.FILE, predictions, len(rows) if count is None else count)
    return (tmp_path / order.FILE).read_text() if (tmp_path / order.FILE).exists() else None


def test_the_least_sure_come_first_and_equals_by_name(tmp_path):
    # The kinds' means are 0.2 and 0.02: one kind's unit doesn't drown the other's.
    rows = [
        ("d.png", "a cat", {"overall": 0.2, "alignment": 0.02}),
        ("a.png", 'a "big" dog, Ünï', {"overall": 0.1, "alignment": 0.01}),
        ("c.png", "x", {"overall": 0.3, "alignment": 0.03}),
        ("b.png", "y", {"overall": 0.1, "alignment": 0.03}),
        ("e.png", "z", {"overall": 0.3, "alignment": 0.01}),
    ]
    assert written(tmp_path, rows) == (
        "image,prompt,uncertainty\n"
        "c.png,x,1.5000\n"
        "b.png,y,1.0000\n"
        "d.png,a cat,1.0000\n"
        "e.png,z,1.0000\n"
        'a.png,"a ""big"" dog, Ünï",0.5000\n'
    )


@pytest.mark.parametrize(("rows", "count"), [([("a", "b", None)], 1), ([], 0), ([("a", "b", {"x": 1})], 0)])
def test_no_uncertainty_no_file(tmp_path, rows, count):
    assert written(tmp_path, rows, count) is None
