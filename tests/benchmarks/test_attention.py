"""The comparison of attention kernels; without a GPU it compares cuDNN's formulas, computed by XLA."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from richhf_jax.benchmarks import attention
from richhf_jax.network import attention_kernel

SHAPE = attention.Shape("encoder", 8, 3, 2, 8, True)


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(attention, "SIZES", {"tiny": (SHAPE,)})
    path = tmp_path / "figures.json"
    return path, ["--size=tiny", "--batch_size=3", "--turns=2", f"--json={path}"]


def test_kernels_that_agree(small, capsys):
    path, arguments = small
    attention.main([*arguments, "--dropout_rate=0.3"])
    figures = json.loads(path.read_text())
    assert (figures["device"], figures["cudnn_is"]) == ("cpu", "its formulas, computed by XLA")
    assert [row["step"] for row in figures["rows"]] == list(attention.PASSES)
    for row in figures["rows"]:
        assert row["agree"]
        names = {"output", "query", "key", "value", "bias"} if "backward" in row["step"] else {"output"}
        for kernel in attention.KERNELS:
            # bfloat16 rounds to 8 bits.
            assert set(row[kernel]["differences"]) == names
            assert all(1e-4 < share < 0.05 for share in row[kernel]["differences"].values())
            assert row[kernel]["milliseconds"] > 0
    printed = capsys.readouterr().out
    assert "cudnn_is: its formulas, computed by XLA" in printed
    assert printed.count("the kernels agree") == 2


def wrong(query, key, value, *_):
    return value


def not_finite(query, key, value, *_):
    return value * jnp.nan


def refused(*_):
    raise NotImplementedError("cuDNN can't do this.\nSecond line.")


@pytest.mark.parametrize(
    ("flash", "message"),
    [(wrong, "DO NOT AGREE"), (not_finite, "output not finite"), (refused, "cudnn  cuDNN can't do this.\n")],
)
def test_kernels_that_do_not_agree(small, monkeypatch, capsys, flash, message):
    path, arguments = small
    monkeypatch.setattr(attention_kernel, "flash", flash)
    with pytest.raises(SystemExit) as exit_:
        attention.main(arguments)
    assert exit_.value.code == 1
    assert message in capsys.readouterr().out
    rows = json.loads(path.read_text())["rows"]
    assert [row["agree"] for row in rows] == [False, False]
    assert all(row["xla"]["milliseconds"] > 0 for row in rows)


def test_inputs_have_padding_without_weight():
    arrays = attention.inputs(SHAPE, 3, "bfloat16")
    lengths = np.asarray(arrays["visible"]).sum(axis=1)
    assert ((lengths >= 5) & (lengths <= 8)).all()
    assert (lengths < 8).any()
    assert not np.asarray(arrays["weights"], np.float32)[~np.asarray(arrays["visible"])].any()
