"""Run an exported file in ONNX Runtime on arrays, tensors, pictures and folders of pictures."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.deployment.metadata import Metadata
from zoo.deployment.pictures import find_pictures, open_picture, to_array
from zoo.deployment.providers import GPUS, onnxruntime_module, open_session
from zoo.errors import ExportError, first_line, integer

__all__ = ["InferenceSession"]

_DTYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}


class InferenceSession:
    """A classifier's ONNX file in ONNX Runtime: images to logits.

    Attributes:
        path: of the file.
        providers: those that run it, the preferred one first.
        image_shape: of its input, (batch, channels, height, width); a dynamic size is None.
        metadata: facts in the file, such as the names of its classes.
    """

    def __init__(
        self,
        path: str | Path,
        providers: str | Sequence[str] | None = None,
        *,
        threads: int | None = None,
        cuda_graph: bool = False,
    ) -> None:
        """Load the file at `path`.

        Args:
            path: an ONNX file of one float32 or float16 input.
            providers: ONNX Runtime's names, in order of preference. By default the first of
                TensorRT, CUDA and the CPU that can be used here; a warning says if torch sees a GPU
                that ONNX Runtime cannot use.
            threads: on the CPU; by default one per core.
            cuda_graph: record the calls to the GPU once for every shape of images, and replay them
                (the CUDA provider alone can).

        Raises:
            ExportError: if the file is missing, corrupt, too new or no classifier of images, or a
                provider that was asked for cannot be used.
        """
        self.path = Path(path).expanduser()
        if not self.path.is_file():
            raise ExportError(f"{self.path} does not exist or is not a file.")
        if threads is not None:
            threads = integer("threads", threads, 1)
        wanted = [providers] if isinstance(providers, str) else providers
        self._session = open_session(self.path, wanted, threads, cuda_graph)
        self.providers: tuple[str, ...] = tuple(self._session.get_providers())
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if len(inputs) != 1 or inputs[0].type not in _DTYPES:
            raise ExportError(
                f"{self.path} takes {_named(inputs)}; expected one float32 or float16 tensor of "
                f"images."
            )
        logits = outputs[0]
        if logits.type not in _DTYPES or len(logits.shape or ()) != 2:
            raise ExportError(
                f"{self.path} gives {_named(outputs)}; expected float32 or float16 logits "
                f"(N, classes) first."
            )
        self._input, self._output = inputs[0].name, logits.name
        self._dtype = _DTYPES[inputs[0].type]
        self.image_shape = tuple(
            size if isinstance(size, int) else None for size in inputs[0].shape
        )
        properties = self._session.get_modelmeta().custom_metadata_map
        self.metadata = Metadata.read(properties, self.path.name)
        on_gpu = self.providers[0] in GPUS and torch.cuda.is_available()
        bindable = on_gpu and isinstance(logits.shape[1], int)
        self._buffers = _Buffers(self._session, cuda_graph) if bindable else None

    def __call__(self, images: Any) -> Any:
        """Logits, float32 (N, classes): arrays for arrays and pictures, else tensors.

        Args:
            images: normalised floating-point images (N, C, H, W): a NumPy array, a torch tensor on
                any device (the logits are on it too), or another object with DLPack support; or one
                PIL image or a list of them, resized and normalised by the file's metadata.

        Raises:
            DataError: if a picture cannot be read, or the range of its values is not known.
            ExportError: if the images have another shape or are not floating-point, if the metadata
                do not say how to normalise pictures, or if the provider fails.
        """
        if isinstance(images, Tensor):
            return self._logits(images.detach()).to(images.device)
        if not hasattr(images, "__dlpack__"):
            images = self._stacked(images if isinstance(images, (list, tuple)) else [images])
        if isinstance(images, np.ndarray):
            self._check(images.shape, images.dtype, np.issubdtype(images.dtype, np.floating))
            tensor = torch.from_numpy(np.require(images, np.float32, ("C", "W")))
            return self._logits(tensor).cpu().numpy()
        try:
            tensor = torch.from_dlpack(images)
        except (BufferError, RuntimeError, TypeError) as error:
            raise ExportError(
                f"{type(images).__name__} cannot be read through DLPack: {error}"
            ) from error
        return self._logits(tensor).to(tensor.device)

    def predict(
        self, source: str | Path | Iterable[Any], *, batch_size: int = 64
    ) -> Iterator[tuple[Path | int, np.ndarray]]:
        """The logits (classes,) of each image in turn, with a progress bar in a terminal.

        Args:
            source: a folder of pictures, or an iterable of PIL images or normalised arrays
                (C, H, W). At most one batch is held in memory.
            batch_size: images per call.

        Yields:
            The picture's path or the image's position, and its logits.

        Raises:
            DataError: if the folder holds no pictures, or one cannot be read.
            ExportError: as for a call.
        """
        batch_size = integer("batch_size", batch_size, 1)
        if isinstance(source, (str, Path)):
            paths = find_pictures(Path(source).expanduser())
            return self._predictions(paths, map(open_picture, paths), len(paths), batch_size)
        if not isinstance(source, Iterable):
            raise ExportError(
                f"predict takes a folder or an iterable of images, not {type(source).__name__}; "
                "call the session with one."
            )
        total = len(source) if isinstance(source, Sized) else None
        return self._predictions(count(), source, total, batch_size)

    def _predictions(
        self, names: Iterable[Any], images: Iterable[Any], total: int | None, batch_size: int
    ) -> Iterator[tuple[Any, np.ndarray]]:
        from tqdm import tqdm

        remaining, labels = iter(images), iter(names)
        failure: Exception | None = None
        with tqdm(total=total, unit="image", disable=None, leave=False) as bar:
            while failure is None:
                part: list[Any] = []
                try:
                    for image in islice(remaining, batch_size):
                        part.append(self._array(image))
                except Exception as error:  # of one image; those before it are still classified
                    failure = error
                if not part:
                    break
                images = self._stacked(part)
                if self._buffers is not None and len(part) < batch_size:
                    # a smaller batch would need buffers of its own
                    images = np.resize(images, (batch_size, *images.shape[1:]))
                logits = self(images)[: len(part)]
                bar.update(len(part))
                yield from zip(islice(labels, len(part)), logits, strict=True)
        if failure is not None:
            raise failure

    def _stacked(self, images: Sequence[Any]) -> np.ndarray:
        if not images:
            raise ExportError(f"There are no images for {self.path.name} to classify.")
        arrays = [self._array(image) for image in images]
        if len({array.shape for array in arrays}) > 1:
            raise ExportError("The images of a batch have several shapes; resize them.")
        return np.stack(arrays)

    def _array(self, image: Any) -> np.ndarray:
        from PIL import Image

        if isinstance(image, Image.Image):
            return to_array(image, self.metadata, self.path.name)
        if isinstance(image, Tensor):
            return image.detach().cpu().numpy()
        if isinstance(image, np.ndarray):
            return image
        raise ExportError(
            f"{self.path.name} takes arrays, tensors and PIL images, not {type(image).__name__}."
        )

    def _check(self, shape: tuple[int, ...], dtype: Any, floating: bool) -> None:
        fits = len(shape) == len(self.image_shape) and all(
            got > 0 if size is None else got == size
            for got, size in zip(shape, self.image_shape, strict=True)
        )
        if not floating or not fits:
            wanted = ", ".join("N" if size is None else str(size) for size in self.image_shape)
            raise ExportError(
                f"{self.path.name} takes floating-point images of shape ({wanted}), N at least 1; "
                f"got {dtype} of shape {tuple(shape)}."
            )

    def _logits(self, images: Tensor) -> Tensor:
        """float32 logits (N, classes), on the GPU if they were computed there."""
        self._check(images.shape, images.dtype, images.is_floating_point())
        try:
            if self._buffers is not None:
                return self._buffers.run(images)
            array = images.to("cpu", self._dtype).contiguous().numpy()
            (logits,) = self._session.run([self._output], {self._input: array})
        except Exception as error:  # its errors share no other base class
            reason = first_line(error)
            raise ExportError(
                f"{self.providers[0]} failed on {len(images)} images in {self.path.name}: {reason}"
            ) from error
        return torch.from_numpy(logits).float()


def _named(values: Sequence[Any]) -> str:
    """The inputs or outputs of an ONNX Runtime session, with their types and shapes."""
    return ", ".join(f"{item.name}: {item.type} {item.shape}" for item in values) or "nothing"


@dataclass
class _Bound:
    """The GPU buffers of images of one shape and of their logits."""

    images: Tensor
    logits: Tensor
    binding: Any
    options: Any


class _Buffers:
    """Calls of a session whose inputs and outputs stay on the GPU (ONNX Runtime's IO binding).

    Threads take turns: those with images of one shape share its buffers.
    """

    def __init__(self, session: Any, cuda_graph: bool) -> None:
        self._session, self._cuda_graph = session, cuda_graph
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._bound: dict[tuple[int, ...], _Bound] = {}
        self._turn = threading.Lock()

    def run(self, images: Tensor) -> Tensor:
        """The logits of `images`, float32, on the GPU."""
        shape = tuple(images.shape)
        with self._turn:
            if shape not in self._bound:
                if not self._cuda_graph:
                    self._bound.clear()  # only graphs stay bound to their memory
                self._bound[shape] = self._bind(shape)
            bound = self._bound[shape]
            stream = torch.cuda.current_stream(self._device)
            bound.images.copy_(images)
            stream.synchronize()  # because ONNX Runtime has its own stream
            self._session.run_with_iobinding(bound.binding, bound.options)
            logits = bound.logits.to(torch.float32, copy=True)
            stream.synchronize()  # before the next thread overwrites the logits
        return logits

    def _bind(self, shape: tuple[int, ...]) -> _Bound:
        given, got = self._session.get_inputs()[0], self._session.get_outputs()[0]
        images = torch.empty(shape, dtype=_DTYPES[given.type], device=self._device)
        logits = torch.empty((shape[0], got.shape[1]), dtype=_DTYPES[got.type], device=self._device)
        binding = self._session.io_binding()
        for bind, name, tensor in (
            (binding.bind_input, given.name, images),
            (binding.bind_output, got.name, logits),
        ):
            kind = np.float32 if tensor.dtype is torch.float32 else np.float16
            bind(name, "cuda", self._device.index, kind, tuple(tensor.shape), tensor.data_ptr())
        options = onnxruntime_module().RunOptions()
        if self._cuda_graph:
            options.add_run_config_entry("gpu_graph_id", str(len(self._bound) + 1))
        return _Bound(images, logits, binding, options)
