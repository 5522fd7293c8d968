"""Convolutions of the heads, in the form that each kind of device computes fastest; the numbers are the same.

Feature maps are [batch, height, width, channels], kernels [side, side, channels, filters].
"""

import jax
import jax.numpy as jnp

Array = jax.Array

_LAYOUT = ("NHWC", "HWIO", "NHWC")
# TPUs: strips that a map is cut into, and the fewest rows of one: below, the seams cost more than they spare.
_STRIPS, _MIN_ROWS = 8, 16


def conv(x: Array, kernel: Array) -> Array:
    """A convolution of stride 1 with zeros beyond the borders: the map keeps its size.

    On TPUs large maps by `conv_in_strips`.

    Args:
      x: [batch, height, width, channels].
      kernel: [side, side, channels, filters]; of an even side, the extra row and column lie after the pixel.

    Returns:
      [batch, height, width, filters].
    """
    side = kernel.shape[0]
    pads = ((side - 1) // 2, side // 2)

    def whole(x, kernel):
        return _convolve(x, kernel, (pads, pads))

    if not _has_strips(x):
        return whole(x, kernel)
    return jax.lax.platform_dependent(
        x, kernel, tpu=lambda x, kernel: conv_in_strips(x, kernel, pads), default=whole
    )


def deconv(x: Array, kernel: Array, padding: str = "SAME") -> Array:
    """A stride-2 transposed convolution with a 3x3 kernel; doubles height and width.

    In one dimension, with taps k0 k1 k2, and 0 beyond the borders:

        'SAME':   out[2i] = x[i - 1] k0 + x[i] k2     out[2i + 1] = x[i] k1
        'torch':  out[2i] = x[i] k1                   out[2i + 1] = x[i] k0 + x[i + 1] k2

    and rows and columns alike in two. 'SAME' equals `jax.lax.conv_transpose(x, kernel, (2, 2), 'SAME')`;
    'torch' equals PyTorch's ConvTranspose2d with padding 1 and output padding 1, whose kernel is stored
    mirrored: k0 here is its last tap.

    On accelerators as one convolution, the gradient of a strided one, which compiles faster than four; on
    TPUs large maps by `conv_in_strips`. XLA's CPU backend multiplies with the zeros between its inputs: there
    by `subpixel_deconv`.

    Args:
      x: [batch, height, width, channels].
      kernel: [3, 3, channels, filters].
      padding: 'SAME' or 'torch'.

    Returns:
      [batch, 2 height, 2 width, filters].
    """
    pads = {"SAME": (2, 1), "torch": (1, 2)}[padding]

    def whole(x, kernel):
        return _convolve(x, kernel, (pads, pads), dilation=2)

    def strips(x, kernel):
        return conv_in_strips(x, kernel, pads, dilation=2)

    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, kernel: subpixel_deconv(x, kernel, padding),
        tpu=strips if _has_strips(x) else whole,
        default=whole,
    )


def subpixel_deconv(x: Array, kernel: Array, padding: str = "SAME") -> Array:
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


def conv_in_strips(
    x: Array, kernel: Array, pads: tuple[int, int], dilation: int = 1, strips: int = _STRIPS
) -> Array:
    """A convolution whose batch is strips of the maps' rows, each with its neighbours' rows that it needs.

    For an example two strips of the rows a b c d, and a kernel of side 3: 0 a b c and b c d 0.

    A TPU wants at least eight examples. Of fewer, XLA cuts the columns into strips itself, and copies the map
    from one layout to another before and after each convolution: by its own estimate for one image on a v5e,
    a 3x3 convolution of 192 channels at 512 px with its norm and gradients then takes 2.1 times the cycles.

    Args:
      x: [batch, height, width, channels].
      kernel: [side, side, channels, filters].
      pads: zeros before and after the dilated rows, and columns; their sum is `side` - 1 for `dilation` 1,
        `side` for 2.
      dilation: distance of the rows, and columns, with zeros in between.
      strips: of each map; they divide the height.

    Returns:
      [batch, dilation x height, dilation x width, filters].
    """
    batch, height, width, channels = x.shape
    side, rows = kernel.shape[0], height // strips
    first, last = -pads[0], dilation * rows - 1 + side - 1 - pads[0]  # what a strip reads, in dilated rows
    above, below = -first // dilation, last // dilation - (rows - 1)
    x = x.reshape(batch, strips, rows, width, channels)
    # -> above + rows + below rows in each strip
    upper = jnp.pad(x[:, :-1, rows - above :], [(0, 0), (1, 0), (0, 0), (0, 0), (0, 0)])
    lower = jnp.pad(x[:, 1:, :below], [(0, 0), (0, 1), (0, 0), (0, 0), (0, 0)])
    x = jnp.concatenate([upper, x, lower], axis=2)
    before = pads[0] - dilation * above
    after = last - dilation * (rows - 1 + below)
    out = _convolve(x.reshape(batch * strips, -1, width, channels), kernel, ((before, after), pads), dilation)
    return out.reshape(batch, dilation * height, dilation * width, -1)


def _has_strips(x: Array) -> bool:
    return x.shape[1] % _STRIPS == 0 and x.shape[1] >= _STRIPS * _MIN_ROWS


def _convolve(x: Array, kernel: Array, pads: tuple, dilation: int = 1) -> Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), pads, lhs_dilation=(dilation, dilation), dimension_numbers=_LAYOUT
    )
