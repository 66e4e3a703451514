"""Embeddings of PyTorch that are trained exactly, at the cost of the rows that are used."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .backends.deferred import OUTSIDE, Rows


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _catch_up(weight: Any, ids: Tensor) -> None:
    if isinstance(weight, Rows) and weight.deferral.is_behind:
        weight.deferral.catch_up(ids)


class _Deferred:
    """What both modules have in common."""

    weight: Any
    sparse: bool

    def _defer(self) -> None:
        """Make the weight one whose rows catch up; it stays the same object."""
        reason = _why_not(self)
        if reason is not None:
            raise ValueError(f"{type(self).__name__} with sparse=True {reason}")
        weight = self.weight
        weight.__class__ = Rows


def _why_not(module: Any) -> str | None:
    """Why a module cannot have sparse gradients, if it cannot."""
    if getattr(module, "scale_grad_by_freq", False):
        return "cannot have scale_grad_by_freq=True: PyTorch has no sparse gradient of that."
    if getattr(module, "mode", None) == "max":
        return "cannot have mode='max': PyTorch has no sparse gradient of that."
    return None


class Embedding(_Deferred, nn.Embedding):  # type: ignore[misc]
    """`torch.nn.Embedding` that is trained exactly, at the cost of the rows that are used.

    Adam moves every row at every step, by its momentum. Here a row that no batch uses puts that
    off until it is looked up next, or until anything else reads the weight; the steps that it
    missed are then made on it in order, so that every value is the same to the bit as with
    `torch.nn.Embedding(..., sparse=True)` and the same optimizer. That may be `Adam` or `AdamW` of
    omniadam.torch, or `omniadam.Adam`; to others it is an ordinary parameter.

    The memory of the weight itself is behind between steps. What reads it past PyTorch's functions
    needs `weight.flush()` before. On other devices than the CPU each step is the full pass.

    Args:
        num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq,
            _weight, _freeze, device, dtype: as in `torch.nn.Embedding`.
        sparse: True if not given; with False this is torch's module.

    Raises:
        ValueError: for what PyTorch refuses of sparse gradients, `scale_grad_by_freq`.

    Example:
        >>> import torch
        >>> from omniadam.torch import Adam, Embedding
        >>> embedding = Embedding(1000, 16)
        >>> opt = Adam(embedding.parameters(), lr=0.1)
        >>> embedding(torch.tensor([1, 5, 1])).sum().backward()
        >>> opt.step()
        >>> embedding.weight.grad.is_sparse
        True

    Source: torch/nn/modules/sparse.py.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = True,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        nn.Embedding.__init__(
            self,
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            _freeze,
            device,
            dtype,
        )
        if sparse:
            self._defer()

    def forward(self, input: Tensor) -> Tensor:
        """The rows of these numbers, of shape `(*input.shape, embedding_dim)`."""
        _catch_up(self.weight, input)
        with OUTSIDE():
            return functional.embedding(
                input,
                self.weight,
                self.padding_idx,
                self.max_norm,
                self.norm_type,
                self.scale_grad_by_freq,
                self.sparse,
            )


class EmbeddingBag(_Deferred, nn.EmbeddingBag):  # type: ignore[misc]
    """`torch.nn.EmbeddingBag` that is trained exactly, at the cost of the rows that are used.

    As `Embedding`; `mode` is "sum" or "mean".

    Args:
        num_embeddings, embedding_dim, max_norm, norm_type, scale_grad_by_freq, mode, _weight,
            include_last_offset, padding_idx, device, dtype: as in `torch.nn.EmbeddingBag`.
        sparse: True if not given; with False this is torch's module.

    Raises:
        ValueError: for what PyTorch refuses of sparse gradients, `scale_grad_by_freq` and
            `mode="max"`.

    Example:
        >>> import torch
        >>> from omniadam.torch import Adam, EmbeddingBag
        >>> bag = EmbeddingBag(1000, 16, mode="sum")
        >>> opt = Adam(bag.parameters(), lr=0.1)
        >>> bag(torch.tensor([[1, 5], [2, 2]])).sum().backward()
        >>> opt.step()

    Source: torch/nn/modules/sparse.py.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = True,
        _weight: Tensor | None = None,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        nn.EmbeddingBag.__init__(
            self,
            num_embeddings,
            embedding_dim,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            mode,
            sparse,
            _weight,
            include_last_offset,
            padding_idx,
            device,
            dtype,
        )
        if sparse:
            self._defer()

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """The sums or means of bags of rows, of shape `(bags, embedding_dim)`."""
        _catch_up(self.weight, input)
        with OUTSIDE():
            return functional.embedding_bag(
                input,
                self.weight,
                offsets,
                self.max_norm,
                self.norm_type,
                self.scale_grad_by_freq,
                self.mode,
                self.sparse,
                per_sample_weights,
                self.include_last_offset,
                self.padding_idx,
            )


_KINDS: dict[type, type] = {nn.Embedding: Embedding, nn.EmbeddingBag: EmbeddingBag}


def defer(model: nn.Module) -> nn.Module:
    """Train a model's embeddings exactly at the cost of the rows that are used, in place.

    Every `torch.nn.Embedding` and `torch.nn.EmbeddingBag` of the model becomes an `Embedding` or
    `EmbeddingBag` of omniadam with sparse gradients. Modules, parameters and hooks stay the same
    objects. Left as they are, with one warning that names them: subclasses, parametrized modules,
    those whose weight another module has too, and what PyTorch has no sparse gradient of.

    Their gradients are sparse from now on. `torch.nn.utils.clip_grad_norm_` and other optimizers
    may refuse those: `global_clipnorm` of `omniadam.torch.Adam` clips by the norm of all gradients.

    Args:
        model: any module; itself may be an embedding.

    Returns:
        The model.

    Example:
        >>> import torch
        >>> import omniadam.torch
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 1))
        >>> type(omniadam.torch.defer(model)[0]).__module__
        'omniadam.embedding'
    """
    counts: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    left = []
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or isinstance(module, _Deferred):
            continue
        target, name = _KINDS.get(type(module)), name or type(module).__name__
        if target is None:
            left.append(f"{name} (a {type(module).__name__})")
        elif counts.get(id(module.weight), 0) > 1:
            left.append(f"{name} (its weight is tied)")
        elif type(module.weight) is not nn.Parameter:
            left.append(f"{name} (its weight is a {type(module.weight).__name__})")
        elif (reason := _why_not(module)) is not None:
            left.append(f"{name} ({reason.partition(':')[0]})")
        elif module.weight.requires_grad:
            module.sparse = True
            module.__class__ = target
            module._defer()
    if left:
        warnings.warn(f"omniadam.torch.defer leaves these as they are: {left}", stacklevel=2)
    return model
