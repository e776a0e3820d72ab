"""`SiameseLSTM` and `SiameseGRU`: parameters, options, `forward`."""

from __future__ import annotations

import ctypes
import math
import os
import warnings
from collections.abc import Callable
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from fastsiam import _steps, functional
from fastsiam._backend import BACKENDS
from fastsiam._checks import GATES, POOLINGS, check_tensor
from fastsiam._network import allows_tf32
from fastsiam._packed import compute_dtype
from fastsiam.functional import Lengths, Prepared, Weights
from fastsiam.kernels._tiling import NARROW
from fastsiam.kernels._tiling_wide import describe

Network = TypeVar("Network", bound=nn.RNNBase)


class _Siamese(nn.Module):
    """What `SiameseLSTM` and `SiameseGRU` share: all but the cell's name."""

    cell: str
    weight_ih_l0: nn.Parameter
    weight_hh_l0: nn.Parameter
    bias_ih_l0: nn.Parameter | None
    bias_hh_l0: nn.Parameter | None
    log_scale: nn.Parameter | None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        embedding: Tensor | nn.Embedding | None = None,
        freeze_embedding: bool = True,
        pooling: str = "last",
        scale: float = 1.0,
        learn_scale: bool = False,
        recompute: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        who = type(self).__name__
        sizes = {"input_size": input_size, "hidden_size": hidden_size, "num_layers": num_layers}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{who}: {name} must be at least 1, got {size}")
        if not 0 <= dropout < 1:
            raise ValueError(f"{who}: dropout must be at least 0 and below 1, got {dropout}")
        if dropout and num_layers == 1:
            warnings.warn(
                f"{who}: dropout={dropout} acts between layers, and there is one layer",
                stacklevel=3,
            )
        if not (scale > 0 and math.isfinite(scale)):
            raise ValueError(f"{who}: scale must be positive and finite, got {scale}")
        for name, value, allowed in (
            ("pooling", pooling, POOLINGS),
            ("backend", backend, BACKENDS),
        ):
            if value not in allowed:
                raise ValueError(
                    f"{who}: {name} must be one of {', '.join(allowed)}, got {value!r}"
                )
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.dropout = dropout
        self.bidirectional = bidirectional
        self.pooling = pooling
        self.recompute = recompute
        self.backend = backend
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        rows, directions = GATES[self.cell] * hidden_size, 2 if bidirectional else 1
        for layer in range(num_layers):
            columns = input_size if layer == 0 else directions * hidden_size
            for suffix in ("", "_reverse")[:directions]:
                shapes = ((rows, columns), (rows, hidden_size), (rows,), (rows,))
                for name, shape in zip(Weights._fields, shapes, strict=True):
                    given = bias or name.startswith("weight")
                    self.register_parameter(
                        f"{name}_l{layer}{suffix}",
                        nn.Parameter(torch.empty(shape, **options)) if given else None,
                    )
        self.reset_parameters()
        # a fixed scale is neither parameter nor buffer: it is an option, saved with the options
        self._scale = float(scale)
        if learn_scale:
            self.log_scale = nn.Parameter(torch.tensor(math.log(scale), **options))
        else:
            self.register_parameter("log_scale", None)
        self.embedding = _own_embedding(who, embedding, freeze_embedding, self.weight_ih_l0)
        self._cache = _PreparedCache()

    def reset_parameters(self) -> None:
        """Draw every weight and bias from U(-1/sqrt(H), 1/sqrt(H)), as nn.LSTM and nn.GRU do."""
        bound = self.hidden_size**-0.5
        for weights in self._weights():
            for parameter in weights:
                if parameter is not None:
                    nn.init.uniform_(parameter, -bound, bound)

    def train(self, mode: bool = True) -> Self:
        """Set training mode as nn.Module does; a change of it drops the kept projection."""
        if mode != self.training:
            self.forget_projection()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        # by which a module goes to another device or dtype; nothing stays behind
        self.forget_projection()
        moved: Self = super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        return moved

    @property
    def scale(self) -> float | Tensor:
        """The factor on L1: a number, or exp of the parameter `log_scale` where it is learned."""
        return self._scale if self.log_scale is None else self.log_scale.exp()

    def forward(
        self,
        left: Tensor,
        right: Tensor,
        left_lengths: Lengths = None,
        right_lengths: Lengths = None,
        *,
        left_mask: Tensor | None = None,
        right_mask: Tensor | None = None,
        validate: bool = False,
    ) -> Tensor:
        """Return the similarities of pairs, [B] in (0, 1], float32 (float64 for float64).

        Args:
            left: [B, T, D] in the parameters' dtype, or ids [B, T] where the module has an
                embedding. Padding may hold anything.
            right: the same; its T may differ.
            left_lengths: [B] valid steps, tensor or list, 0 <= length <= T. None: all T.
            right_lengths: the same for the right side.
            left_mask: [B, T] weights of the steps in place of `pooling`; no gradient.
            right_mask: the same for the right side.
            validate: check lengths and ids of CUDA tensors too, which synchronises.

        Raises:
            TypeError: an input or a mask is no tensor, but an array or a list.
            ValueError: an argument of the wrong shape, dtype, device or range.
        """
        return self._score(
            left, right, left_lengths, right_lengths, left_mask, right_mask, validate, log=False
        )

    def log_similarity(
        self,
        left: Tensor,
        right: Tensor,
        left_lengths: Lengths = None,
        right_lengths: Lengths = None,
        *,
        left_mask: Tensor | None = None,
        right_mask: Tensor | None = None,
        validate: bool = False,
    ) -> Tensor:
        """Return -scale * L1, [B] <= 0: the logarithm of `forward`, which does not underflow."""
        return self._score(
            left, right, left_lengths, right_lengths, left_mask, right_mask, validate, log=True
        )

    def encode(
        self,
        x: Tensor,
        lengths: Lengths = None,
        *,
        mask: Tensor | None = None,
        validate: bool = False,
    ) -> Tensor:
        """Return the sentence vectors in the parameters' dtype; arguments as one side of `forward`.

        Returns:
            [B, H], or [B, 2H] of a bidirectional module: forward, then reverse.
        """
        weights, table = self._weights(), self._table()
        return functional.siamese_encode(
            x,
            weights,
            cell=self.cell,
            bidirectional=self.bidirectional,
            pooling=self.pooling,
            dropout=self.dropout if self.training else 0.0,
            recompute=self.recompute,
            embedding=table,
            lengths=lengths,
            mask=mask,
            backend=self.backend,
            prepared=self._prepared(weights, table),
            validate=validate,
        )

    def forget_projection(self) -> None:
        """Project the embedding anew at the next call without gradients.

        To be called after a write to weights or embedding that PyTorch does not count: through
        `.data`, through a numpy array that shares their memory, or by an optimizer with fused=True
        after a call without gradients.
        """
        self._cache = _PreparedCache()

    def explain(
        self,
        device: torch.device | str | None = None,
        *,
        pairs: int | None = None,
        steps: int | None = None,
        filled: float | None = None,
    ) -> str:
        """Say which backend a call takes, and why.

        Args:
            device: of the call; None: the parameters'.
            pairs: of the call. "auto" goes by measurements where it knows a call's sizes, and by
                its rule where these are not given; gradients on or off count too.
            steps: of the longest sequence.
            filled: share of all steps that is valid; None where lengths are on a GPU.

        Raises:
            ValueError: the named backend cannot run there.
        """
        where = self.weight_hh_l0.device if device is None else torch.device(device)
        backend, reason = functional.explain(
            self._weights(),
            where,
            self.backend,
            cell=self.cell,
            sequences=None if pairs is None else 2 * pairs,
            steps=steps,
            filled=filled,
            who=f"{type(self).__name__}.explain",
        )
        dtype, H = self.weight_hh_l0.dtype, self.hidden_size
        loops = ""
        there = where.type != "cuda" or torch.cuda.is_available()
        if backend == "triton" and H > NARROW and pairs and there:
            P = 2 if self.bidirectional else 1
            loops = f", {describe(2 * pairs, P, H, dtype, allows_tf32(where), where)}"
        if backend == "torch" and where.type == "cpu":
            obstacle = _steps.obstacle(where, compute_dtype(dtype), H)
            loops = (
                f", step loops not compiled: {obstacle}" if obstacle else ", step loops compiled"
            )
        return (
            f"{backend}: {reason} (H = {H}, "
            f"{str(dtype).removeprefix('torch.')} on {where.type}{loops})"
        )

    def extra_repr(self) -> str:
        """Return the options that repr shows."""
        scale = "learned" if self.log_scale is not None else f"{self._scale:g}"
        unusual = [
            f"num_layers={self.num_layers}" if self.num_layers > 1 else "",
            f"dropout={self.dropout:g}" if self.dropout else "",
            "bidirectional=True" if self.bidirectional else "",
        ]
        return ", ".join(
            [
                f"{self.input_size}, {self.hidden_size}, bias={self.bias}",
                *filter(None, unusual),
                f"pooling={self.pooling!r}, scale={scale}, backend={self.backend!r}",
            ]
        )

    def _score(
        self,
        left: Tensor,
        right: Tensor,
        left_lengths: Lengths,
        right_lengths: Lengths,
        left_mask: Tensor | None,
        right_mask: Tensor | None,
        validate: bool,
        *,
        log: bool,
    ) -> Tensor:
        weights, table = self._weights(), self._table()
        return functional.siamese_similarity(
            left,
            right,
            weights,
            cell=self.cell,
            bidirectional=self.bidirectional,
            pooling=self.pooling,
            dropout=self.dropout if self.training else 0.0,
            recompute=self.recompute,
            embedding=table,
            left_lengths=left_lengths,
            right_lengths=right_lengths,
            left_mask=left_mask,
            right_mask=right_mask,
            scale=self.scale,
            log=log,
            backend=self.backend,
            prepared=self._prepared(weights, table),
            validate=validate,
        )

    def _weights(self) -> list[Weights]:
        """Return the weights in nn.LSTM's order: layer by layer, forward before reverse."""
        suffixes = ("", "_reverse") if self.bidirectional else ("",)
        return [
            Weights(*(getattr(self, f"{name}_l{layer}{suffix}") for name in Weights._fields))
            for layer in range(self.num_layers)
            for suffix in suffixes
        ]

    def _table(self) -> Tensor | None:
        return None if self.embedding is None else self.embedding.weight

    def _prepared(self, weights: list[Weights], table: Tensor | None) -> Prepared | None:
        """Return the projected vocabulary where gradients are off: made once a weight version."""
        if table is None or torch.compiler.is_exporting():
            return None
        first_layer = weights[: 2 if self.bidirectional else 1]
        tensors = [t for direction in first_layer for t in direction if t is not None]
        tensors.append(table)
        if not all(isinstance(t, nn.Parameter) for t in tensors):
            # computed for this call: the next one has others
            return None
        if torch.is_grad_enabled():
            if any(t.requires_grad for t in tensors):
                # a step follows, and that of a fused optimizer raises no version counter
                self.forget_projection()
            return None
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            # tensors without an address
            return None
        return self._cache.get(tensors, first_layer, self.backend, self.cell)

    @classmethod
    def _from_torch(cls, network: nn.RNNBase, who: str, options: dict[str, Any]) -> Self:
        """Make a module with a copy of the weights of an nn.LSTM or nn.GRU."""
        if network.proj_size:
            raise ValueError(
                f"{who}: proj_size must be 0, got {network.proj_size}; "
                "a projected state is another network"
            )
        weight = network.weight_hh_l0
        made = cls(
            network.input_size,
            network.hidden_size,
            network.num_layers,
            network.bias,
            network.dropout,
            network.bidirectional,
            **{"device": weight.device, "dtype": weight.dtype, **options},
        )
        own = (name for name, _ in made.named_parameters(recurse=False) if name != "log_scale")
        # not of the state_dict, which names other tensors where a weight is parametrized or pruned
        made.load_state_dict({name: getattr(network, name) for name in own}, strict=False)
        return made

    def _load_into(self, kind: Callable[..., Network]) -> Network:
        """Return an nn.LSTM or nn.GRU (batch_first) with a copy of the weights."""
        weight = self.weight_hh_l0
        network = kind(
            self.input_size,
            self.hidden_size,
            self.num_layers,
            bias=self.bias,
            batch_first=True,
            dropout=self.dropout,
            bidirectional=self.bidirectional,
            device=weight.device,
            dtype=weight.dtype,
        )
        network.load_state_dict({name: getattr(self, name) for name in network.state_dict()})
        return network


