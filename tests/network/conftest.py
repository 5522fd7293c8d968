import json
import os
import pathlib

import jax
import pytest
from flax import traverse_util

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def random_params(random_values):
    """Makes variables of a module whose parameters are all random."""

    def make(module, *args, **kwargs):
        def init():
            return module.init(jax.random.key(0), *args, **kwargs)["params"]

        return {"params": random_values(jax.eval_shape(init))}

    return make


@pytest.fixture(scope="session")
def described():
    """Lists the arrays of a model's variables: name -> "float32 (96, 512) embed vocab".

    Those of collections beside the parameters are called "batch_stats/...".
    """

    def describe(variables):
        found = {}
        for collection in [name for name in variables if not name.endswith("_axes")]:
            prefix = "" if collection == "params" else f"{collection}/"
            axes = traverse_util.flatten_dict(variables[f"{collection}_axes"], sep="/")
            for name, leaf in traverse_util.flatten_dict(variables[collection], sep="/").items():
                of_leaf = " ".join(map(str, axes[f"{name}_axes"].names))
                found[prefix + name] = f"{leaf.dtype} {leaf.shape} {of_leaf}"
        return dict(sorted(found.items()))

    return describe


@pytest.fixture(scope="session")
def check_golden(described):
    """Compares the variables of a preset with those in golden/NAME.json; UPDATE_GOLDEN writes the file."""

    def check(name, variables):
        found = described(variables)
        file = GOLDEN / f"{name}.json"
        if os.environ.get("UPDATE_GOLDEN"):
            file.write_text(json.dumps(found, indent=1) + "\n")
        assert found == json.loads(file.read_text())
        # T5X's partitioner takes no array two of whose axes have one name.
        for array, description in found.items():
            axes = [axis for axis in description.rpartition(") ")[2].split() if axis != "None"]
            assert len(axes) == len(set(axes)), f"{array}: {description}"

    return check
