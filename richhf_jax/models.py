"""The interface of a model for training and inference (T5X's `BaseModel`), and RAHF's implementation."""

import abc
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Bool, Float, Float32, Int, PRNGKeyArray, Shaped, UInt8

from richhf_jax import decoding, errors, feedback, losses
from richhf_jax.shapes import Array

# Features by name, as the feature converter makes them.
Batch = Mapping[str, Shaped[Array, "batch ..."]]
Metrics = dict[str, losses.WeightedMean]
# The system that a description without a name is of.
RAHF = "rahf"
# Features or predictions of the few examples that are drawn.
Images = Mapping[str, Shaped[np.ndarray, "images ..."]]


class BaseModel(abc.ABC):
    """A network with its losses, predictions and optimizer; methods as in T5X.

    A model with mutable collections (batch statistics, for example) returns them from
    `get_initial_variables`. Its `loss_fn` and `predict_batch_with_aux` then take them as the keyword argument
    `flax_mutables`, and `loss_fn` returns (loss, (metrics, new flax_mutables)), as in T5X.

    Attributes:
      optimizer_def: the optimizer; None in a model that only predicts.
      FEATURE_CONVERTER_CLS: the seqio feature converter that makes the model's batches (T5X's name); None:
        the default of `input_pipeline`.
      vocab_size: number of token ids in the network's table; None: the network reads no text.
      exact_vocabulary: whether the data's vocabulary must have exactly `vocab_size` ids, and not fewer.
      outputs: the kinds that predictions have, and their order. Predictions hold "scores", float32
        [batch, scores], and "heatmaps", float32 [batch, heatmaps, height, width], where there are any kinds.
      has_uncertainty: whether predictions have "score_deviations".
      variant: one of `feedback.VARIANTS`; how many prompts an image has.
      system: name in `model_description.SYSTEMS`.
      input_shapes: feature -> shape of an example that the network takes, for `get_initial_variables`.
    """

    FEATURE_CONVERTER_CLS: Callable[..., Any] | None = None
    vocab_size: int | None = None
    exact_vocabulary: bool = False
    outputs: feedback.Outputs = feedback.ALL_OUTPUTS
    has_uncertainty: bool = False
    variant: str = feedback.MULTI_HEAD
    system: str = RAHF
    input_shapes: Mapping[str, tuple[int, ...]]

    def __init__(self, optimizer_def: optax.GradientTransformation | None):
        self.optimizer_def: Any = optimizer_def

    @abc.abstractmethod
    def loss_fn(
        self,
        params: Any,
        batch: Batch,
        dropout_rng: PRNGKeyArray | None,
        normalizers: dict[str, Float[Array, ""]] | None = None,
    ) -> tuple[Float[Array, ""], Metrics]:
        """Computes the loss and the metrics of a training batch.

        Args:
          params: the network's parameters.
          batch: the whole batch, or a microbatch of it.
          dropout_rng: key of the dropout; None switches dropout off.
          normalizers: the whole batch's `loss_weights`, so that the losses of its microbatches add up to its
            loss; None: the `loss_weights` of `batch`.
        """

    def eval_fn(self, params: Any, batch: Batch, **mutables: Any) -> tuple[Float[Array, ""], Metrics]:
        """Computes the loss and the metrics without dropout."""
        loss, aux = self.loss_fn(params, batch, dropout_rng=None, **mutables)
        metrics: Any = aux  # With mutable collections: (metrics, new collections).
        return loss, metrics[0] if mutables else metrics

    @abc.abstractmethod
    def loss_weights(self, batch: Batch) -> dict[str, Float[Array, ""]]:
        """Computes the normalizer of each loss from a whole batch: `loss_fn` divides by it."""

    @abc.abstractmethod
    def predict_batch_with_aux(
        self, params: Any, batch: Batch, rng: PRNGKeyArray | None = None
    ) -> tuple[dict[str, Shaped[Array, "batch ..."]], dict[str, Shaped[Array, "batch ..."]]]:
        """Computes the predictions, and the decoder's other results, such as scores.

        Args:
          params: the network's parameters.
          batch: the examples.
          rng: key of random decoding.
        """

    def predict_batch(
        self, params: Any, batch: Batch, rng: PRNGKeyArray | None = None, **mutables: Any
    ) -> dict[str, Shaped[Array, "batch ..."]]:
        """Computes the predictions alone."""
        return self.predict_batch_with_aux(params, batch, rng, **mutables)[0]

    @abc.abstractmethod
    def score_batch(self, params: Any, batch: Batch) -> Float[Array, "batch ..."]:
        """Computes the log-likelihood of each target sequence."""

    @abc.abstractmethod
    def get_initial_variables(
        self,
        rng: PRNGKeyArray,
        input_shapes: Mapping[str, tuple[int, ...]],
        input_types: Mapping[str, Any] | None = None,
    ) -> Mapping[str, Any]:
        """Makes fresh `params`, their logical axes as `params_axes`, and the mutable collections, if any.

        Args:
          rng: key of the random values.
          input_shapes: feature -> shape in a batch.
          input_types: feature -> type in a batch; None: the model knows them.
        """

    def score_of_kind(
        self, params: Any, batch: Batch, kind: str, **mutables: Any
    ) -> Float32[Array, " batch"]:
        """Computes one kind of score, differentiably: for guidance and rewards.

        Args:
          params: the network's parameters.
          batch: the image, float from 0 to 255, and the features of its prompt for this kind.
          kind: one of `outputs.scores`.
          mutables: "flax_mutables", if the model has any.
        """
        slots = {"heatmap_weights": 0, "score_weights": len(self.outputs.scores)}
        rows = batch["image"].shape[0]
        shapes = {name: jnp.zeros((rows, count)) for name, count in slots.items()}
        scores = self.predict_batch(params, {**batch, **shapes}, **mutables)["scores"]
        return scores[:, self.outputs.scores.index(kind)]

    def check_image_size(self, height: int, width: int) -> None:
        """Checks that the network takes images of this size, in pixels.

        Raises:
          errors.UserError: it doesn't.
        """
        del height, width

    def check_text_length(self, length: int) -> None:
        """Checks that the network takes texts of this length, in tokens.

        Raises:
          errors.UserError: it doesn't.
        """
        del length

    # Descriptions of the model, for a training loop that knows no particular model.

    def describe(
        self, feature_lengths: Mapping[str, int], batch_shapes: Mapping[str, Any], fit: str
    ) -> dict[str, Any] | None:
        """Describes the model for users of its checkpoints.

        Args:
          feature_lengths: seqio's task feature lengths.
          batch_shapes: feature -> shape and type in a batch.
          fit: how the data's pictures become square, see `pixels.square`.

        Returns:
          A JSON-able description, see `describe_system`; None: nothing is written.
        """
        del feature_lengths, batch_shapes, fit
        return None

    def summary_images(
        self, batch: Images, predict: Callable[..., Images]
    ) -> dict[str, UInt8[np.ndarray, "images _ _ 3"]]:
        """Draws the pictures that TensorBoard shows of an evaluation.

        Args:
          batch: a few examples.
          predict: computes the predictions for these examples. It costs nothing if it isn't called. Either
            all processes must call it, or none. It may be given a function of the batch, which takes out
            what needn't be predicted.

        Returns:
          Tag -> RGB pictures.
        """
        del batch, predict
        return {}

    def progress_metrics(self, scalars: Mapping[str, float]) -> dict[str, float]:
        """Selects and names the metrics that a progress line shows."""
        return dict(scalars)


