"""`SiameseLSTM`: parameters, options, `forward`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastsiam import functional
from fastsiam._backend import BACKENDS
from fastsiam.functional import Lengths, Prepared, Weights


class SiameseLSTM(nn.Module):
    """Two sequences through one LSTM, scored by exp(-scale * L1) of their vectors.

    MaLSTM (Mueller and Thyagarajan, "Siamese Recurrent Architectures for Learning Sentence
    Similarity", AAAI 2016). Parameters carry nn.LSTM's names, so its state_dict loads as it is.

    Args:
        input_size: D, features of a step.
        hidden_size: H.
        num_layers: 1.
        bias: whether the gates have nn.LSTM's two biases.
        dropout: 0.0.
        bidirectional: False.
        embedding: [V, D] tensor or nn.Embedding: inputs are then integer ids.
        freeze_embedding: whether the embedding does not train.
        pooling: "last", the state at the last valid step. A call may give masks instead.
        scale: factor on L1, > 0; 1 in the paper, a quarter scores higher on SICK.
        learn_scale: whether the factor trains; its logarithm is then the parameter `log_scale`.
        backend: "auto", "triton", "torch", "lstm" or "reference". A named one runs or raises.
        device, dtype: of the parameters; float64, float32, float16 or bfloat16.

    Raises:
        ValueError: an argument out of range.
        NotImplementedError: an option that is not there yet.
    """

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
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_options(num_layers, dropout, bidirectional, pooling)
        if input_size < 1 or hidden_size < 1:
            raise ValueError(
                "SiameseLSTM: input_size and hidden_size must be at least 1, "
                f"got {input_size} and {hidden_size}"
            )
        if not (scale > 0 and math.isfinite(scale)):
            raise ValueError(f"SiameseLSTM: scale must be positive and finite, got {scale}")
        if backend not in BACKENDS:
            raise ValueError(
                f"SiameseLSTM: backend must be one of {', '.join(BACKENDS)}, got {backend!r}"
            )
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.dropout = dropout
        self.bidirectional = bidirectional
        self.pooling = pooling
        self.backend = backend
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        gates = 4 * hidden_size
        self.weight_ih_l0 = nn.Parameter(torch.empty(gates, input_size, **options))
        self.weight_hh_l0 = nn.Parameter(torch.empty(gates, hidden_size, **options))
        if bias:
            self.bias_ih_l0 = nn.Parameter(torch.empty(gates, **options))
            self.bias_hh_l0 = nn.Parameter(torch.empty(gates, **options))
        else:
            self.register_parameter("bias_ih_l0", None)
            self.register_parameter("bias_hh_l0", None)
        self.reset_parameters()
        # a fixed scale is neither parameter nor buffer: it is an option, saved with the options
        self._scale = float(scale)
        if learn_scale:
            self.log_scale = nn.Parameter(torch.tensor(math.log(scale), **options))
        else:
            self.register_parameter("log_scale", None)
        self.embedding = _own_embedding(embedding, freeze_embedding, input_size, options)
        self._cache = _PreparedCache()

    def reset_parameters(self) -> None:
        """Draw every weight and bias from U(-1/sqrt(H), 1/sqrt(H)), as nn.LSTM does."""
        bound = self.hidden_size**-0.5
        for parameter in self._weights():
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
                embedding. Padding is never read.
            right: the same; its T may differ.
            left_lengths: [B] valid steps, tensor or list, 0 <= length <= T. None: all T.
            right_lengths: the same for the right side.
            left_mask: [B, T] weights of the steps in place of `pooling`; no gradient.
            right_mask: the same for the right side.
            validate: check lengths and ids of CUDA tensors too, which synchronises.

        Raises:
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
        """Return the sentence vectors, [B, H] in the parameters' dtype; arguments as one side."""
        return functional.lstm_encode(
            x,
            self._weights(),
            embedding=self._table(),
            lengths=lengths,
            mask=mask,
            backend=self.backend,
            prepared=self._prepared(),
            validate=validate,
        )

    def explain(self, device: torch.device | str | None = None) -> str:
        """Say which backend a call takes, and why; on the parameters' device unless one is given.

        Raises:
            ValueError: the named backend cannot run there.
        """
        where = self.weight_hh_l0.device if device is None else torch.device(device)
        backend, reason = functional.explain(
            self._weights(), where, self.backend, who="SiameseLSTM.explain"
        )
        return (
            f"{backend}: {reason} (H = {self.hidden_size}, "
            f"{str(self.weight_hh_l0.dtype).removeprefix('torch.')} on {where.type})"
        )

    @classmethod
    def from_lstm(cls, lstm: nn.LSTM, **options: Any) -> SiameseLSTM:
        """Make a module with a copy of an nn.LSTM's weights; options as for the constructor.

        Raises:
            ValueError: the LSTM projects its state (proj_size).
            NotImplementedError: it has an option that is not there yet.
        """
        if lstm.proj_size:
            raise ValueError(
                f"SiameseLSTM.from_lstm: proj_size must be 0, got {lstm.proj_size}; "
                "a projected state is another network"
            )
        weight = lstm.weight_hh_l0
        made = cls(
            lstm.input_size,
            lstm.hidden_size,
            lstm.num_layers,
            lstm.bias,
            lstm.dropout,
            lstm.bidirectional,
            **{"device": weight.device, "dtype": weight.dtype, **options},
        )
        made.load_state_dict(lstm.state_dict(), strict=False)
        return made

    def to_lstm(self) -> nn.LSTM:
        """Return an nn.LSTM (batch_first) with a copy of the weights."""
        weight = self.weight_hh_l0
        lstm = nn.LSTM(
            self.input_size,
            self.hidden_size,
            bias=self.bias,
            batch_first=True,
            device=weight.device,
            dtype=weight.dtype,
        )
        own = self.state_dict()
        lstm.load_state_dict({name: own[name] for name in lstm.state_dict()})
        return lstm

    def extra_repr(self) -> str:
        """Return the options that repr shows."""
        scale = "learned" if self.log_scale is not None else f"{self._scale:g}"
        return (
            f"{self.input_size}, {self.hidden_size}, bias={self.bias}, "
            f"pooling={self.pooling!r}, scale={scale}, backend={self.backend!r}"
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
        return functional.siamese_lstm(
            left,
            right,
            self._weights(),
            embedding=self._table(),
            left_lengths=left_lengths,
            right_lengths=right_lengths,
            left_mask=left_mask,
            right_mask=right_mask,
            scale=self.scale,
            log=log,
            backend=self.backend,
            prepared=self._prepared(),
            validate=validate,
        )

    def _weights(self) -> Weights:
        return Weights(self.weight_ih_l0, self.weight_hh_l0, self.bias_ih_l0, self.bias_hh_l0)

    def _table(self) -> Tensor | None:
        return None if self.embedding is None else self.embedding.weight

    def _prepared(self) -> Prepared | None:
        """Return the projected vocabulary where gradients are off: made once a weight version."""
        table = self._table()
        if table is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        return self._cache.get(self._weights(), table, self.backend)


class _PreparedCache:
    """The last `functional.prepare` of a module, dropped when a weight changes.

    In-place updates raise a tensor's version counter, but writes through `.data` do not. On the
    CPU the weights are therefore compared with a copy at each call, and so is one column of the
    embedding; on CUDA, where that would synchronise, version counters must do.
    """

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._copies: list[Tensor] = []
        self._prepared: Prepared | None = None

    def get(self, weights: Weights, table: Tensor, backend: str) -> Prepared | None:
        tensors = [t for t in (*weights, table) if t is not None]
        device = table.device.type
        counted = not any(t.is_inference() for t in tensors)
        if device != "cpu" and not counted:
            # tensors made in inference mode have no version counter: nothing would show a change
            return None
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        key = (
            backend,
            autocast,
            *((t.data_ptr(), t.shape, t.dtype, t.device) for t in tensors),
            *(t._version for t in tensors if counted),
        )
        watched = [*tensors[:-1], table[:, 0]] if device == "cpu" else []
        same = key == self._key and all(
            torch.equal(now, then) for now, then in zip(watched, self._copies, strict=True)
        )
        if not same:
            self._prepared = functional.prepare(weights, table, backend)
            self._copies = [t.detach().clone() for t in watched]
            self._key = key
        return self._prepared

    def __deepcopy__(self, memo: dict[int, Any]) -> _PreparedCache:
        return _PreparedCache()

    def __reduce__(self) -> tuple[type[_PreparedCache], tuple[()]]:
        return (_PreparedCache, ())


def _check_options(num_layers: int, dropout: float, bidirectional: bool, pooling: str) -> None:
    missing = {
        f"num_layers={num_layers}": num_layers != 1,
        f"dropout={dropout}": dropout != 0.0,
        "bidirectional=True": bidirectional,
        f"pooling={pooling!r}": pooling in ("mean", "max"),
    }
    for option, asked in missing.items():
        if asked:
            raise NotImplementedError(
                f"SiameseLSTM: {option} is not there yet; what there is: num_layers=1, "
                "dropout=0.0, bidirectional=False, pooling='last' or masks given to the call"
            )
    if pooling != "last":
        raise ValueError(f"SiameseLSTM: pooling must be last, mean or max, got {pooling!r}")


def _own_embedding(
    embedding: Tensor | nn.Embedding | None,
    freeze: bool,
    D: int,
    options: dict[str, Any],
) -> nn.Embedding | None:
    """Return the caller's vectors as an nn.Embedding of the module's device and dtype."""
    if embedding is None:
        return None
    table = embedding.weight if isinstance(embedding, nn.Embedding) else embedding
    if table.ndim != 2 or table.shape[1] != D or not table.is_floating_point():
        raise ValueError(
            f"SiameseLSTM: embedding must be floating point [V, D] with D = {D}, "
            f"got {list(table.shape)} of {table.dtype}"
        )
    if isinstance(embedding, nn.Embedding):
        embedding.weight.requires_grad_(not freeze)
        return embedding.to(**options)
    weight = table.detach().clone().to(**{k: v for k, v in options.items() if v is not None})
    if options["dtype"] is None:
        weight = weight.to(torch.get_default_dtype())
    made: nn.Embedding = nn.Embedding.from_pretrained(weight, freeze=freeze)
    return made
