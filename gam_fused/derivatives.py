"""Gradients and Hessian-vector products of the losses that a closure hands over."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

# What PyTorch says where it has no derivative of an operator's gradient.
_NO_SECOND_DERIVATIVE = (
    "is not implemented",
    "double backward",
    "once_differentiable",
    "differentiate twice",
    "no autograd formula was registered",
)
# "the derivative for '_embedding_bag_backward' is not implemented", "derivative for aten::_ctc_loss_backward is …",
# "Trying to backward through mine.cube_grad.default but no autograd formula was registered"
_OPERATOR = re.compile(
    r"(?:derivative for|backward through) '?(?:aten::)?_*([\w:.]+?)(?:_backward)?(?:\.default|: \w+)?'? (?:is|but) "
)


class NoSecondDerivative(RuntimeError):
    """An operator in the loss that cannot be differentiated twice.

    Args:
        operator: its name, as a user may know it.
        reason: how that is known.
        way_out: what to do other than to choose another ``hvp``.
    """

    def __init__(self, operator: str, reason: str, way_out: str = "Replace that operator") -> None:
        super().__init__(operator, reason, way_out)
        self.operator = operator
        self.reason = reason

    def __str__(self) -> str:
        operator, reason, way_out = self.args
        return (
            f"hvp='exact' needs the second derivative of every operator in the loss, and {operator} has none: "
            f"{reason}. {way_out}, or use hvp='finite_difference', which needs first derivatives only, or hvp='auto', "
            "which turns to finite differences by itself."
        )


class Differentiated(Protocol):
    """The gradient of a loss, and its second derivative; see :class:`Gradients`."""

    @property
    def total(self) -> Sequence[Tensor | None]:
        """∇L by parameter, detached; ``None`` where the loss does not depend on the parameter."""

    def hvp(self, indices: Sequence[int], vectors: Sequence[Tensor]) -> list[Tensor]:
        """H v for the parameters at ``indices``, by double backward; may be called once."""


class Gradients:
    """The gradient of the sum of one or more losses, with its graph if a second derivative is to follow.

    Args:
        params: the parameters to differentiate by.
        create_graph: keep the graph of the gradient, so that :meth:`hvp` can differentiate it once more. With several
            losses (micro-batches) the graphs of all of them stay alive until then: the Hessian of a sum times the
            gradient of the sum needs the whole gradient first.
        forward_context: makes the context in which the losses were computed, for checkpoints that compute them again.
        is_known: whether losses of such a graph have been added in this step before, so that it need not be looked at.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        *,
        create_graph: bool,
        forward_context: Callable[[], AbstractContextManager[None]] = nullcontext,
        is_known: bool = False,
    ) -> None:
        self._params = params
        self._create_graph = create_graph
        self._forward_context = forward_context
        self._is_known = is_known
        self._terms: list[list[Tensor | None]] = []
        self.total: list[Tensor | None] = [None] * len(params)
        """∇L by parameter, detached; ``None`` where no loss depends on the parameter."""
        self.other_leaves: list[Tensor] = []
        """Other parameters in the losses' graphs."""

    def add(
        self, losses: Sequence[Tensor], grad_outputs: Sequence[Tensor | None], *, retain_graph: bool = False
    ) -> list[Tensor | None]:
        """Add losses that were computed in one graph and return their own gradient, detached.

        ``retain_graph``: losses that are added later share some of this graph. Implied by ``create_graph``.
        """
        if not self._is_known:
            leaves = _checked_leaves(losses, twice=self._create_graph)
            own = {id(param) for param in self._params}
            # Inputs that require gradients, for a gradient penalty say, are the closure's own affair.
            self.other_leaves += [leaf for leaf in leaves if isinstance(leaf, nn.Parameter) and id(leaf) not in own]
        with self._forward_context():
            terms = _derivatives(
                losses,
                self._params,
                grad_outputs,
                retain_graph=retain_graph or self._create_graph,
                create_graph=self._create_graph,
            )
        if self._create_graph:
            self._terms.append(terms)
        detached: list[Tensor | None] = [
            None if term is None else _dense(term.detach(), i) for i, term in enumerate(terms)
        ]
        if not self._create_graph:
            # The closure runs again before these are used: a buffer that an operator reuses must not change them.
            del terms
            present = [(i, grad) for i, grad in enumerate(detached) if grad is not None]
            indices = [i for i, _ in present]
            own_memory = owned((grad for _, grad in present), (self._params[i] for i in indices))
            for i, grad in zip(indices, own_memory, strict=True):
                detached[i] = grad
        for i, term in enumerate(detached):
            total = self.total[i]
            if term is not None:
                self.total[i] = term if total is None else total + term
        return detached

    def hvp(self, indices: Sequence[int], vectors: Sequence[Tensor]) -> list[Tensor]:
        """H v for the parameters at ``indices``, by double backward; frees the graph.

        Zero where the gradient does not depend on a parameter. Raises :class:`NoSecondDerivative` where PyTorch has
        none of an operator.
        """
        outputs: list[Tensor] = []
        grad_outputs: list[Tensor] = []
        for terms in self._terms:
            for i, vector in zip(indices, vectors, strict=True):
                # A gradient without a graph is constant (a linear loss, a parameter with 0 elements): H has no row.
                if (term := terms[i]) is not None and term.requires_grad:
                    outputs.append(term)
                    grad_outputs.append(vector)
        self._terms.clear()
        params = [self._params[i] for i in indices]
        if not outputs:
            return [torch.zeros_like(param) for param in params]
        try:
            with self._forward_context():
                products = _derivatives(outputs, params, grad_outputs)
        except RuntimeError as error:
            if not any(sign in str(error) for sign in _NO_SECOND_DERIVATIVE):
                raise
            raise NoSecondDerivative(_operator(str(error)), str(error).rstrip(".")) from error
        return [
            torch.zeros_like(param) if product is None else product.detach()
            for param, product in zip(params, products, strict=True)
        ]


