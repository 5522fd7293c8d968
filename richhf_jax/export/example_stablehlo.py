"""Scores an image by the exported program, without richhf_jax: python example.py IMAGE PROMPT.

pip install flatbuffers jax pillow safetensors sentencepiece
"""

import json
import pathlib
import re
import sys

import jax
import jax.export
import numpy as np
import safetensors.numpy
import sentencepiece
from PIL import Image

here = pathlib.Path(__file__).parent
interface = json.loads((here / "interface.json").read_text())
vocabulary = sentencepiece.SentencePieceProcessor(model_file=str(here / "vocabulary.model"))
side, length, target_length = (interface[name] for name in ("image_side", "inputs_length", "targets_length"))


def tokens(text):
    """Ids, EOS at the end, padded with 0. (What is too long ends anywhere; training cuts at a word.)"""
    ids = [*vocabulary.encode(text)[: length - 1], interface["eos_id"]]
    return ids + [0] * (length - len(ids))


def words_of(prompt):
    """The words to be judged; their pieces in a row, and the number of the word that each is of."""
    words = [word for word in re.split(interface["separators"], prompt) if word]
    words = [word for word in words if vocabulary.encode(word)]
    pairs = [(piece, i + 1) for i, word in enumerate(words) for piece in vocabulary.encode(word)]
    pairs = (pairs + [(0, 0)] * target_length)[:target_length]
    return words, *np.array(pairs, np.int32).T


def main(path, prompt):
    """Prints scores and words; writes the heatmaps to heatmaps.npy."""
    image = Image.open(path).convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
    words, pieces, numbers = words_of(prompt)
    prompts = [tokens(form.replace("{prompt}", prompt)) for form in interface["prompts"]]
    inputs = {
        "image": np.asarray(image)[None],
        "encoder_input_tokens": np.array([prompts], np.int32),
        "word_pieces": pieces[None],
        "word_numbers": numbers[None],
    }
    if interface["fit"] == "letterbox":  # Where in the square the image lies: here everywhere.
        inputs["image_box"] = np.array([[0, 0, side, side]], np.int32)
    program = jax.export.deserialize((here / "rahf.stablehlo").read_bytes())
    outputs = jax.device_get(program.call(safetensors.numpy.load_file(here / "model.safetensors"), inputs))
    found = {
        "scores": dict(zip(interface["scores"], outputs["scores"][0].tolist(), strict=True)),
        "words": [
            {"text": word, "misaligned": bool(marked), "probability": float(probability)}
            for word, marked, probability in zip(
                words, outputs["misaligned"][0], outputs["misaligned_probability"][0], strict=False
            )
        ],
    }
    print(json.dumps(found, indent=2))
    np.save("heatmaps.npy", outputs["heatmaps"][0])


if __name__ == "__main__":
    main(*sys.argv[1:])
