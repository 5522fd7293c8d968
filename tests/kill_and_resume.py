r"""Compares training that is interrupted again and again with a run in one go.

    python tests/kill_and_resume.py --data_dir=DIR
    python tests/kill_and_resume.py --data_dir=DIR --elastic

The first command kills the training of the tiny RAHF by SIGKILL at random moments, some of them while a
checkpoint is being written, and gives the same command again each time. All losses and the final parameters
must equal those of the uninterrupted run, bit by bit.

The second runs the training on 8, then 2, then 4 processes; each job but the last ends because one of its
processes is killed. The losses must equal those of a single process to 1e-5, because float32 sums have
another order. The learning rate is a hundredth of the usual one: at the full rate, rounding errors grow
tenfold every few steps from the 30th on. A wrong example still shows: it changes the loss by some percent.

`python -m richhf_jax.datasets --data_dir=DIR` makes the synthetic data in DIR. Exit code 1: the runs differ.
"""

import argparse
import contextlib
import math
import os
import pathlib
import random
import socket
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax.linen.partitioning import AxisMetadata

from richhf_jax import losses, models, trainer

HERE = pathlib.Path(__file__).resolve().parent
LOSSES = "LOSSES_FILE"


class RecordingTrainer(trainer.Trainer):
    """Appends "<step> <loss, exactly>" to a file after each step, at once."""

    def train_step(self, state, batch):
        state, metrics = super().train_step(state, batch)
        loss = trainer.summarize([metrics])["loss"]
        if jax.process_index() == 0:
            with open(os.environ[LOSSES], "a", encoding="utf-8") as file:
                file.write(f"{int(state.step)} {loss.hex()}\n")
        return state, metrics


class Mlp(models.BaseModel):
    """Scores from the columns' mean colours, by two layers: compiles in no time."""

    vocab_size = 1 << 30

    def get_initial_variables(self, rng, input_shapes, input_types=None):
        _, _, width, channels = input_shapes["image"]
        shapes = {"wi": (width * channels, 32), "wo": (32, input_shapes["score_targets"][1])}
        axes = {"wi": ("embed", "mlp"), "wo": ("mlp", None)}
        keys = dict(zip(shapes, jax.random.split(rng), strict=True))
        params = {n: {"kernel": jax.random.normal(keys[n], s) * s[0] ** -0.5} for n, s in shapes.items()}
        return {
            "params": params,
            "params_axes": {n: {"kernel_axes": AxisMetadata(names)} for n, names in axes.items()},
        }

    def loss_weights(self, batch):
        return {"score": jnp.sum(batch["score_weights"])}

    def loss_fn(self, params, batch, dropout_rng, normalizers=None):
        predicted = self.predict_batch(params, batch)["scores"]
        errors = batch["score_weights"] * jnp.square(predicted - batch["score_targets"])
        loss = jnp.sum(errors) / (normalizers or self.loss_weights(batch))["score"]
        return loss, {"loss": losses.WeightedMean(loss, jnp.ones(()))}

    def predict_batch_with_aux(self, params, batch, rng=None):
        columns = jnp.mean(batch["image"] / 255.0, axis=1)
        x = columns.reshape(columns.shape[0], -1)
        return {"scores": jax.nn.relu(x @ params["wi"]["kernel"]) @ params["wo"]["kernel"]}, {}

    def score_batch(self, params, batch):
        raise NotImplementedError("training scores nothing")


GIN = """
from __gin__ import dynamic_registration
import kill_and_resume
from richhf_jax import train as train_script
train_script.train.trainer_cls = @kill_and_resume.RecordingTrainer
"""
MLP_GIN = """
kill_and_resume.Mlp.optimizer_def = %OPTIMIZER
MODEL = @kill_and_resume.Mlp()
OPTIMIZER = @optimizers.adamw()
"""


