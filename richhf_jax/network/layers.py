"""Layers and attention masks of the transformers; the interface is that of T5X's `examples/t5/layers.py`.

Class names, arguments, parameter names and shapes, initialisers, logical axes, the order of operations
and the dropout pattern are T5X's, so that its checkpoints load and give its outputs. For the vision
transformer, `DenseGeneral` and `MlpBlock` also take `use_bias`, and there is a `CenteredLayerNorm`.

Parameters are float32 whatever the compute `dtype`. The collection `params_axes` holds their logical axes:
embed, mlp, heads, kv (the width of one head), joined_kv (heads x kv), vocab, relpos_buckets.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.partitioning import param_with_axes, with_sharding_constraint
from jaxtyping import Bool, Float, Int, Int32, PRNGKeyArray, Real, Shaped

from richhf_jax.network import attention_kernel
from richhf_jax.shapes import Array

DType = Any
# Logical axes, each a str or None. Flax's functions take both, but their annotations know no None.
Axes = tuple[Any, ...]
Initializer = Callable[..., Array]
Activation = str | Callable[[Array], Array]

# Number added to the attention logit of a masked position. It is far below any logit, yet finite: a query
# with no visible key gets uniform weights and not NaN.
MASKED_LOGIT = -1e10

_dense_init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
_attention_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
_embed_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)


def _along_last(vector: Array, ndim: int) -> Array:
    """Adds axes of size 1, up to `ndim`, for explicit broadcasting: [features] -> [1, ..., 1, features]."""
    return jnp.expand_dims(vector, tuple(range(ndim - 1)))


def _as_tuple(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def gathered(kernel: Float[Array, "*axes"], axes: Axes) -> Float[Array, "*axes"]:
    """Gathers a kernel's "embed" axis on every chip, where the rules split it ("fully sharded").

    Without this, XLA multiplies part by part while the parts travel from chip to chip ("windowed einsum").
    For base on v5e:4x4 that took 1.5 times the FLOPs and 2.5 times the bytes in the transformers, and still
    more in the convolutions.

    Args:
      kernel: already of the compute type, because in this type it travels.
      axes: its logical axes.
    """
    return with_sharding_constraint(kernel, tuple(None if axis == "embed" else axis for axis in axes))


class DenseGeneral(nn.Module):
    """A linear map from the input axes `axis` to new trailing axes `features`.

    The kernel is stored as a matrix [product of the input axes, product of `features`], as in T5X. The bias
    is ours.

    Attributes:
      features: the sizes of the output axes.
      axis: the input axes that are contracted.
      dtype: type of the computation and the output.
      kernel_init: initialiser of the matrix; its fan-in is the product of the contracted axes.
      kernel_axes: the matrix's two logical axes; the bias has the second.
      use_bias: adds a bias, zero at the start.
    """

    features: int | Sequence[int]
    axis: int | Sequence[int] = -1
    dtype: DType = jnp.float32
    kernel_init: Initializer = _dense_init
    kernel_axes: Axes = ()
    use_bias: bool = False

    @nn.compact
    def __call__(self, inputs: Float[Array, "..."]) -> Float[Array, "..."]:
        features = _as_tuple(self.features)
        inputs = jnp.asarray(inputs, self.dtype)
        axis = tuple(a % inputs.ndim for a in _as_tuple(self.axis))
        contracted = tuple(inputs.shape[a] for a in axis)
        matrix = (math.prod(contracted), math.prod(features))

        kernel = param_with_axes("kernel", self.kernel_init, matrix, jnp.float32, axes=self.kernel_axes)
        kernel = gathered(jnp.asarray(kernel, self.dtype), self.kernel_axes).reshape(contracted + features)
        outputs = jax.lax.dot_general(inputs, kernel, ((axis, tuple(range(len(axis)))), ((), ())))
        if self.use_bias:
            zeros = nn.initializers.zeros
            bias = param_with_axes("bias", zeros, matrix[1:], jnp.float32, axes=self.kernel_axes[1:])
            bias = jnp.asarray(bias, self.dtype).reshape(features)
            outputs += jnp.expand_dims(bias, tuple(range(outputs.ndim - bias.ndim)))
        return outputs


class Embed(nn.Module):
    """A table with one vector for each token id.

    Attributes:
      num_embeddings: the vocabulary's size.
      features: the vectors' width.
      cast_input_dtype: type that ids are cast to first; None: they are not.
      dtype: type of the vectors returned.
      attend_dtype: type of the product in `attend`; None: `dtype`.
      embedding_init: initialiser of the table [vocab, embed].
      one_hot: looks vectors up by a product with one-hot vectors. Where the table is sharded over the
        vocabulary, a gather would first collect the whole table on every device.
    """

    num_embeddings: int
    features: int
    cast_input_dtype: DType | None = None
    dtype: DType = jnp.float32
    attend_dtype: DType | None = None
    embedding_init: Initializer = _embed_init
    one_hot: bool = False

    def setup(self):
        shape = (self.num_embeddings, self.features)
        self.embedding = param_with_axes(
            "embedding", self.embedding_init, shape, jnp.float32, axes=("vocab", "embed")
        )

    def __call__(self, inputs: Real[Array, "*ids"]) -> Float[Array, "*ids embed"]:
        """Looks up the vectors of integer ids.

        Raises:
          ValueError: the ids are not integers.
        """
        if self.cast_input_dtype:
            inputs = inputs.astype(self.cast_input_dtype)
        if not jnp.issubdtype(inputs.dtype, jnp.integer):
            raise ValueError(f"token ids must be integers, got {inputs.dtype}")
        table = jnp.asarray(self.embedding, self.dtype)
        if self.one_hot:
            table = gathered(table, ("vocab", "embed"))
            return jnp.dot(jax.nn.one_hot(inputs, self.num_embeddings, dtype=self.dtype), table)
        return with_sharding_constraint(table[inputs], ("batch", "length", "embed"))

    def attend(self, query: Float[Array, "*rows embed"]) -> Float[Array, "*rows vocab"]:
        """Multiplies vectors with every embedding: tied logits."""
        return jnp.dot(query, jnp.asarray(self.embedding, self.attend_dtype or self.dtype).T)


class LayerNorm(nn.Module):
    """T5's layer norm over the last axis: divides by the root mean square and multiplies with a scale."""

    epsilon: float = 1e-6
    dtype: DType = jnp.float32
    scale_init: Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x: Float[Array, "*rows embed"]) -> Float[Array, "*rows embed"]:
        x = jnp.asarray(x, jnp.float32)
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        x = jnp.asarray(x * jax.lax.rsqrt(mean_square + self.epsilon), self.dtype)
        scale = param_with_axes("scale", self.scale_init, x.shape[-1:], jnp.float32, axes=("embed",))
        return x * _along_last(jnp.asarray(scale, self.dtype), x.ndim)


