"""GAM steps whose loss, gradient and Hessian-vector product come out of one graph that ``torch.compile`` has made."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from enum import Enum
from functools import partial
from itertools import count
from types import FunctionType
from typing import Any, Protocol

import torch
from torch import Tensor

from gam_fused.closures import Closure, SelfDifferentiating, attention_by_matrix_products, check_loss
from gam_fused.joint_graph import CannotCompile, Compiler, JointBackend, OtherParameters, Results, loss_marker
from gam_fused.replay import Replay

LossFunction = Callable[..., Any]

# A smaller last batch is one; what comes more often than that has a cause worth knowing.
_RECOMPILATIONS_UNWARNED = 2

_INDUCTOR = "inductor"
_CUDA_GRAPHS = "triton.cudagraphs"

_numbers = count()


class _TakesSteps(Protocol):
    def step(self, closure: Closure) -> Tensor: ...

    def _check_can_compile(self) -> None: ...


class Compiling:
    """An optimizer with compiled steps."""

    def compile(
        self: _TakesSteps,
        loss_fn: LossFunction,
        *,
        backend: str | Compiler = "inductor",
        mode: str | None = None,
        options: dict[str, Any] | None = None,
        dynamic: bool | None = None,
    ) -> CompiledStep:
        """A step whose loss and derivatives are computed in one graph by ``torch.compile``.

        Example::

            step = optimizer.compile(lambda x, y: criterion(model(x), y))
            for x, y in loader:
                loss = step(x, y)

        The steps are those of :meth:`step` with the same loss, up to rounding, with everything that it guarantees; the
        two may be mixed. Each pass runs the graph once: for the loss, its gradient and, where the step takes second
        derivatives, the Hessian-vector product. It is compiled in the first step, which may take minutes, and again
        when something changes that it depends on: see :attr:`CompiledStep.recompilations`. Dropout masks are the same
        in all passes of a step, but Inductor draws others than eager PyTorch unless ``options={"fallback_random":
        True}``. Buffers that the graph writes are found without ``model``.

        Args:
            loss_fn: of a mini-batch, in any arguments; returns the loss, one real number as a tensor of any float
                dtype. What ``torch.compile(fullgraph=True)`` can capture. It must not call ``backward()``; the sum of
                the losses of micro-batches is a loss. Modules that are under ``torch.compile`` already become part of
                the graph.
            backend: as for ``torch.compile``: a name or a function.
            mode: Inductor's, as for ``torch.compile``; one that captures CUDA graphs is refused.
            options: Inductor's, as for ``torch.compile``.
            dynamic: as for ``torch.compile``. By default the second size of batch makes a graph for all sizes.

        Raises:
            TypeError, ValueError: an argument is not as above.

        A step raises ``RuntimeError`` where there is no such graph, naming the cause, and ``TypeError`` or
        ``ValueError`` where ``loss_fn`` does not return a loss; never does it run without a graph. What a graph would
        leave out is an error, too: hooks on parameters (``Tensor.register_hook``), and the gradients of what tensors
        that are given to it have been computed from.
        """
        self._check_can_compile()
        return CompiledStep(self, loss_fn, backend=backend, mode=mode, options=options, dynamic=dynamic)

    def _check_can_compile(self) -> None:
        """Raise ``ValueError`` where the optimizer has an option that a compiled step has not."""


class _Kind(Enum):
    """Of graphs."""

    ONCE = "differentiated once"
    BY_LAYERS = "differentiated twice, on the layers of this package"
    BY_PYTORCH = "differentiated twice, on PyTorch's layers"


class CompiledStep:
    """What ``optimizer.compile`` returns: ``step(*batch)`` takes one step and returns the loss at θ, detached.

    Cannot be copied or pickled: checkpoints are the optimizer's and the model's.

    Attributes:
        graphs: how many graphs have been compiled so far, those no longer in use included.
        recompilations: why, for each graph that took the place of another, in the words of ``torch.compile``. A batch
            of another size is the usual cause. From the third on, each is a warning, too.
    """

    def __init__(
        self,
        optimizer: _TakesSteps,
        loss_fn: LossFunction,
        *,
        backend: str | Compiler,
        mode: str | None,
        options: dict[str, Any] | None,
        dynamic: bool | None,
    ) -> None:
        if not callable(loss_fn):
            raise TypeError(
                f"loss_fn must be a function of a mini-batch that returns its loss, got {loss_fn!r}; pass "
                "lambda x, y: criterion(model(x), y)."
            )
        compiler = _compiler(backend, mode, options)
        self.recompilations: list[str] = []
        self._optimizer = optimizer
        self._loss_fn = loss_fn
        self._losses = {kind: CompiledLoss(loss_fn, compiler, dynamic, self.recompilations, kind) for kind in _Kind}

    @property
    def graphs(self) -> int:  # noqa: D102  # above
        return sum(loss.graphs for loss in self._losses.values())

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Take one step on the loss ``loss_fn(*args, **kwargs)`` and return it at θ, detached."""
        known = len(self.recompilations)
        loss = self._optimizer.step(_OnBatch(self._loss_fn, self._losses, args, kwargs))
        for number, cause in enumerate(self.recompilations[known:], start=known + 1):
            if number > _RECOMPILATIONS_UNWARNED:
                warnings.warn(
                    f"the step has been compiled anew, for the {number}. time, which takes as long as the first one. "
                    f"The cause: {cause}. For batches of many sizes, dynamic=True makes one graph for all; drop_last "
                    "or padding makes them one size.",
                    stacklevel=2,
                )
        return loss

    def __reduce__(self) -> Any:
        raise TypeError(
            "a compiled step cannot be copied or pickled; copy or save the model and the optimizer, and compile a step "
            "with them: optimizer.compile(loss_fn)."
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__} of {type(self._optimizer).__name__} on {self._loss_fn!r}, {self.graphs} graphs"


