"""Opens the weights that RAHF's authors published, `rahf_model.pt` (https://github.com/youweiliang/RichHF).

They are a PyTorch state dict of ViT-L/16-384, T5-base 1.0 and the authors' own heads;
`gin/models/rahf_pytorch_release.gin` configures the same network here. The weights' licence is CC BY-NC 4.0.

    vit.*, t5.*                    as in Hugging Face's transformers 4.32; ViT's pooler is not used
    visual_token_projection        a linear layer
    heatmap_predictor.KIND.*       conv_layers (2), deconv_layers (4), residual blocks conv_layers2 (4),
                                   last_conv1, last_conv2
    score_predictor.KIND.*         conv_layers (6), linear_layers (3)

The heads of the augmented-prompt variant, which was not published, have no `.KIND`.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from richhf_jax import feedback
from richhf_jax.convert import huggingface, torch_files
from richhf_jax.convert.source import ConvertError, Source, Tensor

# A name that only this release has.
_MARK = "visual_token_projection.weight"
# Settings that the arrays don't show.
SETTINGS = {
    "t5_config.mlp_activations": ("relu",),
    "t5_config.logits_via_embedding": True,
    "vit_config.layer_norm_epsilon": 1e-12,
}


class _Weights:
    """A state dict that names missing entries, and returns layers in our layout."""

    def __init__(self, path: str, state: Mapping[str, Tensor]):
        self._path, self._state = path, state

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._state:
            raise ConvertError(f"{self._path}: looks like RAHF's PyTorch release, but has no {name!r}")
        return self._state[name]

    def _parameter(self, name: str, rank: int) -> Tensor:
        tensor = self[name]
        if len(tensor.shape) != rank:
            raise ConvertError(f"{self._path}: {name!r} has shape {tensor.shape}, expected {rank} axes")
        return tensor

    def conv(self, name: str) -> dict[str, Tensor]:
        """Returns a convolution: [out, in, height, width] -> [height, width, in, out]."""
        kernel = huggingface.from_torch(f"{name}/kernel", self._parameter(f"{name}.weight", 4))
        return {"kernel": kernel, "bias": self[f"{name}.bias"]}

    def deconv(self, name: str) -> dict[str, Tensor]:
        """Returns a deconvolution: [in, out, height, width] -> [height, width, in, out].

        The kernel is mirrored, see `convolutions.deconv`.
        """
        kernel = self._parameter(f"{name}.weight", 4)
        inputs, out, height, width = kernel.shape
        kernel = kernel.mapped(
            (height, width, inputs, out), lambda array: array[:, :, ::-1, ::-1].transpose(2, 3, 0, 1)
        )
        return {"kernel": kernel, "bias": self[f"{name}.bias"]}

    def dense(self, name: str) -> dict[str, Tensor]:
        """Returns a dense layer: [out, in] -> [in, out]."""
        kernel = huggingface.from_torch(f"{name}/kernel", self._parameter(f"{name}.weight", 2))
        return {"kernel": kernel, "bias": self[f"{name}.bias"]}

    def dense_on_map(self, name: str, channels: int) -> dict[str, Tensor]:
        """Returns a dense layer of a square map.

        The map's values are ordered [channels, side, side] in the release, and [side, side, channels] here.
        """
        layer = self.dense(name)
        inputs, out = layer["kernel"].shape
        side = math.isqrt(inputs // channels)
        if inputs != channels * side * side:
            raise ConvertError(
                f"{self._path}: {name!r} takes {inputs} values, no square map of {channels} channels"
            )

        def permuted(array: np.ndarray) -> np.ndarray:
            return array.reshape(channels, side, side, out).transpose(1, 2, 0, 3).reshape(inputs, out)

        return layer | {"kernel": layer["kernel"].mapped((inputs, out), permuted)}

    def norm(self, name: str) -> dict[str, Tensor]:
        """Returns a norm: [channels, 1, 1] -> [channels]."""
        scale = self._parameter(f"{name}.scale", 3)
        return {"scale": scale.reshaped(math.prod(scale.shape))}


def is_rahf_pytorch(path: str | pathlib.Path) -> bool:
    """Tells whether a file is the authors' release.

    Raises:
      ConvertError: the file begins like one of torch, but is broken.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        if not torch_files.is_torch_start(file.read(64)):
            return False
    return any(name.endswith(_MARK) for name in torch_files.read_torch_file(path).tensors)


