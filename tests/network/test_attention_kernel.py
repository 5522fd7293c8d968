"""The choice of attention kernels, and the formulas of flash attention; cuDNN itself can't run on a CPU.

`python -m richhf_jax.benchmarks.attention` compares the kernels where there is a GPU.
"""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import partitioning as flax_partitioning
from jax._src.cudnn import fused_attention_stablehlo

from richhf_jax import errors, partitioning, trainer
from richhf_jax.costs import counter
from richhf_jax.network import attention_kernel, layers

H100 = attention_kernel.Device("gpu", (9, 0))
# An attention of the base size's encoder.
ENCODER = attention_kernel.Attention("bfloat16", 64, 1088, 1088, has_bias=True, sees_prefix=True)


@pytest.mark.parametrize(
    ("device", "changed", "reason"),
    [
        (H100, {}, None),
        (attention_kernel.Device("gpu", (8, 0)), {"dtype": "float16", "head_dim": 128}, None),
        (H100, {"has_bias": False, "q_length": 577, "kv_length": 577}, None),
        (attention_kernel.Device("cpu"), {}, "for a CPU"),
        (attention_kernel.Device("tpu"), {}, "for a TPU"),
        (attention_kernel.Device("gpu"), {}, "for another GPU"),
        (attention_kernel.Device("gpu", (7, 5)), {}, "compute capability is 7.5; 8.0 is the least"),
        (H100, {"dtype": "float32"}, "activations are float32; it takes bfloat16 and float16"),
        (H100, {"head_dim": 12}, "heads are 12 wide"),
        (H100, {"head_dim": 136}, "heads are 136 wide; it takes multiples of 8 up to 128"),
        (H100, {"q_length": 1089}, "1089 queries and 1088 keys"),
        (H100, {"kv_length": 1089}, "1088 queries and 1089 keys"),
        (H100, {"sees_prefix": False}, "letterboxed"),
    ],
)
def test_where_cudnn_is_possible(device, changed, reason):
    found = attention_kernel.obstacle(device, ENCODER._replace(**changed))
    assert (found is None) == (reason is None)
    assert reason is None or reason in found


def choose(kernel, dtype=jnp.bfloat16, sees_prefix=True):
    tokens = jnp.zeros((1, 4, 2, 8), dtype)
    return attention_kernel.choose(kernel, tokens, tokens, None, sees_prefix)


def test_auto_takes_what_is_possible_and_cudnn_says_why_not(monkeypatch):
    assert choose("auto") == choose("xla") == "xla"
    with pytest.raises(
        ValueError, match="attention_kernel = 'cudnn' isn't possible here: .* for a CPU; 'auto'"
    ):
        choose("cudnn")
    with pytest.raises(ValueError, match="must be one of .*, got 'flash'"):
        choose("flash")
    monkeypatch.setattr(attention_kernel, "current_device", lambda: H100)
    assert choose("auto") == choose("cudnn") == "cudnn"
    assert choose("xla") == choose("auto", jnp.float32) == choose("auto", sees_prefix=False) == "xla"


def test_the_device_is_that_of_the_mesh_or_this_machines(monkeypatch):
    assert attention_kernel.current_device() == attention_kernel.Device("cpu")
    cpu_mesh = jax.sharding.Mesh(jax.devices(), "data")

    def gpu(kind, capability):
        return types.SimpleNamespace(platform="gpu", device_kind=kind, compute_capability=capability)

    monkeypatch.setattr(jax, "local_devices", lambda backend=None: [gpu("NVIDIA H100", "9.0")])
    assert attention_kernel.current_device() == H100
    with jax.set_mesh(cpu_mesh):  # The program is for other hardware than this machine's.
        assert attention_kernel.current_device() == attention_kernel.Device("cpu")
    monkeypatch.setattr(jax, "local_devices", lambda backend=None: [gpu("AMD Instinct", "gfx942")])
    assert attention_kernel.current_device() == attention_kernel.Device("gpu")


def random_inputs(rng, has_bias):
    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    query, key, value, weights = (normal(3, 10, 2, 8) for _ in range(4))
    visible = jnp.arange(10)[None] < jnp.array([[10], [7], [1]])
    learned = {"query": query, "key": key, "value": value}
    if has_bias:
        learned["bias"] = normal(1, 2, 10, 10)
    return learned, visible, weights * visible[:, :, None, None]


