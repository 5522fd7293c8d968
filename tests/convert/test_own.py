"""Our own files as sources: an array of another type is refused, because its checksum says nothing of it."""

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from richhf_jax import checkpoints, errors
from richhf_jax.convert import own


def test_parameters_are_of_floating_point(tmp_path):
    checkpoints.save_params(str(tmp_path), {"vit": {"bias": jnp.ones(2, jnp.int32)}})
    with pytest.raises(errors.UserError, match="checkpoint_0 is damaged: vit/bias can't be of type int32"):
        own.open_checkpoint(str(tmp_path))
    file = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"vit/bias": np.ones(2, np.int32)}, file, own.SAFETENSORS_METADATA)
    with pytest.raises(errors.UserError, match="model.safetensors: vit/bias can't be of type I32"):
        own.open_safetensors(str(file))
