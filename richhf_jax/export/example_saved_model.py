"""Predicts from an image with the SavedModel, without richhf_jax; without arguments, prints its usage.

pip install tensorflow; or tensorflow-text, if the model reads text
"""

import hashlib
import importlib
import json
import pathlib
import sys
import unicodedata

import numpy as np
import tensorflow as tf

here = pathlib.Path(__file__).parent


def check():
    """Checks that the files are those that were exported."""
    checksums = (here / "SHA256SUMS").read_bytes().splitlines()
    files = [path for path in (here / "saved_model").rglob("*") if path.is_file()]
    for path in (here / "interface.json", *files):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if f"{digest}  {path.relative_to(here).as_posix()}".encode() not in checksums:
            sys.exit(f"{path} is damaged: copy the export again")


check()
interface = json.loads((here / "interface.json").read_bytes())
reads_text = "prompts" in interface
if reads_text:
    importlib.import_module("tensorflow_text")  # Loading needs its operations.


def heatmaps_of(heatmaps, height, width):
    """Writes the heatmaps [kinds, side, side]. Returns their peaks on the image, and the file's path."""
    file = pathlib.Path("heatmaps.npy").absolute()
    try:
        np.save(file, heatmaps)
    except OSError as error:
        sys.exit(f"{file} can't be written: {error}. Run this in a folder where you may write")
    side = rows = columns = interface["image_side"]
    if interface["fit"] == "letterbox":
        rows, columns = (max(round(pixels * side / max(height, width)), 1) for pixels in (height, width))
    top, left = (side - rows) // 2, (side - columns) // 2
    peaks = heatmaps[:, top : top + rows, left : left + columns].max((1, 2)).tolist()
    return {"heatmap_peaks": dict(zip(interface["heatmaps"], peaks, strict=True)), "heatmaps": str(file)}


def main(path, prompt=""):
    """Prints scores, heatmaps' peaks and words; writes heatmaps.npy. It leaves out what the model lacks."""
    if reads_text and all(c.isspace() or unicodedata.category(c) in ("Cc", "Cf") for c in prompt):
        sys.exit("the prompt is empty")
    try:
        data = pathlib.Path(path).read_bytes()
        height, width = tf.io.decode_image(data, expand_animations=False).shape[:2]
    except (OSError, tf.errors.InvalidArgumentError) as error:
        sys.exit(f"{path} is no image that can be read: {error}".splitlines()[0])
    if min(width, height) < (least := interface["least_side"]):
        sys.exit(f"{path}: the image has {width} x {height} pixels; {least} x {least} are the least")
    model = tf.saved_model.load(str(here / "saved_model"))
    serve = model.signatures["serving_default"]
    inputs = {"image_bytes": tf.constant([data])}
    if reads_text:
        inputs["prompts"] = tf.constant([prompt])
    outputs = serve(**inputs)
    numbers = outputs.keys() & {"scores", "heatmaps", "uncertainty"}
    if not all(np.isfinite(outputs[name]).all() for name in numbers):
        sys.exit(f"{path}: the model's outputs aren't finite, so they say nothing of the image")
    first = {name: values[0].numpy() for name, values in outputs.items()}
    found = {}
    if "scores" in first:
        found["scores"] = dict(zip(interface["scores"], first["scores"].tolist(), strict=True))
    if "heatmaps" in first:
        found |= heatmaps_of(first["heatmaps"], height, width)
    if "words" in first:
        columns = (first[name].tolist() for name in ("words", "misaligned", "misaligned_probability"))
        found["words"] = [
            {"text": text.decode(), "misaligned": mark, "probability": None if p != p else p}
            for text, mark, p in zip(*columns, strict=True)
        ]
    if "uncertainty" in first:
        found["uncertainty"] = dict(zip(interface["scores"], first["uncertainty"].tolist(), strict=True))
    print(json.dumps(found, indent=2, allow_nan=False))


if __name__ == "__main__":
    if len(sys.argv) != 2 + reads_text:
        print(f"usage: python example.py IMAGE{' PROMPT' if reads_text else ''}", file=sys.stderr)
        sys.exit(2)
    main(*sys.argv[1:])