class SiameseLSTM(_Siamese):
    """Two sequences through one LSTM, scored by exp(-scale * L1) of their vectors.

    MaLSTM (Mueller and Thyagarajan, "Siamese Recurrent Architectures for Learning Sentence
    Similarity", AAAI 2016). Parameters carry nn.LSTM's names, so its state_dict loads as it is.

    Args:
        input_size: D, features of a step.
        hidden_size: H.
        num_layers: each runs over the hidden states of the one before.
        bias: whether the gates have nn.LSTM's two biases.
        dropout: probability, 0 <= p < 1, with which a layer's outputs are dropped in train() before
            the next layer. Both sides of a pair and all steps have one mask: with a mask each,
            equal sentences would differ.
        bidirectional: whether each layer also runs from the last valid step to the first; a vector
            then has 2H values.
        embedding: [V, D] tensor, which is copied, or nn.Embedding, which is used as it is: frozen
            or not, and moved to the weights' device and dtype, in place. Inputs are then integer
            ids. Its options must be nn.Embedding's defaults; those that act on gradients alone
            (padding_idx, scale_grad_by_freq, sparse) are allowed where it is frozen.
        freeze_embedding: whether the embedding does not train.
        pooling: "last", the state after the last step each direction reads; "mean" or "max" of each
            unit over the valid steps. A call may give masks instead.
        scale: factor on L1, > 0; 1 in the paper, a quarter scores higher on SICK.
        learn_scale: whether the factor trains; its logarithm is then the parameter `log_scale`.
        recompute: keep no activations for the backward, which runs the forward again, some thousand
            sequences at a time.
        backend: "auto", "triton", "torch", "lstm" or "reference". A named one runs or raises.
        device, dtype: of the parameters; float64, float32, float16 or bfloat16. On CUDA float32 is
            computed as nn.LSTM computes it: with 11 bits in products and activations where
            `torch.backends.cudnn.allow_tf32` is True, which is PyTorch's default; else fully.

    Without gradients the projected embedding is kept from call to call until a weight changes, a
    call is made with gradients or `train` or `eval` changes the mode. A write that raises no
    version counter (through `.data`, an array that shares the memory or an optimizer with
    fused=True) is seen on a CPU, in the weights (in every so many numbers of one that has more
    than 65,536) and in the first column of the embedding (of some thousand rows where it has ten
    thousand or more), and nowhere else; call `forget_projection` after it.

    Raises:
        TypeError: the embedding is no tensor, but an array or a list.
        ValueError: an argument out of range, or an option of the embedding that is not honoured.
    """

    cell = "lstm"

    @classmethod
    def from_lstm(cls, lstm: nn.LSTM, **options: Any) -> Self:
        """Make a module with a copy of an nn.LSTM's weights; options as for the constructor.

        Raises:
            ValueError: the LSTM projects its state (proj_size).
        """
        return cls._from_torch(lstm, "SiameseLSTM.from_lstm", options)

    def to_lstm(self) -> nn.LSTM:
        """Return an nn.LSTM (batch_first) with a copy of the weights."""
        return self._load_into(nn.LSTM)


