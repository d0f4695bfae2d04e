"""Softmax, log-softmax and cross-entropy with short double backwards.

With P = softmax(x) and J(w) = P ∘ (w − Σ P w), the symmetric derivative of the softmax, for an incoming g and then an
incoming v:

    softmax:        g_x = J(g);             of g: J(v),       of x: J((g − Σ P g) ∘ (v − Σ P v))
    log-softmax:    g_x = g − P Σ g;        of g: v − Σ P v,  of x: −J(v) Σ g

Cross-entropy is −Σ q log P with constant weights q that class indices, class weights and label smoothing give. With Q =
Σ q and h the gradient of each position's term:

    g_x = h (Q P − q);                      of h: Q Σ P v − Σ q v,        of x: h Q J(v)

The first two save their output and cross-entropy log P, as PyTorch does; but cross-entropy never makes a dense gradient
of log P.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gam_fused.second_order import autocast
from gam_fused.second_order.graphs import makes_graph, refuse_batch
from gam_fused.second_order.sizes import is_worthwhile
from gam_fused.second_order.third_order import differentiable_double_backward

# ------------------------------------------------------------------ softmax and log-softmax


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, dim: int) -> Tensor:
        output = torch._softmax(input, dim, False)
        ctx.save_for_backward(output)
        ctx.dim = dim
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (output,) = ctx.saved_tensors
        if makes_graph(grad_output):
            return _softmax_backward(grad_output, output, ctx.dim), None
        return torch._softmax_backward_data(grad_output, output, ctx.dim, output.dtype), None


class _SoftmaxBackward(torch.autograd.Function):
    """A function of the output, whose own backward is J: the derivative by x goes that way."""

    @staticmethod
    def forward(ctx: Any, grad_output: Tensor, output: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(grad_output, output)
        ctx.dim = dim
        return torch._softmax_backward_data(grad_output, output, dim, output.dtype)

    @staticmethod
    def backward(ctx: Any, double_grad: Tensor) -> tuple[Tensor | None, ...]:
        # Out of place throughout, so that with grad mode on this can be differentiated again.
        grad_output, output = ctx.saved_tensors
        centred = double_grad - (double_grad * output).sum(ctx.dim, keepdim=True)
        of_output = (grad_output - (grad_output * output).sum(ctx.dim, keepdim=True)) * centred
        return output * centred, of_output, None


class _LogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, dim: int) -> Tensor:
        output = torch._log_softmax(input, dim, False)
        ctx.save_for_backward(output)
        ctx.dim = dim
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (output,) = ctx.saved_tensors
        if makes_graph(grad_output):
            return _log_softmax_backward(grad_output, output, ctx.dim), None
        return torch._log_softmax_backward_data(grad_output, output, ctx.dim, output.dtype), None


class _LogSoftmaxBackward(torch.autograd.Function):
    """A function of the output, whose own backward maps w to w − P Σ w: −P v Σ g becomes −J(v) Σ g."""

    @staticmethod
    def forward(ctx: Any, grad_output: Tensor, output: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(grad_output, output)
        ctx.dim = dim
        return torch._log_softmax_backward_data(grad_output, output, dim, output.dtype)

    @staticmethod
    def backward(ctx: Any, double_grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_output, output = ctx.saved_tensors
        weighted = output.exp() * double_grad
        of_grad_output = double_grad - weighted.sum(ctx.dim, keepdim=True)
        total = grad_output.sum(ctx.dim, keepdim=True)
        if torch.is_grad_enabled():
            return of_grad_output, weighted * -total, None
        return of_grad_output, weighted.mul_(total.neg_()), None


_softmax_layer: Callable[..., Tensor] = _Softmax.apply
_softmax_backward: Callable[..., Tensor] = _SoftmaxBackward.apply
_log_softmax_layer: Callable[..., Tensor] = _LogSoftmax.apply
_log_softmax_backward: Callable[..., Tensor] = _LogSoftmaxBackward.apply


# ------------------------------------------------------------------ cross-entropy with class indices


class _Options(NamedTuple):
    ignore_index: int
    reduction: str
    smoothing: float


class _CrossEntropy(torch.autograd.Function):
    """Of logits [N, C, …] or [C], class indices [N, …] or [], and class weights [C] or ``None``.

    Returns the loss and log P. The latter stands for the logits, which then need not be kept: it has the same softmax.
    Whatever is differentiated by it sums to 0 over the classes, so that its gradient is that of the logits.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, target: Tensor, weight: Tensor | None, options: _Options
    ) -> tuple[Tensor, Tensor]:
        logarithms = torch._log_softmax(input, _class_dim(input), False)
        ctx.save_for_backward(logarithms, target, weight)
        ctx.set_materialize_grads(False)
        ctx.options = options
        if options.smoothing:
            return _cross_entropy(logarithms, target, weight, options), logarithms
        loss = F.nll_loss(logarithms, target, weight, ignore_index=options.ignore_index, reduction=options.reduction)
        return loss, logarithms

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, of_logarithms: Tensor | None) -> tuple[Tensor | None, ...]:
        result = of_logarithms
        if grad_output is not None:
            refuse_batch(grad_output, "cross_entropy")
            function = _cross_entropy_backward if torch.is_grad_enabled() else _gradient
            logarithms, target, weight = ctx.saved_tensors
            grad = function(grad_output, logarithms, target, weight, ctx.options)
            result = grad if result is None else result + grad
        return result, None, None, None


