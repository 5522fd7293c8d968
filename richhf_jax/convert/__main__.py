r"""Converts weights that others published to a checkpoint of ours, and back.

    python -m richhf_jax.convert --from=t5-v1_1-base --from=B_16.npz --to=pretrained

It reads checkpoints of T5X; directories of Hugging Face's T5, mT5, ViT, ResNet and CLIP; open_clip's weights;
.npz of the vision_transformer and big_vision line; ResNets of torchvision and timm; rahf_model.pt, the
PyTorch release of RAHF's authors; and our own checkpoints and .safetensors. The gin files say what the model
is. Without any it is models/rahf_base.gin; for that release models/rahf_pytorch_release.gin, for a ResNet
models/resnet50_scores.gin, for CLIP models/clip_score.gin.

Prints what becomes of every array: it is loaded; or resampled to the model's grid of positions; or
initialised (no source has it, so training starts it fresh); or unused (the model has no place for it). A
shape that does not fit is an error. The result goes to the new directory --to: `checkpoint_0`, for
INITIAL_CHECKPOINT_PATH; the printed table as conversion.txt; the model's configuration as config.gin; and for
predictions model.json and the vocabulary: vocabulary.model, or CLIP's tokenizer.json.
"""

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import safetensors
from absl import flags
from flax import traverse_util

from richhf_jax import errors, gin_utils, reading, train_state, writing
from richhf_jax.convert import (
    clip,
    huggingface,
    layers,
    mapping,
    own,
    rahf_pytorch,
    resnet,
    t5x,
    vit_npz,
    vocabularies,
    writers,
)
from richhf_jax.convert.source import ConvertError, Source
from richhf_jax.model_description import CONVERSION_FILE, SYSTEMS, ModelDescription

_FROM = flags.DEFINE_multi_string(
    "from",
    [],
    "A file or directory of weights. Give the flag again for more: one with T5 and one with ViT, say.",
)
_TO = flags.DEFINE_string("to", None, "A new directory for the result.")
_FORMAT = flags.DEFINE_enum(
    "format",
    "orbax",
    ["orbax", "safetensors", "huggingface"],
    "The result's form: our checkpoint, one file with our names, or t5/ and vit/ for transformers.",
)
_TEXT_LENGTH = flags.DEFINE_integer(
    "text_length",
    None,
    "For predictions: length in tokens of a prompt, and of the decoder's text. Default: the model's gin file"
    " says it (TEXT_LENGTH, TARGET_LENGTH).",
    lower_bound=2,
)
_ALLOW_MISMATCHED_SHAPES = flags.DEFINE_bool(
    "allow_mismatched_shapes",
    False,
    "Leave out a parameter whose shape does not fit; training starts it fresh.",
)


class Format(NamedTuple):
    """A format that we read.

    Attributes:
      name: the format's name in messages.
      recognises: tells whether a path looks like this format; called in the order of `FORMATS`.
      open: opens the weights at a path.
    """

    name: str
    recognises: Callable[[str], bool]
    open: Callable[[str], Source]


RESNET = Format("a ResNet of Hugging Face, torchvision or timm", resnet.is_resnet, resnet.open_resnet)
RELEASE = Format("the PyTorch release of RAHF", rahf_pytorch.is_rahf_pytorch, rahf_pytorch.open_rahf_pytorch)
CLIP = (
    Format("a directory of Hugging Face's CLIP", clip.is_huggingface, clip.open_huggingface),
    Format("open_clip's weights", clip.is_open_clip, clip.open_open_clip),
)
FORMATS = (
    Format("a checkpoint of T5X", t5x.is_t5x, t5x.open_t5x),
    Format("a checkpoint of ours", own.is_checkpoint, own.open_checkpoint),
    Format("a ViT's .npz", vit_npz.is_vit_npz, vit_npz.open_vit_npz),
    RESNET,
    CLIP[0],
    Format(
        "a directory of Hugging Face's T5 or ViT", huggingface.is_huggingface, huggingface.open_huggingface
    ),
    CLIP[1],
    Format("our .safetensors", own.is_safetensors, own.open_safetensors),
    RELEASE,
)
_WRITERS = {
    "orbax": writers.write_checkpoint,
    "safetensors": writers.write_safetensors,
    "huggingface": writers.write_huggingface,
}


