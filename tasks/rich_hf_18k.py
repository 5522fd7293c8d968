"""Registers tasks on RichHF-18K and the mixtures of the paper's pretraining, for both variants of the model.

    rich_hf_18k_{multi_head,augmented_prompt}          rich feedback
    rich_hf_18k_<kind>_{multi_head,augmented_prompt}   a single kind of it: plausibility, ..., keywords
    rich_hf_18k_corrupted_...                          rich feedback, some of its prompts made wrong
    rich_hf_18k_plus_...                               mixtures: rich feedback as it is, and with such prompts
    rahf_pretrain, rahf_pretrain_augmented_prompt      captions of the web, and RichHF-18K's keywords
    rahf_pretrain_coco, ...                            the same with COCO's captions
    rahf_pretrain_plus, ...                            rahf_pretrain's, and all corrupted and flawed tasks

The mixtures have `providers.caption_rate.rate` captions for each record of RichHF-18K. The paper mixed WebLI
into its pretraining (section 4.1.2); it doesn't give the rate.
"""

from richhf_jax.datasets.rich_hf_18k import builder
from tasks import captions, providers

providers.add_rich_feedback_tasks(
    "rich_hf_18k",
    f"rich_hf_18k:{builder.RichHf18k.VERSION}",
    ["train", "validation", "test"],
    captions.english_words,
)
providers.add_pretraining_mixture("rahf_pretrain", "web_captions", "rich_hf_18k_keywords")
providers.add_pretraining_mixture(
    "rahf_pretrain_plus",
    "web_captions",
    "rich_hf_18k_keywords",
    {
        "web_corrupted_captions": providers.corrupted_caption_rate,
        "web_flawed_captions": providers.flawed_caption_rate,
    },
    {"rich_hf_18k_corrupted": providers.corrupted_feedback_rate},
)
providers.add_pretraining_mixture("rahf_pretrain_coco", "coco_captions", "rich_hf_18k_keywords")
