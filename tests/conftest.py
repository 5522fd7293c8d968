"""Strict mode of every test: two CPU devices, no silent broadcasting, no state left in gin.

Warnings are errors, too: see pyproject.toml.
"""

import atexit
import fcntl
import gc
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import hypothesis
import jaxtyping
import numpy as np
import pytest
from absl import logging

# Set before anything imports jax or TensorFlow, and inherited by the programs that tests start.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_NUM_CPU_DEVICES"] = "2"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Most tests compile a program and run it a few times: compilation without optimisations is twice as fast.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
# A run's processes, those of pytest-xdist and the programs that tests start, find each other's programs.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
# For PyTorch's build for GPUs. Without this it warns where there is no driver.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
# It imports triton, and beside TensorFlow that is a segmentation fault.
sys.modules["triton"] = None


# Checks every call of these modules' functions against the annotations, shapes included; an int may stand for
# a float. pytest's option --jaxtyping-packages does the same, but not in the workers of pytest-xdist.
CHECKED = ("network", "muse", "losses", "decoding", "metrics", "pixels", "keywords", "models", "predict")
jaxtyping.install_import_hook(
    [f"richhf_jax.{name}" for name in CHECKED],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)

# The same inputs in every run, and no time limit for one of them: the machine may be busy.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("fixed")

# They take minutes, and the end of a run shall not wait for one of them.
LONGEST = ("test_kill_and_resume.py", "test_train.py", "test_multihost.py")


def pytest_configure(config: pytest.Config) -> None:
    """Lets pytest-xdist keep the order of the files; it would begin with those of the most tests."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_collection_finish() -> None:
    """Spares the garbage collector the many objects that the imports of all tests made."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def no_shape_checks(monkeypatch: pytest.MonkeyPatch):
    """Lets a test see the function's own message about types and shapes that don't fit."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def rng() -> np.random.Generator:
    """Makes a generator of the same random numbers in every run."""
    return np.random.default_rng(0)


@pytest.fixture
def compiled():
    """Lists the seconds of each compilation."""
    from jax import monitoring

    seconds = []

    def listen(event, duration, **kwargs):
        if event.endswith("backend_compile_duration"):
            seconds.append(duration)

    monitoring.register_event_duration_secs_listener(listen)
    yield seconds
    monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(autouse=True)
def clean_globals():
    """Resets gin's configuration and absl's verbosity, which are global, after each test."""
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    if "gin" in sys.modules:
        sys.modules["gin"].clear_config()


@pytest.fixture(autouse=True, scope="module")
def clean_data_dir():
    """Resets seqio's data directory, which is global, too, after each module."""
    yield
    if "seqio" not in sys.modules:
        return
    seqio = sys.modules["seqio"]
    seqio.set_tfds_data_dir_override(None)
    # A task remembers the first directory that it was read from.
    for name in seqio.TaskRegistry.names():
        source = seqio.TaskRegistry.get(name).source
        if isinstance(source, seqio.TfdsDataSource):
            source.tfds_dataset.override_data_dir(None)


@pytest.fixture(scope="session")
def make_model():
    """Makes the model of the shipped gin files: a preset of models/, or the size of small.gin."""
    import gin

    from richhf_jax import gin_utils, models

    search_paths = [str(pathlib.Path(__file__).parent), *gin_utils.DEFAULT_SEARCH_PATHS]

    def make(variant, *bindings, preset=None):
        model_files = [f"models/{preset}.gin"] if preset else ["models/rahf.gin", "small.gin"]
        files = [*model_files, f"variants/{variant}.gin", "losses/default.gin"]
        gin.clear_config()
        gin_utils.parse_gin_flags(search_paths, files, bindings)
        return gin.get_configurable(models.RahfModel)()

    return make


@pytest.fixture(scope="session")
def random_values():
    """Fills a tree of shapes with random numbers: a zero bias or a scale of one would hide its misuse.

    NumPy draws them, because compiling a network's own initialisers takes seconds.
    """
    import jax

    def fill(shapes):
        rng = np.random.default_rng(4)

        def value(path, leaf):
            # Standard deviation 1 / sqrt(fan-in), 1 for vectors and tables.
            is_table = path and "embedding" in str(path[-1])
            deviation = 1 if is_table else np.prod(leaf.shape[:-1]) ** -0.5
            return rng.normal(0, deviation, leaf.shape).astype(np.float32)

        return jax.tree_util.tree_map_with_path(value, shapes)

    return fill


