import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from richhf_jax.network import convolutions

LAYOUT = ("NHWC", "HWIO", "NHWC")


def _normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


# Rows and columns of zeros around the input with its zeros in between.
PADDINGS = {"SAME": "SAME", "torch": ((1, 2), (1, 2))}


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("size", [(1, 1), (4, 4), (3, 5)])
def test_subpixel_deconv_equals_the_transposed_convolution(rng, size, padding):
    def transposed(x, kernel):
        return jax.lax.conv_transpose(x, kernel, (2, 2), PADDINGS[padding], dimension_numbers=LAYOUT)

    x, kernel = _normal(rng, 2, *size, 6), _normal(rng, 3, 3, 6, 4)
    outputs, gradients = jax.vjp(lambda *args: convolutions.subpixel_deconv(*args, padding), x, kernel)
    expected, expected_gradients = jax.vjp(transposed, x, kernel)
    assert outputs.shape == (2, 2 * size[0], 2 * size[1], 4)
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)
    cotangent = _normal(rng, *outputs.shape)
    for gradient, other in zip(gradients(cotangent), expected_gradients(cotangent), strict=True):
        np.testing.assert_allclose(gradient, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("padding", "expected"),
    # The middle row of taps reaches the odd rows alone, or the even ones.
    [("SAME", [[0, 0, 0, 0], [100, 10, 201, 20]]), ("torch", [[10, 201, 20, 2], [0, 0, 0, 0]])],
)
def test_subpixel_deconv_of_the_docstring(padding, expected):
    # One row of the kernel: k0 k1 k2 = 1 10 100, on the input 1 2.
    kernel = jnp.zeros((3, 3)).at[1].set(jnp.array([1, 10, 100]))[..., None, None]
    outputs = convolutions.subpixel_deconv(jnp.array([[[[1.0], [2.0]]]]), kernel, padding)
    np.testing.assert_allclose(outputs[0, :, :, 0], expected)


def test_subpixel_deconv_equals_pytorchs(rng):
    x, kernel = _normal(rng, 2, 3, 4, 6), _normal(rng, 6, 5, 3, 3)  # [in, out, height, width]
    layer = torch.nn.ConvTranspose2d(6, 5, 3, stride=2, padding=1, output_padding=1, bias=False)
    layer.weight.data = torch.from_numpy(kernel)
    expected = layer(torch.from_numpy(x.transpose(0, 3, 1, 2))).detach().numpy().transpose(0, 2, 3, 1)
    mirrored = kernel.transpose(2, 3, 0, 1)[::-1, ::-1]
    outputs = convolutions.subpixel_deconv(x, mirrored, "torch")
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", PADDINGS)
def test_deconv_is_one_convolution_but_on_a_cpu(rng, padding):
    x, kernel = _normal(rng, 2, 3, 4, 6), _normal(rng, 3, 3, 6, 5)
    deconv = jax.jit(functools.partial(convolutions.deconv, padding=padding))
    expected = convolutions.subpixel_deconv(x, kernel, padding)
    np.testing.assert_allclose(deconv(x, kernel), expected, rtol=1e-5, atol=1e-5)
    for platform, count in {"cpu": 4, "tpu": 1, "cuda": 1}.items():
        program = deconv.trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
        assert program.count("stablehlo.convolution") == count
        assert ("lhs_dilate = [2, 2]" in program) == (platform != "cpu")


@pytest.mark.parametrize("padding", PADDINGS)
def test_subpixel_deconv_multiplies_each_tap_once(padding):
    deconv = functools.partial(convolutions.subpixel_deconv, padding=padding)
    jaxpr = jax.make_jaxpr(deconv)(jnp.zeros((1, 4, 4, 2)), jnp.zeros((3, 3, 2, 3)))
    equations = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "conv_general_dilated"]
    assert sorted(np.prod(eqn.invars[1].aval.shape[:2]) for eqn in equations) == [1, 2, 2, 4]
    for eqn in equations:
        assert eqn.outvars[0].aval.shape == (1, 4, 4, 3)


def _assert_same_with_gradients(rng, fn, other, x, kernel):
    outputs, gradients = jax.vjp(fn, x, kernel)
    expected, expected_gradients = jax.vjp(other, x, kernel)
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)
    cotangent = _normal(rng, *outputs.shape)
    for gradient, wanted in zip(gradients(cotangent), expected_gradients(cotangent), strict=True):
        np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("strips", [1, 2, 4])
@pytest.mark.parametrize("side", [1, 2, 3, 5])
def test_conv_of_strips_equals_that_of_the_whole(rng, side, strips):
    def whole(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT)

    def in_strips(x, kernel):
        return convolutions.join(convolutions.conv(convolutions.cut(x, strips), kernel, strips), strips)

    x, kernel = _normal(rng, 2, 8, 5, 3), _normal(rng, side, side, 3, 4)
    _assert_same_with_gradients(rng, in_strips, whole, x, kernel)


@pytest.mark.parametrize("padding", PADDINGS)
def test_deconv_of_strips_equals_that_of_the_whole(rng, padding):
    def in_strips(x, kernel):
        strips = convolutions.cut(x, 4)
        assert strips.shape == (8, 2, 5, 3)
        return convolutions.join(convolutions.deconv(strips, kernel, padding, 4), 4)

    x, kernel = _normal(rng, 2, 8, 5, 3), _normal(rng, 3, 3, 3, 4)
    whole = functools.partial(convolutions.subpixel_deconv, padding=padding)
    _assert_same_with_gradients(rng, in_strips, whole, x, kernel)