class _OnBatch(SelfDifferentiating):
    """The compiled loss of one batch, as the closure of one step."""

    def __init__(
        self,
        loss_fn: LossFunction,
        losses: dict[_Kind, CompiledLoss],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self._loss_fn = loss_fn
        self._losses = losses
        self._args = args
        self._kwargs = kwargs

    def __call__(self) -> Any:
        return self._loss_fn(*self._args, **self._kwargs)

    def differentiate(
        self, params: Sequence[Tensor], replay: Replay, *, twice: bool, reroutes: bool
    ) -> tuple[Tensor, Results]:
        kind = _Kind.ONCE if not twice else _Kind.BY_LAYERS if reroutes else _Kind.BY_PYTORCH
        return self._losses[kind].differentiate(params, replay, self._args, self._kwargs)


class CompiledLoss:
    """A loss function and its derivatives, as ``torch.compile`` has compiled them for the batches seen so far.

    Args:
        loss_fn: returns a scalar loss.
        compiler: see :class:`JointBackend`.
        dynamic: see ``torch.compile``.
        recompilations: is told the cause of each.
        kind: what is wanted.
    """

    def __init__(
        self,
        loss_fn: LossFunction,
        compiler: Compiler,
        dynamic: bool | None,
        recompilations: list[str],
        kind: _Kind,
    ) -> None:
        self._loss_fn = loss_fn
        self._dynamic = dynamic
        self._log = _Log(recompilations)
        self._backend = JointBackend(
            compiler, self._log.compiled, twice=kind is not _Kind.ONCE, reroutes=kind is _Kind.BY_LAYERS
        )
        self._compiled = self._anew()

    @property
    def graphs(self) -> int:
        """How many there are, or have been."""
        return self._log.graphs

    def differentiate(
        self, params: Sequence[Tensor], replay: Replay, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Results]:
        """Loss, gradient and, perhaps, H g, by ``params``.

        Raises:
            RuntimeError: there is no such graph, or no second derivative of an operator.
            TypeError, ValueError: ``loss_fn`` returned something other than a real scalar that can be differentiated.
        """
        with self._backend.within(params, replay):
            self._log.cause = None
            try:
                return self._run(args, kwargs)
            except OtherParameters:
                self._log.cause = "other tensors have become the optimizer's parameters"
                self._compiled = self._anew()
            return self._run(args, kwargs)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Results]:
        import torch._dynamo.config
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        # Or a forward hook of a module, registered after it has been compiled, would not run.
        guards_hooks = torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)
        refusal: Exception | None = None
        loss: Any = None
        # The derivatives are in the graph, and attention's fused kernels have no second one.
        plain = attention_by_matrix_products() if self._backend.twice else nullcontext()
        try:
            with torch.enable_grad(), plain, guards_hooks:
                loss = self._compiled(*args, **kwargs)
        except _SwitchedOff:
            raise CannotCompile(
                "torch.compile would run it without compiling; it is switched off, by TORCHDYNAMO_DISABLE, "
                "torch._dynamo.config.disable or torch.compiler.set_stance()"
            ) from None
        except (TorchDynamoException, FailOnRecompileLimitHit, CannotCompile) as error:
            if (refusal := self._backend.refusal) is None:
                raise CannotCompile(_cause(error)) from error
        if refusal is not None:
            raise refusal
        check_loss(loss, needs_graph=False, name="what loss_fn returned")
        assert self._backend.results is not None
        return loss, self._backend.results

    def _anew(self) -> Callable[..., Any]:
        import torch._dynamo

        decorate = torch._dynamo.optimize(
            self._backend, nopython=True, dynamic=self._dynamic, guard_fail_fn=self._log.guard_failed
        )
        return decorate(_marking(self._loss_fn))