class RahfModel(BaseModel):
    """Losses and predictions of `network.rahf.Rahf`, which gin injects as `module`.

    The loss is the paper's weighted sum (section 4.1.3): pixel-wise mean squared error of the heatmaps,
    mean squared error of the scores, teacher-forced cross entropy of the keywords; each is a mean over
    the slots (or tokens) that have labels. Of a network that predicts the scores' variances, too, the scores'
    loss is `losses.weighted_beta_nll`; its metrics are the squared error as always ("loss/score"), and the
    likelihood ("loss/score_nll"). Texts are decoded by `decode_fn`, one of `decoding`'s functions,
    which makes `num_decodes` of each; the best is the prediction. But where a batch has "keyword_pieces"
    (`keywords` makes them of the prompt), the decoder can only copy them and decide which words to mark: it
    marks those whose probability of being misaligned is above `misalignment_threshold`.

    The ViT's position table is for images of one size, its grid times its patch_size. Other sizes are
    refused, unless `resample_positions` says that the table is to be resampled to them.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer_def: optax.GradientTransformation | None,
        decode_fn: Callable = decoding.temperature_sample,
        num_decodes: int = 1,
        misalignment_threshold: float = 0.5,
        resample_positions: bool = False,
        heatmap_loss_weight: float = 1.0,
        score_loss_weight: float = 1.0,
        keywords_loss_weight: float = 1.0,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        eos_id: int = 1,
    ):
        super().__init__(optimizer_def)
        self.module = module
        self._decode_fn = decode_fn
        self._num_decodes = num_decodes
        self._misalignment_threshold = misalignment_threshold
        self._resample_positions = resample_positions
        self._loss_weights = {
            "heatmap": heatmap_loss_weight,
            "score": score_loss_weight,
            "keywords": keywords_loss_weight,
        }
        self._label_smoothing = label_smoothing
        self._z_loss = z_loss
        self._eos_id = eos_id

    @property
    def misalignment_threshold(self) -> float:
        """The probability of being misaligned above which a word is marked."""
        return self._misalignment_threshold

    def describe(self, feature_lengths, batch_shapes, fit):
        """Describes the model: see `describe_system`."""
        del batch_shapes
        lengths = {name: feature_lengths[name] for name in ("image", "inputs", "targets")}
        return describe_system(self.system, self.module, lengths, fit, self._misalignment_threshold)

    def summary_images(
        self, batch: Images, predict: Callable[..., Images]
    ) -> dict[str, UInt8[np.ndarray, "images height three_widths 3"]]:
        """Draws the image, the true and the predicted first heatmap side by side."""
        if not batch["heatmap_weights"].size:
            return {}
        predicted = predict(_without_other_slots)["heatmaps"][:, 0]
        return beside_its_heatmaps(batch["image"], batch["heatmap_targets"][:, 0], predicted)

    def progress_metrics(self, scalars):
        """Names the losses by their kinds, and leaves out the shares of cut texts that are 0."""
        return named_by_kind(scalars)

    @property
    def vocab_size(self) -> int:
        """Number of token ids in the network's table."""
        return self.module.t5_config.vocab_size

    @property
    def has_uncertainty(self) -> bool:
        """Whether predictions have "score_deviations"."""
        return self.module.heads_config.score_variance

    @property
    def variant(self) -> str:
        """The network's variant."""
        return self.module.variant

    def get_initial_variables(self, rng, input_shapes, input_types=None):
        """Variables for all heads, whatever slots the batch has: one checkpoint then fits every task.

        Raises:
          errors.UserError: the images are of a size that the ViT doesn't take, or the prompts are of another
            variant.
        """
        del input_types  # The network's inputs have one type each.
        self._check_prompts(input_shapes)
        slots = self.module.smallest_slots
        height, width = input_shapes["image"][1:3]
        self.check_image_size(height, width)
        length, target_length = (
            input_shapes["encoder_input_tokens"][-1],
            input_shapes["decoder_input_tokens"][-1],
        )
        targets = jnp.ones((1, slots.texts, target_length), jnp.int32)
        # Letterboxed pictures have a mask, which not every kernel of attention takes.
        box = jnp.array([[0, 0, height, width]]) if "image_box" in input_shapes else None
        return self.module.init(
            rng,
            jnp.zeros((1, height, width, 3), jnp.uint8),
            jnp.ones((1, slots.prompts(self.module.variant), length), jnp.int32),
            targets,
            targets,
            num_heatmaps=slots.heatmaps,
            num_scores=slots.scores,
            image_box=box,
            enable_dropout=False,
        )

    def _check_prompts(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Checks that the data have as many prompts an image as the model's variant."""
        names = ("heatmap_weights", "score_weights", "decoder_input_tokens")
        if not set(names) <= set(shapes):
            return
        slots = feedback.Slots(*(shapes[name][1] for name in names))
        variant, given = self.module.variant, shapes["encoder_input_tokens"][1]
        if given != (wanted := slots.prompts(variant)):
            raise errors.UserError(
                f"VARIANT is {variant!r}, which takes {wanted} prompts an image, but the data have {given}:"
                " set MIXTURE_OR_TASK_NAME to a task of this variant, or VARIANT to the task's"
            )

    @property
    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of a batch that `get_initial_variables` takes, at the size of the ViT's position table."""
        config = self.module.vit_config
        height, width = (count * config.patch_size for count in config.grid)
        # Texts may be of any length.
        tokens = dict.fromkeys(("encoder_input_tokens", "decoder_input_tokens"), (1, 1, 8))
        return {"image": (1, height, width, 3), **tokens}

    def check_image_size(self, height: int, width: int) -> None:
        """Checks that the ViT takes images of this size, in pixels.

        Raises:
          errors.UserError: it doesn't.
        """
        given = f"IMAGE_SIDE: images have {height}x{width} pixels"
        (rows, columns), patch = self.module.vit_config.grid, self.module.vit_config.patch_size
        fits = (height, width) == (rows * patch, columns * patch)
        if not fits and not self._resample_positions:
            raise errors.UserError(
                f"{given}, but the ViT's position table is for {rows * patch}x{columns * patch}: a grid of"
                f" {rows}x{columns} patches, each of {patch} pixels (ViTConfig.grid, ViTConfig.patch_size)."
                f" Give --gin.IMAGE_SIDE={rows * patch}, or another grid; or, to train a model at this size,"
                " resample the table to the images with --gin.RESAMPLE_POSITIONS=True"
            )
        if height % patch or width % patch:
            raise errors.UserError(
                f"{given}, which don't divide into patches of {patch} (ViTConfig.patch_size): give a multiple"
            )

    def _outputs(self, params: Any, batch: Batch, dropout_rng: jax.Array | None) -> dict[str, jax.Array]:
        outputs: Any = self.module.apply(
            {"params": params},
            batch["image"],
            batch["encoder_input_tokens"],
            batch["decoder_input_tokens"],
            batch["decoder_target_tokens"],
            num_heatmaps=batch["heatmap_weights"].shape[1],
            num_scores=batch["score_weights"].shape[1],
            image_box=batch.get("image_box"),
            enable_dropout=dropout_rng is not None,
            rngs=None if dropout_rng is None else {"dropout": dropout_rng},
        )
        return outputs

    def loss_weights(self, batch: Batch) -> dict[str, Float[Array, ""]]:
        """Counts labelled slots of each kind and target tokens; at least 1, so an empty kind's loss is 0."""
        return {kind: jnp.maximum(count, 1.0) for kind, count in _label_counts(batch).items()}

    def loss_fn(
        self,
        params: Any,
        batch: Batch,
        dropout_rng: PRNGKeyArray | None,
        normalizers: dict[str, Float[Array, ""]] | None = None,
    ) -> tuple[Float32[Array, ""], Metrics]:
        """Computes the loss that the class describes, and its metrics; see the base class."""
        outputs = self._outputs(params, batch, dropout_rng)
        sums, metrics = {}, {}
        if "heatmaps" in outputs:
            targets = batch["heatmap_targets"].astype(jnp.float32) / 255.0
            sums["heatmap"] = losses.weighted_squared_error(
                outputs["heatmaps"], targets, batch["heatmap_weights"], batch.get("image_box")
            )
        if "scores" in outputs:
            sums["score"] = losses.weighted_squared_error(
                outputs["scores"], batch["score_targets"], batch["score_weights"]
            )
        if "logits" in outputs:
            targets, weights = batch["decoder_target_tokens"], batch["decoder_loss_weights"]
            sums["keywords"], _, _ = losses.compute_weighted_cross_entropy(
                outputs["logits"], targets, weights, self._label_smoothing, self._z_loss
            )
            hits = (jnp.argmax(outputs["logits"], axis=-1) == targets) * weights
            metrics["keywords/token_accuracy"] = losses.WeightedMean(jnp.sum(hits), jnp.sum(weights))
        counts = _label_counts(batch)
        for kind, total in sums.items():
            metrics[f"loss/{kind}"] = losses.WeightedMean(total, counts[kind])
        if "score_log_variances" in outputs:
            distributions = outputs["scores"], outputs["score_log_variances"]
            targets, weights = batch["score_targets"], batch["score_weights"]
            sums["score"] = losses.weighted_beta_nll(*distributions, targets, weights)
            nll = jnp.sum(weights * losses.gaussian_nll(*distributions, targets))
            metrics["loss/score_nll"] = losses.WeightedMean(nll, counts["score"])
        normalizers = self.loss_weights(batch) if normalizers is None else normalizers
        loss = jnp.zeros((), jnp.float32)
        for kind, total in sums.items():
            loss += self._loss_weights[kind] * total / normalizers[kind]
        metrics["loss"] = losses.WeightedMean(loss, jnp.ones(()))
        return loss, metrics | shares_cut(batch)

    def predict_batch_with_aux(
        self, params: Any, batch: Batch, rng: PRNGKeyArray | None = None
    ) -> tuple[dict[str, Shaped[Array, "batch ..."]], dict[str, Shaped[Array, "batch ..."]]]:
        """Predicts all outputs that the batch has slots for, in one program.

        Only the shape of the batch's targets counts, not their values.

        Returns:
          Two dictionaries. The predictions: "heatmaps" float32 [batch, heatmaps, height, width], "scores"
          float32 [batch, scores], "tokens" int32 [batch, texts, target_length]; with `has_uncertainty` also
          "score_deviations" float32 [batch, scores], standard deviations. The decoder's results:
          "decodes" int32 [batch, texts, num_decodes, target_length] and their log-probabilities "scores"
          float32 [batch, texts, num_decodes], the best text last as in T5X. If the batch has the features of
          `keywords.features`, there is one decode, and the predictions also hold "keyword_probability"
          float32 and "keyword_misaligned" bool, both [batch, texts, target_length]: position i belongs to the
          word of number i + 1. They are NaN and False where there is no such word, or where the decoder's
          length ended before it.
        """
        tokens = batch["encoder_input_tokens"]
        batch_size, texts, target_length = batch["decoder_input_tokens"].shape
        apply = functools.partial(self.module.apply, {"params": params})
        encoded: Any = apply(batch["image"], tokens, batch.get("image_box"), method="encode")
        slots = feedback.Slots(batch["heatmap_weights"].shape[1], batch["score_weights"].shape[1], texts)
        predictions, aux = {}, {}
        if slots.heatmaps:
            predictions["heatmaps"] = apply(encoded, slots, method="heatmaps")
        if slots.scores:
            scores = self.module.named_scores(apply(encoded, slots, method="scores"))
            if "score_log_variances" in scores:
                scores["score_deviations"] = jnp.exp(scores.pop("score_log_variances") / 2)
            predictions |= scores
        if texts:
            if "keyword_pieces" in batch:
                *decoded, probability, misaligned = self._mark_words(
                    self._decoder(params, encoded.last(texts), target_length), batch
                )
                shape = (batch_size, texts, target_length)
                predictions["keyword_probability"] = probability.reshape(shape)
                predictions["keyword_misaligned"] = misaligned.reshape(shape)
            else:
                decoded = self._decode_fn(
                    *self._decoder(params, encoded.last(texts), target_length),
                    eos_id=self._eos_id,
                    decode_rng=rng,
                    num_decodes=self._num_decodes,
                    cache_offset=self.module.cache_offset,
                )
            aux["decodes"] = decoded[0].reshape(batch_size, texts, -1, target_length)
            aux["scores"] = decoded[1].reshape(batch_size, texts, -1)
            predictions["tokens"] = aux["decodes"][:, :, -1]
        return predictions, aux

    def _mark_words(
        self, decoder: tuple[Array, Any, decoding.TokensToLogits], batch: Batch
    ) -> tuple[
        Int[Array, "sequences target_length"],
        Float32[Array, " sequences"],
        Float32[Array, "sequences target_length"],
        Bool[Array, "sequences target_length"],
    ]:
        """Returns tokens, their log-probability, and each word's probability and decision, by its number."""
        pieces, words = (batch[name] for name in ("keyword_pieces", "keyword_words"))
        texts, length = pieces.shape[1:]
        text, decided_at = decoding.optional_suffixes(
            pieces.reshape(-1, length),
            words.reshape(-1, length),
            jnp.repeat(batch["keyword_suffix"], texts, axis=0),
            self._eos_id,
        )
        tokens, log_probs, log_odds, written = decoding.constrained_decode(
            *decoder, text, threshold=self._misalignment_threshold
        )
        log_odds, written = (jnp.take_along_axis(x, decided_at, axis=1) for x in (log_odds, written))
        is_word = decided_at >= 0
        probability = jnp.where(is_word, jax.nn.sigmoid(log_odds), jnp.nan)
        return tokens, log_probs, probability, written & is_word

    def _decoder(self, params: Any, encoded: Any, length: int) -> tuple[Array, Any, decoding.TokensToLogits]:
        """Makes the first arguments of `decoding`'s functions: inputs, cache and step function.

        Args:
          params: the network's parameters.
          encoded: `network.rahf.Encoded` examples with one prompt each.
          length: number of tokens to decode.
        """
        targets = jnp.zeros((encoded.tokens.shape[0], length), jnp.int32)
        step = functools.partial(
            self.module.apply, encoded=encoded, method="decode", decode=True, max_decode_length=length
        )
        _, variables = step(
            {"params": params},
            decoder_input_tokens=targets,
            decoder_target_tokens=targets,
            mutable=["cache", "fixed_kv"],
        )
        # The keys and values of the encoded prompts are the same in every step and for every decode.
        fixed = {"params": params, "fixed_kv": variables["fixed_kv"]}

        def tokens_to_logits(state: decoding.DecodingState):
            logits, variables = step(
                fixed | {"cache": state.cache},
                decoder_input_tokens=state.cur_token,
                decoder_target_tokens=state.cur_token,
                mutable=["cache"],
            )
            return jnp.squeeze(logits, axis=1), variables["cache"]

        return targets, variables["cache"], tokens_to_logits

    def score_of_kind(
        self, params: Any, batch: Batch, kind: str, **mutables: Any
    ) -> Float32[Array, " batch"]:
        """Computes one kind of score, and no other head; see the base class."""
        apply = functools.partial(self.module.apply, {"params": params})
        inputs = batch["image"], batch["encoder_input_tokens"], batch.get("image_box")
        score: Any = apply(apply(*inputs, method="encode"), kind, method="score")
        return score

    def score_batch(self, params: Any, batch: Batch) -> Float32[Array, "batch texts"]:
        """Computes the log-likelihood of each target text."""
        logits = self._outputs(params, batch, dropout_rng=None)["logits"]
        log_probs = jax.nn.log_softmax(logits, axis=-1)
        chosen = jnp.take_along_axis(log_probs, batch["decoder_target_tokens"][..., None], axis=-1)
        return jnp.sum(jnp.squeeze(chosen, axis=-1) * batch["decoder_loss_weights"], axis=-1)


def describe_system(
    system: str,
    module: nn.Module,
    feature_lengths: Mapping[str, int],
    fit: str,
    misalignment_threshold: float | None = None,
) -> dict[str, Any]:
    """Describes a network and its inputs, for `model_description`; JSON-able.

    Args:
      module: the network; its `describe()` names every setting.
      feature_lengths: {"image": side in pixels}; of a system that reads text, "inputs", its tokens; of one
        that marks words, "targets", the decoder's.
      fit: how pictures become square, see `pixels.square`.
      misalignment_threshold: words with a higher probability of being misaligned are marked; None: the
        system marks no words.
    """
    return {
        # Older files name no system.
        **({} if system == RAHF else {"system": system}),
        **module.describe(),  # pyright: ignore[reportAttributeAccessIssue]
        "feature_lengths": dict(feature_lengths),
        "fit": fit,
        **({} if misalignment_threshold is None else {"misalignment_threshold": misalignment_threshold}),
    }


def beside_its_heatmaps(
    image: UInt8[np.ndarray, "images height width 3"],
    truth: UInt8[np.ndarray, "images height width"],
    predicted: Float32[Array, "images height width"],
) -> dict[str, UInt8[np.ndarray, "images height three_widths 3"]]:
    """Draws images, their true and their predicted heatmaps side by side, for `BaseModel.summary_images`."""
    grey = [np.repeat(heat.astype(np.uint8)[..., None], 3, axis=-1) for heat in (truth, 255 * predicted)]
    return {"image_truth_prediction": np.concatenate([image, *grey], axis=2)}


def named_by_kind(scalars: Mapping[str, float]) -> dict[str, float]:
    """Names losses by their kinds, and leaves out the shares of cut texts that are 0."""
    return {
        name.removeprefix("loss/"): value
        for name, value in scalars.items()
        if value or not name.startswith("data/")
    }


def shares_cut(batch: Batch) -> Metrics:
    """Counts the texts that were too long; each metric becomes their share."""
    metrics = {}
    for name in ("encoder_words_cut", "decoder_words_cut"):
        if name in batch:
            cut = batch[name] > 0
            metrics[f"data/{name}"] = losses.WeightedMean(
                jnp.sum(cut, dtype=jnp.float32), jnp.full((), cut.size, jnp.float32)
            )
    return metrics


def _without_other_slots(batch: Images) -> Images:
    """Returns a batch without slots of scores and texts: decoding takes seconds to compile."""
    return {**batch, **{name: batch[name][:, :0] for name in ("score_weights", "decoder_input_tokens")}}


def _label_counts(batch: Batch) -> dict[str, Float[Array, ""]]:
    """Counts labelled heatmap and score slots, and target tokens."""
    names = {"heatmap": "heatmap_weights", "score": "score_weights", "keywords": "decoder_loss_weights"}
    return {kind: jnp.sum(batch[name]) for kind, name in names.items()}
