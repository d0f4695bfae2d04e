"""An optimizer around another optimizer: one set of groups, one state, one checkpoint, all-or-nothing steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gam_fused import arguments, kernels
from gam_fused.ambient import Ambient
from gam_fused.interrupts import uninterrupted
from gam_fused.kernels.interface import Backend
from gam_fused.transaction import Transaction

StateDict = dict[str, Any]

_KEY = "gam_fused"


class OptimizerWrapper(Optimizer):
    """What GAM shares with any optimizer that moves parameters, differentiates there, and lets a base optimizer step.

    ``param_groups`` and ``state`` *are* the base optimizer's, so learning-rate schedulers may be given either, and a
    checkpoint moves between the wrapper and the plain base optimizer both ways: the wrapper's own numbers stand under
    one extra key that plain optimizers ignore, and hyper-parameters that a plain checkpoint lacks keep their values.

    Args:
        base_optimizer: steps from ``.grad``.
        hyperparameters: the wrapper's own per-group hyper-parameters and their defaults, each a number >= 0.
        backend: see :func:`gam_fused.kernels.resolve`.
        model: see :class:`gam_fused.GAM`.
    """

    evaluates_closure = True
    """Cannot be a base optimizer itself: those step from gradients."""

    keys: dict[str, str]
    """Where each of the wrapper's hyper-parameters stands in a param group: under its own name, unless the base
    optimizer has one of that name (RMSprop's ``alpha``, Adadelta's ``rho``); then under ``gam_alpha``, ``gam_rho``."""

    _pending: Any = None
    """A step whose first half is done, while the parameters stand at a moved point."""

    _running = False
    """A step is running closures, with the parameters at θ or at a moved point."""

    _skipped_last = False
    """The last step met something non-finite."""

    def __init__(
        self, base_optimizer: Optimizer, hyperparameters: dict[str, float], backend: str, model: nn.Module | None
    ) -> None:
        for name, value in hyperparameters.items():
            arguments.check_non_negative(name, value)
        self.keys = {name: f"gam_{name}" if name in base_optimizer.defaults else name for name in hyperparameters}
        own_defaults = {self.keys[name]: value for name, value in hyperparameters.items()}
        for number, group in enumerate(base_optimizer.param_groups):
            self._check_hyperparameters({**own_defaults, **group}, f"param group {number}")
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module or None, got {type(model)}.")
        self._wanted_backend = backend
        self._kernels: Backend = kernels.resolve(backend, _devices(base_optimizer.param_groups))
        self.model = model
        self.steps = 0
        self.metrics: dict[str, Tensor] = {}
        # Registers hooks and defaults. The groups it adds are the base's already: see the setters below.
        super().__init__(base_optimizer.param_groups, {**base_optimizer.defaults, **own_defaults})
        self.base_optimizer = base_optimizer
        self._complete_groups()
        self._watch_loading()
        self.metrics["skipped_steps"] = torch.zeros((), dtype=torch.int64, device="cpu")
        self._follow_devices()

    @classmethod
    def _checked_base(cls, optimizer: Any) -> Optimizer:
        """``optimizer``, or an error unless it has been built and can be a base optimizer."""
        if not isinstance(optimizer, Optimizer) or isinstance(optimizer, OptimizerWrapper):
            raise TypeError(f"optimizer must be a plain torch.optim.Optimizer, got {type(optimizer)}.")
        arguments.check_base_optimizer_class(type(optimizer), cls.__name__)
        arguments.listed_groups(optimizer.param_groups)
        return optimizer

    @property
    def backend(self) -> str:
        """The name of the back end in use."""
        return self._kernels.name

    # ------------------------------------------------------------------ one set of groups, one state

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's own list."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        # torch.optim.Optimizer.__init__ assigns an empty list before there is a base optimizer.
        if self._has_base:
            self.base_optimizer.param_groups = groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The base optimizer's own mapping."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        if self._has_base:
            self.base_optimizer.state = state

    @property
    def _has_base(self) -> bool:
        return "base_optimizer" in self.__dict__

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer, with the wrapper's hyper-parameters for it. All or nothing."""
        if not self._has_base:
            return
        self._refuse_within_step("add_param_group()")
        group = arguments.listed_group(param_group)
        arguments.check_no_repeats([*self.param_groups, group])
        self._check_hyperparameters({**self.defaults, **group}, "the new param group")
        self.base_optimizer.add_param_group(group)
        self._complete_groups()

    def _complete_groups(self) -> None:
        """Give every group the hyper-parameters it lacks; it may have been added to the base optimizer directly."""
        for group in self.param_groups:
            for key in self.keys.values():
                group.setdefault(key, self.defaults[key])

    def _check_hyperparameters(self, group: dict[str, Any], where: str) -> None:
        for key in self.keys.values():
            arguments.check_non_negative(key, group[key], where)

    def _trainable(self) -> tuple[list[Tensor], list[dict[str, Any]]]:
        """Every parameter that requires gradients, and the group of each."""
        pairs = [(param, group) for group in self.param_groups for param in group["params"] if param.requires_grad]
        return [param for param, _ in pairs], [group for _, group in pairs]

    # ------------------------------------------------------------------ all-or-nothing steps

    def _check_ready(self) -> None:
        """Raise if a step cannot begin: a schedule may have broken a hyper-parameter since the last one."""
        self._complete_groups()
        self._follow_devices()
        for number, group in enumerate(self.param_groups):
            self._check_hyperparameters(group, f"param group {number}")
            for index, param in enumerate(group["params"]):
                if getattr(param, "_post_accumulate_grad_hooks", None):
                    raise RuntimeError(
                        f"param group {number}, params[{index}] has a post-accumulate-grad hook, which never runs: "
                        f"{type(self).__name__} does not accumulate into .grad. Remove it; to change the combined "
                        "gradient, use optimizer.base_optimizer.register_step_pre_hook(...)."
                    )
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            world = torch.distributed.get_world_size()
            if world > 1:
                raise RuntimeError(
                    f"{type(self).__name__} does not average gradients over processes yet, and torch.distributed runs "
                    f"{world} of them: replicas would drift apart. Train in one process."
                )

    def _follow_devices(self) -> None:
        """Parameters may be moved, or groups added, after the optimizer was made."""
        devices = _devices(self.param_groups)
        self._kernels = kernels.resolve(self._wanted_backend, devices)
        if devices:
            self.metrics["skipped_steps"] = self.metrics["skipped_steps"].to(devices[0])

    def _refuse_while_running(self, what: str) -> None:
        if self._running:
            raise RuntimeError(f"{what} within a closure of the same optimizer; call it after step() has returned.")

    def _refuse_within_step(self, what: str) -> None:
        self._refuse_while_running(what)
        if self._pending is not None:
            raise RuntimeError(
                f"{what} between first_step() and second_step(), while the parameters stand at the adversarial point; "
                "call second_step(loss_adv) to finish the step, or cancel_step() to return to θ."
            )

    @contextmanager
    def _all_or_nothing(self, transaction: Transaction) -> Iterator[None]:
        ambient = Ambient()  # of this call: the second half of a step may run under other modes than the first
        try:
            try:
                yield
            except BaseException:  # KeyboardInterrupt and SystemExit included
                self._undo(ambient, transaction)
                raise
        except BaseException:
            self._undo(ambient, transaction)  # once more: Ctrl-C may have come as the first one began
            raise

    def _undo(self, ambient: Ambient, transaction: Transaction) -> None:
        with uninterrupted():
            ambient.restore()
            self._pending, self._running = None, False
            transaction.roll_back()

    def _step_base(self, transaction: Transaction, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        """Let the base optimizer step along ``grads``; every other parameter is left alone. Then nothing rolls back."""
        self.base_optimizer.zero_grad(set_to_none=True)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        # Before the base optimizer steps: what its hooks draw, or write into buffers, stays.
        transaction.replay.finish()
        self._running = False
        versions = [param._version for param in params]
        try:
            self.base_optimizer.step()
        except BaseException:
            # Raised by a hook after the update: there is no way back, so the step counts as made.
            if any(param._version != version for param, version in zip(params, versions, strict=True)):
                self._commit(transaction)
            raise
        self._commit(transaction)

    def _commit(self, transaction: Transaction) -> None:
        transaction.commit()
        self.steps += 1
        self._skipped_last = False

    def _finish_replay(self, transaction: Transaction, has_stepped: Tensor | None = None) -> None:
        """Before a launch steps in the base optimizer's place: afterwards nothing may fail.

        If a device tensor is given, the launch steps where that is true, and buffers follow it without the host knowing
        which way. Random states go on either way: those of devices could follow, those of the host could not, and both
        passes of a step have to see one function.
        """
        if has_stepped is None:
            transaction.replay.finish()
        else:
            transaction.replay.finish_where(has_stepped)

    def _commit_fused(self, transaction: Transaction, skipped_steps: Tensor | None = None) -> None:
        """A launch has stepped, or may have: then ``skipped_steps`` is the count, on the device."""
        if skipped_steps is not None:
            self.metrics["skipped_steps"] = skipped_steps
        self._running = False
        self._commit(transaction)

    def _skip(self, transaction: Transaction) -> None:
        """Leave everything as it was, and count.

        Where the step before was skipped too, the random states advance: a closure that draws its own data must not be
        given the same draw for ever.
        """
        transaction.roll_back()
        if self._skipped_last:
            transaction.replay.finish_random_states()
        self.metrics["skipped_steps"] += 1
        self.steps += 1
        self._skipped_last, self._running = True, False

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> StateDict:
        """The base optimizer's state dict, and the wrapper's own numbers under one extra key."""
        self._refuse_within_step("state_dict()")
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state_dict = self.base_optimizer.state_dict()
        state_dict[_KEY] = {
            "steps": self.steps,
            "skipped_steps": self.metrics["skipped_steps"].clone(),
            "skipped_last": self._skipped_last,
            **self._further_state(),
        }
        for after in self._optimizer_state_dict_post_hooks.values():
            if (changed := after(self, state_dict)) is not None:
                state_dict = changed
        return state_dict

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state dict of this optimizer or of the plain base optimizer. Raises before anything has changed."""
        self._refuse_within_step("load_state_dict()")
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            if (changed := before(self, state_dict)) is not None:
                state_dict = changed
        own = state_dict.pop(_KEY, {"steps": 0, "skipped_steps": 0, "skipped_last": False})
        steps, skipped, skipped_last = int(own["steps"]), int(own["skipped_steps"]), bool(own["skipped_last"])
        self._check_further_state(own)

        self.base_optimizer.load_state_dict(state_dict)
        self.steps = steps
        self.metrics["skipped_steps"].fill_(skipped)
        self._skipped_last = skipped_last
        self._load_further_state(own)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _further_state(self) -> StateDict:
        """What a kind of wrapper adds to its own numbers."""
        return {}

    def _check_further_state(self, own: StateDict) -> None:
        """Raise ``ValueError`` where the same cannot be loaded."""

    def _load_further_state(self, own: StateDict) -> None:
        """The same, of a state dict that may be older than what is added, or that of a plain base optimizer."""

    def _watch_loading(self) -> None:
        # Not a method of self, which would tie both optimizers into a reference cycle.
        self.base_optimizer.register_load_state_dict_pre_hook(partial(_keep_hyperparameters, self.keys.values()))

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_within_step("copying or pickling")
        # Like torch's own optimizers, without hooks; a back end is found again by name.
        # Nor with `step`, which LR schedulers replace by a function that steps this very object.
        state = {name: value for name, value in self.__dict__.items() if not name.startswith("_") and name != "step"}
        return {**state, "backend": self._wanted_backend, "_skipped_last": self._skipped_last}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._wanted_backend = state.pop("backend")
        self._kernels = kernels.resolve(self._wanted_backend)  # for now; where parameters are, a step looks
        super().__setstate__(state)
        self._watch_loading()

    def __repr__(self) -> str:
        return super().__repr__().replace(type(self).__name__, self._header(), 1)

    def _header(self) -> str:
        return f"{type(self).__name__} around {type(self.base_optimizer).__name__}, back end {self.backend}"


def _devices(groups: Iterable[dict[str, Any]]) -> list[torch.device]:
    """Of all parameters, each once, the first one's first."""
    return list(dict.fromkeys(param.device for group in groups for param in group["params"]))


def _keep_hyperparameters(keys: Iterable[str], base_optimizer: Optimizer, state_dict: StateDict) -> StateDict:
    """Runs whenever the base optimizer loads: what a plain checkpoint lacks stays as it is, what is wrong raises."""
    groups = [dict(group) for group in state_dict["param_groups"]]
    for number, (group, present) in enumerate(zip(groups, base_optimizer.param_groups, strict=False)):
        for key in keys:
            if key not in group and key in present:
                group[key] = present[key]
            if key in group:
                arguments.check_non_negative(key, group[key], f"param group {number} of the state dict")
    return {**state_dict, "param_groups": groups}
