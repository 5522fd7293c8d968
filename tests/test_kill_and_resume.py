"""A short form of kill_and_resume.py; test_multihost runs its form with several processes."""

import os
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent


def test_training_that_is_killed_ends_as_if_it_were_not(tmp_path, synthetic_data_dir):
    command = [
        *(sys.executable, str(HERE / "kill_and_resume.py"), f"--data_dir={synthetic_data_dir}"),
        # One kill while a checkpoint is saved, one between two steps.
        *(f"--out={tmp_path}", "--model=mlp", "--steps=24", "--period=4", "--kills=2", "--seed=2"),
    ]
    kept = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
    result = subprocess.run(
        command, env=kept | {"PYTHONPATH": str(HERE.parent)}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1: killed (saving) after " in result.stdout
    assert "2: killed (stepping) after " in result.stdout
    assert "largest relative difference of 24 losses" in result.stdout
    assert "parameters that differ: 0" in result.stdout