class CenteredLayerNorm(nn.Module):
    """The usual layer norm over the last axis: zero mean and unit variance, then scale and bias."""

    epsilon: float = 1e-6
    dtype: DType = jnp.float32
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*rows embed"]) -> Float[Array, "*rows embed"]:
        x = jnp.asarray(x, jnp.float32)
        features = x.shape[-1:]
        scale = param_with_axes("scale", nn.initializers.ones, features, jnp.float32, axes=("embed",))
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        x = x * _along_last(scale, x.ndim)
        if self.use_bias:
            bias = param_with_axes("bias", nn.initializers.zeros, features, jnp.float32, axes=("embed",))
            x = x + _along_last(bias, x.ndim)
        return jnp.asarray(x, self.dtype)


class MlpBlock(nn.Module):
    """The feed-forward block: one hidden layer, or the product of several with different activations (gated).

    Attributes:
      intermediate_dim: width of a hidden layer.
      activations: the activation of each hidden layer: 'linear', the name of a function in flax.linen, or a
        function. ('relu',) is T5 1.0's, ('gelu', 'linear') is T5 1.1's gated GELU.
      kernel_init: initialiser of every kernel.
      intermediate_dropout_rate: dropout rate of the hidden layer; one draw serves all positions.
      dtype: type of the computation.
      use_bias: adds biases to all dense layers (ours, for the vision transformer).
    """

    intermediate_dim: int = 2048
    activations: Sequence[Activation] = ("relu",)
    kernel_init: Initializer = _dense_init
    intermediate_dropout_rate: float = 0.1
    dtype: DType = jnp.float32
    use_bias: bool = False

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "batch length embed"], *, deterministic: bool = False
    ) -> Float[Array, "batch length embed"]:
        """Transforms each position."""
        dense = functools.partial(
            DenseGeneral, dtype=self.dtype, kernel_init=self.kernel_init, use_bias=self.use_bias
        )
        gated = len(self.activations) > 1
        branches = []
        for i, activation in enumerate(self.activations):
            name = f"wi_{i}" if gated else "wi"
            branch = dense(self.intermediate_dim, kernel_axes=("embed", "mlp"), name=name)(inputs)
            branches.append(_activation_function(activation)(branch))
        hidden = functools.reduce(operator.mul, branches)
        hidden = nn.Dropout(self.intermediate_dropout_rate, broadcast_dims=(-2,))(
            hidden, deterministic=deterministic
        )
        hidden = with_sharding_constraint(hidden, ("batch", "length", "mlp"))
        return dense(inputs.shape[-1], kernel_axes=("mlp", "embed"), name="wo")(hidden)