@pytest.fixture(scope="session")
def described():
    """Lists the arrays of a model's variables: name -> "float32 (96, 512) embed vocab".

    Those of collections beside the parameters are called "batch_stats/...".
    """

    from flax import traverse_util

    def describe(variables):
        found = {}
        for collection in [name for name in variables if not name.endswith("_axes")]:
            prefix = "" if collection == "params" else f"{collection}/"
            axes = traverse_util.flatten_dict(variables[f"{collection}_axes"], sep="/")
            for name, leaf in traverse_util.flatten_dict(variables[collection], sep="/").items():
                of_leaf = " ".join(map(str, axes[f"{name}_axes"].names))
                found[prefix + name] = f"{leaf.dtype} {leaf.shape} {of_leaf}"
        return dict(sorted(found.items()))

    return describe


@pytest.fixture
def check_golden(described, request: pytest.FixtureRequest):
    """Compares a preset's variables with golden/NAME.json beside the test; UPDATE_GOLDEN writes the file."""

    def check(name, variables):
        found = described(variables)
        file = request.path.parent / f"golden/{name}.json"
        if os.environ.get("UPDATE_GOLDEN"):
            file.write_text(json.dumps(found, indent=1) + "\n")
        assert found == json.loads(file.read_text())
        # T5X's partitioner takes no array two of whose axes have one name.
        for array, description in found.items():
            axes = [axis for axis in description.rpartition(") ")[2].split() if axis != "None"]
            assert len(axes) == len(set(axes)), f"{array}: {description}"

    return check


@pytest.fixture(scope="session")
def make_batch():
    """Makes a batch of the size of small.gin as the feature converter does, with random labels."""
    from richhf_jax import feedback

    def make(model, heatmaps, scores, texts, batch_size=4):
        rng = np.random.default_rng(3)
        prompts = feedback.Slots(heatmaps, scores, texts).prompts(model.module.variant)
        tokens = rng.integers(2, 32, (batch_size, prompts, 6), dtype=np.int32)
        tokens[..., 4:] = 0
        targets = rng.integers(2, 32, (batch_size, texts, 5), dtype=np.int32)
        ended = np.arange(5) >= rng.integers(2, 5, (batch_size, texts, 1))
        targets = np.where(ended, 0, targets)
        inputs = np.pad(targets[..., :-1], ((0, 0), (0, 0), (1, 0)))
        return {
            "image": rng.integers(0, 256, (batch_size, 16, 16, 3), dtype=np.uint8),
            "encoder_input_tokens": tokens,
            "heatmap_targets": rng.integers(0, 256, (batch_size, heatmaps, 16, 16), dtype=np.uint8),
            "heatmap_weights": rng.integers(0, 2, (batch_size, heatmaps)).astype(np.float32),
            "score_targets": rng.random((batch_size, scores), dtype=np.float32),
            "score_weights": rng.integers(0, 2, (batch_size, scores)).astype(np.float32),
            "decoder_input_tokens": inputs,
            "decoder_target_tokens": targets,
            "decoder_loss_weights": (targets > 0).astype(np.float32),
        }

    return make