class _CrossEntropyBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, grad_output: Tensor, logarithms: Tensor, target: Tensor, weight: Tensor | None, options: _Options
    ) -> Tensor:
        ctx.save_for_backward(grad_output, logarithms, target, weight)
        ctx.options = options
        return _gradient(grad_output, logarithms, target, weight, options)

    @staticmethod
    def backward(ctx: Any, double_grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_output, logarithms, target, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            results = differentiable_double_backward(
                lambda x: _cross_entropy(x, target, weight, ctx.options), [logarithms], grad_output, [double_grad]
            )
            return *results, None, None, None
        terms = _Terms(logarithms, target, weight, ctx.options)
        probabilities = logarithms.exp()
        weighted = probabilities * double_grad
        mean = weighted.sum(terms.dim, keepdim=True)
        of_terms = terms.total * mean - terms.inner_product(double_grad)
        of_logits = weighted.addcmul_(probabilities, mean, value=-1)
        of_logits.mul_(terms.grad(grad_output) * terms.total)
        return terms.reduce(of_terms), of_logits, None, None, None


_cross_entropy_layer: Callable[..., tuple[Tensor, Tensor]] = _CrossEntropy.apply
_cross_entropy_backward: Callable[..., Tensor] = _CrossEntropyBackward.apply


def _class_dim(input: Tensor) -> int:
    return 1 if input.dim() > 1 else 0


def _cross_entropy(input: Tensor, target: Tensor, weight: Tensor | None, options: _Options) -> Tensor:
    return F.cross_entropy(
        input,
        target,
        weight,
        ignore_index=options.ignore_index,
        reduction=options.reduction,
        label_smoothing=options.smoothing,
    )


def _gradient(
    grad_output: Tensor, logarithms: Tensor, target: Tensor, weight: Tensor | None, options: _Options
) -> Tensor:
    """The gradient of the logits: h (Q P − q)."""
    terms = _Terms(logarithms, target, weight, options)
    grad = terms.grad(grad_output)
    # A new tensor, since `grad` may be a batch of gradients (is_grads_batched), and then the product is one.
    return terms.subtract_(logarithms.exp() * (grad * terms.total), grad)


class _Terms:
    """The weights q of log P, position by position, never as a whole: one class's, and the smoothing's.

    Numbers per position keep the dimension of the classes, of size 1.
    """

    def __init__(self, input: Tensor, target: Tensor, weight: Tensor | None, options: _Options) -> None:
        self.dim = _class_dim(input)
        self._options = options
        target = target.unsqueeze(self.dim)
        counts = target != options.ignore_index
        self._index = torch.where(counts, target, 0)
        self._counted = counts.to(input.dtype)
        self._shares: Tensor | float = 1.0  # class weights, to broadcast over the input
        self._weights = self._counted
        all_weights: Tensor | float = float(input.shape[self.dim])
        if weight is not None:
            weight = weight.to(input.dtype)
            self._shares = weight.view(-1, *[1] * (input.dim() - self.dim - 1))
            self._weights = weight[self._index] * self._counted
            all_weights = weight.sum()
        self._smoothing = options.smoothing / max(1, input.shape[self.dim])
        self._chosen = self._weights * (1 - options.smoothing)
        self.total = self._chosen + self._counted * (all_weights * self._smoothing) if self._smoothing else self._chosen
        """Q."""

    def grad(self, grad_output: Tensor) -> Tensor:
        """h: the gradient of each position's term, from that of the reduced ones."""
        if self._options.reduction == "none":
            return grad_output.unsqueeze(self.dim)
        if self._options.reduction == "sum":
            return grad_output
        count = self._weights.sum()
        return torch.where(count == 0, 0, grad_output / count)  # the mean over nothing is NaN, and its gradient 0

    def reduce(self, terms: Tensor) -> Tensor:
        """The reduced ones, from the terms of each position."""
        if self._options.reduction == "none":
            return terms.squeeze(self.dim)
        return terms.sum() / self._weights.sum() if self._options.reduction == "mean" else terms.sum()

    def inner_product(self, tensor: Tensor) -> Tensor:
        """Σ q v over the classes."""
        result = tensor.gather(self.dim, self._index) * self._chosen
        if self._smoothing:
            result += (tensor * self._shares).sum(self.dim, keepdim=True) * (self._counted * self._smoothing)
        return result

    def subtract_(self, tensor: Tensor, grad: Tensor) -> Tensor:
        """``tensor`` − h q, in place."""
        tensor.scatter_add_(self.dim, self._index, (grad * self._chosen).neg_())
        if self._smoothing:
            tensor.sub_(self._counted * grad * self._smoothing * self._shares)
        return tensor


# ------------------------------------------------------------------ in the place of PyTorch's


def _softmax_like(
    layer: Callable[..., Tensor], original: Callable[..., Tensor], operator: str
) -> Callable[..., Tensor]:
    def apply(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        if not isinstance(dim, int) or not input.dim() or not is_worthwhile(input):
            return original(input, dim, dtype=dtype)
        input = autocast.to_float32(operator, input) if dtype is None else input.to(dtype)
        return layer(input, dim)

    return apply


def _functional(layer: Callable[..., Tensor], original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """With the arguments of ``torch.nn.functional``, whose ``dim`` may be missing."""

    def apply(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
        if dim is None:  # deprecated; PyTorch warns
            return original(input, dim, _stacklevel + 2, dtype)
        return layer(input, dim, dtype)

    return apply


softmax = _softmax_like(_softmax_layer, torch.softmax, "softmax.int")
"""(input, dim, dtype=None): :func:`torch.softmax`, to be differentiated twice."""
log_softmax = _softmax_like(_log_softmax_layer, torch.log_softmax, "log_softmax.int")
"""(input, dim, dtype=None): :func:`torch.log_softmax`, to be differentiated twice."""


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """:func:`torch.nn.functional.cross_entropy`, to be differentiated twice.

    Class probabilities as targets are a product with :func:`log_softmax`, as in PyTorch.
    """
    own = size_average is None and reduce is None and is_worthwhile(input) and reduction in ("none", "mean", "sum")
    own = own and (weight is None or not weight.requires_grad) and 0 <= label_smoothing <= 1 and input.dim() > 0
    if own and target.dtype == torch.long:
        input = autocast.to_float32(_operator_of_cross_entropy(input), input)
        return _cross_entropy_layer(input, target, weight, _Options(ignore_index, reduction, label_smoothing))[0]
    if own and target.is_floating_point() and target.shape == input.shape:
        return _with_probabilities(input, target, weight, reduction, label_smoothing)
    return F.cross_entropy(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)


def _operator_of_cross_entropy(input: Tensor) -> str:
    """The operator for which autocast casts the logits."""
    return "cross_entropy_loss" if input.device.type == "cpu" else "log_softmax.int"


def _with_probabilities(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, smoothing: float
) -> Tensor:
    """−Σ w t log P over the classes, with the probabilities t smoothed toward 1 / C."""
    dim = _class_dim(input)
    input = autocast.to_float32(_operator_of_cross_entropy(input), input)
    logarithms = log_softmax(input, dim)
    if smoothing:
        target = target * (1 - smoothing) + smoothing / input.shape[dim]
    if weight is not None:
        target = target * weight.view(-1, *[1] * (input.dim() - dim - 1))
    terms = -(logarithms * target).sum(dim)
    if reduction == "none":
        return terms
    return terms.sum() / (input.numel() // input.shape[dim]) if reduction == "mean" else terms.sum()


REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.softmax: softmax,
    Tensor.softmax: softmax,
    F.softmax: _functional(softmax, F.softmax),
    torch.log_softmax: log_softmax,
    Tensor.log_softmax: log_softmax,
    F.log_softmax: _functional(log_softmax, F.log_softmax),
    F.cross_entropy: cross_entropy,
}
