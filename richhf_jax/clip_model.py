"""CLIP's systems for training and inference: `ClipModel`."""

from typing import Any

import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Float, Float32, PRNGKeyArray, Shaped

from richhf_jax import errors, feedback, losses, models
from richhf_jax.network import clip, grad_cam
from richhf_jax.shapes import Array

# Head -> the name of its system in `model_description.SYSTEMS`.
SYSTEMS = {
    clip.COSINE: "clip_score",
    clip.PREFERENCE: "pickscore",
    clip.DENSE: "clip_finetuned",
    clip.GRADIENT: "clip_gradient",
}


class ClipModel(models.BaseModel):
    """Losses and predictions of `network.clip.Clip`, which gin injects as `module`.

    Its head says what it predicts:

        clip_score      "cosine": the alignment, as the cosine itself, which is in [-1, 1]. It ranks images:
                        correlations with it mean something, but errors of it as a score in [0, 1] don't.
        pickscore       "preference": the cosine for each kind of score. The published number is the cosine
                        times a constant, the exponential of the logits' scale.
        clip_finetuned  "dense": the four scores, in [0, 1]
        clip_gradient   "gradient": the misalignment heatmap, see `network.grad_cam`

    The loss of "dense" is the scores' mean squared error, as RAHF's. That of the others is CLIP's own
    (`losses.contrastive`), over the images and prompts of the batch, or of a microbatch; labels don't count.

    Attributes:
      module: the network.
    """

    # The end of a text is found by its id.
    exact_vocabulary = True

    def __init__(
        self,
        module: nn.Module,
        optimizer_def: optax.GradientTransformation | None,
        score_loss_weight: float = 1.0,
    ):
        super().__init__(optimizer_def)
        self.module: Any = module
        self._score_loss_weight = score_loss_weight

    @property
    def outputs(self) -> feedback.Outputs:
        """The kinds that the head predicts."""
        return self.module.outputs

    @property
    def vocab_size(self) -> int:
        """Number of token ids in the network's table."""
        return self.module.text_config.vocab_size

    @property
    def system(self) -> str:
        """The system's name."""
        return SYSTEMS[self.module.head]

    def describe(self, feature_lengths, batch_shapes, fit):
        """Describes the model: see `models.describe_system`."""
        del batch_shapes
        lengths = {name: feature_lengths[name] for name in ("image", "inputs")}
        return models.describe_system(self.system, self.module, lengths, fit)

    def progress_metrics(self, scalars):
        """Names the losses by their kinds, and leaves out the shares of cut texts that are 0."""
        return models.named_by_kind(scalars)

    def get_initial_variables(self, rng, input_shapes, input_types=None):
        """Makes variables for the network and its head.

        Raises:
          errors.UserError: the images or the prompts don't fit the network.
        """
        del input_types  # The network's inputs have one type each.
        prompts, length = input_shapes["encoder_input_tokens"][1:]
        if prompts != 1:
            raise errors.UserError(
                f"CLIP reads one prompt an image, but the data have {prompts}: set MIXTURE_OR_TASK_NAME to a"
                f" task of the variant {feedback.MULTI_HEAD!r}"
            )
        self.check_text_length(length)
        height, width = input_shapes["image"][1:3]
        self.check_image_size(height, width)
        image, tokens = jnp.zeros((1, height, width, 3), jnp.uint8), jnp.ones((1, length), jnp.int32)
        return self.module.init(rng, image, tokens)

    def check_image_size(self, height: int, width: int) -> None:
        """Checks that the image tower takes images of this size, in pixels.

        Raises:
          errors.UserError: it doesn't.
        """
        config = self.module.vision_config
        wanted = tuple(count * config.patch_size for count in config.grid)
        if (height, width) != wanted:
            raise errors.UserError(
                f"IMAGE_SIDE: images have {height}x{width} pixels, but the image tower is for"
                f" {wanted[0]}x{wanted[1]} (VisionConfig.grid x VisionConfig.patch_size): give"
                f" --gin.IMAGE_SIDE={wanted[0]}"
            )

    def check_text_length(self, length: int) -> None:
        """Checks that the text tower has a position for each token.

        Raises:
          errors.UserError: it hasn't.
        """
        if length > (most := self.module.text_config.max_length):
            raise errors.UserError(
                f"TEXT_LENGTH (or convert's --text_length) is {length}, but the text tower's position table"
                f" has {most} rows (TextConfig.max_length): train or convert with --gin.TEXT_LENGTH={most}"
            )

    @property
    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of a batch that `get_initial_variables` takes."""
        config = self.module.vision_config
        height, width = (count * config.patch_size for count in config.grid)
        return {"image": (1, height, width, 3), "encoder_input_tokens": (1, 1, 8)}

    def loss_weights(self, batch: models.Batch) -> dict[str, Float[Array, ""]]:
        """Counts labelled scores, at least 1; without a trained head, the batch's images."""
        if self.module.head == clip.DENSE:
            return {"score": jnp.maximum(jnp.sum(batch["score_weights"]), 1.0)}
        return {"contrastive": jnp.full((), batch["image"].shape[0], jnp.float32)}

    def loss_fn(
        self,
        params: Any,
        batch: models.Batch,
        dropout_rng: PRNGKeyArray | None,
        normalizers: dict[str, Float[Array, ""]] | None = None,
    ) -> tuple[Float32[Array, ""], models.Metrics]:
        """Computes the loss that the class describes, and its metrics; see the base class."""
        outputs: Any = self.module.apply(
            {"params": params},
            batch["image"],
            batch["encoder_input_tokens"][:, 0],
            enable_dropout=dropout_rng is not None,
            rngs=None if dropout_rng is None else {"dropout": dropout_rng},
        )
        normalizers = self.loss_weights(batch) if normalizers is None else normalizers
        metrics: models.Metrics = {}
        if self.module.head == clip.DENSE:
            weights = batch["score_weights"]
            total = losses.weighted_squared_error(outputs["scores"], batch["score_targets"], weights)
            metrics["loss/score"] = losses.WeightedMean(total, jnp.sum(weights))
            loss = self._score_loss_weight * total / normalizers["score"]
        else:
            image, text = clip.unit(outputs["image"]), clip.unit(outputs["text"])
            each, chose_right = losses.contrastive(image, text, jnp.exp(outputs["logit_scale"]))
            total, count = jnp.sum(each), jnp.full((), each.shape[0], jnp.float32)
            metrics["loss/contrastive"] = losses.WeightedMean(total, count)
            right = jnp.sum(chose_right, dtype=jnp.float32)
            metrics["contrastive/accuracy"] = losses.WeightedMean(right, count)
            loss = total / normalizers["contrastive"]
        metrics["loss"] = losses.WeightedMean(loss, jnp.ones(()))
        return loss, metrics | models.shares_cut(batch)

    def predict_batch_with_aux(
        self, params: Any, batch: models.Batch, rng: PRNGKeyArray | None = None
    ) -> tuple[dict[str, Shaped[Array, "batch ..."]], dict[str, Shaped[Array, "batch ..."]]]:
        """Predicts "scores" or "heatmaps", see the class and `outputs`; there is nothing else."""
        del rng
        image, tokens = batch["image"], batch["encoder_input_tokens"][:, 0]
        if self.module.head == clip.GRADIENT:
            maps = grad_cam.grad_cam(self.module, params, image, tokens)
            return {"heatmaps": grad_cam.disagreement(maps, image.shape[1])[:, None]}, {}
        outputs: Any = self.module.apply({"params": params}, image, tokens)
        return {"scores": outputs["scores"]}, {}

    def score_batch(self, params: Any, batch: models.Batch) -> Float[Array, "batch ..."]:
        """Raises NotImplementedError, because the network writes no text."""
        raise NotImplementedError("CLIP writes no text, so texts have no likelihood")
