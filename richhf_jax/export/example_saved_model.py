"""Scores an image with the SavedModel, without richhf_jax: python example.py IMAGE PROMPT.

pip install tensorflow-text
"""

import pathlib
import sys

import tensorflow as tf
import tensorflow_text  # noqa: F401  Loading needs its operations.

model = tf.saved_model.load(str(pathlib.Path(__file__).parent / "saved_model"))


def main(path, prompt):
    """Prints the scores, the heatmaps' peaks and the words."""
    outputs = model.signatures["serving_default"](
        image_bytes=tf.constant([pathlib.Path(path).read_bytes()]), prompts=tf.constant([prompt])
    )
    print("scores", outputs["scores"][0].numpy().tolist())
    print("peaks", tf.reduce_max(outputs["heatmaps"][0], [1, 2]).numpy().tolist())
    for word, probability in zip(outputs["words"][0], outputs["misaligned_probability"][0], strict=True):
        print(f"{float(probability):.3f} {word.numpy().decode()}")


if __name__ == "__main__":
    main(*sys.argv[1:])