class SiameseGRU(_Siamese):
    """Two sequences through one GRU, scored by exp(-scale * L1) of their vectors.

    Arguments and calls are those of `SiameseLSTM`, and so is `forget_projection` to be called after
    a write through `.data`; equations, names and gate order (r, z, n) are those of nn.GRU, whose
    reset gate acts after the product with the hidden state.

    Raises:
        TypeError: the embedding is no tensor, but an array or a list.
        ValueError: an argument out of range, or an option of the embedding that is not honoured.
    """

    cell = "gru"

    @classmethod
    def from_gru(cls, gru: nn.GRU, **options: Any) -> Self:
        """Make a module with a copy of an nn.GRU's weights; options as for the constructor."""
        return cls._from_torch(gru, "SiameseGRU.from_gru", options)

    def to_gru(self) -> nn.GRU:
        """Return an nn.GRU (batch_first) with a copy of the weights."""
        return self._load_into(nn.GRU)


_MEMCMP = ctypes.CDLL(None).memcmp if os.name == "posix" else None
if _MEMCMP is not None:
    _MEMCMP.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class _PreparedCache:
    """The last `functional.prepare` of a module, dropped when a weight changes.

    In-place updates raise a tensor's version counter, but writes through `.data` do not. On the
    CPU the weights are therefore compared with a copy at each call, and so is one number of each
    row of the embedding, or of ten thousand rows where it has more; on CUDA, where that would
    synchronise, version counters must do. Of a weight with more than `_WHOLE` numbers every so
    many are compared: all of them would take as long as a few sentences.
    """

    def __init__(self) -> None:
        # key, tensors, what is watched of them and its copies, result: in one piece, since another
        # thread may come in between. The tensors keep their memory, so that no other tensor has
        # their addresses
        self._kept: tuple[list[Any], list[Tensor], list[Tensor], list[Tensor], Prepared | None]
        self._kept = ([], [], [], [], None)

    def get(
        self, tensors: list[Tensor], directions: list[Weights], backend: str, cell: str
    ) -> Prepared | None:
        """Return what `functional.prepare` makes of a layer, whose tensors end with the table."""
        table = tensors[-1]
        device = table.device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        key: list[Any] = [backend, autocast]
        for t in tensors:
            # tensors made in inference mode have no version counter
            version = None if t.is_inference() else t._version
            if version is None and device != "cpu":
                # nothing would show a change
                return None
            key += (t.data_ptr(), t.shape, t.stride(), t.dtype, t.device, version)
        known, _, watched, copies, prepared = self._kept
        if key != known or not all(map(_same_bytes, watched, copies)):
            kept = [t.detach() for t in tensors]
            some = kept[-1][:: 1 + table.shape[0] // 10_000, 0]
            watched = [*map(_some, kept[:-1]), some] if device == "cpu" else []
            copies = [t.clone() for t in watched]
            prepared = functional.prepare(
                directions, table, backend, cell=cell, bidirectional=len(directions) == 2
            )
            self._kept = (key, kept, watched, copies, prepared)
        return prepared

    def __deepcopy__(self, memo: dict[int, Any]) -> _PreparedCache:
        return _PreparedCache()

    def __reduce__(self) -> tuple[type[_PreparedCache], tuple[()]]:
        return (_PreparedCache, ())


_WHOLE = 2**16


def _some(weight: Tensor) -> Tensor:
    """Return a view of a weight's numbers, of some from all rows and columns where it has many."""
    if weight.numel() <= _WHOLE or not weight.is_contiguous():
        return weight
    # odd, so that the numbers stand in other columns from row to row
    return weight.flatten()[:: weight.numel() // _WHOLE * 2 + 1]


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    """Compare CPU tensors of one shape and dtype: the C library is faster at it than PyTorch."""
    if _MEMCMP is None or not (one.is_contiguous() and other.is_contiguous()):
        return torch.equal(one, other)
    return not _MEMCMP(one.data_ptr(), other.data_ptr(), one.nbytes)


def _own_embedding(
    who: str, embedding: Tensor | nn.Embedding | None, freeze: bool, like: Tensor
) -> nn.Embedding | None:
    """Return the caller's vectors as an nn.Embedding of weight_ih's device, dtype and columns."""
    if embedding is None:
        return None
    D = like.shape[1]
    table = embedding.weight if isinstance(embedding, nn.Embedding) else embedding
    check_tensor(who, "embedding", table)
    if table.ndim != 2 or table.shape[1] != D or not table.is_floating_point():
        raise ValueError(
            f"{who}: embedding must be floating point [V, D] with D = {D}, "
            f"got {list(table.shape)} of {table.dtype}"
        )
    if isinstance(embedding, nn.Embedding):
        if ignored := _ignored_options(embedding, freeze):
            raise ValueError(
                f"{who}: embedding must be without {ignored}, which would not be honoured; "
                "pass its weight alone"
            )
        return embedding.requires_grad_(not freeze).to(like.device, like.dtype)
    weight = table.detach().to(like, copy=True).contiguous()
    made: nn.Embedding = nn.Embedding.from_pretrained(weight, freeze=freeze)
    return made


def _ignored_options(embedding: nn.Embedding, freeze: bool) -> str:
    """Name the options by which the embedding's own forward or backward would differ."""
    of_gradients = () if freeze else ("padding_idx", "scale_grad_by_freq", "sparse")
    options = {name: getattr(embedding, name) for name in ("max_norm", *of_gradients)}
    # padding_idx may be 0
    return ", ".join(
        f"{name}={value}"
        for name, value in options.items()
        if value is not None and value is not False
    )
