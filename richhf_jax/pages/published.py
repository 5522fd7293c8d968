"""Published figures on RichHF-18K's test split: rows for the tables, none of which was measured here."""

from collections.abc import Mapping, Sequence

from richhf_jax.feedback import AESTHETICS, ALIGNMENT, IMPLAUSIBILITY, MISALIGNMENT, OVERALL, PLAUSIBILITY
from richhf_jax.pages.table_formats import Row

_PAPER = "Liang et al., Rich Human Feedback for Text-to-Image Generation, CVPR 2024, Tables 1 to 4"
_RELEASE = (
    "the authors' later PyTorch release (ViT-L/16 at 384 pixels, T5 base); its keywords are averaged over"
    " images, not pooled"
)
_IMAGE_DOCTOR = "ImageDoctor (a vision-language model of 3B parameters), its authors' figures"
_HEIE = "HEIE, its authors' figures"

_HEATMAP = ("mse", "mse_empty", "cc", "kld", "sim", "nss", "auc_judd")
_KEYWORDS = ("precision", "recall", "f1")


def _scores(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Names PLCC and, if it is known, SRCC of each kind."""
    return {
        f"score/{metric}/{kind}": value
        for kind, pair in values.items()
        for metric, value in zip(("plcc", "srcc"), pair, strict=False)
    }


def _heatmap(kind: str, *values: float, names: Sequence[str] = _HEATMAP) -> dict[str, float]:
    return {f"heatmap/{name}/{kind}": value for name, value in zip(names, values, strict=True)}


def _keywords(*percent: float) -> dict[str, float]:
    return {f"keywords/{name}": value / 100 for name, value in zip(_KEYWORDS, percent, strict=True)}


ROWS = (
    Row(
        "ResNet-50",
        _scores(
            {
                PLAUSIBILITY: (0.495, 0.487),
                AESTHETICS: (0.370, 0.363),
                ALIGNMENT: (0.108, 0.119),
                OVERALL: (0.337, 0.308),
            }
        )
        | _heatmap(IMPLAUSIBILITY, 0.00996, 0.00093, 0.506, 1.669, 0.338, 2.924, 0.909),
        _PAPER,
    ),
    Row(
        "PickScore (off the shelf)",
        _scores(
            {
                PLAUSIBILITY: (0.0098, 0.0280),
                AESTHETICS: (0.131, 0.140),
                ALIGNMENT: (0.346, 0.340),
                OVERALL: (0.202, 0.226),
            }
        ),
        _PAPER,
    ),
    Row("CLIP (off the shelf)", _scores({ALIGNMENT: (0.185, 0.130)}), _PAPER),
    Row(
        "CLIP (fine-tuned)",
        _scores(
            {
                PLAUSIBILITY: (0.390, 0.378),
                AESTHETICS: (0.357, 0.360),
                ALIGNMENT: (0.398, 0.390),
                OVERALL: (0.353, 0.352),
            }
        ),
        _PAPER,
    ),
    Row(
        "CLIP gradient",
        _heatmap(MISALIGNMENT, 0.00817, 0.00551, 0.015, 3.844, 0.041, 0.143, 0.643),
        _PAPER,
    ),
    Row(
        "RAHF multi-head",
        _scores(
            {
                PLAUSIBILITY: (0.666, 0.654),
                AESTHETICS: (0.605, 0.591),
                ALIGNMENT: (0.487, 0.500),
                OVERALL: (0.582, 0.561),
            }
        )
        | _heatmap(IMPLAUSIBILITY, 0.01216, 0.00141, 0.425, 1.971, 0.302, 2.330, 0.877)
        | _heatmap(MISALIGNMENT, 0.00303, 0.00015, 0.206, 2.932, 0.093, 1.335, 0.838)
        | _keywords(62.9, 33.0, 43.3),
        _PAPER,
    ),
    Row(
        "RAHF augmented prompt",
        _scores(
            {
                PLAUSIBILITY: (0.693, 0.681),
                AESTHETICS: (0.600, 0.589),
                ALIGNMENT: (0.474, 0.496),
                OVERALL: (0.580, 0.562),
            }
        )
        | _heatmap(IMPLAUSIBILITY, 0.00920, 0.00095, 0.556, 1.652, 0.409, 3.085, 0.913)
        | _heatmap(MISALIGNMENT, 0.00304, 0.00006, 0.212, 2.933, 0.106, 1.411, 0.841)
        | _keywords(61.3, 34.1, 43.9),
        _PAPER,
    ),
    Row(
        "RAHF, PyTorch release",
        _scores(
            {
                PLAUSIBILITY: (0.739, 0.726),
                AESTHETICS: (0.629, 0.621),
                ALIGNMENT: (0.565, 0.564),
                OVERALL: (0.642, 0.634),
            }
        )
        | _heatmap(IMPLAUSIBILITY, 0.00724, 0.00078, 0.525, 1.649, 0.339, 2.029, 0.905)
        | _heatmap(MISALIGNMENT, 0.00324, 0.00035, 0.232, 2.848, 0.104, 1.256, 0.797)
        | _keywords(56.5, 45.2, 47.5),
        _RELEASE,
    ),
    Row(
        "ImageDoctor",
        _scores({PLAUSIBILITY: (0.727,), AESTHETICS: (0.681,), ALIGNMENT: (0.808,), OVERALL: (0.745,)})
        | _heatmap(IMPLAUSIBILITY, 0.571, names=["cc"])
        | _heatmap(MISALIGNMENT, 0.225, names=["cc"]),
        _IMAGE_DOCTOR,
    ),
    Row(
        "HEIE",
        _scores({PLAUSIBILITY: (0.697,)})
        | _heatmap(IMPLAUSIBILITY, 0.574, 1.634, 0.915, names=["cc", "kld", "auc_judd"]),
        _HEIE,
    ),
)
