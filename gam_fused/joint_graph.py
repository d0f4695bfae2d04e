"""One graph of a loss, its gradient and the Hessian-vector product with it, out of a graph of the loss alone.

``torch.compile`` has two halves. Dynamo captures what Python computes of tensors in a graph; a backend (Inductor, say)
compiles that. Between the two stands :class:`JointBackend`, which wraps the captured graph in a function that
differentiates its loss, twice if need be, and hands that to the backend: it sees a graph without autograd, in which it
may fuse all three.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.fx import Graph, GraphModule

from gam_fused.closures import check_loss
from gam_fused.derivatives import Gradients, owned
from gam_fused.interrupts import uninterrupted
from gam_fused.replay import Replay
from gam_fused.second_order.in_graphs import LayersInGraphs
from gam_fused.written_parameters import RefusingWrites, WritesParameter

Compiler = Callable[[GraphModule, list[Any]], Callable[..., Any]]

# Higher-order operators that are their body, as far as values and derivatives go: the checkpoints of torch.utils.
_CHECKPOINTS = frozenset(("tag_activation_checkpoint", "wrap_activation_checkpoint"))


class CannotCompile(RuntimeError):
    """Loss and derivatives cannot be had in one graph.

    Args:
        cause: says why.
    """

    def __str__(self) -> str:
        return (
            f"torch.compile cannot make one graph of this loss and its derivatives: {self.args[0]}. Change that, or "
            "take the step without a graph: optimizer.step(lambda: loss_fn(*batch))."
        )


class OtherParameters(Exception):
    """Where the optimizer's parameters stood when a graph was compiled stand other tensors, or the other way round."""


class Results:
    """What one run of a graph has found.

    Args:
        total: see :class:`~gam_fused.derivatives.Differentiated`.
        hvps: H · ``total`` for each, or ``None`` if the graph was made to be differentiated once.
    """

    def __init__(self, total: Sequence[Tensor | None], hvps: list[Tensor | None] | None) -> None:
        self.total = total
        self._hvps = hvps

    def hvp(self, indices: Sequence[int], vectors: Sequence[Tensor]) -> list[Tensor]:
        """H v for the parameters at ``indices``; v has to be the gradient, zero where there is none. Once."""
        hvps, self._hvps = self._hvps, None
        assert hvps is not None
        if others := {i for i, grad in enumerate(self.total) if grad is not None} - set(indices):
            raise RuntimeError(
                f"the loss depends on parameter {min(others)} at the adversarial point and did not at θ, so that the "
                "compiled Hessian-vector product takes more into account than the step does; take this step by "
                "optimizer.step(closure)."
            )
        found = [hvps[i] for i in indices]
        return [torch.zeros_like(v) if h is None else h for h, v in zip(found, vectors, strict=True)]


@cache
def loss_marker() -> Callable[[Tensor], Tensor]:
    """The identity, for a captured function to mark its loss with: outputs of a graph come in any order."""
    return torch.compiler.allow_in_graph(_the_loss)


def _the_loss(loss: Tensor) -> Tensor:
    return loss.view_as(loss)