@pytest.fixture(scope="session")
def once_a_run(tmp_path_factory: pytest.TempPathFactory):
    """Makes a folder by the first of pytest-xdist's processes that needs it, for all of them."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def make(name, build) -> pathlib.Path:
        folder, built = base / name, base / f"{name}.built"
        with (base / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not built.exists():
                shutil.rmtree(folder, ignore_errors=True)  # Of a process that failed.
                build(folder)
                built.touch()
        return folder

    return make


SMALL_SPLITS = {"train": 32, "validation": 8, "test": 8}


@pytest.fixture(scope="session")
def synthetic_data_dir(once_a_run) -> pathlib.Path:
    """Makes a TFDS data directory with both synthetic data sets, of a few examples a split."""
    import tensorflow_datasets as tfds

    from richhf_jax.datasets import synthetic_captions, synthetic_rich_hf

    def build(data_dir):
        for builder_cls in (synthetic_rich_hf.SyntheticRichHf, synthetic_captions.SyntheticCaptions):
            sizes = builder_cls.builder_configs["default"].split_sizes
            with pytest.MonkeyPatch.context() as patch:
                for split in sizes:
                    patch.setitem(sizes, split, SMALL_SPLITS[split])
                builder_cls(data_dir=data_dir).download_and_prepare(
                    download_config=tfds.download.DownloadConfig(try_download_gcs=False)
                )

    return once_a_run("synthetic", build)


@pytest.fixture(scope="session")
def sample_sources_dir(once_a_run) -> pathlib.Path:
    """Writes small files in the format of every real source; `consolidated` has the ratings as TFRecords."""
    from richhf_jax.datasets import consolidate, sample_sources

    def build(folder):
        sample_sources.write(folder, examples=12, image_size=64)
        (folder / "consolidated").mkdir()
        for raw in (folder / "raw").glob("*.jsonl"):
            consolidate.main([str(raw), str(folder / "consolidated" / f"{raw.stem}.tfrecord")])

    return once_a_run("samples", build)


@pytest.fixture(scope="session")
def sample_data_dir(once_a_run, sample_sources_dir: pathlib.Path) -> pathlib.Path:
    """Makes a TFDS data directory with rich_hf_18k and web_captions, by the shipped commands."""
    from richhf_jax.datasets.rich_hf_18k import __main__ as rich_hf_18k
    from richhf_jax.datasets.web_captions import __main__ as web_captions

    labels, images = sample_sources_dir / "consolidated", sample_sources_dir / "pick_a_pic"
    shards = sample_sources_dir / "web/webdataset/*.tar"

    def build(data_dir):
        rich_hf_18k.main([f"--labels={labels}", f"--pick_a_pic={images}", f"--data_dir={data_dir}"])
        web_captions.main([f"--shards={shards}", f"--data_dir={data_dir}", "--processes=1"])

    return once_a_run("samples_tfds", build)


@pytest.fixture(scope="session")
def make_model_dir(tmp_path_factory: pytest.TempPathFactory, random_values):
    """Makes a MODEL_DIR as training leaves it, of a small network with random parameters and a vocabulary."""
    import jax
    import jax.numpy as jnp

    from richhf_jax import checkpoints, model_description
    from richhf_jax.network import rahf, t5, vit
    from richhf_jax.predict import forward
    from tasks import vocabulary

    def make(variant="multi_head", fit="resize", dtype="float32", uncertainty=False) -> pathlib.Path:
        directory = tmp_path_factory.mktemp(variant)
        t5_config = t5.T5Config(
            vocab_size=448, dtype=dtype, emb_dim=32, num_heads=2, num_encoder_layers=1,
            num_decoder_layers=1, head_dim=16, mlp_dim=56, mlp_activations=("gelu", "linear"),
            dropout_rate=0.0,
        )  # fmt: skip
        vit_config = vit.ViTConfig(
            patch_size=4, grid=(8, 8), dtype=dtype, emb_dim=32, num_layers=1, num_heads=2, mlp_dim=40
        )
        heads_config = rahf.HeadsConfig(
            (("deconv", 8, 3), ("deconv", 8, 3)), ((8, 2),), (8,), score_variance=uncertainty
        )
        description = model_description.ModelDescription(
            rahf.Rahf(t5_config, vit_config, heads_config, variant),
            {"image": 32, "inputs": 24, "targets": 24},
            fit,
            0.5,
            {"task": "synthetic_rich_hf_multi_head", "batch_size": 16, "initial_checkpoint": None},
            vocabulary.get_vocabulary().sp_model,
        )
        params = random_values(forward.abstract_state(description).params)
        checkpoints.save_params(str(directory), jax.tree.map(jnp.asarray, params))
        description.write(directory)
        return directory

    return make


@pytest.fixture(scope="session")
def model_dir(make_model_dir) -> pathlib.Path:
    """Makes a MODEL_DIR of the multi-head variant."""
    return make_model_dir()


# Debian's packages of these names, which launch/test.sh installs.
CHROMIUM, CHROMEDRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
# The browser shows only the page: no network, no first-run page, no display.
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# Computes WCAG's contrast of every text on the page with its background.
CONTRASTS = """
const channel = (c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
// The browser itself turns any form of colour into pixels, and lays one over another.
function paint(colours) {
  canvas.clearRect(0, 0, 1, 1);
  for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
  return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((c) => c / 255);
}
const results = [];
for (const element of document.querySelectorAll("body *, body")) {
  const isText = [...element.childNodes].some((n) => n.nodeType === Node.TEXT_NODE && n.data.trim());
  if (!isText || element.closest("script, .spoken, option, svg") || !element.checkVisibility()) continue;
  const behind = [];
  for (let e = element; e; e = e.parentElement) behind.unshift(getComputedStyle(e).backgroundColor);
  const [text, back] = [paint([...behind, getComputedStyle(element).color]), paint(behind)].map(luminance);
  const contrast = (Math.max(text, back) + 0.05) / (Math.min(text, back) + 0.05);
  results.push([contrast, element.outerHTML.slice(0, 80)]);
}
return results.sort((a, b) => a[0] - b[0]);
"""


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory):
    """Starts Chromium, with what tests of pages need besides: a screen's size, and texts' contrasts."""
    from selenium import webdriver

    class Chromium(webdriver.Chrome):
        def set_screen(self, width: int, theme: str) -> None:
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
            self.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            media = [
                {"name": "prefers-color-scheme", "value": theme},
                # Without this, transitions would be measured midway.
                {"name": "prefers-reduced-motion", "value": "reduce"},
            ]
            self.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})

        def contrasts(self) -> list[tuple[float, str]]:
            """Returns the contrast of each text on the page, and the text's element; the lowest first."""
            return self.execute_script(CONTRASTS)

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # With the driver's path, selenium downloads none.
    driver = Chromium(options=options, service=webdriver.ChromeService(CHROMEDRIVER))
    yield driver
    driver.quit()


class RaterPage:
    """A page for raters in Chromium, with the actions that the tests of all such pages need.

    `site` has an `address` and the `secret` of a rater's link.
    """

    def __init__(self, driver, site):
        self.driver, self.site, self.run = driver, site, driver.execute_script

    def find(self, selector: str):
        return self.driver.find_element("css selector", selector)

    def open(self, width: int = 1280, theme: str = "light") -> None:
        self.driver.set_screen(width, theme)
        self.driver.get(f"{self.site.address}/r/{self.site.secret}")
        self.wait(lambda: self.run("return document.getElementById('guidelines')?.open"))
        self.find("#guidelines button").click()
        self.wait_for_task()

    def reload(self) -> None:
        self.driver.refresh()
        self.wait_for_task()

    def wait(self, condition) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, 10, 0.02).until(lambda _: condition())

    def wait_for_task(self) -> None:
        self.wait(lambda: self.run("return document.getElementById('task')?.hidden === false"))

    def wait_until_saved(self) -> None:
        self.wait(lambda: self.find("#saved").text == "Saved")

    def type(self, *keys: str) -> None:
        """Presses keys without moving the focus."""
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()