def open_rahf_pytorch(path: str | pathlib.Path) -> Source:
    """Opens the authors' release, multi-head or augmented-prompt, of any size.

    Raises:
      ConvertError: see `torch_files.read_torch_file`; or the file is not this release.
    """
    state = torch_files.read_torch_file(path).unwrapped()
    return dataclasses.replace(map_state(str(path), state.tensors), note=state.note)


def map_state(path: str, state: Mapping[str, Tensor]) -> Source:
    """Converts the release's state dict to our names and layouts. `path` is the file's name in messages."""
    if _MARK not in state:
        if prefix := next((name.removesuffix(_MARK) for name in state if name.endswith(_MARK)), ""):
            raise ConvertError(
                f"{path}: looks like RAHF's PyTorch release, but its names begin with {prefix!r}: save the"
                " state dict of the model itself, without what a trainer adds to it"
            )
        raise ConvertError(f"{path}: not RAHF's PyTorch release, which has {_MARK!r}")
    weights = _Weights(path, state)
    layers = {"image_projection": weights.dense("visual_token_projection")}
    for ours, theirs in _heads("heatmap", feedback.HEATMAPS, state):
        layers |= {f"{ours}/{name}": layer for name, layer in _heatmap_head(weights, theirs)}
    for ours, theirs in _heads("score", feedback.SCORES, state):
        layers |= {f"{ours}/{name}": layer for name, layer in _score_head(weights, theirs)}
    tensors = {f"{layer}/{name}": t for layer, arrays in layers.items() for name, t in arrays.items()}
    tensors |= huggingface.vit_tensors(state, "vit.") | huggingface.t5_tensors(state, "t5.")
    copies = huggingface.table_copies(state, "t5.")
    return Source(
        path=path,
        description="RAHF, the authors' PyTorch release",
        tensors=tensors,
        unused=huggingface.unused(state, tensors, copies),
        copies=copies,
        settings=SETTINGS,
    )


def _heads(what: str, kinds: Sequence[str], state: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Yields our name and theirs of each head in the state dict."""
    if f"{what}_predictor.conv_layers.0.weight" in state:
        yield f"{what}_head", f"{what}_predictor"
    else:
        yield from ((f"{what}_head_{kind}", f"{what}_predictor.{kind}") for kind in kinds)


def _heatmap_head(weights: _Weights, name: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yields our layers of one heatmap head, numbered as in `HeadsConfig.heatmap_layers`."""
    for i in (0, 1):  # convolution, ReLU, norm
        yield f"conv_{i}", weights.conv(f"{name}.conv_layers.{3 * i}")
        yield f"norm_{i}", weights.norm(f"{name}.conv_layers.{3 * i + 2}")
    layer = 2
    for i in range(4):  # deconvolution, norm, ReLU; then a residual block
        yield f"deconv_{layer}", weights.deconv(f"{name}.deconv_layers.{i}.0")
        yield f"norm_{layer}", weights.norm(f"{name}.deconv_layers.{i}.1")
        block = f"{name}.conv_layers2.{i}"
        for j in (0, 1):  # convolution, norm, ReLU, convolution, norm
            yield f"residual_{layer + 1}/conv_{j}", weights.conv(f"{block}.{3 * j}")
            yield f"residual_{layer + 1}/norm_{j}", weights.norm(f"{block}.{3 * j + 1}")
        layer += 2
    yield f"conv_{layer}", weights.conv(f"{name}.last_conv1")
    yield "output", weights.conv(f"{name}.last_conv2")


def _score_head(weights: _Weights, name: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yields our layers of one score head."""
    for i in range(6):  # convolution, norm, ReLU
        yield f"conv_{i}", weights.conv(f"{name}.conv_layers.{3 * i}")
        yield f"norm_{i}", weights.norm(f"{name}.conv_layers.{3 * i + 1}")
    (channels,) = weights[f"{name}.conv_layers.15.bias"].shape
    yield "dense_0", weights.dense_on_map(f"{name}.linear_layers.0", channels)
    yield "dense_1", weights.dense(f"{name}.linear_layers.2")
    yield "output", weights.dense(f"{name}.linear_layers.4")