class Run:
    """One MODEL_DIR, trained by the same command each time."""

    def __init__(self, options: argparse.Namespace, name: str):
        self._folder = pathlib.Path(options.out)
        self.model_dir = self._folder / name
        self._losses_file = self._folder / f"{name}.losses"
        self._losses_file.touch()
        self._log = self._folder / f"{name}.log"
        gin = self._folder / "recording.gin"
        imports = "from richhf_jax import optimizers\n" if options.model == "mlp" else ""
        gin.write_text(GIN + imports + (MLP_GIN if options.model == "mlp" else ""))
        self._command = [
            *(sys.executable, "-m", "richhf_jax.train", f"--tfds_data_dir={options.data_dir}"),
            *("--gin_file=experiments/quickstart.gin", f"--gin_file={gin}"),
            *(f"--gin.MODEL_DIR='{self.model_dir}'", f"--gin.TRAIN_STEPS={options.steps}"),
            *(f"--gin.CHECKPOINT_PERIOD={options.period}", "--gin.BATCH_SIZE=8", "--gin.LOG_PERIOD=10"),
            "--gin.train.train_eval_dataset_cfg=None",
            *(["--gin.BASE_LEARNING_RATE=2e-5"] if options.elastic else []),
        ]
        self._environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self._folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": f"{HERE.parent}:{HERE}",
            LOSSES: str(self._losses_file),
        }

    def start(self, processes: int = 1) -> list[subprocess.Popen]:
        """Begins or continues the training."""
        commands = [self._command]
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                address = f"127.0.0.1:{free.getsockname()[1]}"
            shared = (f"--coordinator_address={address}", "--heartbeat_timeout_seconds=10")
            commands = [
                [*self._command, *shared, f"--process_count={processes}", f"--process_index={index}"]
                for index in range(processes)
            ]
        with open(self._log, "a", encoding="utf-8") as log:
            return [
                subprocess.Popen(command, env=self._environment, stdout=log, stderr=subprocess.STDOUT)
                for command in commands
            ]

    def finish(self, processes: list[subprocess.Popen]) -> None:
        """Waits for the end of the training, which must succeed."""
        codes = [process.wait() for process in processes]
        if any(codes):
            sys.exit(f"exit codes {codes}\n{self._log.read_text()[-3000:]}")

    def losses(self) -> list[tuple[int, float]]:
        """Returns (step, loss) in the order of computation; a repeated step has several."""
        lines = self._losses_file.read_text().split("\n")[:-1]  # without one that is only half there
        return [(int(step), float.fromhex(loss)) for step, loss in map(str.split, lines)]

    def checkpoints(self) -> list[int]:
        """Returns the steps of the complete checkpoints."""
        names = [path.name for path in self.model_dir.glob("checkpoint_*")]
        return sorted(int(name.split("_")[1]) for name in names if name.split("_")[1].isdigit())

    def unfinished(self) -> set[tuple[str, int]]:
        """Returns names and inodes of incomplete checkpoints: being written, or left by a killed process."""
        paths = self.model_dir.glob("*.orbax-checkpoint-tmp*")
        with contextlib.suppress(FileNotFoundError):  # One was finished just now.
            return {(path.name, path.stat().st_ino) for path in paths}
        return set()

    def params(self) -> dict:
        """Reads the final parameters as NumPy arrays."""
        state = self.model_dir / f"checkpoint_{self.checkpoints()[-1]}" / "state"
        reader = ocp.PyTreeCheckpointer()
        tree = reader.metadata(state).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return reader.restore(state, args=ocp.args.PyTreeRestore(restore_args=as_numpy))["params"]


def wait_until(condition, process: subprocess.Popen) -> None:
    """Waits until a condition holds, and checks it every few milliseconds."""
    while not condition():
        if process.poll() is not None:
            sys.exit("training ended before it was to be killed: give more --steps, or look at its log")
        time.sleep(0.003)