def find_format(path: str) -> Format:
    """Recognises the format of the weights at a path.

    Raises:
      ConvertError: there is no such path, or it has an unknown format.
    """
    place = pathlib.Path(path)
    if not place.exists():
        raise ConvertError(f"--from={path}: no such file or directory")
    if not place.is_dir():
        reading.check_regular(place)
    with _explained(path):
        for candidate in FORMATS:
            if candidate.recognises(path):
                return candidate
    if place.is_dir():
        entries = sorted(entry.name for entry in place.iterdir())
        what = f"a directory with {', '.join(entries[:5]) or 'nothing'}{' ...' if len(entries) > 5 else ''}"
    else:
        with place.open("rb") as file:
            what = f"a file of {place.stat().st_size} bytes that begins with {file.read(8)!r}"
    known = "; ".join(candidate.name for candidate in FORMATS)
    raise ConvertError(f"--from={path} is {what}, in none of the known formats: {known}")


def open_weights(path: str) -> Source:
    """Opens the weights at a path, in one of `FORMATS`.

    Raises:
      ConvertError: there are none, or they are damaged.
    """
    found = find_format(path)
    with _explained(path):
        return found.open(path)


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    """Makes every error a UserError, because what is in a damaged file may lead to any."""
    try:
        yield
    except errors.UserError:
        raise
    except Exception as error:
        raise ConvertError(
            f"--from={path} is damaged, or in none of the known formats ({type(error).__name__}: {error})"
        ) from error


def default_gin_file(paths: Sequence[str]) -> str:
    """Returns the gin file of the model for weights whose user names no model."""
    files = {RELEASE: "models/rahf_pytorch_release.gin", RESNET: "models/resnet50_scores.gin"}
    files |= dict.fromkeys(CLIP, "models/clip_score.gin")
    formats = [find_format(path) for path in paths]
    return files.get(formats[0], "models/rahf_base.gin") if len(formats) == 1 else "models/rahf_base.gin"