def _activation_function(activation: Activation) -> Callable[[Array], Array]:
    if callable(activation):
        return activation
    if activation == "linear":
        return lambda x: x
    if not hasattr(nn, activation):
        raise ValueError(f"activation {activation!r} is neither 'linear' nor a function of flax.linen")
    return getattr(nn, activation)


class RelativePositionBiases(nn.Module):
    """T5's relative position biases: a learned number for each head and bucket of distances.

    They are added to the attention logits.

    Attributes:
      num_buckets: number of buckets; when bidirectional, half of them for each side.
      max_distance: from this distance on, all positions share the last bucket.
      num_heads: heads of the attention.
      dtype: type of the biases returned.
      embedding_init: initialiser of the table [heads, relpos_buckets].
    """

    num_buckets: int
    max_distance: int
    num_heads: int
    dtype: DType = jnp.float32
    embedding_init: Initializer = _embed_init

    @nn.compact
    def __call__(
        self,
        qlen: int,
        klen: int,
        bidirectional: bool = True,
        positions: Int[np.ndarray, " length"] | None = None,
    ) -> Float[Array, "1 heads {qlen} {klen}"]:
        """Returns the biases.

        Args:
          qlen, klen: number of queries and keys.
          bidirectional: keys after the query have buckets of their own.
          positions: position of each token; None: 0, 1, 2, ... (ours).
        """
        table = param_with_axes(
            "rel_embedding",
            self.embedding_init,
            (self.num_heads, self.num_buckets),
            jnp.float32,
            axes=("heads", "relpos_buckets"),
        )
        if positions is None:
            positions = np.arange(max(qlen, klen))
        relative = positions[None, :klen] - positions[:qlen, None]
        buckets = relative_position_bucket(relative, bidirectional, self.num_buckets, self.max_distance)
        # A product with one-hot vectors, because TPUs are far slower at gathering single numbers.
        one_hot = jax.nn.one_hot(buckets, self.num_buckets, dtype=self.dtype, axis=0)
        biases = jnp.einsum("hn,nqk->hqk", jnp.asarray(table, self.dtype), one_hot)
        return biases[None]