class _Log:
    """Counts graphs and collects why. Holds nothing that holds a graph: Dynamo keeps it where no collector looks."""

    def __init__(self, recompilations: list[str]) -> None:
        self.graphs = 0
        self.cause: str | None = None
        self._recompilations = recompilations

    def guard_failed(self, failure: Any) -> None:
        """Of a graph that there is, told newest first."""
        if self.cause is None:
            self.cause = failure.reason.splitlines()[0].partition(": ")[2].partition("  # ")[0].rstrip()

    def compiled(self) -> None:
        """A graph has been."""
        if self.graphs:
            self._recompilations.append(self.cause or "unknown to torch.compile")
        self.graphs += 1


class _SwitchedOff(Exception):
    """Dynamo has not captured the function, but let it run."""


def _marking(loss_fn: LossFunction) -> Callable[..., Any]:
    mark = loss_marker()

    def loss_of_batch(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            raise _SwitchedOff
        loss = loss_fn(*args, **kwargs)
        return mark(loss) if isinstance(loss, Tensor) else loss

    # Dynamo keeps graphs, and what it has learnt about sizes, with the code object: each function gets one of its own.
    code = loss_of_batch.__code__.replace(co_name=f"loss_of_batch_{next(_numbers)}")
    return FunctionType(code, loss_of_batch.__globals__, code.co_name, None, loss_of_batch.__closure__)


def _compiler(backend: str | Compiler, mode: str | None, options: dict[str, Any] | None) -> Compiler:
    """What ``torch.compile`` would take by these arguments."""
    if backend == _INDUCTOR:
        return _inductor(mode, options or {})
    if mode is not None or options is not None:
        raise ValueError(f"mode and options are those of backend='inductor'; leave them out for backend={backend!r}.")
    from torch._dynamo import lookup_backend
    from torch._dynamo.exc import InvalidBackend

    try:
        return lookup_backend(backend)
    except InvalidBackend:
        raise ValueError(
            f"backend must be one of torch._dynamo.list_backends(None) or a function, got {backend!r}."
        ) from None


def _inductor(mode: str | None, options: dict[str, Any]) -> Compiler:
    import torch._inductor

    modes: dict[str, dict[str, Any]] = torch._inductor.list_mode_options()
    if mode is not None and mode not in modes:
        raise ValueError(f"mode must be one of {', '.join(map(repr, modes))}, got {mode!r}.")
    options = {**(modes[mode] if mode is not None else {}), **options}
    if options.get(_CUDA_GRAPHS):
        raise ValueError(
            f"mode={mode!r} with options={options!r} captures CUDA graphs, whose results at θ the pass at θ_adv would "
            "overwrite; use mode='max-autotune-no-cudagraphs' or the default."
        )
    return partial(_compile_by_inductor, options={**options, _CUDA_GRAPHS: False})


def _compile_by_inductor(graph: Any, inputs: list[Any], *, options: dict[str, Any]) -> Callable[..., Any]:
    import torch._functorch.config

    # Its key would be a graph of one call, of a function that it cannot look into.
    with torch._functorch.config.patch(enable_autograd_cache=False):
        return torch._inductor.compile(graph, inputs, options=options)


def _cause(error: Exception) -> str:
    """What Dynamo says, in one line; the rest is in the exception that this becomes the cause of."""
    from torch._dynamo.exc import Unsupported

    if isinstance(error.__cause__, Unsupported):  # of the limit of recompilations
        error = error.__cause__
    inner = getattr(error, "inner_exception", error)
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()] or [""]
    said = lines[0].rstrip(".") if inner is error else f"{type(inner).__name__}: {lines[0]}".rstrip(".")
    for label in ("Developer debug context: ", "Explanation: "):
        said += "".join(f": {line.removeprefix(label)}".rstrip(".") for line in lines if line.startswith(label))
    return said
