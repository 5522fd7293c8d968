"""The commands that power_cut.py and kills.py interrupt: on small inputs, in a process that starts quickly.

A process that has imported all modules forks for each run, so a run needs no seconds to import them.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import io
import json
import os
import pathlib
import runpy
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import disk
import numpy as np
from PIL import Image

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ENVIRONMENT = {
    "PYTHONPATH": f"{ROOT}:{HERE}:{HERE.parent}",
    "JAX_PLATFORMS": "cpu",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    # A program names the calls that made it.
    "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "LOSSES_FILE": os.devnull,
}

# run.json is written after each batch, not once a second.
_SAVE_OFTEN = "from richhf_jax.predict import files; files._SAVE_SECONDS = 0"
_SMALL_SPLITS = """
from richhf_jax.datasets import synthetic_captions, synthetic_rich_hf
for builder in (synthetic_captions.SyntheticCaptions, synthetic_rich_hf.SyntheticRichHf):
    sizes = builder.builder_configs["default"].split_sizes
    sizes.update(dict.fromkeys(sizes, 24))
"""
_MLP = """
from __gin__ import dynamic_registration
import kill_and_resume
from richhf_jax import optimizers
kill_and_resume.Mlp.optimizer_def = %OPTIMIZER
MODEL = @kill_and_resume.Mlp()
OPTIMIZER = @optimizers.adamw()
"""


@dataclasses.dataclass(frozen=True)
class Command:
    """A command that writes to a folder, and that may be given again at any time.

    Attributes:
      name: its name for the table.
      module, arguments: `python -m MODULE ARGUMENTS`.
      out: the folder.
      prepare: Python code to run first.
      often: Python code that makes it write more often, to run before that where it is recorded or killed.
      codes: exit codes of success.
      content: reads what must be the same at the end, however often the command was interrupted.
      alone: whether each run needs a process of its own: the module defines absl's flags, or `content` forks.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    out: pathlib.Path
    prepare: str = ""
    often: str = ""
    codes: tuple[int, ...] = (0,)
    content: Callable[[pathlib.Path], Any] = disk.tree
    alone: bool = False

    def code(self) -> str:
        """Returns Python code that runs the command."""
        return (
            f"import runpy, sys\nsys.argv[1:] = {list(self.arguments)!r}\n{self.often}\n{self.prepare}\n"
            f"runpy.run_module({self.module!r}, run_name='__main__', alter_sys=True)"
        )

    def start(self, log: pathlib.Path) -> int:
        """Starts the command in a forked process of a new group. Returns its number."""

        def run() -> None:
            exec(self.often)
            self._run()

        return fork(run, log)

    def run(self, log: pathlib.Path) -> tuple[int, str]:
        """Runs the command in a forked process. Returns its exit code and what it printed."""
        code = wait(self.start(log))
        return code, log.read_text(encoding="utf-8", errors="replace")

    def run_here(self) -> tuple[int, str]:
        """Runs the command in this process. Returns its exit code and what it printed."""
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            code = _exit_code(self._run)
        return code, printed.getvalue()

    def _run(self) -> None:
        sys.argv = ["", *self.arguments]
        exec(self.prepare)
        if self.alone:
            _forget_flags(self.module)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)
            runpy.run_module(self.module, run_name="__main__", alter_sys=True)


def _forget_flags(module: str) -> None:
    """Forgets the flags of an imported module, which will run as the main module and define them again."""
    from absl import flags

    for name in (module, f"{module}.__main__"):
        for flag in flags.FLAGS.get_flags_for_module(name):
            delattr(flags.FLAGS, flag.name)


def _exit_code(function: Callable[[], object]) -> int:
    """Calls a function. Returns the exit code of a process that does so, and prints what that would print."""
    try:
        function()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


@contextlib.contextmanager
def loaded_once() -> Iterator[None]:
    """Lets the commands in this process load each checkpoint only once."""
    from richhf_jax.predict import predictor

    load = functools.cache(predictor.RahfPredictor.from_checkpoint)
    with mock.patch.object(predictor.RahfPredictor, "from_checkpoint", load):
        yield


def fork(function: Callable[[], object], log: pathlib.Path | None = None) -> int:
    """Calls a function in a forked process, which may print to a file. Returns the process's number."""
    sys.stdout.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX's modules are imported, but none of its threads run yet.
        process = os.fork()
    if process:
        return process
    try:
        if log:
            os.setsid()
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(file, 1)
            os.dup2(file, 2)
        code = _exit_code(function)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def wait(process: int) -> int:
    """Waits for a process. Returns its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def checkpoints(out: pathlib.Path) -> dict[str, str]:
    """Reads all checkpoints in a folder, in a process of its own: array -> digest, or what is wrong."""

    def read() -> None:
        found = {}
        for state in sorted(out.rglob("checkpoint_*/state")):
            name = str(state.parent.relative_to(out))
            try:
                found |= {f"{name}: {path}": digest for path, digest in _arrays(state)}
            except Exception as error:
                found[name] = f"damaged: {error}"
        print(json.dumps(found), file=sys.__stdout__)

    log = out.with_name("checkpoints.json")
    assert wait(fork(read, log)) == 0, log.read_text()
    return json.loads(log.read_text().splitlines()[-1])


def _arrays(state: pathlib.Path) -> Iterator[tuple[str, str]]:
    import jax
    import orbax.checkpoint as ocp

    reader = ocp.PyTreeCheckpointer()
    as_numpy = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(state).item_metadata.tree
    )
    arrays = reader.restore(state, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    for path, array in jax.tree_util.tree_leaves_with_path(arrays):
        yield jax.tree_util.keystr(path), hashlib.sha256(np.asarray(array).tobytes()).hexdigest()


def data_sets(out: pathlib.Path) -> dict[str, Any]:
    """Reads a folder of data sets. Each process writes the features of an example in an order of its own."""
    from richhf_jax.datasets import tfrecord

    found: dict[str, Any] = dict(disk.tree(out))
    for name in [name for name in found if ".tfrecord-" in name]:
        with (out / name).open("rb") as file:
            found[name] = [_features(tfrecord, data) for data in tfrecord.read(file)]
    return found


def _features(tfrecord: Any, data: Any) -> Any:
    try:
        parsed = tfrecord.parse_example(data)
    except Exception as error:
        return f"damaged: {error}"
    return sorted((name, feature.SerializeToString()) for name, feature in parsed.items())


def _images(folder: pathlib.Path, count: int) -> pathlib.Path:
    """Writes images with prompts; one is broken."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for number in range(count):
        pixels = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03}.png")
        (folder / f"{number:03}.txt").write_text("a red circle and a star")
    (folder / "007.png").write_bytes(b"broken")
    return folder


