"""Scores an image with the SavedModel, without richhf_jax: python example.py IMAGE PROMPT.

pip install tensorflow-text

A model that reads no text takes no PROMPT, and needs only tensorflow.
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


def main(path, prompt=""):
    """Prints the scores, the heatmaps' peaks and the words; it leaves out what the model lacks."""
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
    for name in ("scores", "uncertainty"):
        if name in outputs:
            print(name, outputs[name][0].numpy().tolist())
    if "heatmaps" in outputs:
        print("peaks", tf.reduce_max(outputs["heatmaps"][0], [1, 2]).numpy().tolist())
    if "words" in outputs:
        for word, probability in zip(outputs["words"][0], outputs["misaligned_probability"][0], strict=True):
            print(f"{float(probability):.3f} {word.numpy().decode()}")


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) == 2 + reads_text else sys.exit(__doc__)
