"""A whole training step as one call, captured in a CUDA graph where the module is on a GPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsiam.checks import as_tensor, check_tensor
from fastsiam.functional import Lengths

__all__ = ["GraphedStep", "squared_error"]

WARMUP = 3  # eager steps before the capture, as PyTorch's notes on CUDA graphs ask for

Loss = Callable[[Tensor, Tensor], Tensor]


def squared_error(similarity: Tensor, target: Tensor) -> Tensor:
    """Return (similarity - target)^2 of each pair, [B]."""
    return F.mse_loss(similarity, target, reduction="none")


class GraphedStep:
    """Forward, loss, backward, clipping and optimizer of a siamese module as one call.

    On CUDA the first calls run eagerly, on a stream of their own: they are training steps like any
    other, and the warm-up that a capture needs. The next one is captured, and from then on a step
    copies its batch into the graph's buffers and launches the graph. On other devices every step
    runs eagerly, from the same buffers.

    The graph is of B pairs and T time steps and takes every batch up to that: lengths stay on the
    device, and a smaller batch is filled up with its first pair, which then counts once all the
    same, and takes its time as often. A step does what the eager step of its batch does, to
    rounding.

    A graph repeats what was captured. A learning rate that a schedule changes must therefore be a
    tensor on the device, `Adam(..., lr=torch.tensor(1e-3, device="cuda"), capturable=True)`; a
    setting that changes where the graph cannot see it is an error. The module and the optimizer
    may be saved, loaded into and evaluated between steps. GradScaler is not supported.

    Args:
        module: `SiameseLSTM`, `SiameseGRU`, or a module with their `forward`; its backend must work
            on the device alone ("triton" and "lstm" do).
        optimizer: of the module's parameters; on CUDA with capturable=True, or an SGD.
        B: most pairs of a batch.
        T: most time steps of a side.
        loss: from similarities and targets, [B] each, to a loss a pair, [B]; the step takes their
            mean.
        clip: largest norm of the gradient, or None.

    Raises:
        ValueError: an argument out of range, or an optimizer that a graph cannot hold.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        B: int,
        T: int,
        *,
        loss: Loss = squared_error,
        clip: float | None = None,
    ) -> None:
        for name, size in (("B", B), ("T", T)):
            if size < 1:
                raise ValueError(f"GraphedStep: {name} must be at least 1, got {size}")
        if clip is not None and not clip > 0:
            raise ValueError(f"GraphedStep: clip must be positive or None, got {clip}")
        self.module, self.optimizer, self.loss, self.clip = module, optimizer, loss, clip
        self.B, self.T = B, T
        devices = {p.device for p in (*self._trained, *module.parameters())}
        if len(devices) != 1:
            raise ValueError(
                "GraphedStep: all parameters must be on one device, "
                f"got {', '.join(sorted(map(str, devices)))}"
            )
        (self.device,) = devices
        if self.device.type == "cuda" and (obstacle := capture_obstacle(optimizer)):
            raise ValueError(f"GraphedStep: {obstacle}")
        # of each pair's loss in the batch's: 0 for a pair that fills the batch up
        self._shares: Tensor | None = None
        self._pairs = B
        # of both sides, and so the sides themselves: halves of one tensor are joined without a copy
        lengths = torch.zeros(2, B, dtype=torch.int64, device=self.device)
        self._lengths = lengths[0], lengths[1]
        self._sides: tuple[Tensor, ...] = ()
        self._target: Tensor | None = None
        self._done = 0
        self._settings: dict[str, Any] = {}
        self._stream: torch.cuda.Stream | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._loss: Tensor | None = None

    @property
    def _trained(self) -> list[Tensor]:
        """The optimizer's parameters, of groups that were added since, too."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def __call__(
        self,
        left: Tensor,
        right: Tensor,
        left_lengths: Lengths,
        right_lengths: Lengths,
        target: Tensor,
    ) -> Tensor:
        """Train on one batch of at most B pairs and T time steps.

        Args:
            left: [B', T', D] floating point or ids [B', T'], 1 <= B' <= B and T' <= T; on the
                module's device, or on the host (pinned memory is copied without waiting).
            right: the same; its T' may differ.
            left_lengths: [B'] valid steps, tensor or list; None: all T'.
            right_lengths: the same for the right side.
            target: [B'], what the loss compares the similarities with. No gradient flows into it,
                nor into left and right.

        Returns:
            The mean loss before the step, a tensor of one element on the device.

        Raises:
            TypeError: an input or the target is no tensor, but an array or a list.
            ValueError: a batch that does not fit or requires gradients, or a setting changed after
                the capture.
            RuntimeError: the step does something that a CUDA graph cannot hold.
        """
        self._load((left, right), (left_lengths, right_lengths), target)
        if self.device.type != "cuda":
            return self._step()
        with torch.cuda.device(self.device):
            if self._done < WARMUP:
                loss = self._warm_up()
                # not where it was refused: what a capture must not make is made by these steps
                self._done += 1
                return loss
            if self._graph is None:
                self._capture()
            self._check_settings()
            assert self._graph is not None
            assert self._loss is not None
            self._graph.replay()
            # a replay raises no version counter, by which a module knows that its weights changed
            torch.autograd.graph.increment_version(self._trained)
            # the next step overwrites the graph's own
            return self._loss.clone()

    def _load(
        self, sides: tuple[Tensor, Tensor], lengths: tuple[Lengths, Lengths], target: Tensor
    ) -> None:
        """Copy a batch into the buffers; what lies behind the ends of sentences is not read."""
        for name, part in (("left", sides[0]), ("right", sides[1]), ("target", target)):
            check_tensor("GraphedStep", name, part)
            if part.requires_grad:
                raise ValueError(
                    f"GraphedStep: {name} must not require gradients, which end at the step's "
                    "buffers; make the layers before it a part of the module, or detach it"
                )
        B = sides[0].shape[0]
        for name, side in zip(("left", "right"), sides, strict=True):
            if (
                side.ndim < 2
                or side.shape[0] != B
                or not 1 <= B <= self.B
                or side.shape[1] > self.T
            ):
                raise ValueError(
                    f"GraphedStep: {name} must be [B, T] or [B, T, D] with left's B, 1 to "
                    f"{self.B}, and T at most {self.T}, got {list(side.shape)}"
                )
        if target.shape != (B,):
            raise ValueError(f"GraphedStep: target must be [{B}], got {list(target.shape)}")
        if self._shares is None:
            # no step has come as far as its loss yet
            left, right = (
                torch.zeros((self.B, self.T, *s.shape[2:]), dtype=s.dtype, device=self.device)
                for s in sides
            )
            if left.shape == right.shape and left.dtype == right.dtype:
                both = torch.stack((left, right))
                left, right = both[0], both[1]
            self._sides = left, right
            self._target = torch.zeros(self.B, dtype=target.dtype, device=self.device)
        assert self._target is not None
        for name, buffer, side in zip(("left", "right"), self._sides, sides, strict=True):
            if side.shape[2:] != buffer.shape[2:] or side.dtype != buffer.dtype:
                raise ValueError(
                    f"GraphedStep: {name} must be like that of the first batch, "
                    f"{[self.B, self.T, *buffer.shape[2:]]} of {buffer.dtype} at most, "
                    f"got {list(side.shape)} of {side.dtype}"
                )
            buffer[:B, : side.shape[1]].copy_(side, non_blocking=True)
            _fill_up(buffer, B)
        for name, valid, given, side in zip(
            ("left", "right"), self._lengths, lengths, sides, strict=True
        ):
            _load_lengths(name, valid, given, B, side.shape[1])
        if target.dtype != self._target.dtype:
            raise ValueError(
                "GraphedStep: target must have the dtype of the first batch's, "
                f"{self._target.dtype}, got {target.dtype}"
            )
        self._target[:B].copy_(target, non_blocking=True)
        _fill_up(self._target, B)
        if B != self._pairs:
            self._pairs = B
            self._share_out()

    def _share_out(self) -> None:
        if self._shares is not None:
            self._shares[: self._pairs].fill_(1 / self._pairs)
            self._shares[self._pairs :].zero_()

    def _step(self) -> Tensor:
        """Run one step on what the buffers hold."""
        assert self._target is not None
        self.optimizer.zero_grad(set_to_none=True)
        device = self.device.type
        # a cast that autocast keeps between calls would not be part of the graph
        with torch.autocast(
            device,
            dtype=torch.get_autocast_dtype(device),
            enabled=torch.is_autocast_enabled(device),
            cache_enabled=False,
        ):
            losses = self.loss(self.module(*self._sides, *self._lengths), self._target)
        if losses.shape != (self.B,):
            raise ValueError(
                f"GraphedStep: loss must return one value a pair, [{self.B}], "
                f"got {list(losses.shape)}; most losses do with reduction='none'"
            )
        if self._shares is None:
            self._shares = losses.new_empty(self.B)
            self._share_out()
        # as of the mean's own backward, without its launches
        losses.backward(self._shares)
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self._trained, self.clip)
        self.optimizer.step()
        return (losses.detach() * self._shares).sum()

    def _warm_up(self) -> Tensor:
        """Run a step eagerly on the stream of the later capture."""
        current = torch.cuda.current_stream()
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), warnings.catch_warnings():
            # an optimizer for graphs warns where it steps without one
            warnings.filterwarnings("ignore", ".*capturable=True", UserWarning)
            loss = self._step()
        current.wait_stream(self._stream)
        return loss.clone()

    def _capture(self) -> None:
        """Record a step; nothing runs."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._loss = self._step()
        except RuntimeError as error:
            raise RuntimeError(
                "GraphedStep: the step cannot be captured: something in it waits for the device or "
                "copies to the host (the backend 'torch' does); pass backend='lstm' to the module, "
                f"or train without GraphedStep; torch says: {error}"
            ) from error
        self._graph = graph
        self._settings = frozen_settings(self.module, self.optimizer)

    def _check_settings(self) -> None:
        now = frozen_settings(self.module, self.optimizer)
        for name, value in now.items():
            if value != self._settings.get(name):
                raise ValueError(
                    f"GraphedStep: {name} must stay what it was when the step was captured, "
                    f"{self._settings.get(name)}, got {value}; an lr in a tensor may change, and "
                    "for the rest make a new GraphedStep"
                )


def _load_lengths(name: str, buffer: Tensor, given: Lengths, B: int, T: int) -> None:
    """Write lengths of B sequences of T steps to the buffer, and the first of them behind."""
    if given is None:
        buffer.fill_(T)
        return
    lengths = as_tensor(given)
    if lengths.shape != (B,) or lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"GraphedStep: {name}_lengths must be [{B}] whole numbers (int32 or int64), "
            f"got {list(lengths.shape)} of {lengths.dtype}"
        )
    # of a device's no value is known here; the kernels keep to the buffer's T steps
    if lengths.device.type == "cpu" and not ((lengths >= 0) & (lengths <= T)).all():
        raise ValueError(
            f"GraphedStep: {name}_lengths must be 0 to {T}, "
            f"got {int(lengths.min())} to {int(lengths.max())}"
        )
    buffer[:B].copy_(lengths, non_blocking=True)
    _fill_up(buffer, B)


def _fill_up(buffer: Tensor, B: int) -> None:
    """Repeat the buffer's first row behind its first B: finite wherever the batch is."""
    if len(buffer) > B:
        buffer[B:].copy_(buffer[:1].expand_as(buffer[B:]))


def capture_obstacle(optimizer: torch.optim.Optimizer) -> str:
    """Return what keeps an optimizer's step from a CUDA graph, or an empty string."""
    if isinstance(optimizer, torch.optim.SGD):
        # keeps no count of its steps
        return ""
    name = type(optimizer).__name__
    if "capturable" not in optimizer.defaults:
        return (
            f"optimizer must be capturable, and {name} is not: it counts its steps on the host; "
            "Adam, AdamW, Adadelta and others take capturable=True"
        )
    if not all(group["capturable"] for group in optimizer.param_groups):
        return f"optimizer must be made with capturable=True on CUDA, got {name} without it"
    return ""


def frozen_settings(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return by name what a captured step holds as constants."""
    settings: dict[str, Any] = {
        f"training of {name or 'the module'}": part.training
        for name, part in module.named_modules()
    }
    settings["autocast"] = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
    for number, group in enumerate(optimizer.param_groups):
        for name in optimizer.defaults:
            if not isinstance(group[name], Tensor):
                settings[f"{name} of parameter group {number}"] = group[name]
    return settings
