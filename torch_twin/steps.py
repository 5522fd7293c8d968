"""The train step and the predict step of the PyTorch model, as PyTorch's users would run them."""

import contextlib
import itertools
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torch

from richhf_jax import feedback
from richhf_jax.network import rahf
from torch_twin import network as twin

Batch = Mapping[str, np.ndarray]


class TorchSteps:
    """The steps on one GPU, or on the CPU where there is none.

    The steps use `torch.compile`, parameters in float32, autocast to the dtype of the model that it copies,
    TensorFloat32 if that is float32, convolutions with channels last, fused AdamW, and gradients clipped at a
    norm of 1. Weights are random.
    """

    def __init__(self, module: rahf.Rahf, prompt_length: int, target_length: int):
        torch.manual_seed(0)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self._device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TensorFloat32, which is jax's default, too.
        self._module = module
        self._dtype = getattr(torch, np.dtype(module.t5_config.dtype).name)
        network = twin.Rahf(module, prompt_length, target_length)
        # Torch's annotations of `to` lack memory_format.
        self._network: twin.Rahf = cast(Any, network).to(self._device, memory_format=torch.channels_last)
        self._run: Callable[[dict[str, torch.Tensor]], object] | None = None

    def prepare(self, step: str, batch: Batch) -> None:
        """Makes `run` a "train" or "predict" step, and frees the last step's memory.

        The first step compiles. It is run here, and its seconds are printed.
        """
        begin = time.perf_counter()
        self._run = None
        self._network.zero_grad(set_to_none=True)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        make = {"train": self._train_step, "predict": self._predict_step}[step]
        self._run = make(batch, _slots(batch))
        self.run(batch)
        print(f"  torch compile: {time.perf_counter() - begin:.4g} s", flush=True)

    def run(self, batch: Batch) -> None:
        """Takes one step, from the batch in the host's memory until the device is done."""
        assert self._run is not None, "`prepare` comes first"
        with warnings.catch_warnings():
            # torch.compile warns about its lowerings, which doesn't concern the result.
            warnings.simplefilter("ignore")
            self._run({name: torch.from_numpy(value).to(self._device) for name, value in batch.items()})
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def peak_bytes(self) -> int | None:
        """Returns the most bytes that tensors had at once since `prepare`; None on a CPU."""
        return torch.cuda.max_memory_allocated() if self._device.type == "cuda" else None

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self._dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, self._dtype)

    def _train_step(self, batch: Batch, slots: feedback.Slots) -> Callable:
        network = self._network
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
        loss = torch.compile(lambda tensors: network.loss(tensors, slots))

        def run(tensors):
            optimizer.zero_grad(set_to_none=True)
            with self._autocast():
                value = loss(tensors)
            value.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()

        return run

    def _predict_step(self, batch: Batch, slots: feedback.Slots) -> Callable:
        network = self._network
        texts = batch["image"].shape[0] * slots.texts
        decoder = twin.GreedyDecoder(network, self._module.t5_config, texts, self._dtype)
        decoder = decoder.to(self._device)

        def outputs(tensors):
            encoded, valid = network.encode(tensors["image"], tensors["encoder_input_tokens"])
            decoder.start(encoded[:, -slots.texts :].flatten(0, 1), valid[:, -slots.texts :].flatten(0, 1))
            return network.maps(encoded, slots)

        outputs = torch.compile(outputs)
        # A step of decoding has many small kernels; CUDA graphs start them together.
        mode = "reduce-overhead" if self._device.type == "cuda" else None
        decode_step = torch.compile(decoder.step, mode=mode)
        length = batch["decoder_input_tokens"].shape[-1]

        def run(tensors):
            with torch.no_grad(), self._autocast():
                heatmaps, scores = outputs(tensors)
                for _ in itertools.repeat(None, length):
                    decode_step()
                return heatmaps, scores, decoder.tokens[:, 1:]

        return run


def _slots(batch: Batch) -> feedback.Slots:
    names = ("heatmap_weights", "score_weights", "decoder_input_tokens")
    return feedback.Slots(*(batch[name].shape[1] for name in names))