def relative_position_bucket(
    relative_position: Int[np.ndarray, "*pairs"],
    bidirectional: bool = True,
    num_buckets: int = 32,
    max_distance: int = 128,
) -> Int32[np.ndarray, "*pairs"]:
    """Returns the bucket of each relative position (key's position - query's position).

    When bidirectional, keys after the query use the upper half of the buckets; when not, they all fall in
    bucket 0. The first half of a side's buckets holds one distance each. The second half holds ranges of
    distances that grow geometrically up to `max_distance`.

    >>> relative_position_bucket(np.array([-200, -16, -8, -1, 0, 1, 8, 16, 200]))
    array([15, 10,  8,  1,  0, 17, 24, 26, 31], dtype=int32)
    """
    offset = np.zeros_like(relative_position)
    if bidirectional:
        num_buckets //= 2
        offset = num_buckets * (relative_position > 0)
        distance = np.abs(relative_position)
    else:
        distance = np.maximum(-relative_position, 0)
    exact = num_buckets // 2
    # In float32 with float32's epsilon added, as in T5: distances at a bucket's edge then round up.
    ratio = distance.astype(np.float32) / np.float32(exact) + np.finfo(np.float32).eps
    far = np.log(ratio) / np.float32(math.log(max_distance / exact)) * np.float32(num_buckets - exact)
    far = np.minimum(exact + far.astype(np.int32), num_buckets - 1)
    return (offset + np.where(distance < exact, distance, far)).astype(np.int32)


def dot_product_attention(
    query: Float[Array, "batch q_length heads kv"],
    key: Float[Array, "batch kv_length heads kv"],
    value: Float[Array, "batch kv_length heads value_width"],
    bias: Float[Array, "#batch #heads #q_length #kv_length"] | None = None,
    dropout_rng: PRNGKeyArray | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: DType = jnp.float32,
    float32_logits: bool = False,
    kernel: str = "xla",
    visible: Bool[Array, "batch kv_length"] | None = None,
) -> Float[Array, "batch q_length heads value_width"]:
    """Computes softmax(query . key + bias) . value. The logits are not scaled here: T5's initialiser does it.

    Args:
      query, key, value: of as many heads each.
      bias: number added to each logit: masks, relative positions.
      dropout_rng: key of the dropout on the attention weights; one draw serves all queries, as in T5.
      dropout_rate: share of the weights that is dropped.
      deterministic: turns dropout off.
      dtype: type of the attention weights after the softmax.
      float32_logits: computes the logits and the softmax in float32 whatever the inputs' type. The kernel
        'cudnn' always does.
      kernel: 'xla', or 'cudnn' (ours), see `attention_kernel`. With 'cudnn', `bias` has 1 as its batch axis.
      visible: with 'cudnn', the keys that are visible, the first ones of each example; None: all.

    Raises:
      ValueError: the shapes do not fit each other, or dropout has no `dropout_rng`.
    """
    batch, _, heads, kv = query.shape
    kv_length = key.shape[1]
    if key.shape != (batch, kv_length, heads, kv) or value.shape[:-1] != key.shape[:-1]:
        shapes = f"{query.shape}, {key.shape} and {value.shape}"
        raise ValueError(f"query, key and value [batch, length, heads, kv] do not fit: {shapes}")

    kept = None
    if dropout_rate > 0.0 and not deterministic:
        if dropout_rng is None:
            raise ValueError("dropout needs a dropout_rng")
        kept = kept_weights(dropout_rng, dropout_rate, (batch, heads, 1, kv_length), dtype)
    if kernel == "cudnn":
        return attention_kernel.flash(query, key, value, bias, visible, kept)

    if float32_logits:
        query, key = query.astype(jnp.float32), key.astype(jnp.float32)

    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key)
    if bias is not None:
        logits = logits + bias.astype(logits.dtype)
    weights = jax.nn.softmax(logits).astype(dtype)
    if kept is not None:
        weights = weights * kept
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def kept_weights(
    rng: PRNGKeyArray, dropout_rate: float, shape: tuple[int, ...], dtype: DType
) -> Float[Array, "..."]:
    """Draws the factors of attention weights under dropout: 0, or 1 / (1 - `dropout_rate`)."""
    keep_rate = 1.0 - dropout_rate
    return jax.random.bernoulli(rng, keep_rate, shape).astype(dtype) / jnp.asarray(keep_rate, dtype)


