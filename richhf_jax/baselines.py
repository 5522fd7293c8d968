"""The baselines' models: their losses and predictions, on RAHF's tasks and batches."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Float, Float32, PRNGKeyArray, Shaped, UInt8

from richhf_jax import errors, feedback, losses, models
from richhf_jax.models import Batch, Images, Metrics
from richhf_jax.shapes import Array

RESNET_SCORES, RESNET_HEATMAPS = "resnet50_scores", "resnet50_heatmaps"


class ResNetModel(models.BaseModel):
    """Losses and predictions of `network.resnet.ResNetFeedback`, which gin injects as `module`.

    The losses are RAHF's: the scores' mean squared error and the heatmaps' pixel-wise one, each a mean over
    the slots that have labels. Batches are those of the multi-head variant. They have a slot for
    each kind, and those of the network's kinds count.

    In training, images are normalised by the mean and the variance of their microbatch, which also move the
    running statistics. The losses of evaluations, and predictions, use the running statistics.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer_def: optax.GradientTransformation | None,
        heatmap_loss_weight: float = 1.0,
        score_loss_weight: float = 1.0,
    ):
        super().__init__(optimizer_def)
        self.module: Any = module
        self._loss_weights = {"heatmap": heatmap_loss_weight, "score": score_loss_weight}

    @property
    def outputs(self) -> feedback.Outputs:
        """The kinds of the network's heads."""
        heads = self.module.heads_config
        return feedback.Outputs(tuple(heads.score_kinds), tuple(heads.heatmap_kinds), keywords=False)

    @property
    def system(self) -> str:
        """The name of what the network predicts; with heads for both, that of heatmaps."""
        return RESNET_HEATMAPS if self.outputs.heatmaps else RESNET_SCORES

    @property
    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """An image of one cell."""
        side = self.module.resnet_config.stride
        return {"image": (1, side, side, 3)}

    def check_image_size(self, height: int, width: int) -> None:
        """Checks that heatmaps come back to the image's size.

        Raises:
          errors.UserError: they don't.
        """
        stride = self.module.resnet_config.stride
        if self.outputs.heatmaps and (height % stride or width % stride):
            raise errors.UserError(
                f"IMAGE_SIDE: images have {height}x{width} pixels, but heatmaps are made of cells of {stride}"
                " (4 times 2 for each stage but the first, ResNetConfig.depths): give a multiple"
            )

    def describe(self, feature_lengths, batch_shapes, fit):
        """Describes the model: see `models.describe_system`."""
        del batch_shapes
        return models.describe_system(self.system, self.module, {"image": feature_lengths["image"]}, fit)

    def summary_images(
        self, batch: Images, predict: Callable[..., Images]
    ) -> dict[str, UInt8[np.ndarray, "images height three_widths 3"]]:
        """Draws the image, the true and the predicted first heatmap side by side."""
        if not self.outputs.heatmaps:
            return {}
        truth = batch["heatmap_targets"][:, feedback.HEATMAPS.index(self.outputs.heatmaps[0])]
        return models.beside_its_heatmaps(batch["image"], truth, predict()["heatmaps"][:, 0])

    def progress_metrics(self, scalars):
        """Names the losses by their kinds."""
        return models.named_by_kind(scalars)

    def get_initial_variables(self, rng, input_shapes, input_types=None):
        """Makes variables, which fit images of any size.

        Raises:
          errors.UserError: see `check_image_size`.
        """
        del input_types  # The network's input has one type.
        self.check_image_size(*input_shapes["image"][1:3])
        return self.module.init(rng, jnp.zeros((1, *input_shapes["image"][1:]), jnp.uint8))

    def loss_weights(self, batch: Batch) -> dict[str, Float[Array, ""]]:
        """Counts the labelled slots of scores and heatmaps; at least 1, so an empty kind's loss is 0."""
        return {
            name: jnp.maximum(jnp.sum(weights), 1.0) for name, (_, weights) in self._labels(batch).items()
        }

    def loss_fn(
        self,
        params: Any,
        batch: Batch,
        dropout_rng: PRNGKeyArray | None,
        normalizers: dict[str, Float[Array, ""]] | None = None,
        *,
        flax_mutables: Any,
    ) -> tuple[Float32[Array, ""], tuple[Metrics, Any]]:
        """Computes the loss that the class describes, its metrics and the new running statistics.

        Args:
          params, batch, normalizers: as in the base class.
          dropout_rng: None evaluates; a key trains. There is no dropout.
          flax_mutables: {"batch_stats": the running statistics}.
        """
        train = dropout_rng is not None
        outputs, new_mutables = self.module.apply(
            {"params": params, **flax_mutables}, batch["image"], train=train, mutable=[*flax_mutables]
        )
        normalizers = self.loss_weights(batch) if normalizers is None else normalizers
        loss, metrics = jnp.zeros((), jnp.float32), {}
        for name, (targets, weights) in self._labels(batch).items():
            box = batch.get("image_box") if name == "heatmap" else None
            targets = targets / 255.0 if name == "heatmap" else targets
            total = losses.weighted_squared_error(outputs[f"{name}s"], targets, weights, box)
            metrics[f"loss/{name}"] = losses.WeightedMean(total, jnp.sum(weights))
            loss += self._loss_weights[name] * total / normalizers[name]
        metrics["loss"] = losses.WeightedMean(loss, jnp.ones(()))
        return loss, (metrics, dict(new_mutables))

    def _labels(self, batch: Batch) -> dict[str, tuple[Array, Array]]:
        """Returns "heatmap" and "score" -> targets and weights of the network's kinds, if it has any.

        Raises:
          errors.UserError: the batch has no slots for them.
        """
        kinds = {
            "heatmap": (self.outputs.heatmaps, feedback.HEATMAPS),
            "score": (self.outputs.scores, feedback.SCORES),
        }
        labels = {}
        for name, (chosen, known) in kinds.items():
            targets, weights = batch[f"{name}_targets"], batch[f"{name}_weights"]
            if chosen and weights.shape[1] != len(known):
                raise errors.UserError(
                    f"NUM_{name.upper()}S is {weights.shape[1]}, but the network predicts {name}s: set it to"
                    f" {len(known)}, for a slot of every kind"
                )
            if chosen:
                slots = np.array([known.index(kind) for kind in chosen])
                labels[name] = jnp.asarray(targets)[:, slots], jnp.asarray(weights)[:, slots]
        return labels

    def predict_batch_with_aux(
        self, params: Any, batch: Batch, rng: PRNGKeyArray | None = None, *, flax_mutables: Any
    ) -> tuple[dict[str, Shaped[Array, "batch ..."]], dict[str, Shaped[Array, "batch ..."]]]:
        """Predicts all outputs of the network, whatever slots the batch has.

        Returns:
          The predictions, "scores" and "heatmaps" (see the base class), and no other results.
        """
        del rng  # Nothing is drawn.
        return self.module.apply({"params": params, **flax_mutables}, batch["image"]), {}

    def score_batch(self, params: Any, batch: Batch) -> Float[Array, "batch ..."]:
        """Raises NotImplementedError, because the network writes no text."""
        raise NotImplementedError("a ResNet writes no text, so texts have no likelihood")