@pytest.fixture
def rater_page(driver):
    """Returns the class of pages for raters; the test also fails if a page writes to the console."""
    driver.get("about:blank")
    driver.get_log("browser")
    yield RaterPage
    assert driver.get_log("browser") == []
    driver.get("about:blank")


class LocalServer:
    """An app on a server in this process, which may stop and start again at the same address."""

    def __init__(self, app):
        self.app = app
        self.port = 0
        self.start()

    def start(self) -> None:
        import uvicorn

        config = uvicorn.Config(self.app, port=self.port, log_level="error", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]

    def stop(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@pytest.fixture(scope="session")
def local_server():
    """Returns the class of servers in this process."""
    return LocalServer


class ServerProcess:
    """The server of a project or a survey in its own process, which dies without a warning."""

    def __init__(self, command: str, folder: pathlib.Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self._port}"
        self._command = [
            sys.executable, "-m", f"richhf_jax.{command}", "serve", str(folder), f"--port={self._port}",
        ]  # fmt: skip
        self.start()

    def start(self) -> None:
        root = pathlib.Path(__file__).resolve().parents[1]
        environment = os.environ | {"PYTHONPATH": str(root)}
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, env=environment)
        while True:
            with socket.socket() as connection:
                if connection.connect_ex(("127.0.0.1", self._port)) == 0:
                    return
            assert self._process.poll() is None
            time.sleep(0.05)

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()


@pytest.fixture
def start_server():
    """Starts servers in processes of their own: of a command and a folder. They are killed at the end."""
    servers = []

    def start(command: str, folder: pathlib.Path) -> ServerProcess:
        servers.append(ServerProcess(command, folder))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()
