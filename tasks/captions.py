"""Registers captioning tasks on real images, for both variants of the model.

    coco_captions, coco_captions_augmented_prompt   TFDS's own data set; one of an image's captions is drawn
    web_captions, web_captions_augmented_prompt     built by `python -m richhf_jax.datasets.web_captions`
    coco_corrupted_captions, web_corrupted_captions, ...  the same, half of them made wrong, with labels
    coco_flawed_captions, web_flawed_captions, ...  the same images with painted flaws, see `flaws`

COCO's images and splits are those of Karpathy and Li; like them, training uses `restval`, too.
"""

import gin

from richhf_jax import preprocessors, word_table
from richhf_jax.datasets import caption_words
from tasks import providers


@gin.configurable
def english_words(**changes) -> word_table.Words:
    """Returns the table of English words; gin may set each field of `word_table.Words`."""
    return word_table.Words.changed(caption_words.ENGLISH, **changes)


providers.add_captions_tasks(
    "coco",
    "coco_captions/2014:1.1.0",
    {"train": "train+restval", "validation": "val", "test": "test"},
    english_words,
    first_preprocessors=[preprocessors.draw_caption],
)
providers.add_captions_tasks("web", "web_captions/default:1.0.0", ["train", "validation"], english_words)