def outputs_and_gradients(attend, learned, weights, dtype):
    def loss(learned):
        output = attend({name: array.astype(dtype) for name, array in learned.items()})
        return jnp.sum(output.astype(jnp.float32) * weights), output

    gradients, output = jax.grad(loss, has_aux=True)(learned)
    return {"output": output.astype(jnp.float32) * (weights != 0)} | gradients


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("has_bias", "dropout_rate"), [(False, 0.0), (False, 0.4), (True, 0.4)])
def test_flash_attention_is_the_same_function(rng, dtype, dropout_rate, has_bias):
    learned, visible, weights = random_inputs(rng, has_bias)
    dropout = (jax.random.key(1), dropout_rate)

    def plain(dtype):
        def attend(arrays):
            mask = layers.mask_to_bias(layers.make_attention_mask(visible, visible), dtype)
            bias = layers.combine_biases(mask, arrays.get("bias"))
            query, key, value = (arrays[name] for name in ("query", "key", "value"))
            return layers.dot_product_attention(query, key, value, bias, *dropout, dtype=dtype)

        return attend

    def flash(arrays):
        kept = layers.kept_weights(*dropout, (3, 2, 1, 10), dtype) if dropout_rate else None
        query, key, value = (arrays[name] for name in ("query", "key", "value"))
        bias = arrays.get("bias")
        return attention_kernel.flash(query, key, value, bias, visible, kept, implementation="xla")

    expected = outputs_and_gradients(plain(jnp.float32), learned, weights, jnp.float32)
    found = outputs_and_gradients(flash, learned, weights, dtype)
    # Numbers are of the order of 1. bfloat16 has 8 bits, and a gradient is rounded a few times.
    tolerance = 3e-6 if dtype == "float32" else 2**-5
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, atol=tolerance * np.abs(array).max(), err_msg=name)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Lets programs be traced as for a GPU. To run them here, XLA computes cuDNN's formulas."""
    calls = []
    flash = attention_kernel.flash

    def counted(query, key, value, bias, *arrays):
        calls.append((query.shape[1], bias is not None))
        return flash(query, key, value, bias, *arrays, implementation="xla")

    monkeypatch.setattr(attention_kernel, "current_device", lambda: H100)
    monkeypatch.setattr(attention_kernel, "_DTYPES", ("float32", "bfloat16"))
    monkeypatch.setattr(attention_kernel, "flash", counted)
    return calls


# Heads of the ViT are a multiple of 8 wide.
WIDTHS = "vit.ViTConfig.emb_dim = 16"
BFLOAT16 = ("t5.T5Config.dtype = 'bfloat16'", "vit.ViTConfig.dtype = 'bfloat16'")


@pytest.fixture(scope="module")
def make_case(make_model, make_batch, random_values):
    """Makes a network of random parameters, its batch, and the gradients of its loss."""

    def make(*bindings):
        model = make_model("multi_head", WIDTHS, *bindings)
        batch = make_batch(model, 0, 0, 1)  # No heads: the ViT, the encoder and the decoder.
        shapes = {name: array.shape for name, array in batch.items()}
        variables = jax.eval_shape(lambda: model.get_initial_variables(jax.random.key(0), shapes))
        params = random_values(variables["params"])

        def gradients(params, batch):
            return jax.grad(model.loss_fn, has_aux=True)(params, batch, jax.random.key(2))

        return gradients, params, batch

    return make


def test_the_network_trains_alike_with_both_kernels(make_case, on_a_gpu):
    def gradients_and_metrics(kernel):
        gradients, params, batch = make_case("DROPOUT_RATE = 0.3", f"ATTENTION_KERNEL = '{kernel}'")
        on_a_gpu.clear()
        return jax.jit(gradients)(params, batch)

    expected = gradients_and_metrics("xla")
    assert on_a_gpu == []
    found = gradients_and_metrics("auto")
    assert on_a_gpu == [(64, False), (70, True)]  # The ViT's layer, and the encoder's.
    assert np.abs(expected[0]["encoder"]["relpos_bias"]["rel_embedding"]).max() > 1e-3
    # A key's bias changes no attention: its gradient is 0 but for rounding, which is that of larger numbers.
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for (path, a), b in zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-6 * largest, err_msg=str(path))