class MultiHeadDotProductAttention(nn.Module):
    """Multi-head attention without biases, with a cache for decoding step by step.

    Attributes:
      num_heads: number of heads.
      head_dim: width of a head.
      dtype: type of the computation.
      dropout_rate: dropout rate of the attention weights.
      kernel_init: initialiser of the kernels. The query's is divided by sqrt(head_dim): T5 scales the
        logits there and nowhere else.
      float32_logits: computes logits and softmax in float32.
      kernel: what computes the attention, see `attention_kernel` (ours).
    """

    num_heads: int
    head_dim: int
    dtype: DType = jnp.float32
    dropout_rate: float = 0.0
    kernel_init: Initializer = _attention_init
    float32_logits: bool = False
    kernel: str = "xla"

    @nn.compact
    def __call__(
        self,
        inputs_q: Float[Array, "sequences q_length embed"],
        inputs_kv: Float[Array, "batch kv_length kv_embed"],
        mask: Shaped[Array, "#batch #heads _ #kv_length"] | None = None,
        bias: Float[Array, "#batch #heads _ _"] | None = None,
        visible: Bool[Array, "batch kv_length"] | None = None,
        *,
        decode: bool = False,
        keep_kv: bool = False,
        deterministic: bool = False,
    ) -> Float[Array, "sequences q_length embed"]:
        """Lets `inputs_q` attend to `inputs_kv`.

        With `decode`, the first call (an `init`) takes inputs of the longest length and sets up an empty
        cache. Each later call takes one position, stores its key and value, and attends to all so far.

        With `keep_kv` (ours), keys and values that no step changes are computed once. A call with a mutable
        collection "fixed_kv" stores them there; a call that is given this collection uses it. `sequences` may
        then be a multiple of `batch`: successive sequences share one example's keys and values. Without the
        collection every call computes them, as in T5X.

        Args:
          inputs_q: queries.
          inputs_kv: the sequence they attend to.
          mask: > 0 where a query may see a key, broadcastable to [batch, heads, q_length, kv_length].
          bias: number added to each logit, of the same shape; with `decode`, that of the longest length.
          visible: the keys that the mask shows, where they are the first ones and the same for all queries
            that aren't padding; None: they aren't. Kernels other than 'xla' take no other mask (ours).
          decode: keeps and uses the cache.
          keep_kv: keeps keys and values, or uses those that were kept.
          deterministic: turns dropout off.

        Raises:
          ValueError: with `decode`, more than one position was given.
        """

        def scaled_init(*args):
            return self.kernel_init(*args) / math.sqrt(self.head_dim)

        # [batch, length, embed] -> [batch, length, heads, kv]
        def project(name, inputs, kernel_init=self.kernel_init):
            projected = DenseGeneral(
                (self.num_heads, self.head_dim),
                dtype=self.dtype,
                kernel_init=kernel_init,
                kernel_axes=("embed", "joined_kv"),
                name=name,
            )(inputs)
            return with_sharding_constraint(projected, ("batch", "length", "heads", "kv"))

        def keys_and_values():
            return project("key", inputs_kv), project("value", inputs_kv)

        query = project("query", inputs_q, scaled_init)
        if keep_kv and (self.is_mutable_collection("fixed_kv") or self.has_variable("fixed_kv", "kv")):
            key, value = self.variable("fixed_kv", "kv", keys_and_values).value
            # [batch * queries, 1, heads, kv] -> [batch, queries, heads, kv]
            query = query.reshape(key.shape[0], -1, *query.shape[2:])
        else:
            key, value = keys_and_values()
        if decode:
            key, value, mask, bias = self._extend_cache(query, key, value, mask, bias)
        kernel = attention_kernel.choose(
            self.kernel, query, key, bias, sees_prefix=mask is None or visible is not None
        )
        if kernel == "xla" and mask is not None:
            bias = combine_biases(mask_to_bias(mask, self.dtype), bias)

        drop = self.dropout_rate > 0.0 and not deterministic
        attended = dot_product_attention(
            query,
            key,
            value,
            bias=bias,
            dropout_rng=self.make_rng("dropout") if drop else None,
            dropout_rate=self.dropout_rate,
            deterministic=deterministic,
            dtype=self.dtype,
            float32_logits=self.float32_logits,
            kernel=kernel,
            visible=visible,
        )
        attended = attended.reshape(*inputs_q.shape[:2], *attended.shape[2:])
        # [batch, length, heads, kv] -> [batch, length, embed]
        return DenseGeneral(
            inputs_q.shape[-1],
            axis=(-2, -1),
            dtype=self.dtype,
            kernel_init=self.kernel_init,
            kernel_axes=("joined_kv", "embed"),
            name="out",
        )(attended)

    def _extend_cache(self, query, key, value, mask, bias):
        """Caches this position's key and value; returns the keys, values, mask and bias to attend with."""
        is_initialized = self.has_variable("cache", "cached_key")

        # Stored as [batch, heads, kv, length]: TPUs fuse the write below best where length comes last.
        def empty(array):
            batch, length, heads, kv = array.shape
            return jnp.zeros((batch, heads, kv, length), array.dtype)

        cached_key = self.variable("cache", "cached_key", empty, key)
        cached_value = self.variable("cache", "cached_value", empty, value)
        cache_index = self.variable("cache", "cache_index", lambda: jnp.zeros((), jnp.int32))
        if not is_initialized:
            return key, value, mask, bias

        batch, heads, kv, length = cached_key.value.shape
        if query.shape != (batch, 1, heads, kv):
            raise ValueError(
                f"decoding takes one position of shape {(batch, 1, heads, kv)} a step, got {query.shape}"
            )
        index = cache_index.value
        # On TPUs, adding a one-hot product (the slot is still zero) is several times faster than a scatter.
        slot = jax.nn.one_hot(index, length, dtype=key.dtype)[None, None, None]
        cached_key.value = cached_key.value + jnp.moveaxis(key, -3, -1) * slot
        cached_value.value = cached_value.value + jnp.moveaxis(value, -3, -1) * slot
        cache_index.value = index + 1

        seen = jnp.broadcast_to(jnp.arange(length) <= index, (batch, 1, 1, length))
        if bias is not None:  # the row of this query
            bias = jax.lax.dynamic_slice_in_dim(bias, index, 1, axis=-2)
        key, value = (jnp.moveaxis(cache.value, -1, -3) for cache in (cached_key, cached_value))
        return key, value, combine_masks(mask, seen), bias


