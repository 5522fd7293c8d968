"""The network of `richhf_jax.network` in PyTorch, for comparison in `benchmarks.steps --torch`.

Sizes come from our own configurations. Names are those of our parameter tree, and a test loads our parameters
and gets our outputs. Feature maps are [batch, channels, height, width], attention [batch, heads, length, kv].
The module can build the presets tiny, base and large; `Rahf` names the parts that it can't build.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from richhf_jax import errors, feedback
from richhf_jax.network import layers, rahf, t5, vit

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "exact_gelu": F.gelu,
    "relu": F.relu,
    "linear": lambda x: x,
}


class Attention(nn.Module):
    """Attention. `scale` multiplies the logits; None: 1 / sqrt(head_dim)."""

    def __init__(self, width: int, heads: int, head_dim: int, bias: bool, scale: float | None):
        super().__init__()
        self.heads, self.scale = heads, scale
        self.query, self.key, self.value = (nn.Linear(width, heads * head_dim, bias) for _ in range(3))
        self.out = nn.Linear(heads * head_dim, width, bias)

    def split(self, x: Tensor) -> Tensor:
        """Splits [batch, length, heads * kv] into [batch, heads, length, kv]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.split(self.key(x)), self.split(self.value(x))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
        """Attends from `x` [batch, length, embed] to keys and values [batch, heads, kv_length, kv].

        `bias` broadcasts to [batch, heads, length, kv_length].
        """
        query = self.split(self.query(x))
        x = F.scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=self.scale)
        return self.out(x.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """One hidden layer, or the product of several."""

    def __init__(self, width: int, hidden: int, activations: Sequence[str], bias: bool):
        super().__init__()
        self.activations = [ACTIVATIONS[name] for name in activations]
        self.wi = nn.ModuleList(nn.Linear(width, hidden, bias) for _ in activations)
        self.wo = nn.Linear(hidden, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        first, *others = (act(wi(x)) for act, wi in zip(self.activations, self.wi, strict=True))
        for branch in others:
            first = first * branch
        return self.wo(first)


class EncoderLayer(nn.Module):
    """A layer of the ViT and of T5's encoder."""

    def __init__(self, make_norm: Callable[[], nn.Module], attention: Attention, mlp: Mlp):
        super().__init__()
        self.pre_attention_layer_norm, self.pre_mlp_layer_norm = make_norm(), make_norm()
        self.attention, self.mlp = attention, mlp

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = self.pre_attention_layer_norm(x)
        x = x + self.attention(y, *self.attention.keys_and_values(y), bias)
        return x + self.mlp(self.pre_mlp_layer_norm(x))


class StemLayer(nn.Module):
    """A 3x3 convolution with stride 2, a norm over the channels, a GELU."""

    def __init__(self, channels: int, filters: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, filters, 3, stride=2, bias=False)
        self.norm = ChannelNorm(filters, 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS["gelu"](self.norm(self.conv(F.pad(x, (0, 1, 0, 1)))))


class ViT(nn.Module):
    """Pre-norm vision transformer."""

    def __init__(self, cfg: vit.ViTConfig):
        super().__init__()
        width, channels = cfg.emb_dim, (3, *cfg.stem_filters)
        self.stem = nn.ModuleList(StemLayer(*pair) for pair in itertools.pairwise(channels))
        patch = cfg.patch_size // 2 ** len(self.stem)
        self.patch_embedding = nn.Conv2d(channels[-1], width, patch, stride=patch)
        self.position_embedding = nn.Parameter(torch.randn(*cfg.grid, width) / width**0.5)
        activation = "gelu" if cfg.approximate_gelu else "exact_gelu"

        def norm():
            return nn.LayerNorm(width, cfg.layer_norm_epsilon)

        self.layers = nn.ModuleList(
            EncoderLayer(
                norm,
                Attention(width, cfg.num_heads, width // cfg.num_heads, bias=True, scale=None),
                Mlp(width, cfg.mlp_dim, (activation,), bias=True),
            )
            for _ in range(cfg.num_layers)
        )
        self.encoder_norm = norm()

    def forward(self, images: Tensor) -> Tensor:
        """Encodes uint8 [batch, height, width, 3] to [batch, patches, embed]."""
        x = (images / 127.5 - 1.0).permute(0, 3, 1, 2)
        for layer in self.stem:
            x = layer(x)
        # [batch, embed, rows, columns] -> [batch, patches, embed]
        x = (self.patch_embedding(x).permute(0, 2, 3, 1) + self.position_embedding).flatten(1, 2)
        for layer in self.layers:
            x = layer(x)
        return self.encoder_norm(x)


class RelativePositionBias(nn.Module):
    """T5's relative position biases, for positions that are known beforehand."""

    buckets: Tensor

    def __init__(self, heads: int, positions: np.ndarray, bidirectional: bool):
        super().__init__()
        self.rel_embedding = nn.Parameter(torch.randn(heads, 32) / 32**0.5)
        relative = positions[None, :] - positions[:, None]
        buckets = torch.from_numpy(layers.relative_position_bucket(relative, bidirectional)).long()
        # A product with one-hot vectors is fast; a look-up's gradient would add millions of numbers to a few.
        self.register_buffer("buckets", F.one_hot(buckets, 32).to(torch.uint8), persistent=False)

    def forward(self) -> Tensor:
        """Returns the biases, [1, heads, length, length]."""
        one_hot = self.buckets.to(self.rel_embedding.dtype).flatten(0, 1).T
        return (self.rel_embedding @ one_hot).unflatten(-1, self.buckets.shape[:2])[None]


def _t5_attention(cfg: t5.T5Config) -> Attention:
    return Attention(cfg.emb_dim, cfg.num_heads, cfg.head_dim, bias=False, scale=1.0)


def _t5_mlp(cfg: t5.T5Config) -> Mlp:
    return Mlp(cfg.emb_dim, cfg.mlp_dim, cfg.mlp_activations, bias=False)


def _t5_norm(cfg: t5.T5Config) -> nn.RMSNorm:
    return nn.RMSNorm(cfg.emb_dim, eps=1e-6)


class Encoder(nn.Module):
    """T5's encoder, for an image's tokens and a text's."""

    def __init__(self, cfg: t5.T5Config, image_tokens: int, text_tokens: int):
        super().__init__()
        positions = t5.encoder_positions(image_tokens, text_tokens, cfg.image_positions)
        self.relpos_bias = RelativePositionBias(cfg.num_heads, positions, bidirectional=True)
        self.layers = nn.ModuleList(
            EncoderLayer(lambda: _t5_norm(cfg), _t5_attention(cfg), _t5_mlp(cfg))
            for _ in range(cfg.num_encoder_layers)
        )
        self.encoder_norm = _t5_norm(cfg)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """Encodes [batch, length, embed]; `valid`, bool [batch, length], is False at padding."""
        bias = self.relpos_bias()
        bias = bias + mask_to_bias(valid, bias.dtype)
        for layer in self.layers:
            x = layer(x, bias)
        return self.encoder_norm(x)


def mask_to_bias(valid: Tensor, dtype: torch.dtype) -> Tensor:
    """Converts a mask, bool [batch, length], to a bias of attention's logits, [batch, 1, 1, length]."""
    return torch.where(valid, 0.0, layers.MASKED_LOGIT).to(dtype)[:, None, None]


class DecoderLayer(nn.Module):
    """A layer of T5's decoder."""

    def __init__(self, cfg: t5.T5Config):
        super().__init__()
        self.pre_self_attention_layer_norm = _t5_norm(cfg)
        self.self_attention = _t5_attention(cfg)
        self.pre_cross_attention_layer_norm = _t5_norm(cfg)
        self.encoder_decoder_attention = _t5_attention(cfg)
        self.pre_mlp_layer_norm = _t5_norm(cfg)
        self.mlp = _t5_mlp(cfg)

    def forward(
        self, y: Tensor, bias: Tensor, cross: Sequence[Tensor], cross_bias: Tensor, cache: Callable
    ) -> Tensor:
        """Returns the layer's outputs, [batch, length, embed].

        Args:
          y: inputs, [batch, length, embed].
          bias, cross_bias: biases of self-attention and cross-attention.
          cross: keys and values of the encoder's outputs.
          cache: maps keys and values of `y` to those that self-attention attends to.
        """
        x = self.pre_self_attention_layer_norm(y)
        y = y + self.self_attention(x, *cache(*self.self_attention.keys_and_values(x)), bias)
        x = self.pre_cross_attention_layer_norm(y)
        y = y + self.encoder_decoder_attention(x, *cross, cross_bias)
        return y + self.mlp(self.pre_mlp_layer_norm(y))


class Decoder(nn.Module):
    """T5's decoder."""

    def __init__(self, cfg: t5.T5Config, length: int):
        super().__init__()
        self.relpos_bias = RelativePositionBias(cfg.num_heads, np.arange(length), bidirectional=False)
        self.layers = nn.ModuleList(DecoderLayer(cfg) for _ in range(cfg.num_decoder_layers))
        self.decoder_norm = _t5_norm(cfg)
        self.logits_dense = nn.Linear(cfg.emb_dim, cfg.vocab_size, bias=False)

    def bias(self) -> Tensor:
        """Returns the bias of relative positions and the causal mask, [1, heads, length, length]."""
        bias = self.relpos_bias()
        return bias + torch.full_like(bias, layers.MASKED_LOGIT).triu(1)

    def cross(self, encoded: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Returns each layer's keys and values of [batch, encoded length, embed]."""
        decoder_layers = cast(Iterable[DecoderLayer], self.layers)
        return [layer.encoder_decoder_attention.keys_and_values(encoded) for layer in decoder_layers]

    def forward(self, y: Tensor, encoded: Tensor, valid: Tensor) -> Tensor:
        """Returns logits [batch, length, vocab] for embedded inputs [batch, length, embed]."""
        bias = self.bias()
        cross_bias = mask_to_bias(valid, bias.dtype)
        for layer, cross in zip(self.layers, self.cross(encoded), strict=True):
            y = layer(y, bias, cross, cross_bias, lambda *new: new)
        return self.logits_dense(self.decoder_norm(y))


class Conv(nn.Conv2d):
    """A convolution that keeps the map's size. An even kernel pads one row and column more at the end."""

    def __init__(self, channels: int, filters: int, side: int):
        super().__init__(channels, filters, side, padding=(side - 1) // 2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.kernel_size[0] % 2 else F.pad(x, (0, 1, 0, 1)))


class Deconv(nn.ConvTranspose2d):
    """`convolutions.deconv` with 'SAME' padding; the kernel is stored mirrored."""

    def __init__(self, channels: int, filters: int, side: int):
        super().__init__(channels, filters, side, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., :-1, :-1]


CONVOLUTIONS = {"conv": Conv, "deconv": Deconv}


class ChannelNorm(nn.LayerNorm):
    """A layer norm over the channels of a map; its output has the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).to(x.dtype)


class Block(nn.Module):
    """A convolution, a norm over the channels, a ReLU."""

    def __init__(self, channels: int, epsilon: float, kind: str, filters: int, side: int):
        super().__init__()
        self.conv = CONVOLUTIONS[kind](channels, filters, side)
        self.norm = ChannelNorm(filters, epsilon)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


def _blocks(width: int, epsilon: float, head_layers: Sequence[tuple]) -> nn.Sequential:
    widths = [width, *(filters for _, filters, _ in head_layers)]
    pairs = zip(widths[:-1], head_layers, strict=True)
    return nn.Sequential(*(Block(channels, epsilon, *layer) for channels, layer in pairs))


class HeatmapHead(nn.Module):
    """A head from a feature map to a heatmap [batch, height, width]."""

    def __init__(self, cfg: rahf.HeadsConfig, width: int):
        super().__init__()
        self.blocks = _blocks(width, cfg.norm_epsilon, cfg.heatmap_layers)
        kind, side = cfg.heatmap_output_layer
        self.output = CONVOLUTIONS[kind](cfg.heatmap_layers[-1][1], 1, side)
        nn.init.constant_(self.output.bias, cfg.heatmap_output_bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.output(self.blocks(x))[:, 0].float())


class ScoreHead(nn.Module):
    """A head from a feature map to a score [batch]."""

    def __init__(self, cfg: rahf.HeadsConfig, width: int, patches: int):
        super().__init__()
        self.blocks = _blocks(width, cfg.norm_epsilon, [("conv", *layer) for layer in cfg.score_conv_layers])
        widths = (patches * cfg.score_conv_layers[-1][0], *cfg.score_dense_layers)
        self.dense = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(widths))
        self.output = nn.Linear(widths[-1], 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x).permute(0, 2, 3, 1).flatten(1)
        for dense in self.dense:
            x = F.relu(dense(x))
        return torch.sigmoid(self.output(x)[:, 0].float())


class Rahf(nn.Module):
    """The whole network.

    Args:
      module: our network; its sizes and variant are copied.
      prompt_length, target_length: lengths in tokens, padding included.

    Raises:
      errors.UserError: the module has a part that can't be built here.
    """

    def __init__(self, module: rahf.Rahf, prompt_length: int, target_length: int):
        super().__init__()
        _check(module)
        cfg, heads = module.t5_config, module.heads_config
        self.multi_head = module.variant == feedback.MULTI_HEAD
        self.grid = tuple(module.vit_config.grid)
        patches = self.grid[0] * self.grid[1]
        self.vit = ViT(module.vit_config)
        if module.vit_config.emb_dim != cfg.emb_dim:
            self.image_projection = nn.Linear(module.vit_config.emb_dim, cfg.emb_dim)
        else:
            self.image_projection = nn.Identity()
        self.token_embedder = nn.Embedding(cfg.vocab_size, cfg.emb_dim)
        self.encoder = Encoder(cfg, patches, prompt_length)
        self.decoder = Decoder(cfg, target_length)
        heatmap_heads = feedback.HEATMAPS if self.multi_head else ("all",)
        score_heads = feedback.SCORES if self.multi_head else ("all",)
        self.heatmap_head = nn.ModuleDict({kind: HeatmapHead(heads, cfg.emb_dim) for kind in heatmap_heads})
        self.score_head = nn.ModuleDict(
            {kind: ScoreHead(heads, cfg.emb_dim, patches) for kind in score_heads}
        )

    def encode(self, images: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes each prompt together with its image.

        Args:
          images: uint8 [batch, height, width, 3].
          prompts: int [batch, prompts, length], 0 = padding.

        Returns:
          [batch, prompts, patches + length, embed], and its mask, bool [batch, prompts, patches + length],
          which is False at padding.
        """
        vision = self.image_projection(self.vit(images))
        text = self.token_embedder(prompts)
        vision = vision[:, None].expand(-1, prompts.shape[1], -1, -1).to(text.dtype)
        fused = torch.cat([vision, text], dim=2)
        valid = torch.cat([torch.ones_like(vision[..., 0], dtype=torch.bool), prompts > 0], dim=2)
        encoded = self.encoder(fused.flatten(0, 1), valid.flatten(0, 1))
        return encoded.unflatten(0, prompts.shape[:2]), valid

    def maps(self, encoded: Tensor, slots: feedback.Slots) -> tuple[Tensor, Tensor]:
        """Returns heatmaps [batch, heatmaps, height, width] and scores [batch, scores] of encoded prompts."""

        def features(prompts):  # -> [batch * prompts, embed, rows, columns]
            patches = encoded[:, prompts, : self.grid[0] * self.grid[1]]
            return patches.unflatten(2, self.grid).flatten(0, 1).permute(0, 3, 1, 2)

        if self.multi_head:
            x = features(slice(1))
            heatmaps = torch.stack([head(x) for head in self.heatmap_head.values()], dim=1)
            return heatmaps, torch.stack([head(x) for head in self.score_head.values()], dim=1)
        heatmaps = self.heatmap_head["all"](features(slice(slots.heatmaps)))
        scores = self.score_head["all"](features(slice(slots.heatmaps, slots.heatmaps + slots.scores)))
        return heatmaps.unflatten(0, (-1, slots.heatmaps)), scores.unflatten(0, (-1, slots.scores))

    def forward(self, batch: Mapping[str, Tensor], slots: feedback.Slots) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the results of `maps`, and teacher-forced logits [batch * texts, length, vocab]."""
        encoded, valid = self.encode(batch["image"], batch["encoder_input_tokens"])
        texts = self.token_embedder(batch["decoder_input_tokens"].flatten(0, 1))
        logits = self.decoder(
            texts, encoded[:, -slots.texts :].flatten(0, 1), valid[:, -slots.texts :].flatten(0, 1)
        )
        return *self.maps(encoded, slots), logits

    def loss(self, batch: Mapping[str, Tensor], slots: feedback.Slots) -> Tensor:
        """Computes `models.RahfModel.loss_fn` with loss weights 1 and a label for every heatmap and score."""
        heatmaps, scores, logits = self(batch, slots)
        return (
            F.mse_loss(heatmaps, batch["heatmap_targets"] / 255.0)
            + F.mse_loss(scores, batch["score_targets"])
            + F.cross_entropy(
                logits.flatten(0, 1), batch["decoder_target_tokens"].flatten().long(), ignore_index=0
            )
        )


def _check(module: rahf.Rahf) -> None:
    cfg, patches, heads = module.t5_config, module.vit_config, module.heads_config
    missing = {
        "dropout": bool(cfg.dropout_rate or patches.dropout_rate),
        "stochastic depth": bool(cfg.stochastic_depth_rate or patches.stochastic_depth_rate),
        "a class token": patches.class_token,
        "attention logits in float32": cfg.float32_attention_logits or patches.float32_attention_logits,
        "logits by the token table": cfg.logits_via_embedding,
        "a decoder that doesn't see the image": not module.decoder_sees_image,
        "variances of scores": heads.score_variance,
        "heads with other norms, paddings or layers than the paper's": (
            (heads.norm, heads.deconv_padding) != ("layer", "SAME")
            or any(len(layer) != 3 for layer in heads.heatmap_layers)
        ),
    }
    if found := [name for name, is_there in missing.items() if is_there]:
        raise errors.UserError(
            f"the PyTorch model to compare with has no {'; no '.join(found)}: leave out --torch"
        )


class GreedyDecoder(nn.Module):
    """Writes texts; each token is the most probable one.

    Its state is in buffers, which `step` changes in place, so that CUDA graphs can replay it.
    """

    tokens: Tensor
    position: Tensor
    cache: Tensor
    cross: Tensor
    bias: Tensor
    cross_bias: Tensor

    def __init__(self, network: Rahf, cfg: t5.T5Config, texts: int, dtype: torch.dtype):
        """Makes an empty state.

        Args:
          network: the network that writes.
          cfg: sizes of its T5.
          texts: number of texts at once.
          dtype: type of keys and values.
        """
        super().__init__()
        # The list keeps the network's parameters out of this module's.
        self.network = [network]
        length, encoded_length = (
            part.relpos_bias.buckets.shape[0] for part in (network.decoder, network.encoder)
        )
        shape = (cfg.num_decoder_layers, 2, texts, cfg.num_heads)
        for name, tensor in {
            "tokens": torch.zeros(texts, length + 1, dtype=torch.int64),  # Column 0 is no token.
            "position": torch.zeros(1, dtype=torch.int64),
            "cache": torch.zeros(*shape, length, cfg.head_dim, dtype=dtype),
            "cross": torch.zeros(*shape, encoded_length, cfg.head_dim, dtype=dtype),
            "bias": torch.zeros(1, cfg.num_heads, length, length, dtype=dtype),
            "cross_bias": torch.zeros(texts, 1, 1, encoded_length, dtype=dtype),
        }.items():
            self.register_buffer(name, tensor)

    def start(self, encoded: Tensor, valid: Tensor) -> None:
        """Starts texts from encoded prompts, [texts, encoded length, embed], and their mask without embed."""
        (network,) = self.network
        for kept, keys_and_values in zip(self.cross, network.decoder.cross(encoded), strict=True):
            kept.copy_(torch.stack(keys_and_values))
        self.bias.copy_(network.decoder.bias())
        self.cross_bias.copy_(mask_to_bias(valid, self.bias.dtype))
        self.position.zero_()

    def step(self) -> None:
        """Writes the next token of each text."""
        (network,) = self.network
        y = network.token_embedder(self.tokens.index_select(1, self.position))
        bias = self.bias.index_select(2, self.position)
        for i, layer in enumerate(network.decoder.layers):

            def extend(key, value, cache=self.cache[i]):
                cache[0].index_copy_(2, self.position, key)
                cache[1].index_copy_(2, self.position, value)
                return cache[0], cache[1]

            y = layer(y, bias, (self.cross[i, 0], self.cross[i, 1]), self.cross_bias, extend)
        logits = network.decoder.logits_dense(network.decoder.decoder_norm(y))
        self.position.add_(1)
        self.tokens.index_copy_(1, self.position, logits.argmax(-1))