def model_shapes(model: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns name -> shape and dtype of each parameter, and of each array of mutable collections.

    The shapes are those at the model's own image size.
    """
    shapes = model.input_shapes
    variables = jax.eval_shape(lambda rng: model.get_initial_variables(rng, shapes), jax.random.key(0))
    tree = variables["params"] | {train_state.MUTABLES: train_state.mutable_collections(variables)}
    arrays: dict[str, Any] = traverse_util.flatten_dict(tree, sep="/")
    return arrays


def unstacked_shapes(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
    """Replaces the shapes of scanned layers by those of the single layers."""
    single = {}
    for name, leaf in shapes.items():
        names = layers.layer_names(name, leaf.shape[0] if leaf.shape else 0)
        single |= {layer: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for layer in names} or {name: leaf}
    return single


def describe(
    model: Any,
    paths: Sequence[str],
    lengths: Mapping[str, int],
    vocabulary: str | None,
    unstacked: bool,
    fit: str = "resize",
    gin_flags: str | None = None,
) -> ModelDescription:
    """Describes the model for predictions.

    Args:
      model: a `models.BaseModel` of a system.
      paths: where the parameters came from.
      lengths: feature lengths, of which the system's are taken: "image" in pixels, "inputs" and "targets" in
        tokens.
      vocabulary: path of the vocabulary, see `vocabularies.find`.
      unstacked: whether the parameters are written as single layers, even if the model scans its layers.
      fit: how pictures become square, see `pixels.square`.
      gin_flags: flags of the gin files, for a training from the result; None: they aren't known.

    Raises:
      errors.UserError: see `vocabularies.find` and `ModelDescription.check`.
    """
    system = SYSTEMS[model.system]
    network = model.module
    if unstacked:
        configs = {name: getattr(network, name) for name in system.configs}
        network = network.clone(
            **{
                name: config.replace(scan_layers=False)
                for name, config in configs.items()
                if hasattr(config, "scan_layers")
            }
        )
    description = ModelDescription(
        network,
        {name: lengths[name] for name in system.lengths},
        fit,
        model.misalignment_threshold if system.marks_words else None,
        {"converted_from": ", ".join(paths)} | ({"gin_flags": gin_flags} if gin_flags else {}),
        vocabularies.find(model, paths, vocabulary),
        system=model.system,
    )
    description.check(model)
    return description


def convert(
    model: Any,
    paths: Sequence[str],
    to: str,
    output: str = "orbax",
    allow_mismatched_shapes: bool = False,
    description: ModelDescription | None = None,
) -> str:
    """Converts weights, writes the result, and prints the table.

    Args:
      model: the model for the weights, a `models.BaseModel` of a system.
      paths: the weights to read, each in one of `FORMATS`.
      to: a directory that doesn't exist yet, or is empty.
      output: "orbax", "safetensors" or "huggingface".
      allow_mismatched_shapes: see the flag.
      description: the description to write beside the parameters; None: none.

    Returns:
      The printed table.

    Raises:
      ConvertError: the weights can't be read or don't fit the model; nothing is written.
      errors.UserError: `to` isn't new, or can't be written.
    """
    writing.check_is_new(to, "--to")
    own.check_outside_checkpoints(to, "--to")
    sources = [open_weights(path) for path in paths]
    configs = {name: getattr(model.module, name) for name in SYSTEMS[model.system].configs}
    shapes = model_shapes(model)
    if output != "orbax":  # The names of the other formats do not depend on how we compile a stack.
        shapes = unstacked_shapes(shapes)
    conversion = mapping.make_plan(shapes, sources, allow_mismatched_shapes)
    notes = mapping.check_settings(configs, sources)
    if description and not model.outputs.heatmaps:  # Those of heatmaps must show all of a picture.
        notes += [
            f"FIT is {description.fit!r}, but {source.path} saw pictures by {source.fit!r}, so outputs"
            " differ from the published ones"
            for source in sources
            if source.fit not in (None, description.fit)
        ]
    mapping.check_copies(sources)
    table = mapping.format_table(conversion, sources, notes)
    print(table)
    with (
        writing.explained_disk_errors(to, also=(safetensors.SafetensorError,)),
        writing.new_directory(to, "--to") as directory,
    ):
        for line in _WRITERS[output](directory, conversion.tensors, configs):
            print(line)
        writing.write(directory / CONVERSION_FILE, table + "\n")
        gin_utils.write_operative_config(directory / "config.gin")
        if description and output != "huggingface":
            description.write(directory)
            file = SYSTEMS[description.system].vocabulary_file
            if file and description.vocabulary is None:  # CLIP's is never missing.
                print(f"for predictions, copy the SentencePiece model to {to}/{file}")
    return table


def main() -> None:
    """Runs the command."""
    paths, to = _FROM.value, _TO.value
    if not paths or not to:
        raise ConvertError("give what to read, --from=PATH, and a new directory for the result, --to=DIR")
    jax.config.update("jax_platforms", "cpu")  # Nothing is computed, so an accelerator stays free.
    gin_files = gin_utils.configure([default_gin_file(paths)])
    print(f"model: {' '.join(gin_files)}")
    model = gin_utils.macro("MODEL")
    macros = {"image": "IMAGE_SIDE", "inputs": "TEXT_LENGTH", "targets": "TARGET_LENGTH"}
    lengths = {
        name: gin_utils.macro(macro, f"task_feature_lengths[{name}]", int) for name, macro in macros.items()
    }
    if _TEXT_LENGTH.value:
        lengths |= dict.fromkeys(("inputs", "targets"), _TEXT_LENGTH.value)
    fit = gin_utils.macro("FIT", "fit", str)
    for path in paths:  # What is wrong with the weights comes before what is wrong with the vocabulary.
        source = open_weights(path)
        if not _ALLOW_MISMATCHED_SHAPES.value:
            vocabularies.check_table(model, source)
    description = describe(
        model,
        paths,
        lengths,
        gin_utils.macro("VOCABULARY"),
        _FORMAT.value != "orbax",
        fit,
        gin_utils.given_flags(gin_files),
    )
    convert(model, paths, to, _FORMAT.value, _ALLOW_MISMATCHED_SHAPES.value, description)
    print(f"written to {to}")


if __name__ == "__main__":
    gin_utils.run_program(main)
