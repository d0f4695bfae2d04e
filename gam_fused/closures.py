"""Running the user's closure: its ordinary ``loss.backward()`` is taken over, its side effects are replayed.

While a closure runs, a :class:`torch.overrides.TorchFunctionMode` sees every call into PyTorch made by this thread.
Nothing is patched, and when the closure returns or raises, nothing is left behind.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from gam_fused.derivatives import Differentiated, Gradients
from gam_fused.replay import Replay
from gam_fused.second_order import rerouting

Closure = Callable[..., Any]

# Where running_mean and running_var stand among the positional arguments.
_RUNNING_STATISTICS: dict[Callable[..., Any], tuple[int, int]] = {
    F.batch_norm: (1, 2),
    F.instance_norm: (1, 2),
    torch.batch_norm: (3, 4),
    torch.instance_norm: (3, 4),
}


class Evaluation:
    """What one run of the closure gave: the loss it returned, detached, and the gradient of what it differentiated.

    ``fills_grads``: whether the closure differentiated it itself, or wrote into ``.grad`` in another way.
    """

    def __init__(self, loss: Tensor, gradients: Differentiated, *, fills_grads: bool = False) -> None:
        self.loss = loss
        self.gradients = gradients
        self.fills_grads = fills_grads


class SelfDifferentiating(ABC):
    """A closure that comes with its derivatives: :func:`evaluate` asks for them instead of running it."""

    @abstractmethod
    def __call__(self) -> Tensor:
        """The loss, with its graph, for whoever takes this for a plain closure."""

    @abstractmethod
    def differentiate(
        self, params: Sequence[Tensor], replay: Replay, *, twice: bool, reroutes: bool
    ) -> tuple[Tensor, Differentiated]:
        """The loss and its gradient by ``params``; with ``twice``, the product of the Hessian with it, too.

        That one by the layers of :mod:`gam_fused.second_order`, if it ``reroutes``.
        Buffers that this changes are to be told to ``replay`` before they are.
        """


def evaluate(
    closure: Closure,
    params: Sequence[Tensor],
    replay: Replay,
    *,
    create_graph: bool,
    second_order: str = "off",
) -> Evaluation:
    """Run ``closure`` once and differentiate.

    With ``create_graph``, the forward pass runs without the kernels that have no second derivative (fused attention,
    cuDNN's recurrent networks), and on the layers of :mod:`gam_fused.second_order` unless ``second_order`` is
    ``"off"``.

    Three kinds of closure are understood: one that returns a scalar loss; an ordinary one that also calls
    ``zero_grad()`` and ``loss.backward()``; and one that calls ``backward()`` several times, whose loss is the sum. A
    :class:`SelfDifferentiating` one is taken at its word.

    Raises:
        TypeError: the closure returned something other than a tensor.
        ValueError: the loss is not a real scalar, or depends on nothing that requires gradients.
    """
    replay.begin_pass()
    for param in params:
        param.grad = None
    if isinstance(closure, SelfDifferentiating):
        loss, derivatives = closure.differentiate(params, replay, twice=create_graph, reroutes=second_order == "auto")
        replay.end_pass()
        return Evaluation(_scalar(loss), derivatives, fills_grads=True)
    again = _Again(reroutes=second_order == "auto") if create_graph else None
    gradients = Gradients(params, create_graph=create_graph, forward_context=again.context if again else nullcontext)
    interception = _Interception(params, gradients, replay, again)
    with torch.enable_grad(), attention_by_matrix_products() if create_graph else nullcontext(), interception:
        loss = closure()
    replay.end_pass()
    check_loss(loss, needs_graph=not interception.backward_called)
    fills_grads = interception.backward_called or any(param.grad is not None for param in params)
    if interception.backward_called:
        interception.warn()
        for param in params:
            param.grad = None  # was for the closure to see; the double backward can use the memory
    else:
        gradients.add([loss], [None])
    return Evaluation(_scalar(loss), gradients, fills_grads=fills_grads)


def evaluate_again(closure: Closure, params: Sequence[Tensor], replay: Replay, first: Evaluation) -> Evaluation:
    """As :func:`evaluate` without ``create_graph``, once ``first`` has told what this closure does.

    One that only returns its loss is not watched a second time: that would cost a microsecond and more for each of its
    calls into PyTorch.

    Raises:
        RuntimeError: the closure left ``.grad`` alone in its first run, and does not now.
    """
    if first.fills_grads:
        return evaluate(closure, params, replay, create_graph=False)
    replay.begin_pass()
    for param in params:
        param.grad = None
    with torch.enable_grad():
        loss = closure()
    check_loss(loss, needs_graph=False)
    if any(param.grad is not None for param in params):
        raise RuntimeError(
            "the closure called backward() in a later pass of a step and not in its first, or wrote into .grad; it has "
            "to do the same each time that it is run within a step."
        )
    check_loss(loss, needs_graph=True)
    gradients = Gradients(params, create_graph=False, is_known=True)
    gradients.add([loss], [None])
    return Evaluation(_scalar(loss), gradients)


def attention_by_matrix_products() -> AbstractContextManager[None]:
    """Where the fused attention kernels are off: they have no second derivative, the plain form has one."""
    return sdpa_kernel(SDPBackend.MATH)


def _scalar(loss: Tensor) -> Tensor:
    # A copy: a closure that adds up its loss in one tensor writes into it again in the next pass.
    return loss.detach().clone().reshape(())


def differentiated(loss: Tensor, params: Sequence[Tensor], *, create_graph: bool) -> Evaluation:
    """As :func:`evaluate`, of a loss that the user's own forward pass has given."""
    gradients = Gradients(params, create_graph=create_graph)
    gradients.add([loss], [None])
    return Evaluation(_scalar(loss), gradients)


def check_loss(loss: Any, *, needs_graph: bool, name: str = "the closure's return value") -> None:
    """Raise unless ``loss`` is a real scalar tensor, with a graph where one is needed."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"{name} must be the scalar loss tensor, got {loss!r}; end the closure with `return loss`.")
    if loss.numel() != 1 or not loss.dtype.is_floating_point:
        raise ValueError(
            f"{name} must be one real number, got shape {tuple(loss.shape)} and dtype {loss.dtype}; "
            "reduce it first, for example with loss.mean()."
        )
    if needs_graph and not loss.requires_grad:
        raise ValueError(
            f"{name} is detached ({loss!r} has no grad_fn); return the loss itself, not loss.detach(), and compute it "
            "without torch.no_grad()."
        )


class _Again:
    """The surroundings of a forward pass that is differentiated twice, once more.

    For checkpoints, which run a part of it in the backward pass and have to save the same tensors then. A mode costs a
    microsecond for every call that it sees, so it is on only where there was a checkpoint.

    Args:
        reroutes: whether functions run on the layers of :mod:`gam_fused.second_order`.
    """

    def __init__(self, *, reroutes: bool) -> None:
        self.reroutes = reroutes
        self._has_checkpoints = False

    def look_for_checkpoint(self) -> None:
        """Called within the forward pass, for every function."""
        # Checkpoints keep what the operators inside of them save by hooks that they set. torch.compile, which traces
        # modes too, does not know how to ask for those.
        if not self._has_checkpoints and not torch.compiler.is_compiling():
            self._has_checkpoints = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None

    @contextmanager
    def context(self) -> Iterator[None]:
        """The surroundings."""
        mode = rerouting.TwiceDifferentiable(reroutes=self.reroutes) if self._has_checkpoints else nullcontext()
        with attention_by_matrix_products(), mode:
            yield


class _Interception(TorchFunctionMode):
    """Takes over ``backward``, watches running statistics and explicit generators.

    Args:
        again: where the closure is differentiated twice: functions run as in :class:`rerouting.TwiceDifferentiable`,
            and this is told of checkpoints.
    """

    def __init__(self, params: Sequence[Tensor], gradients: Gradients, replay: Replay, again: _Again | None) -> None:
        super().__init__()
        self._again = again
        self.backward_called = False
        self._params = params
        self._gradients = gradients
        self._replay = replay
        self._counter: tuple[Tensor, Tensor] | None = None
        self._handed_out: dict[int, tuple[Tensor, int]] = {}
        self._changed = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.backward:
            return self._tensor_backward(*args, **kwargs)
        if func is torch.autograd.backward:
            return self._autograd_backward(*args, **kwargs)
        if (generator := kwargs.get("generator")) is not None:
            self._replay.watch_generator(generator)
        if (places := _RUNNING_STATISTICS.get(func)) is not None:
            self._watch_running_statistics(places, args, kwargs)
        elif func is Tensor.add_:
            self._remember_counter(args[0])
        if self._again is None:
            return func(*args, **kwargs)
        self._again.look_for_checkpoint()
        return rerouting.call(func, types, args, kwargs, reroutes=self._again.reroutes)

    def _watch_running_statistics(self, places: tuple[int, int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for name, place in zip(("running_mean", "running_var"), places, strict=True):
            statistic = args[place] if place < len(args) else kwargs.get(name)
            if statistic is not None:
                self._replay.watch_buffer(statistic)
                if self._counter is not None:
                    self._replay.watch_buffer(*self._counter)
        self._counter = None

    def _remember_counter(self, tensor: Tensor) -> None:
        # A batch-norm layer counts with `num_batches_tracked.add_(1)` just before it calls F.batch_norm, which never
        # sees the counter. So the last integer that was added to belongs to the running statistics that come next.
        if tensor.dtype == torch.long and tensor.dim() == 0:
            self._counter = (tensor, tensor.detach().clone())

    def _tensor_backward(
        self,
        tensor: Tensor,
        gradient: Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> None:
        self._backward([tensor], [gradient], retain_graph or create_graph, inputs)

    def _autograd_backward(
        self,
        tensors: Any,
        grad_tensors: Any = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        grad_variables: Any = None,
        inputs: Any = None,
    ) -> None:
        losses = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        if grad_tensors is None:
            grad_tensors = [None] * len(losses)
        grad_outputs = [grad_tensors] if isinstance(grad_tensors, Tensor) else list(grad_tensors)
        self._backward(losses, grad_outputs, retain_graph or create_graph, inputs)

    def _backward(
        self, losses: list[Tensor], grad_outputs: list[Tensor | None], retain_graph: bool, inputs: Any
    ) -> None:
        if inputs is not None:
            raise ValueError(
                "backward(inputs=...) inside a GAM closure is not supported: GAM differentiates by the parameters that "
                "it was built with. Leave `inputs` out, or build GAM over those parameters only."
            )
        self.backward_called = True
        gradients = self._gradients.add(losses, grad_outputs, retain_graph=retain_graph)
        for param, gradient in zip(self._params, gradients, strict=True):
            if gradient is not None:
                self._hand_out(param, gradient)

    def _hand_out(self, param: Tensor, gradient: Tensor) -> None:
        # The closure may read .grad after backward(), and zero it; the step's own gradient must not change with it.
        self._changed |= self._is_changed(param)
        if param.grad is None:
            param.grad = gradient.clone()
        else:
            param.grad.add_(gradient)
        self._handed_out[id(param)] = (param.grad, param.grad._version)

    def _is_changed(self, param: Tensor) -> bool:
        if id(param) not in self._handed_out:
            return False
        handed_out, version = self._handed_out[id(param)]
        return param.grad is not handed_out or handed_out._version != version

    def warn(self) -> None:
        """Of what an ordinary closure expects of ``backward()`` and does not get."""
        # Zeroing .grad when all is done is harmless.
        if self._changed or any(param.grad is not None and self._is_changed(param) for param in self._params):
            warnings.warn(
                "the closure changed .grad after backward() (gradient clipping? zero_grad() between two backward() "
                "calls?). GAM differentiates the losses themselves and does not see that change. Clip the combined "
                "gradient instead, in optimizer.base_optimizer.register_step_pre_hook(...).",
                stacklevel=2,
            )
        # Not of inputs that require gradients: those come with gradient penalties, which differentiate by themselves.
        if others := [leaf for leaf in self._gradients.other_leaves if isinstance(leaf, nn.Parameter)]:
            shapes = ", ".join(str(tuple(leaf.shape)) for leaf in others[:3])
            warnings.warn(
                f"the closure's backward() reached {len(others)} parameters that GAM was not built with (shapes "
                f"{shapes}, …) and did not fill their .grad. Give them to GAM, freeze them with requires_grad_(False), "
                "or compute their gradients outside of the closure.",
                stacklevel=2,
            )
