"""Convolutions of the heads, in the form that each kind of device computes fastest; the numbers are the same.

Feature maps are [batch, height, width, channels], kernels [side, side, channels, filters].

Maps may be cut into strips of rows: [batch * strips, height / strips, width, channels], an example's strips
one after the other. A TPU wants at least eight examples: of fewer, XLA cuts the columns itself, and copies
the map from one layout to another around each convolution. Maps in strips stay as they are: by XLA's
estimate, the base size's heatmap head with its gradients, one image on a v5e, takes two thirds of the
cycles.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from richhf_jax.shapes import Array

_LAYOUT = ("NHWC", "HWIO", "NHWC")


def cut(
    x: Float[Array, "batch height width channels"], strips: int
) -> Float[Array, "batch*{strips} height//{strips} width channels"]:
    """[batch, height, width, channels] -> strips of its rows; `strips` must divide the height."""
    batch, height, *rest = x.shape
    return x.reshape(batch * strips, height // strips, *rest)


def join(
    x: Float[Array, "rows height width channels"], strips: int
) -> Float[Array, "rows//{strips} height*{strips} width channels"]:
    """The reverse of `cut`; also of strips that a deconvolution has enlarged."""
    rows, height, *rest = x.shape
    return x.reshape(rows // strips, height * strips, *rest)


def conv(
    x: Float[Array, "rows height width channels"],
    kernel: Float[Array, "side side channels filters"],
    strips: int = 1,
) -> Float[Array, "rows height width filters"]:
    """A convolution of stride 1 with zeros beyond the borders: the map keeps its size.

    Args:
      x: [batch * strips, height, width, channels].
      kernel: [side, side, channels, filters]; of an even side, the extra row and column lie after the pixel.
      strips: into which `x` is cut.

    Returns:
      [batch * strips, height, width, filters].
    """
    side = kernel.shape[0]
    return _convolve_strips(x, kernel, ((side - 1) // 2, side // 2), 1, strips)


def deconv(
    x: Float[Array, "rows height width channels"],
    kernel: Float[Array, "3 3 channels filters"],
    padding: str = "SAME",
    strips: int = 1,
) -> Float[Array, "rows 2*height 2*width filters"]:
    """A stride-2 transposed convolution with a 3x3 kernel; doubles height and width.

    In one dimension, with taps k0 k1 k2, and 0 beyond the borders:

        'SAME':   out[2i] = x[i - 1] k0 + x[i] k2     out[2i + 1] = x[i] k1
        'torch':  out[2i] = x[i] k1                   out[2i + 1] = x[i] k0 + x[i + 1] k2

    and rows and columns alike in two. 'SAME' equals `jax.lax.conv_transpose(x, kernel, (2, 2), 'SAME')`;
    'torch' equals PyTorch's ConvTranspose2d with padding 1 and output padding 1, whose kernel is stored
    mirrored: k0 here is its last tap.

    On accelerators as one convolution, the gradient of a strided one, which compiles faster than four. XLA's
    CPU backend multiplies with the zeros between its inputs: there by `subpixel_deconv`, of whole maps.

    Args:
      x: [batch * strips, height, width, channels].
      kernel: [3, 3, channels, filters].
      padding: 'SAME' or 'torch'.
      strips: into which `x` is cut.

    Returns:
      [batch * strips, 2 height, 2 width, filters].
    """
    pads = {"SAME": (2, 1), "torch": (1, 2)}[padding]

    def one_convolution(x, kernel):
        return _convolve_strips(x, kernel, pads, 2, strips)

    if strips > 1:
        return one_convolution(x, kernel)
    return jax.lax.platform_dependent(
        x, kernel, cpu=lambda x, kernel: subpixel_deconv(x, kernel, padding), default=one_convolution
    )


def subpixel_deconv(
    x: Float[Array, "batch height width channels"],
    kernel: Float[Array, "3 3 channels filters"],
    padding: str = "SAME",
) -> Float[Array, "batch 2*height 2*width filters"]:
    """`deconv` without products with zeros.

    Each of the four parities of output rows and columns is a convolution of the input with its own 4, 2, 2 or
    1 taps, and the four are interleaved: 4 to 6 times faster on 2 CPU cores, forward and backward together.
    """
    batch, height, width, _ = x.shape
    outer, middle = slice(0, None, 2), slice(1, 2)
    # The taps of the even and of the odd outputs, and how much zero padding the input needs before and after.
    even, odd = {
        "SAME": ((outer, (1, 0)), (middle, (0, 0))),
        "torch": ((middle, (0, 0)), (outer, (0, 1))),
    }[padding]

    def parity(rows, columns):
        return _convolve(x, kernel[rows[0], columns[0]], (rows[1], columns[1]))

    # [batch, height, width, 2, filters]: the last-but-one axis is the output column's parity
    upper = jnp.stack([parity(even, even), parity(even, odd)], axis=3)
    lower = jnp.stack([parity(odd, even), parity(odd, odd)], axis=3)
    # [batch, height, 2, width, 2, filters] -> [batch, 2 height, 2 width, filters]
    return jnp.stack([upper, lower], axis=2).reshape(batch, 2 * height, 2 * width, -1)


def _convolve_strips(x: Array, kernel: Array, pads: tuple[int, int], dilation: int, strips: int) -> Array:
    """A convolution of strips, each with the rows of its neighbours that it needs.

    For two strips of the rows a b c d, and a kernel of side 3: 0 a b c and b c d 0.

    Args:
      x: [batch * strips, height, width, channels].
      kernel: [side, side, channels, filters].
      pads: zeros before and after the dilated rows of a map, and its columns.
      dilation: distance of the rows, and columns, with zeros in between.

    Returns:
      [batch * strips, dilation * height, dilation * width, filters].
    """
    if strips == 1:
        return _convolve(x, kernel, (pads, pads), dilation)
    height, side = x.shape[1], kernel.shape[0]
    first, last = -pads[0], dilation * height - 1 + side - 1 - pads[0]  # what a strip reads, in dilated rows
    above, below = -first // dilation, last // dilation - (height - 1)
    of_map = x.reshape(-1, strips, *x.shape[1:])
    none = (0, 0)
    upper = jnp.pad(of_map[:, :-1, height - above :], [none, (1, 0), none, none, none])
    lower = jnp.pad(of_map[:, 1:, :below], [none, (0, 1), none, none, none])
    upper, lower = (rows.reshape(x.shape[0], -1, *x.shape[2:]) for rows in (upper, lower))
    x = jnp.concatenate([upper, x, lower], axis=1)
    before, after = pads[0] - dilation * above, last - dilation * (height - 1 + below)
    return _convolve(x, kernel, ((before, after), pads), dilation)


def _convolve(x: Array, kernel: Array, pads: tuple, dilation: int = 1) -> Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), pads, lhs_dilation=(dilation, dilation), dimension_numbers=_LAYOUT
    )
