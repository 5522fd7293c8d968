import json

import gin

from richhf_jax.benchmarks import clip


def test_both_compute_the_same_cosines(tmp_path, capsys):
    clip.main(
        ["--size=clip_tiny", "--images=5", "--batch-size=2", "--turns=1", f"--json={tmp_path}/clip.json"]
    )
    gin.clear_config()
    figures = json.loads((tmp_path / "clip.json").read_text())["clip_tiny"]
    assert 0 < figures["largest_difference"] < 1e-5
    assert min(figures["ours"], figures["transformers"]) > 0
    assert "clip_tiny: " in capsys.readouterr().out