def _derivatives(
    outputs: Sequence[Tensor], params: Sequence[Tensor], grad_outputs: Sequence[Tensor | None], **options: bool
) -> list[Tensor | None]:
    """``torch.autograd.grad`` by parameters of which a closure may have frozen some, or all: ``None`` for those."""
    trained = [i for i, param in enumerate(params) if param.requires_grad]
    derivatives: list[Tensor | None] = [None] * len(params)
    if trained:
        with outside_autocast(params):
            found = torch.autograd.grad(
                list(outputs), [params[i] for i in trained], list(grad_outputs), allow_unused=True, **options
            )
        for i, derivative in zip(trained, found, strict=True):
            derivatives[i] = derivative
    return derivatives


def owned(tensors: Iterable[Tensor], params: Iterable[Tensor]) -> list[Tensor]:
    """The tensors themselves where a step may write into them, copies where it may not.

    What autograd returns is not always ours to write: the gradients of ``a + b`` are one tensor, that of a sum is
    expanded from one number, a product may *be* the vector it was given, a custom backward may return the user's own
    data. A step may write into a tensor that is laid out like its parameter in memory that nobody else holds. (For
    ``.backward()``, PyTorch's ``AccumulateGrad`` decides alike.)
    """
    return [
        tensor
        if tensor.stride() == param.stride() and _is_sole_owner(tensor)
        else torch.empty_like(param, dtype=tensor.dtype, requires_grad=False).copy_(tensor)
        for tensor, param in zip(tensors, params, strict=True)
    ]


def _is_sole_owner(tensor: Tensor) -> bool:
    storage = tensor.untyped_storage()
    # Two references: the tensor's own and the Python object made on the line above.
    return bool(torch._C._storage_Use_Count(storage._cdata) <= 2)


def _operator(message: str) -> str:
    """The one that PyTorch's message is about."""
    found = _OPERATOR.search(message)
    return found[1] if found else "an operator"


def _checked_leaves(losses: Sequence[Tensor], *, twice: bool) -> list[Tensor]:
    """The leaves of the losses' graphs. Raises where ``torch.autograd.grad`` would silently leave terms out.

    A reentrant checkpoint hides the parameters of its block from everything but ``backward()``: they look unused. What
    a once-differentiable function returns looks constant to a second derivative. A walk over the graph takes about a
    microsecond per node.
    """
    leaves = []
    nodes = [loss.grad_fn for loss in losses]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if node is None:
            continue
        function = getattr(type(node), "_forward_cls", None)  # only functions written in Python have one
        if function is CheckpointFunction:
            raise RuntimeError(
                "torch.utils.checkpoint with use_reentrant=True works with .backward() only, and GAM differentiates by "
                "torch.autograd.grad; pass use_reentrant=False."
            )
        if twice and function is not None:
            _refuse_once_differentiable(function)
        if (leaf := getattr(node, "variable", None)) is not None:
            leaves.append(leaf)
        found = {following for following, _ in node.next_functions} - seen
        seen |= found
        nodes += found
    return leaves


def _refuse_once_differentiable(function: type[torch.autograd.Function]) -> None:
    if function.__module__.startswith("torch._functorch._aot_autograd."):
        # It may refuse the graph of its first derivative already, with words about the reuse of memory.
        raise NoSecondDerivative(
            "a module under torch.compile",
            "what AOTAutograd compiles is differentiated once",
            "Let the closure call the module itself, without torch.compile",
        )
    if _is_once_differentiable(function):
        raise NoSecondDerivative(function.__name__, f"{function.__name__} is marked as once_differentiable")


def _is_once_differentiable(function: type[torch.autograd.Function]) -> bool:
    for backward in (function.backward, function.vjp):
        while (wrapped := getattr(backward, "__wrapped__", None)) is not None:
            # The decorator leaves no mark but the module that its wrapper was written in.
            if getattr(backward, "__globals__", None) is vars(torch.autograd.function):
                return True
            backward = wrapped
    return False


def _dense(gradient: Tensor, index: int) -> Tensor:
    if gradient.layout != torch.strided:
        raise RuntimeError(
            f"the gradient of parameter {index} (shape {tuple(gradient.shape)}) is {gradient.layout}; GAM needs dense "
            "gradients: build the layer with sparse=False."
        )
    return gradient


@contextmanager
def outside_autocast(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Switch autocast off: derivatives run in the dtypes that their forward pass chose, as PyTorch advises."""
    with ExitStack() as stack:
        for device in {tensor.device.type for tensor in tensors}:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
