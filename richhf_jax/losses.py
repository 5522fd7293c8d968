"""Losses in float32, and the weighted mean that metrics are kept as."""

import math
from typing import no_type_check

import jax
import jax.numpy as jnp
from clu import metrics as clu_metrics
from flax import struct
from jaxtyping import Bool, Float, Float32, Int, Real, ScalarLike

from richhf_jax.shapes import Array


# Unchecked, because jax also makes means of shapes and shardings.
@no_type_check
@struct.dataclass
class WeightedMean(clu_metrics.Metric):
    """A mean kept as its two sums, so that means over parts of a batch merge exactly.

    It is a clu metric because T5X's trainer accepts no other.

    Attributes:
      total: sum of weight x value.
      weight: sum of weights.
    """

    total: Float[Array, ""]
    weight: Float[Array, ""]

    def merge(self, other: "WeightedMean") -> "WeightedMean":
        return WeightedMean(self.total + other.total, self.weight + other.weight)

    def compute(self) -> Float[Array, ""]:
        """Returns the mean; NaN where the weights sum to 0."""
        return self.total / self.weight


def contrastive(
    image: Float32[Array, "batch projection"],
    text: Float32[Array, "batch projection"],
    scale: Float[Array, ""],
) -> tuple[Float32[Array, " batch"], Bool[Array, " batch"]]:
    """Computes CLIP's loss (InfoNCE): an image has to find its own text in the batch, and a text its image.

    Where the batch is split over devices, each example has the whole batch's others against it.

    Args:
      image, text: embeddings of length 1; those of one row belong together.
      scale: factor of the cosines; at most 100 of it counts.

    Returns:
      Each example's loss, the mean of both choices' cross entropies; and whether the image chose right.
    """
    # The published training keeps the factor's logarithm below ln 100.
    logits = jnp.minimum(scale, 100.0) * jnp.dot(image, text.T, precision="highest")
    own = jnp.diagonal(logits)
    losses = [jax.nn.logsumexp(logits, axis=axis) - own for axis in (0, 1)]
    return (losses[0] + losses[1]) / 2, jnp.argmax(logits, axis=1) == jnp.arange(len(own))


@jax.custom_vjp
def cross_entropy_with_logits(
    logits: Float[Array, "*positions vocab"], targets: Float[Array, "*positions vocab"], z_loss: ScalarLike
) -> tuple[Float[Array, "*positions"], Float[Array, "*positions"]]:
    """Computes the cross entropy and T5X's z-loss, z_loss * log(Z)^2, with a stable gradient.

    The z-loss keeps the logits close to 0; far from it, bfloat16 rounds coarsely.

    Args:
      logits: unnormalised log-probabilities.
      targets: one distribution for each position (one-hot, or smoothed).
      z_loss: weight of the z-loss.

    Returns:
      (loss with the z-loss added, z-loss).
    """
    log_z = jax.nn.logsumexp(logits, axis=-1)
    auxiliary = z_loss * jnp.square(log_z)
    loss = -jnp.sum(targets * (logits - log_z[..., None]), axis=-1)
    return loss + auxiliary, auxiliary


def _cross_entropy_fwd(logits, targets, z_loss):
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return cross_entropy_with_logits(logits, targets, z_loss), (logits, targets, z_loss, log_z)


def _cross_entropy_bwd(residuals, cotangents):
    logits, targets, z_loss, log_z = residuals
    cotangent = cotangents[0][..., None]  # The second output is for logs only.
    log_z = log_z[..., None]
    probabilities = jnp.exp(logits - log_z)
    # d loss / d logits = p - t (t sums to 1), and the z-loss adds 2 z log(Z) p.
    logits_grad = cotangent * ((1 + 2 * z_loss * log_z) * probabilities - targets)
    targets_grad = -cotangent * (logits - log_z)
    return logits_grad.astype(logits.dtype), targets_grad.astype(targets.dtype), jnp.zeros(())


cross_entropy_with_logits.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


