"""The settings of a network, for `model.json`."""

import dataclasses
from typing import Any

import jax.numpy as jnp


def settings(config: Any) -> dict[str, Any]:
    """Names every setting of a network's configuration; JSON-able."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    # These are no settings of the model: the kernel changes no output, and another device may not have it;
    # stochastic depth is of training alone.
    for name in ("attention_kernel", "stochastic_depth_rate"):
        fields.pop(name, None)
    # Without them, a description is that of the versions which had no such settings.
    for name, without in (("score_variance", False), ("pad_id", None)):
        if name in fields and fields[name] is without:
            del fields[name]
    if "dtype" in fields:  # A name, or a type of numpy or jax.
        fields["dtype"] = jnp.dtype(fields["dtype"]).name
    return fields
