import json
import pathlib
import sys

import jax
import pytest
import torch

from richhf_jax import errors, feedback
from richhf_jax.benchmarks import steps
from richhf_jax.costs import chips
from torch_twin import steps as twin_steps

TESTS = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    """Makes a preset with the sizes of small.gin."""
    path = tmp_path_factory.mktemp("gin") / "rahf_small.gin"
    files = ("gin/models/rahf.gin", TESTS / "small.gin", "gin/variants/multi_head.gin")
    path.write_text("".join(f"include '{file}'\n" for file in files))
    return str(path)


@pytest.fixture
def quick_torch(monkeypatch):
    """Runs PyTorch uncompiled: compilation takes a minute and a C++ compiler, and computes the same."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # On busy cores, threads that wait for each other take far longer.
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("quick_torch")
def test_both_steps_of_both(preset, tmp_path, capsys):
    path = tmp_path / "figures.json"
    arguments = [f"--preset={preset}", "--variant=augmented_prompt", "--batch_size=2", "--steps=2", "--torch"]
    steps.main([*arguments, f"--json={path}"])
    figures = json.loads(path.read_text())
    assert figures["image_size"] == [16, 16]
    assert figures["devices"] == 1  # There are two, but PyTorch has one.
    train, predict = figures["steps"]
    assert (train["step"], train["prompts_per_image"]) == ("train", 4)
    assert (predict["step"], predict["prompts_per_image"]) == ("predict", 7)
    # The ratio of three forward passes of 4 prompts to one of 7. The ViT is part of both.
    assert 1 < train["model_flops_per_image"] / predict["model_flops_per_image"] < 3
    for row in (train, predict):
        ours = row["jax"]
        assert ours["images_per_second"] == 2 / ours["step_seconds"]["median"]
        assert row["ratio"] == ours["images_per_second"] / row["torch"]["images_per_second"]
        assert ours["mfu"] is None  # A CPU's peak is unknown.
        assert row["torch"]["peak_bytes"] is None
    # Adam has two numbers beside each parameter.
    assert train["jax"]["peak_bytes"] > 3 * 4 * num_parameters(preset)
    assert 4 * num_parameters(preset) < predict["jax"]["peak_bytes"]
    printed = capsys.readouterr().out
    assert "augmented_prompt predict, batches of 2, prompts an image: 7" in printed
    assert f"ratio {train['ratio']:.2f}" in printed
    # Each figure is printed when it is known.
    told = ("jax   compile: ", "torch compile: ", "jax   steps 1 to 2: ", "torch steps 1 to 2: ", "ratio")
    places = [printed.index(text) for text in told]
    assert places == sorted(places)


def num_parameters(preset):
    model = steps.make_model(preset, "augmented_prompt")
    batch = steps.random_batch(model.module, feedback.ALL_SLOTS, 1)
    shapes = {name: array.shape for name, array in batch.items()}
    variables = jax.eval_shape(lambda: model.get_initial_variables(jax.random.key(0), shapes))
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


@pytest.mark.usefixtures("quick_torch")
def test_training_with_torch_lowers_its_loss(preset):
    module = steps.make_model(preset, "multi_head").module
    batch = steps.random_batch(module, feedback.ALL_SLOTS, 2)
    contender = twin_steps.TorchSteps(module, steps.PROMPT_LENGTH, steps.TARGET_LENGTH)
    contender.prepare("train", batch)

    def loss():
        with torch.no_grad():
            tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
            return contender._network.loss(tensors, feedback.ALL_SLOTS)

    before = loss()
    for _ in range(3):
        contender.run(batch)
    assert loss() < before


class Contender:
    """A contender that notes the order of runs."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def run(self, batch):
        self.log.append(self.name)


def test_turns(monkeypatch):
    log = []
    seconds = steps.measure({name: Contender(name, log) for name in "ab"}, {}, 7)
    assert log == ["a"] * 6 + ["b"] * 6 + ["a"] * 3 + ["b"] * 3
    assert {name: len(times) for name, times in seconds.items()} == {"a": 7, "b": 7}


def test_utilisation_is_of_all_devices():
    chip = chips.spec("NVIDIA H200")

    class Device:
        device_kind = "NVIDIA H200"

    class Measured:
        devices = (Device(), Device())

        def peak_bytes(self):
            return 5

    row = steps.figures({"jax": [1.0, 0.5, 9.0]}, {"jax": Measured()}, 4, chip.peak_flops / 8)
    assert row["jax"]["images_per_second"] == 4.0
    assert row["jax"]["mfu"] == 0.25
    assert row["jax"]["step_seconds"] == {"median": 1.0, "min": 0.5, "max": 9.0}
    assert "ratio" not in row


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset=models/nowhere.gin"], "nowhere.gin"),
        (["--gin.NO_SUCH=1"], "no gin file uses a macro of this name"),
        (["--batch_size=3"], "batch size 3 doesn't split over 2 data-parallel devices"),
    ],
)
def test_mistakes(arguments, message, preset):
    with pytest.raises(SystemExit, match=message):
        steps.main([f"--preset={preset}", *arguments])


def test_without_the_twin_the_fix_is_named(preset, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_twin", None)  # An installed wheel lacks it.
    monkeypatch.delitem(sys.modules, "torch_twin.steps")
    with pytest.raises(SystemExit, match="--torch: .*give the command in a checkout"):
        steps.main([f"--preset={preset}", "--torch"])


def test_memory_that_does_not_suffice(preset, monkeypatch):
    def prepare(self, step, batch):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory while trying to allocate 1 byte")

    monkeypatch.setattr(steps.OurSteps, "prepare", prepare)
    model = steps.make_model(preset, "multi_head")
    with pytest.raises(errors.UserError, match="multi_head train: a batch of 8 .* smaller --batch_size"):
        steps.measure_variant(model, 8, 1, with_torch=False)


def test_a_training_example_of_the_augmented_prompt():
    assert steps.TRAIN_SLOTS["augmented_prompt"] == feedback.Slots(heatmaps=1, scores=2, texts=1)
    assert sum(feedback.ALL_SLOTS) == 7
