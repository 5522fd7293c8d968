"""Checks values of settings: types, ranges and choices. gin's flags and model.json have the same.

The type is the annotation of the parameter that gets the value. The range depends on the parameter's name
alone (`RANGES`), so `dropout_rate` means the same in each network.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from richhf_jax import feedback


@dataclasses.dataclass(frozen=True)
class Range:
    """Range of a number, or of each number in a tuple.

    Attributes:
      least: the least value.
      greatest: the greatest value; None: there is none.
      is_open: whether the last limit is left out: the greatest, or without one the least.
    """

    least: float
    greatest: float | None = None
    is_open: bool = False

    def __contains__(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        if self.greatest is None:
            return value > self.least if self.is_open else value >= self.least
        return self.least <= value and (value < self.greatest if self.is_open else value <= self.greatest)

    def __str__(self) -> str:
        if self.greatest is None:
            return f"above {self.least}" if self.is_open else f"of at least {self.least}"
        return f"from {self.least} to {'below ' if self.is_open else ''}{self.greatest}"


# Range -> parameters of numbers, or of tuples of numbers. "name[key]" is an item of a dictionary.
_PARAMETERS = {
    Range(1): (
        "batch_size total_steps eval_steps log_period eval_period period checkpoint_period"
        " keep keep_best num_decodes num_shards warmup_steps steps_per_decay steps_per_cycle"
        " num_partitions num_cpu_devices ici_mesh_shape dcn_mesh_shape"
    ),
    # A model's sizes have upper limits, because a damaged or foreign model.json could ask for any.
    Range(1, 1000): (
        "num_layers num_encoder_layers num_decoder_layers depths num_conv_blocks layers_per_block num_steps"
    ),
    Range(1, 2**20): (
        "patch_size grid emb_dim num_heads head_dim mlp_dim vocab_size stem_filters heatmap_layers"
        " heatmap_output_layer score_conv_layers score_dense_layers row_strips widths stem_width"
        " projection_dim token_dim conv_dim conv_num_heads micro_condition_dim latent_dim code_dim"
        " codebook_size norm_groups"
    ),
    # One token of a text is its end.
    Range(2, 2**16): "task_feature_lengths[inputs] task_feature_lengths[targets] max_length levels",
    Range(1, 2**13): "task_feature_lengths[image]",
    Range(0): (
        "end_id pad_id guidance_scale num_microbatches gallery_size task_feature_lengths shard_id topk"
        " step_offset heatmap_loss_weight score_loss_weight keywords_loss_weight z_loss weight_decay"
        " learning_rate_multipliers rate"
        " base_learning_rate min_learning_rate decay_factor contrast saturation temperature alpha"
        " plausibility_weight count_weights least_change"
    ),
    Range(0, is_open=True): "norm_epsilon layer_norm_epsilon max_grad_norm deviation_factors",
    Range(-1): "eos_id",  # -1: no token ends a text.
    Range(0, 1): (
        "misalignment_threshold crop_probability crop_shares jitter_probability grey_probability"
        " jpeg_probability shown_share brightness hue topp flip_probability shift radii strengths"
        " clean_plausibility flaw_cost strength"
    ),
    Range(
        0, 1, is_open=True
    ): "dropout_rate stochastic_depth_rate label_smoothing beta beta1 beta2 adam_beta2 ema_decay",
    Range(0, 100): "jpeg_quality",
    Range(0, 2**32 - 1): "seed random_seed",
    Range(1, 2): "parameter_partitioning_dims",
}
RANGES = {name: limits for limits, names in _PARAMETERS.items() for name in names.split()}
# Parameter -> the texts that it may be.
CHOICES = {
    "variant": feedback.VARIANTS,
    "remat_policy": ("none", "minimal", "full"),
    "attention_kernel": ("auto", "xla", "cudnn"),
    "image_positions": ("running", "after_text", "one_point"),
    "norm": ("layer", "rms"),
    "score_kinds": feedback.SCORES,
    "heatmap_kinds": feedback.HEATMAPS,
    "head": ("cosine", "preference", "dense", "gradient"),
    "deconv_padding": ("SAME", "torch"),
    "fit": ("resize", "letterbox", "centre_crop"),
    "to": ("image", "prompt"),
    "metric_mode": ("min", "max"),
    "schedule": ("cosine", "linear"),
    "dtype": ("float32", "bfloat16", "float16"),
}
_WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", type(None): "None"}
# Words of other languages -> Python's.
_PYTHONS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_PYTHONS |= {"none": None, "null": None}


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of a value.

    Attributes:
      where: the entry that holds the value, for messages.
      name: the parameter's name, or "name[key]" for an item of a dictionary.
    """

    where: str
    name: str

    @property
    def parameter(self) -> str:
        """The parameter's name."""
        return self.name.partition("[")[0]

    @property
    def range(self) -> Range | None:
        """The parameter's range; None: any number is right."""
        return RANGES.get(self.name, RANGES.get(self.parameter))

    def resolved(self, value: Any) -> tuple["Place", Any]:
        """Returns the place of the value itself, and the value, where a value may refer to another one."""
        return self, value

    def is_known(self, value: Any) -> bool:
        """Returns whether this is the value itself, not a recipe for it."""
        del value
        return True