def mask_to_bias(mask: Shaped[Array, "*pairs"], dtype: DType) -> Float[Array, "*pairs"]:
    """Turns a mask into numbers to add to logits: 0 where the mask is > 0, `MASKED_LOGIT` elsewhere."""
    return jnp.where(mask > 0, 0.0, MASKED_LOGIT).astype(dtype)


def make_attention_mask(
    query_input: Shaped[Array, "batch q_length"],
    key_input: Shaped[Array, "batch kv_length"],
    pairwise_fn: Callable = jnp.multiply,
    extra_batch_dims: int = 0,
    dtype: DType = jnp.float32,
) -> Shaped[Array, "*ones batch 1 q_length kv_length"]:
    """Makes the mask of which query may see which key: `pairwise_fn` of each pair.

    Example: two positions of text and one of padding, with `query_input` = `key_input` = [[1, 1, 0]]:

        [[[[1, 1, 0],
           [1, 1, 0],
           [0, 0, 0]]]]

    Args:
      query_input, key_input: one value for each query and each key.
      pairwise_fn: an elementwise function of two arrays, e.g. `jnp.equal` of segment ids.
      extra_batch_dims: number of axes of size 1 to put in front.
      dtype: type of the mask.

    Returns:
      The mask; its third axis from the right, of size 1, is the heads'.
    """
    mask = pairwise_fn(query_input[..., :, None], key_input[..., None, :])
    mask = jnp.expand_dims(mask, -3)
    return jnp.expand_dims(mask, tuple(range(extra_batch_dims))).astype(dtype)


