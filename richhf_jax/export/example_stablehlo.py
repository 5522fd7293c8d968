"""Predicts from an image with the exported program, without richhf_jax; without arguments, prints its usage.

pip install flatbuffers jax pillow safetensors; if the model reads text, sentencepiece, or tokenizers for CLIP
"""

import hashlib
import importlib
import json
import pathlib
import re
import sys
import unicodedata

import jax
import jax.export
import numpy as np
import safetensors.numpy
from PIL import Image, ImageOps

here = pathlib.Path(__file__).parent
checksums = (here / "SHA256SUMS").read_bytes().splitlines()


def checked(name):
    """Returns the content of one of the export's files, if it is the one that was exported."""
    content = (here / name).read_bytes()
    if f"{hashlib.sha256(content).hexdigest()}  {name}".encode() not in checksums:
        sys.exit(f"{here / name} is damaged: copy the export again")
    return content


interface = json.loads(checked("interface.json"))
side, length, target_length = (
    interface.get(name) for name in ("image_side", "inputs_length", "targets_length")
)
reads_text = "prompts" in interface
is_clip = "start_id" in interface
if is_clip:
    tokenizers = importlib.import_module("tokenizers")  # pip install tokenizers; no sentencepiece
    vocabulary = tokenizers.Tokenizer.from_str(checked("tokenizer.json").decode())
elif reads_text:
    sentencepiece = importlib.import_module("sentencepiece")
    vocabulary = sentencepiece.SentencePieceProcessor(model_proto=checked("vocabulary.model"))


def tokens(text):
    """Encodes a text to ids, then EOS, then zeros. (A long text is cut anywhere; training cuts at a word.)

    For CLIP, the start stands before them. CLIP's training cuts anywhere, too.
    """
    if is_clip:
        pieces = vocabulary.encode(text, add_special_tokens=False).ids
        ids = [interface["start_id"], *pieces[: length - 2], interface["end_id"]]
    else:
        ids = [*vocabulary.encode(text)[: length - 1], interface["eos_id"]]
    return ids + [0] * (length - len(ids))


def words_of(prompt):
    """Returns the words to judge, their pieces in a row, and for each piece the number of its word."""
    words = [word for word in re.split(interface["separators"], prompt) if word]
    words = [word for word in words if vocabulary.encode(word)]
    pairs = [(piece, i + 1) for i, word in enumerate(words) for piece in vocabulary.encode(word)]
    pairs = (pairs + [(0, 0)] * target_length)[:target_length]
    return words, *np.array(pairs, np.int32).T


def square_of(path):
    """Returns an image as the model sees it, uint8 [side, side, 3], and its place in the square."""
    try:
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGBA")
    except Exception as error:  # A broken image may raise anything.
        sys.exit(f"{path} is no image that can be read: {error}")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    width, height = image.size
    if min(width, height) < (least := interface["least_side"]):
        sys.exit(f"{path}: the image has {width} x {height} pixels; {least} x {least} are the least")
    width = height = side
    if interface["fit"] == "letterbox":
        width, height = (max(round(pixels * side / max(image.size)), 1) for pixels in image.size)
    if interface["fit"] == "centre_crop":
        width, height = (int(side * pixels / min(image.size)) for pixels in image.size)
    resampling = Image.Resampling.BICUBIC if interface["fit"] == "centre_crop" else Image.Resampling.BILINEAR
    left, top = int((width - side) / 2), int((height - side) / 2)
    square = image.resize((width, height), resampling).crop((left, top, left + side, top + side))
    return np.asarray(square), np.array([-top, -left, height - top, width - left], np.int32)


def heatmaps_of(heatmaps, box):
    """Writes the heatmaps [kinds, side, side]. Returns their peaks on the image, and the file's path."""
    file = pathlib.Path("heatmaps.npy").absolute()
    try:
        np.save(file, heatmaps)
    except OSError as error:
        sys.exit(f"{file} can't be written: {error}. Run this in a folder where you may write")
    top, left, bottom, right = np.clip(box, 0, side)
    peaks = heatmaps[:, top:bottom, left:right].max((1, 2)).tolist()
    return {"heatmap_peaks": dict(zip(interface["heatmaps"], peaks, strict=True)), "heatmaps": str(file)}


def main(path, prompt=""):
    """Prints scores, heatmaps' peaks and words; writes heatmaps.npy. It leaves out what the model lacks."""
    if reads_text and all(c.isspace() or unicodedata.category(c) in ("Cc", "Cf") for c in prompt):
        sys.exit("the prompt is empty")
    image, box = square_of(path)
    inputs = {"image": image[None]}
    if reads_text:
        prompts = [tokens(form.replace("{prompt}", prompt)) for form in interface["prompts"]]
        inputs["encoder_input_tokens"] = np.array([prompts], np.int32)
    if target_length:
        words, pieces, numbers = words_of(prompt)
        inputs |= {"word_pieces": pieces[None], "word_numbers": numbers[None]}
    if interface["fit"] == "letterbox":
        inputs["image_box"] = box[None]
    program = jax.export.deserialize(bytearray(checked("rahf.stablehlo")))
    try:
        outputs = jax.device_get(program.call(safetensors.numpy.load(checked("model.safetensors")), inputs))
    except jax.errors.JaxRuntimeError as error:
        if "deserialize StableHLO" not in str(error):
            raise
        required = " ".join(interface["requires"])
        sys.exit(f"JAX {jax.__version__} is too old for this program: pip install '{required}'")
    numbers = outputs.keys() & {"scores", "heatmaps", "uncertainty"}
    if not all(np.isfinite(outputs[name]).all() for name in numbers):
        sys.exit(f"{path}: the model's outputs aren't finite, so they say nothing of the image")
    found = {}
    if "scores" in outputs:
        found["scores"] = dict(zip(interface["scores"], outputs["scores"][0].tolist(), strict=True))
    if "heatmaps" in outputs:
        found |= heatmaps_of(outputs["heatmaps"][0], box)
    if target_length:
        # Nothing is known of words for which the decoder has no room.
        probabilities = [*outputs["misaligned_probability"][0].tolist(), *[float("nan")] * len(words)]
        marks = [*outputs["misaligned"][0].tolist(), *[False] * len(words)]
        found["words"] = [
            {"text": text, "misaligned": mark, "probability": None if p != p else p}
            for text, mark, p in zip(words, marks, probabilities, strict=False)
        ]
    if "uncertainty" in outputs:
        found["uncertainty"] = dict(zip(interface["scores"], outputs["uncertainty"][0].tolist(), strict=True))
    print(json.dumps(found, indent=2, allow_nan=False))


if __name__ == "__main__":
    if len(sys.argv) != 2 + reads_text:
        print(f"usage: python example.py IMAGE{' PROMPT' if reads_text else ''}", file=sys.stderr)
        sys.exit(2)
    main(*sys.argv[1:])