def options_of(hint: Any) -> tuple[Any, ...]:
    """Returns the types of a union, or the one type of another annotation."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def faults(place: Place, value: Any, hint: Any) -> Iterator[tuple[str, str]]:
    """Yields (where, message) for what is wrong with a value, or with the values inside it.

    Args:
      place: the value's place.
      value: the value.
      hint: the annotation of its parameter.
    """
    place, value = place.resolved(value)
    if not place.is_known(value):
        return
    options = options_of(hint)
    found = (_items(value, option) for option in options)
    items = next((items for items in found if items is not None), None)
    for key, item, item_hint in items or ():
        name = place.name if key is None else f"{place.name}[{key}]"
        yield from faults(dataclasses.replace(place, name=name), item, item_hint)
    if items is None or not (items or _is_allowed(place, value, options)):
        yield place.where, _message(place, value, options)


def _items(value: Any, hint: Any) -> list[tuple[str | None, Any, Any]] | None:
    """Returns (key, value, annotation) of what is in a value; None if its type isn't the annotated one."""
    outer, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if isinstance(value, dict) and outer in (Any, Mapping):
        return [(key, item, args[1] if args else Any) for key, item in value.items()]
    if isinstance(value, tuple | list) and outer in (Any, Sequence, type(value)):
        inner = args or (Any, ...)
        if outer is tuple and inner[-1] is not ...:
            return (
                [(None, *pair) for pair in zip(value, inner, strict=True)]
                if len(value) == len(inner)
                else None
            )
        return [(None, item, inner[0]) for item in value]
    fits = outer is Any or type(value) is outer or (outer is float and type(value) is int)
    return [] if fits else None


def _is_allowed(place: Place, value: Any, options: Sequence[Any]) -> bool:
    """Returns whether a value of the right type is in the range, or one of the choices."""
    if isinstance(value, str):
        # A path of this name would be ./none.
        is_none = (
            type(None) in options and value.lower() in ("none", "null") and place.name == place.parameter
        )
        return value in CHOICES.get(place.parameter, [value]) and not is_none
    if isinstance(value, int | float) and not isinstance(value, bool):
        return math.isfinite(value) and (place.range is None or value in place.range)
    return True


def _message(place: Place, value: Any, options: Sequence[Any]) -> str:
    given = f"the text {value!r}" if isinstance(value, str) else repr(value)
    hint = ""
    if isinstance(value, str) and value.lower() in _PYTHONS:
        meant = _PYTHONS[value.lower()]
        hint = f": write {meant}" if type(meant) in options else ""
    elif isinstance(value, int | float) and str in options:
        hint = f""": write "'{value}'", with both quotes"""
    expected = " or ".join(_expected(place, option) for option in options)
    return f"{place.where} must be {expected}, got {given}{hint}"


def _expected(place: Place, option: Any) -> str:
    if place.parameter in CHOICES and option in (str, Any):
        return " or ".join(map(repr, CHOICES[place.parameter]))
    if option in (int, float) and place.range:
        return f"{_WORDS[option]} {place.range}"
    outer, args = typing.get_origin(option) or option, typing.get_args(option)
    if outer in (tuple, Sequence):
        return f"a tuple of {len(args)}" if args and args[-1] is not ... and outer is tuple else "a tuple"
    return _WORDS.get(outer, "a dictionary" if outer is Mapping else "a reference, such as @name()")