def test_a_letterboxed_picture_is_for_xla(make_case, on_a_gpu):
    gradients, params, batch = make_case()
    box = np.array([[4, 0, 12, 16]] * 4, np.int32)
    on_a_gpu.clear()
    jax.eval_shape(gradients, params, batch | {"image_box": box})
    assert on_a_gpu == []


def test_a_training_that_cudnn_cant_do_is_refused(make_model, make_batch, monkeypatch):
    def start(**more):
        model = make_model("multi_head", WIDTHS, *BFLOAT16, "ATTENTION_KERNEL = 'cudnn'")
        batch = make_batch(model, 0, 0, 1) | more
        shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in batch.items()}
        trainer.Trainer(model, partitioning.PjitPartitioner(), shapes)

    with pytest.raises(errors.UserError, match="settings don't fit .* 'cudnn' isn't possible here: .* a CPU"):
        start()
    monkeypatch.setattr(attention_kernel, "current_device", lambda: H100)
    with pytest.raises(errors.UserError, match="'cudnn' isn't possible here: .* letterboxed pictures"):
        start(image_box=np.zeros((4, 4), np.int32))


@pytest.fixture
def cudnn(monkeypatch):
    """Lets JAX lower programs with cuDNN's calls, as if cuDNN were here."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(attention_kernel, "current_device", lambda: H100)


def lowered_for_cuda(function, *arguments):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))


@pytest.mark.usefixtures("cudnn")
@pytest.mark.parametrize(
    "bindings", [(), ("SCAN_LAYERS = True", "REMAT_POLICY = 'full'", "DROPOUT_RATE = 0.3")]
)
def test_a_gpus_program_calls_cudnn_and_has_no_logits(make_case, bindings):
    gradients, params, batch = make_case(*BFLOAT16, *bindings)
    text = lowered_for_cuda(gradients, params, batch).as_text()
    calls = re.findall(r"custom_call @__cudnn\$fmha(\w+)", text)
    forward = ["ScaleBiasSoftmax", "Softmax"]
    backward = [f"{name}Backward" for name in forward]
    # "full" computes the forward pass again.
    assert sorted(calls) == sorted(forward * (2 if bindings else 1) + backward)
    logits = r"tensor<4x\d+x(64x64|70x70)x"
    assert not re.search(logits, text)
    gradients, params, batch = make_case(*BFLOAT16, "ATTENTION_KERNEL = 'xla'")
    text = lowered_for_cuda(gradients, params, batch).as_text()
    assert re.search(logits, text)
    assert "__cudnn" not in text


@pytest.mark.usefixtures("cudnn")
def test_flops_of_cudnns_calls():
    tokens = jax.ShapeDtypeStruct((3, 64, 2, 8), jnp.bfloat16)
    product = 2 * 3 * 2 * 64 * 64 * 8

    def flops(function):
        text = lowered_for_cuda(function, tokens, tokens, tokens).as_text(dialect="hlo")
        return counter.analyze(text).flops

    def loss(*qkv):
        return jnp.sum(attention_kernel.flash(*qkv).astype(jnp.float32))

    assert flops(attention_kernel.flash) == 2 * product
    assert flops(jax.grad(loss, (0, 1, 2))) == (2 + 5) * product


def test_a_program_over_several_devices_splits_examples_and_heads(cudnn):
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 1), ("data", "model"))
    rules = (("batch", "data"), ("heads", "model"), ("length", None), ("kv", None))
    tokens = jax.ShapeDtypeStruct((4, 64, 2, 8), jnp.bfloat16)
    bias = jax.ShapeDtypeStruct((1, 2, 64, 64), jnp.bfloat16)
    with jax.set_mesh(mesh), flax_partitioning.axis_rules(rules):
        lowered = lowered_for_cuda(attention_kernel.flash, tokens, tokens, tokens, bias)
    constraints = re.findall(
        r"sdy.sharding_constraint .*<@mesh, \[(.*)\]> : tensor<(\S+)>", lowered.as_text()
    )
    array = '{"data"}, {}, {"model"}, {}'
    assert constraints == [
        *[(array, "4x64x2x8xbf16")] * 3,
        *[('{"data"}', "4xi32")] * 2,
        ('{}, {"model"}, {}, {}', "1x2x64x64xbf16"),
        (array, "4x64x2x8xbf16"),
    ]
    assert counter.analyze(lowered.as_text(dialect="hlo")).flops == 2 * 2 * 4 * 2 * 64 * 64 * 8