def kill_at_a_random_moment(run: Run, period: int, rng: random.Random) -> str:
    """Starts the training, kills it, and returns a description of the moment."""
    leftovers = run.unfinished()
    (process,) = run.start()
    before, kind = len(run.losses()), rng.choice(["saving", "saving", "stepping", "any time"])
    if kind == "saving":
        wait_until(lambda: run.unfinished() - leftovers, process)
        time.sleep(rng.uniform(0, 0.1))
    elif kind == "stepping":
        steps = rng.randint(1, 3 * period // 2)
        wait_until(lambda: len(run.losses()) >= before + steps, process)
        time.sleep(rng.uniform(0, 0.05))
    else:
        time.sleep(rng.uniform(0, 20))
    torn = run.unfinished() - leftovers
    process.kill()
    process.wait()
    done, left = len(run.losses()) - before, " leaving an unfinished checkpoint" if torn else ""
    return f"killed ({kind}) after {done} steps,{left} newest: {max(run.checkpoints(), default=None)}"


def kill_one_of(run: Run, processes: int, period: int, rng: random.Random) -> str:
    """Kills one of several processes after the next checkpoint; the others must end by themselves."""
    newest = max(run.checkpoints(), default=0)
    started = run.start(processes)
    wait_until(lambda: max(run.checkpoints(), default=0) >= newest + period, started[0])
    victim = rng.randrange(processes)
    started[victim].kill()
    begin = time.monotonic()
    codes = [process.wait() for process in started]
    if not all(codes):
        sys.exit(f"a process whose companion was lost exited with 0: {codes}")
    return (
        f"{processes} processes, {victim} killed: exit codes {codes} after {time.monotonic() - begin:.0f} s"
    )


def largest_difference(whole: Run, parts: Run) -> float:
    """Computes the largest relative difference of losses over all steps in parts; inf if one is missing."""
    truth = dict(whole.losses())
    done = parts.losses()
    if {step for step, _ in done} != set(truth):
        return math.inf
    return max(abs(loss / truth[step] - 1) for step, loss in done)


def main() -> None:
    """Runs the comparison that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_dir", required=True, help="the synthetic data")
    parser.add_argument("--out", help="where the runs go (default: a temporary folder)")
    parser.add_argument("--model", choices=["tiny", "mlp"], default="tiny")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--period", type=int, default=4, help="steps between checkpoints")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--elastic", action="store_true", help="several processes, see above")
    parser.add_argument("--processes", default="8,2,4", help="of the jobs of --elastic")
    options = parser.parse_args()
    options.out = os.path.abspath(options.out or tempfile.mkdtemp())
    os.makedirs(options.out, exist_ok=True)
    rng = random.Random(options.seed)
    print(f"logs and checkpoints: {options.out}", flush=True)
    whole, parts = Run(options, "whole"), Run(options, "parts")
    uninterrupted = whole.start()
    if options.elastic:
        *others, last = map(int, options.processes.split(","))
        for processes in others:
            print(kill_one_of(parts, processes, options.period, rng), flush=True)
        parts.finish(parts.start(last))
        whole.finish(uninterrupted)
    else:
        whole.finish(uninterrupted)  # Before the others, so that they find its program compiled.
        print(f"uninterrupted: {len(whole.losses())} steps", flush=True)
        for number in range(options.kills):
            message = kill_at_a_random_moment(parts, options.period, rng)
            print(f"{number + 1}: {message}", flush=True)
        parts.finish(parts.start())
    difference = largest_difference(whole, parts)
    again = len(parts.losses()) - len(whole.losses())
    print(
        f"largest relative difference of {len(whole.losses())} losses ({again} done again): {difference:.3g}"
    )
    if options.elastic:
        sys.exit(difference > 1e-5)
    pairs = zip(jax.tree.leaves(whole.params()), jax.tree.leaves(parts.params()), strict=True)
    different = sum(a.tobytes() != b.tobytes() for a, b in pairs)
    print(f"parameters that differ: {different}")
    sys.exit(bool(different or difference))


if __name__ == "__main__":
    main()