def predict(
    name: str, model_dir: pathlib.Path, images: pathlib.Path, count: int, out: pathlib.Path, *flags: str
) -> Command:
    """Makes the command `predict`, and its images if they aren't there."""
    images = images if images.exists() else _images(images, count)
    arguments = (f"--checkpoint={model_dir}", f"--out={out}", "--batch-size=4", *flags, str(images))
    return Command(name, "richhf_jax.predict", arguments, out, "", _SAVE_OFTEN, (3,))


def make(options: Any, folder: pathlib.Path) -> list[Command]:
    """Makes all commands, with their inputs in a folder; each writes to a folder FOLDER/NAME/deep/out."""
    from richhf_jax.datasets import sample_sources

    inputs = folder / "inputs"
    inputs.mkdir()

    def out(name: str) -> pathlib.Path:
        return folder / name / "deep/out"

    def of_predict(name: str, *flags: str) -> Command:
        return predict(name, options.checkpoint, inputs / "images", 80, out(name), *flags)

    def of_export(to: str, **more: Any) -> Command:
        name = f"export {to}"
        arguments = (f"--checkpoint={options.checkpoint}", f"--to={to}", f"--out={out(name)}")
        return Command(name, "richhf_jax.export", arguments, out(name), **more)

    def of_convert(form: str, **more: Any) -> Command:
        name = f"convert {form}"
        arguments = (f"--from={options.checkpoint}", f"--format={form}", f"--to={out(name)}")
        model = "--gin_file=models/rahf_tiny.gin"
        return Command(name, "richhf_jax.convert", (*arguments, model), out(name), alone=True, **more)

    sample_sources.write(inputs / "samples", examples=24, image_size=64)
    (inputs / "mlp.gin").write_text(_MLP)
    train = (
        *(f"--tfds_data_dir={options.data_dir}", "--gin_file=experiments/quickstart.gin"),
        *(f"--gin_file={inputs}/mlp.gin", f"--gin.MODEL_DIR='{out('train')}'", "--gin.TRAIN_STEPS=24"),
        *("--gin.CHECKPOINT_PERIOD=6", "--gin.BATCH_SIZE=8", "--gin.LOG_PERIOD=6"),
        "--gin.train.train_eval_dataset_cfg=None",
    )
    datasets = (f"--data_dir={out('datasets')}",)
    web = (f"--shards={inputs}/samples/web/webdataset/*.tar", f"--data_dir={out('web_captions')}")
    return [
        of_predict("predict png", "--overlay"),
        of_predict("predict npz", "--heatmaps=npz", "--report"),
        Command("train", "richhf_jax.train", train, out("train"), content=checkpoints, alone=True),
        of_export("safetensors"),
        of_export("stablehlo"),
        of_export("orbax", content=checkpoints, alone=True),
        of_convert("orbax", content=checkpoints),
        of_convert("huggingface"),
        Command(
            "datasets", "richhf_jax.datasets", datasets, out("datasets"), _SMALL_SPLITS, content=data_sets
        ),
        Command(
            "web_captions", "richhf_jax.datasets.web_captions", (*web, "--processes=2"), out("web_captions")
        ),
    ]


def choose(options: Any, folder: pathlib.Path) -> list[Command]:
    """Makes the commands that the options name, all if they name none, and imports their modules."""
    os.environ.update(ENVIRONMENT)
    sys.path[:0] = ENVIRONMENT["PYTHONPATH"].split(":")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
    found = make(options, folder)
    unknown = set(options.commands) - {command.name for command in found}
    if unknown:
        sys.exit(f"{', '.join(unknown)}: the commands are {', '.join(command.name for command in found)}")
    chosen = [command for command in found if command.name in options.commands or not options.commands]
    for command in chosen:
        _import(command.module)
    return chosen


def _import(module: str) -> None:
    importlib.import_module(module)
    is_package = (
        importlib.util.find_spec(f"{module}.__main__") if hasattr(sys.modules[module], "__path__") else None
    )
    if is_package:
        importlib.import_module(f"{module}.__main__")


def add_options(parser: Any, each: Sequence[str]) -> None:
    """Adds the common options to a parser; `each`: name and default of the number of interruptions."""
    parser.add_argument("commands", nargs="*", help="names of commands; default: all")
    parser.add_argument(
        "--checkpoint", required=True, help="a MODEL_DIR that launch/quickstart.sh has trained"
    )
    parser.add_argument("--data_dir", required=True, help="its data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        f"--{each[0]}", type=int, default=int(each[1]), help="for each command; default: %(default)s"
    )
    parser.add_argument("--out", help="a new folder, which is kept; default: a temporary one")
