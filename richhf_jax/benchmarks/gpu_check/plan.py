"""The jobs of the check, and their sizes. Imports nothing heavy: the check's own process never runs JAX."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence

from richhf_jax.benchmarks.gpu_check import turns

PROGRAM = "richhf_jax.benchmarks.gpu_check.job"
# Other ways to compile a step -> gin's bindings of the model, and XLA's options.
WAYS: Mapping[str, tuple[Sequence[str], Mapping[str, str | bool]]] = {
    "xla": (["ATTENTION_KERNEL = 'xla'"], {}),
    "cudnn": (["ATTENTION_KERNEL = 'cudnn'"], {}),
    # XLA tries no kernels.
    "untuned": ([], {"xla_gpu_autotune_level": "0"}),
    # Matrix products are cuBLAS's alone, so there are fewer kernels to compile and try.
    "notriton": ([], {"xla_gpu_enable_triton_gemm": False}),
}
# Name of a job after "part-" -> name of the part; the network's are those of `costs.parts`.
PARTS = {
    "vit": "ViT",
    "encoder": "ViT and encoder",
    "decoder": "decoder",
    "heatmap": "heatmap head",
    "score": "score head",
    "optimizer": "optimizer",
}


@dataclasses.dataclass(frozen=True)
class Size:
    """What the check measures.

    Attributes:
      name: its name, also in `richhf_jax.benchmarks.attention`.
      preset: a file of gin/models/.
      batches: images a step.
      torch: steps whose counterpart in PyTorch is measured, such as "train-8".
      ways: steps that are measured in each of `WAYS`.
      matrix_side: rows and columns of the matrices of the product.
      copied_bytes: bytes of the copies.
      timed: timed runs of each program.
      prediction: images and batch size of the prediction.
      learning: training steps and batch size.
      seconds: what JAX's start and small programs may take, and a program of the model.
    """

    name: str
    preset: str
    batches: Sequence[int]
    torch: Sequence[str]
    ways: Sequence[str]
    matrix_side: int
    copied_bytes: int
    timed: int
    prediction: tuple[int, int]
    learning: tuple[int, int]
    seconds: tuple[float, float]


_SIZES = (
    Size(
        name="base",
        preset="models/rahf_base.gin",
        batches=(8, 16, 32),
        torch=("predict-16", "train-8", "train-16"),
        ways=("train-8", "predict-16"),
        matrix_side=8192,
        copied_bytes=2**31,
        timed=10,
        prediction=(512, 32),
        learning=(300, 8),
        seconds=(90, 360),
    ),
    Size(
        name="tiny",
        preset="models/rahf_tiny.gin",
        batches=(2,),
        torch=("predict-2", "train-2"),
        ways=("train-2",),
        matrix_side=256,
        copied_bytes=2**24,
        timed=5,
        prediction=(32, 8),
        learning=(30, 2),
        seconds=(90, 200),
    ),
)
SIZES = {size.name: size for size in _SIZES}


def jobs(size_name: str, gin_arguments: Sequence[str] = (), only: Sequence[str] = ()) -> list[turns.Job]:
    """Lists the jobs in the order in which they get the device.

    Args:
      size_name: one of `SIZES`.
      gin_arguments: `--gin.NAME=VALUE` for the model.
      only: names of jobs, or the beginnings of names before a dash: "train" means "train-8", "train-16" and
        so on; none: all jobs.
    """
    size = SIZES[size_name]
    short, long = size.seconds
    images, _ = size.prediction
    steps, learning_batch = size.learning
    # The smallest batch comes first: it is the most likely to be ready in time, and to fit.
    base = [f"{step}-{batch}" for batch in size.batches for step in ("predict", "train")]
    plan = [
        ("versions", short, ()),
        ("ceilings", short, ()),
        ("numbers", long, ()),
        *((name, long, ()) for name in base),
        # It compiles while the others are paused, so they come first, and it gets little time.
        ("attention", short, base[:2]),
        # Ours ends first, so that the ratio can be told.
        *((f"torch-{name}", long, (name,)) for name in size.torch),
        *((f"part-{part}", long, ()) for part in PARTS),
        (f"command-{images}", long, ()),
        ("export", long, ()),
        *((f"{name}-{way}", long, (name,)) for way in WAYS for name in size.ways),
        # It finds its program in the cache. It is the last because it takes the device for the longest time.
        (f"learn-{steps}", long, (f"train-{learning_batch}",)),
    ]
    arguments = [f"--size={size_name}", *gin_arguments]
    return [
        turns.Job(name, [sys.executable, "-m", PROGRAM, name, *arguments], limit, after)
        for name, limit, after in plan
        if not only or any(name == wanted or name.startswith(f"{wanted}-") for wanted in only)
    ]