def make_causal_mask(
    x: Shaped[Array, "batch length"], extra_batch_dims: int = 0, dtype: DType = jnp.float32
) -> Shaped[Array, "*ones batch 1 length length"]:
    """Makes the mask that lets each position see itself and those before it.

    Example: `x` of shape [1, 3]:

        [[[[1, 0, 0],
           [1, 1, 0],
           [1, 1, 1]]]]

    Args:
      x: any array; only its shape counts.
      extra_batch_dims: number of axes of size 1 to put in front.
      dtype: type of the mask.
    """
    positions = jnp.broadcast_to(jnp.arange(x.shape[-1]), x.shape)
    return make_attention_mask(positions, positions, jnp.greater_equal, extra_batch_dims, dtype)


def combine_masks(
    *masks: Shaped[Array, "..."] | None, dtype: DType = jnp.float32
) -> Shaped[Array, "..."] | None:
    """Combines masks: 1 where all of them allow it. None allows everything; the result is None if all are.

    Example: [[[[1, 1, 0]]]] and None and [[[[0, 1, 1]]]] give [[[[0, 1, 0]]]].

    Raises:
      ValueError: the ranks differ.
    """
    given = _same_rank(masks)
    return functools.reduce(jnp.logical_and, given).astype(dtype) if given else None


def combine_biases(*masks: Float[Array, "..."] | None) -> Float[Array, "..."] | None:
    """Adds attention biases. None stands for zero; the result is None if all are.

    Example: [[[[0, -1e10]]]] and None and [[[[1, 2]]]] give [[[[1, -1e10 + 2]]]].

    Raises:
      ValueError: the ranks differ.
    """
    biases = _same_rank(masks)
    return functools.reduce(operator.add, biases) if biases else None


def _same_rank(arrays: Sequence[Array | None]) -> list[Array]:
    given = [array for array in arrays if array is not None]
    if len({array.ndim for array in given}) > 1:
        raise ValueError(f"masks must have the same rank, got shapes {[array.shape for array in given]}")
    return given


def make_decoder_mask(
    decoder_target_tokens: Int[Array, "batch length"],
    dtype: DType,
    decoder_causal_attention: Int[Array, "batch length"] | None = None,
    decoder_segment_ids: Int[Array, "batch length"] | None = None,
) -> Shaped[Array, "batch 1 length length"]:
    """Makes the decoder's self-attention mask: causal, and neither from nor to padding (token 0).

    Example: the target "a cat_0" as tokens [[5, 7, 1, 0]] (1 ends it, 0 pads it):

        [[[[1, 0, 0, 0],
           [1, 1, 0, 0],
           [1, 1, 1, 0],
           [0, 0, 0, 0]]]]

    and with `decoder_causal_attention` [[1, 1, 0, 0]], a prefix of two tokens, the first row is [1, 1, 0, 0].
    With `decoder_segment_ids` [[1, 1, 2, 0]], two examples packed, the third row is [0, 0, 1, 0].

    Args:
      decoder_target_tokens: 0 = padding.
      dtype: type of the mask.
      decoder_causal_attention: 1 for the positions of a prefix, which see each other both ways.
      decoder_segment_ids: number of the example that a position belongs to.
    """
    order = make_causal_mask(decoder_target_tokens, dtype=dtype)
    if decoder_causal_attention is not None:
        prefix = make_attention_mask(decoder_causal_attention, decoder_causal_attention, dtype=dtype)
        order = jnp.logical_or(order, prefix)
    is_text = decoder_target_tokens > 0
    masks = [order, make_attention_mask(is_text, is_text)]
    if decoder_segment_ids is not None:
        masks.append(make_attention_mask(decoder_segment_ids, decoder_segment_ids, jnp.equal))
    return functools.reduce(jnp.logical_and, masks).astype(dtype)
