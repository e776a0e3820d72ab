"""`SiameseLSTM` and `SiameseGRU`: parameters, options, `forward`."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from fastsiam import functional
from fastsiam.checks import POOLINGS, check_network, check_tensor, choice_of
from fastsiam.engine.layer import GATES, Projection, Weights
from fastsiam.engine.network import Network
from fastsiam.engine.select import NAMES
from fastsiam.engine.similarity import SIMILARITIES
from fastsiam.functional import Lengths

RNN = TypeVar("RNN", bound=nn.RNNBase)


class _Siamese(nn.Module):
    """The base of `SiameseLSTM` and `SiameseGRU`, which name the cell."""

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
        similarity: str = "manhattan",
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
                stacklevel=2,
            )
        if not (scale > 0 and math.isfinite(scale)):
            raise ValueError(f"{who}: scale must be positive and finite, got {scale}")
        choice_of(who, "pooling", pooling, POOLINGS)
        choice_of(who, "similarity", similarity, SIMILARITIES)
        choice_of(who, "backend", backend, NAMES)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.dropout = dropout
        self.bidirectional = bidirectional
        self.pooling = pooling
        self.similarity = similarity
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
        self._projection = _Held()

    def reset_parameters(self) -> None:
        """Draw every weight and bias from U(-1/sqrt(H), 1/sqrt(H)), as nn.LSTM and nn.GRU do."""
        bound = self.hidden_size**-0.5
        for weights in self._weights():
            for parameter in weights:
                if parameter is not None:
                    nn.init.uniform_(parameter, -bound, bound)

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
        """Return the logarithm of `forward`, [B] <= 0; arguments and errors are the same.

        Of the Manhattan similarity it is -scale * L1, which does not underflow.
        """
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

        Raises:
            TypeError: the input or the mask is no tensor, but an array or a list.
            ValueError: an argument of the wrong shape, dtype, device or range.
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

    @contextmanager
    def prepared(self) -> Iterator[Self]:
        """Hold the projection of the whole embedding: calls without gradients inside share it.

        A call projects the distinct words that it reads. That is less work for one batch, and more
        for many: inside `with model.prepared():` the first call without gradients projects all V
        words, and the next ones read the result. It is made anew where a weight's version or memory
        changed, and dropped by a call with gradients and at the end of the outermost `with`. During
        the capture of a CUDA graph it is not used.

        PyTorch does not count every write to a weight: not one through `.data` or through a numpy
        array, nor a step of an optimizer with fused=True. Call `forget_projection` after such a
        write.

        Example:
            with torch.no_grad(), model.prepared():
                scores = [model(left, right) for left, right in batches]
        """
        with self._projection.lock:
            self._projection.holders += 1
        try:
            yield self
        finally:
            with self._projection.lock:
                self._projection.holders -= 1
                if not self._projection.holders:
                    self.forget_projection()

    def forget_projection(self) -> None:
        """Drop the projection that `prepared` holds; the next call inside makes it anew."""
        self._projection.made = None

    def explain(
        self,
        device: torch.device | str | None = None,
        *,
        pairs: int | None = None,
    ) -> str:
        """Say which backend a call takes, and why.

        Args:
            device: of the call; None: the parameters'.
            pairs: of the call. The rule of "auto" may depend on them, and on gradients on or off;
                None: the answer names the number of pairs up to which it does.

        Raises:
            ValueError: the named backend cannot run there.
        """
        where = self.weight_hh_l0.device if device is None else torch.device(device)
        who = f"{type(self).__name__}.explain"
        sequences = None if pairs is None else 2 * pairs
        backend, reason = self._network(who).choose(who, where, sequences)
        dtype = str(self.weight_hh_l0.dtype).removeprefix("torch.")
        return f"{backend.name}: {reason} (H = {self.hidden_size}, {dtype} on {where.type})"

    def extra_repr(self) -> str:
        """Return the options that repr shows."""
        scale = "learned" if self.log_scale is not None else f"{self._scale:g}"
        unusual = [
            f"num_layers={self.num_layers}" if self.num_layers > 1 else "",
            f"dropout={self.dropout:g}" if self.dropout else "",
            "bidirectional=True" if self.bidirectional else "",
            f"similarity={self.similarity!r}" if self.similarity != "manhattan" else "",
            "recompute=True" if self.recompute else "",
            "freeze_embedding=False" if self._trains_embedding() else "",
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
            similarity=self.similarity,
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

    def _network(self, who: str) -> Network:
        """Return the checked network, as `functional` makes it at each call."""
        return check_network(
            who,
            self._weights(),
            self.bidirectional,
            cell=self.cell,
            pooling=self.pooling,
            dropout=self.dropout if self.training else 0.0,
            recompute=self.recompute,
            backend=self.backend,
        )

    def _trains_embedding(self) -> bool:
        return self.embedding is not None and self.embedding.weight.requires_grad

    def _prepared(self, weights: list[Weights], table: Tensor | None) -> Projection | None:
        """Return the projection that `prepared` holds, made where there is none for the weights."""
        held = self._projection
        if not held.holders or table is None or torch.compiler.is_compiling():
            return None
        first_layer = weights[: 2 if self.bidirectional else 1]
        tensors = [*(t for direction in first_layer for t in direction if t is not None), table]
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            self.forget_projection()
            return None
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            # a graph keeps pointers, and a new projection would leave them behind
            return None
        if any(t.is_inference() or type(t) is not nn.Parameter for t in tensors):
            # without a version, or computed for this call
            return None
        autocast = torch.is_autocast_enabled(table.device.type)
        parts = [(t.data_ptr(), t._version, t.dtype, t.shape, t.stride()) for t in tensors]
        key = (self.backend, autocast and torch.get_autocast_dtype(table.device.type), *parts)
        made = held.made
        if made is None or made[0] != key:
            value = functional.prepare(
                first_layer,
                table,
                self.backend,
                cell=self.cell,
                bidirectional=self.bidirectional,
            )
            # the tensors stay, so that no other one can get their memory and their version
            made = held.made = key, tensors, value
        return made[2]

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

    def _load_into(self, kind: Callable[..., RNN]) -> RNN:
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
    """Two sequences through one LSTM, scored by the similarity of their vectors.

    With exp(-scale * L1), the default, this is MaLSTM (Mueller and Thyagarajan, "Siamese Recurrent
    Architectures for Learning Sentence Similarity", AAAI 2016). Parameters carry nn.LSTM's names,
    so the state_dict of an nn.LSTM loads into a module without embedding and learned scale.

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
        similarity: "manhattan", exp(-scale * L1), or "cosine", (1 + cos) / 2, which has no scale.
        scale: factor on L1, > 0; 1 in the paper, a quarter scores higher on SICK.
        learn_scale: whether the factor trains; its logarithm is then the parameter `log_scale`.
        recompute: keep no activations for the backward, which runs the forward again, some thousand
            sequences at a time.
        backend: "auto"; "triton"; "torch", which is "cpu" (the compiled library) where that takes
            the call and else "batched" (tensor operations); "lstm" (torch's own); "reference". A
            named one runs or raises.
        device, dtype: of the parameters; float64, float32, float16 or bfloat16. On CUDA float32 is
            computed as nn.LSTM computes it: with 11 bits in products and activations where
            `torch.backends.cudnn.allow_tf32` is True, which is PyTorch's default; else fully.

    A call projects the distinct words that it reads. Inside `with model.prepared():` calls without
    gradients share the projection of the whole embedding.

    Example:
        >>> model = SiameseLSTM(300, 50, embedding=torch.randn(1000, 300))
        >>> left, right = torch.randint(1000, (2, 32, 7))
        >>> model(left, right, left_lengths=[7] * 31 + [3]).shape
        torch.Size([32])

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
    """Two sequences through one GRU, scored by the similarity of their vectors.

    Arguments and calls are those of `SiameseLSTM`. Equations, names and gate order (r, z, n) are
    those of nn.GRU, whose reset gate acts after the product with the hidden state.

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


class _Held:
    """The projection that `prepared` holds; a copy of a module holds none."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.holders = 0
        # what it was made for, the tensors, and the projection: one tuple, which threads share
        self.made: tuple[tuple[Any, ...], list[Tensor], Projection | None] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Held:
        return _Held()

    def __reduce__(self) -> tuple[type[_Held], tuple[()]]:
        return (_Held, ())


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