class JointBackend:
    """A backend of ``torch.compile`` for a function that returns ``loss_marker()(loss)``.

    Call the compiled function :meth:`within` a step, and ask for the :attr:`results` afterwards.

    Args:
        compiler: a backend, which compiles the joint graph.
        on_compile: called for each graph that has been compiled.
        twice: whether second derivatives are wanted.
        reroutes: whether those are to come from this package's layers, where that pays.
    """

    def __init__(self, compiler: Compiler, on_compile: Callable[[], None], *, twice: bool, reroutes: bool) -> None:
        self.twice = twice
        self._reroutes = reroutes
        self.parameters: dict[int, int] = {}
        """By ``id`` of each parameter to differentiate by, its place in the results."""
        self.replay: Replay | None = None
        self.results: Results | None = None
        self.refusal: Exception | None = None
        """What was wrong with the loss, as it was raised: what passes through a compiler becomes another exception."""
        self._compiler = compiler
        self._on_compile = on_compile

    @contextmanager
    def within(self, params: Sequence[Tensor], replay: Replay) -> Iterator[None]:
        """Where graphs differentiate by ``params``, and tell ``replay`` of buffers before they write them."""
        self.parameters = {id(param): i for i, param in enumerate(params)}
        self.replay = replay
        try:
            yield
        finally:
            self.parameters, self.replay, self.results, self.refusal = {}, None, None, None

    def __call__(self, captured: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        """``captured``, which leaves derivatives behind when it runs."""
        try:
            _return_loss_last(captured)
            for module in captured.modules():
                if isinstance(module, GraphModule):
                    _simplify(module, twice=self.twice)
            if next(captured.parameters(), None) is not None:
                raise CannotCompile(
                    "the captured graph holds parameters instead of being given them; set "
                    "torch._dynamo.config.inline_inbuilt_nn_modules to True, as it is by default"
                )
        except (CannotCompile, TypeError) as error:
            self.refusal = error
            raise
        compiled = _JointGraph(self, captured, inputs, self._compiler)
        self._on_compile()  # only now: Dynamo may start again from scratch
        return compiled

    def differentiate(self, captured: GraphModule, found: _Found, *inputs: Any) -> list[Tensor]:
        """What the joint graph computes: the outputs of ``captured`` but its last, g, and H g.

        By inputs at ``found.places``; zeros where there is no gradient.
        """
        leaves = [x.detach().requires_grad_() if isinstance(x, Tensor) and x.requires_grad else x for x in inputs]
        params = [leaves[i] for i in found.places]
        # A compiler looks for anomalies to learn which line an operator came from; an error would be a warning as well.
        with torch.enable_grad(), torch.autograd.set_detect_anomaly(False):
            layers = LayersInGraphs(reroutes=self._reroutes) if self.twice else nullcontext()
            try:
                with layers, RefusingWrites(dict(zip(found.numbers, params, strict=True))):
                    *outputs, loss = captured(*leaves)
            except WritesParameter as error:
                self.refusal = CannotCompile(str(error))  # and another than is raised, to which a compiler adds text
                raise CannotCompile(str(error)) from error
            found.same = [next((i for i, leaf in enumerate(leaves) if leaf is output), None) for output in outputs]
            try:
                check_loss(loss, needs_graph=True, name="what loss_fn returned")
                gradients = Gradients(params, create_graph=True)
                gradients.add([loss], [None])
                found.given = [grad is not None for grad in gradients.total]
                grads = [torch.zeros_like(p) if g is None else g for p, g in zip(params, gradients.total, strict=True)]
                hvps = gradients.hvp(range(len(params)), grads) if self.twice else []
            except Exception as error:
                self.refusal = error
                raise CannotCompile(str(error)) from error
        return [result.detach() for result in (*outputs, *grads, *hvps)]


@dataclass
class _Found:
    """What only tracing shows."""

    places: list[int]
    """Of the optimizer's parameters among the inputs."""
    numbers: list[int]
    """Which parameter each of them is."""
    given: list[bool] = field(default_factory=list)
    """Whether each of them has a gradient."""
    same: list[int | None] = field(default_factory=list)
    """Which input each output *is*: to a captured function, a buffer that it writes is what it was bound to before."""


class _JointGraph:
    """What takes the place of a captured graph: the same inputs and outputs, and derivatives on the side."""

    def __init__(self, backend: JointBackend, captured: GraphModule, inputs: list[Any], compiler: Compiler) -> None:
        self._backend = backend
        places = _places(inputs, backend.parameters)
        self._found = _Found(places, [backend.parameters[id(inputs[i])] for i in places])
        self._outputs = len(_outputs(captured)) - 1
        self._written: list[int] | None = None
        """Which inputs the graph writes into, once it has run."""
        differentiate = partial(backend.differentiate, captured, self._found)
        count = self._outputs + len(self._found.places) * (2 if backend.twice else 1)
        with torch.no_grad():
            self._compiled = compiler(_calling(differentiate, captured, count), inputs)

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        backend = self._backend
        if _places(inputs, backend.parameters) != self._found.places:
            raise OtherParameters
        try:
            _check_beginnings(inputs, backend.parameters)
        except CannotCompile as error:
            backend.refusal = error
            raise
        with torch.no_grad():
            values = self._run_telling_replay(inputs)
        outputs, n = self._outputs, len(self._found.places)
        backend.results = Results(
            self._by_parameter(inputs, values[outputs : outputs + n]),
            self._by_parameter(inputs, values[outputs + n :]) if backend.twice else None,
        )
        return [value if i is None else inputs[i] for value, i in zip(values[:outputs], self._found.same, strict=True)]

    def _by_parameter(self, inputs: Sequence[Any], values: Sequence[Tensor]) -> list[Tensor | None]:
        parameters = self._backend.parameters
        found: list[Tensor | None] = [None] * len(parameters)
        for i, value, given in zip(self._found.places, values, self._found.given, strict=True):
            if given:
                param = inputs[i]
                # Twice differentiated, the step sees to it; else it is used, or written to, as it is.
                (own,) = [value] if self._backend.twice else owned([value], [param])
                found[parameters[id(param)]] = own
        return found

    def _run_telling_replay(self, inputs: Sequence[Any]) -> Sequence[Any]:
        replay = self._backend.replay
        assert replay is not None
        if self._written is not None:
            for i in self._written:
                replay.watch_buffer(inputs[i])
            return self._compiled(*inputs)
        with uninterrupted():
            return self._run_first(inputs, replay)

    def _run_first(self, inputs: Sequence[Any], replay: Replay) -> Sequence[Any]:
        """Run the graph and look which inputs it has written. Only those are buffers, and can be written at all."""
        others = [(i, x) for i, x in enumerate(inputs) if i not in self._found.places and _may_be_written(x)]
        before = {i: (x, x._version, x.detach().clone()) for i, x in others}
        written = []
        try:
            values = self._compiled(*inputs)
        finally:
            for i, (x, version, value) in before.items():
                if x._version != version or not _same(x, value):
                    written.append(i)
                    replay.watch_buffer(x, value)
        self._written = written
        return values


def _places(inputs: Sequence[Any], parameters: dict[int, int]) -> list[int]:
    return [i for i, value in enumerate(inputs) if id(value) in parameters]


def _check_beginnings(inputs: Sequence[Any], parameters: dict[int, int]) -> None:
    """Raise where derivatives would go on, or be changed, beyond the graph."""
    for value in inputs:
        if not isinstance(value, Tensor):
            continue
        if value._backward_hooks and (number := parameters.get(id(value))) is not None:
            raise CannotCompile(f"parameter {number} has a hook (Tensor.register_hook), which a graph does not run")
        if value.grad_fn is not None:
            raise CannotCompile(
                f"a tensor of shape {tuple(value.shape)} that it uses has been computed, outside of it, from something "
                "that requires gradients, which a graph would not get (detach() it if it need not)"
            )


def _may_be_written(value: Any) -> bool:
    return (
        isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested and not value.is_inference()
    )


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether all bits are; what is written through ``.data`` has no new version."""
    return torch.equal(_bits(one), _bits(other))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def _outputs(captured: GraphModule) -> Sequence[Any]:
    (output,) = captured.graph.output_node().args
    assert isinstance(output, Sequence)
    return output


def _return_loss_last(captured: GraphModule) -> None:
    """Append the marked loss to the outputs."""
    marked = [node for node in captured.graph.nodes if node.target is loss_marker()]
    if not marked:
        raise TypeError(
            "what loss_fn returned must be the scalar loss tensor, got something else; end it with `return loss`."
        )
    captured.graph.output_node().args = ((*_outputs(captured), marked[0].args[0]),)
    captured.recompile()


def _calling(function: Callable[..., Any], captured: GraphModule, count: int) -> GraphModule:
    """A graph with the inputs of ``captured`` that calls ``function``, which returns ``count`` tensors."""
    graph = Graph()
    inputs = []
    for node in captured.graph.nodes:
        if node.op == "placeholder":
            inputs.append(graph.placeholder(node.name))
            inputs[-1].meta = dict(node.meta)

    def joint(*values: Any) -> list[Tensor]:  # a graph wants a plain function
        return function(*values)

    results = graph.call_function(joint, tuple(inputs))
    graph.output(tuple(graph.call_function(operator.getitem, (results, i)) for i in range(count)))
    return GraphModule({}, graph)


def _simplify(captured: GraphModule, *, twice: bool) -> None:
    """Take checkpoints away, and see to it that what is left can be differentiated twice if it has to be."""
    for node in captured.graph.nodes:
        if not isinstance(node.target, HigherOrderOperator):
            continue
        if (name := node.target.name()) in _CHECKPOINTS:
            # In a graph with second derivatives there is no one moment to compute its body again: PyTorch refuses to,
            # or does not.
            node.target = _run_body
        elif twice:
            # It has a derivative of its own, whose derivative need not be right: where a torch.autograd.Function was
            # captured, what it saves counts as constant.
            described = "a torch.autograd.Function" if name == "autograd_function_apply" else f"the operator {name}"
            raise CannotCompile(f"{described} has no second derivative in a graph")
    captured.recompile()


def _run_body(body: Callable[..., Any], *args: Any, **options: Any) -> Any:
    return body(*args)
