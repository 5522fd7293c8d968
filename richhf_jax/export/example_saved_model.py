"""Scores an image with the SavedModel, without richhf_jax: python example.py IMAGE PROMPT.

pip install tensorflow-text
"""

import hashlib
import pathlib
import sys

import numpy as np
import tensorflow as tf
import tensorflow_text  # noqa: F401  Loading needs its operations.

here = pathlib.Path(__file__).parent


def check():
    """Checks that the files are those that were exported."""
    checksums = (here / "SHA256SUMS").read_bytes().splitlines()
    for path in (path for path in (here / "saved_model").rglob("*") if path.is_file()):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if f"{digest}  {path.relative_to(here).as_posix()}".encode() not in checksums:
            sys.exit(f"{path} is damaged: copy the export again")


def main(path, prompt):
    """Prints the scores, the heatmaps' peaks and the words; it leaves out what the model lacks."""
    check()
    model = tf.saved_model.load(str(here / "saved_model"))
    serve = model.signatures["serving_default"]
    inputs = {"image_bytes": tf.constant([pathlib.Path(path).read_bytes()])}
    if "prompts" in serve.structured_input_signature[1]:  # A model may read no text.
        inputs["prompts"] = tf.constant([prompt])
    try:
        outputs = serve(**inputs)
    except (OSError, tf.errors.InvalidArgumentError) as error:
        sys.exit(f"{path} is no image that can be read: {error}".splitlines()[0])
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
    main(*sys.argv[1:]) if len(sys.argv) == 3 else sys.exit(__doc__)