def compute_weighted_cross_entropy(
    logits: Float[Array, "*positions vocab"],
    targets: Int[Array, "*positions"],
    weights: Real[Array, "*positions"] | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    loss_normalizing_factor: ScalarLike | None = None,
) -> tuple[Float32[Array, ""], Float32[Array, ""], Float32[Array, ""]]:
    """Sums the teacher-forced cross entropy, as T5X's function of this name does.

    Args:
      logits: unnormalised log-probabilities.
      targets: the right token at each position.
      weights: weight of each position; None: 1.
      label_smoothing: probability spread over the other tokens. The entropy of the smoothed target
        is subtracted, so a perfect prediction has loss 0.
      z_loss: weight of the z-loss.
      loss_normalizing_factor: divides both losses; None leaves them summed.

    Returns:
      (loss with the z-loss added, z-loss, sum of weights).

    Raises:
      ValueError: logits and targets disagree in rank.
    """
    if logits.ndim != targets.ndim + 1:
        raise ValueError(f"logits {logits.shape} don't fit targets {targets.shape}")
    vocab_size = logits.shape[-1]
    confidence = 1.0 - label_smoothing
    low_confidence = label_smoothing / max(vocab_size - 1, 1)
    entropy = -(
        confidence * jnp.log(confidence) + (vocab_size - 1) * low_confidence * jnp.log(low_confidence + 1e-20)
    )
    soft_targets = jax.nn.one_hot(targets, vocab_size) * (confidence - low_confidence) + low_confidence
    loss, auxiliary = cross_entropy_with_logits(logits.astype(jnp.float32), soft_targets, z_loss)
    loss = loss - entropy
    weights = jnp.ones(targets.shape, jnp.float32) if weights is None else weights
    factor = 1.0 if loss_normalizing_factor is None else loss_normalizing_factor
    return jnp.sum(loss * weights) / factor, jnp.sum(auxiliary * weights) / factor, jnp.sum(weights)


def weighted_squared_error(
    predictions: Float[Array, "batch slots *pixels"],
    targets: Float[Array, "batch slots *pixels"],
    weights: Float[Array, "batch slots"],
    image_box: Int[Array, "batch 4"] | None = None,
) -> Float32[Array, ""]:
    """Sums weight x mean squared error over batch and slots.

    Args:
      predictions, targets: scores, or heatmaps (`pixels` is height and width), whose error is averaged.
      weights: weight of each slot; 0 takes a slot out.
      image_box: for letterboxed heatmaps: first row and column of the image, and those after its last. Pixels
        outside are left out. None: all pixels count.
    """
    error = jnp.square(predictions.astype(jnp.float32) - targets)
    if image_box is None:
        return jnp.sum(weights * error.reshape(*weights.shape, -1).mean(axis=-1))
    top, left, bottom, right = (edge[:, None, None] for edge in jnp.moveaxis(image_box, 1, 0))
    rows = jnp.arange(error.shape[2])[None, :, None]
    columns = jnp.arange(error.shape[3])[None, None, :]
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)  # [batch, height, width]
    pixels = jnp.maximum(jnp.sum(inside, axis=(1, 2)), 1)[:, None]
    means = jnp.sum(error * inside[:, None], axis=(2, 3)) / pixels
    return jnp.sum(weights * means)


# A standard deviation at which the beta-NLL has the squared error's gradient: that of a new score head.
_USUAL_DEVIATION = 0.2


def gaussian_nll(
    predictions: Float[Array, "batch scores"],
    log_variances: Float[Array, "batch scores"],
    targets: Float[Array, "batch scores"],
) -> Float32[Array, "batch scores"]:
    """Computes the negative log-likelihood of each target, in nats, under a normal distribution.

    The network predicts the distribution's mean and variance for each example (Nix and Weigend, "Estimating
    the mean and variance of the target probability distribution", 1994).
    """
    error = jnp.square(predictions - targets)
    return 0.5 * (error * jnp.exp(-log_variances) + log_variances + math.log(2 * math.pi))


def weighted_beta_nll(
    predictions: Float[Array, "batch scores"],
    log_variances: Float[Array, "batch scores"],
    targets: Float[Array, "batch scores"],
    weights: Float[Array, "batch scores"],
    beta: float = 0.5,
) -> Float32[Array, ""]:
    """Sums weight x beta-NLL over batch and scores.

    The likelihood's gradient of a mean is its error divided by the variance. So examples that a model takes
    for noisy hardly train their mean, and stay badly predicted. The beta-NLL multiplies each example's
    likelihood by variance^beta, which counts as a constant (Seitzer et al., "On the Pitfalls of
    Heteroscedastic Uncertainty Estimation with Probabilistic Neural Networks", ICLR 2022; 0.5 is theirs).

    The result is scaled so that at a standard deviation of 0.2 the means have the gradient of
    `weighted_squared_error`, at s that times (0.2 / s)^(2 - 2 beta): the two losses take the same weight. As
    the factor counts as a constant, the value itself says little; `gaussian_nll` is the one to compare.

    Args:
      predictions, log_variances: the distributions.
      targets: the scores.
      weights: weight of each score; 0 takes it out.
      beta: 0 is the likelihood itself; at 1 the means learn as from the squared error.
    """
    factors = jax.lax.stop_gradient(jnp.exp(beta * log_variances))
    scale = 2 * _USUAL_DEVIATION ** (2 - 2 * beta)
    return scale * jnp.sum(weights * factors * gaussian_nll(predictions, log_variances, targets))
