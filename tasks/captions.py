"""Registers captioning tasks on real images, for both variants of the model.

    coco_captions, coco_captions_augmented_prompt   TFDS's own data set; one of an image's captions is drawn
    web_captions, web_captions_augmented_prompt     built by `python -m richhf_jax.datasets.web_captions`

COCO's images and splits are those of Karpathy and Li; like them, training uses `restval`, too.
"""

from richhf_jax import preprocessors
from tasks import providers

providers.add_captions_tasks(
    "coco_captions",
    "coco_captions/2014:1.1.0",
    {"train": "train+restval", "validation": "val", "test": "test"},
    first_preprocessors=[preprocessors.draw_caption],
)
providers.add_captions_tasks("web_captions", "web_captions/default:1.0.0", ["train", "validation"])
