"""The user's model as the verbs take it: unwrapped, plain parameters, float32; and its own training flags kept."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm
from torch.optim.swa_utils import AveragedModel

from qsnn.graph.recipe import recipe_of, set_recipe

WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
"""Modules that only run the one inside, as their ``module``; torch.compile's keeps it as ``_orig_mod``."""
_FROZEN = "qsnn_frozen"
"""Attribute of a batch norm that its owner had frozen; copies keep it."""
_OURS = ("qsnn.snn", "qsnn.folded")
"""Networks of these rooms choose their own precision: integers in float64 are exact."""


class QsnnWarning(UserWarning):
    """Something was taken otherwise than it came; the text says what, and how to have it otherwise."""


def arrived(model: nn.Module) -> nn.Module:
    """Return the model as the verbs take it; the argument is not changed.

    ``nn.DataParallel``, ``DistributedDataParallel``, ``AveragedModel`` and ``torch.compile`` are taken off, wherever
    they stand. Pruned and parametrized weights (``torch.nn.utils.prune``, weight norm, spectral norm) become plain ones
    of the same value. Other precisions become float32, which is said. Training flags, statistics and the recipe stay.

    Args:
        model: a float network, or one of qsnn's own.
    Returns:
        The model itself where there is nothing to do, else a copy.
    Raises:
        TypeError: not a module, or one that torch.jit or torch.export has made.
        ValueError: parameters without values (lazy ones, the meta device).
    """
    if not isinstance(model, nn.Module):
        hint = "build the network, then load_state_dict" if isinstance(model, Mapping) else "pass the network itself"
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}; {hint}")
    modules = list(model.modules())
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"{name or 'the model'} was compiled by torch.jit, which leaves no layers to see; pass the nn.Module "
                f"it was made from: build it and call load_state_dict(scripted.state_dict())"
            )
    if "inline_constraints" in getattr(model, "meta", {}):
        raise TypeError(
            "the model was exported by torch.export, which keeps operators and no layers; pass the nn.Module it was "
            "made from: build it and call load_state_dict(exported.state_dict())"
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor) or tensor.is_meta:
            raise ValueError(f"{name} holds no values yet; run the network once on an image, or load its weights")
    dtypes = _other_dtypes(model)
    if not (dtypes or any(_inside(module) is not None or _reparametrized(module) for module in modules)):
        return model
    new = _copy(model)
    for module in new.modules():
        _plain_(module)
    to_float32_(new)
    if recipe_of(model):  # a torch.fx graph drops it when it is copied
        set_recipe(new, recipe_of(model))
    return new


def to_float32_(model: nn.Module) -> None:
    """Turn a float network of another precision into float32, in place, and say so; for training in place."""
    dtypes = _other_dtypes(model)
    if dtypes:
        warnings.warn(f"a model of {', '.join(dtypes)} runs in float32", QsnnWarning, stacklevel=4)
        model.float()


def refuse_state(model: nn.Module, verb: str, *, numbers: bool = True) -> None:
    """Refuse what would make a network of nonsense, or fail much later: numbers, modes and dtypes, before the work.

    Args:
        model: as it arrived.
        verb: what is to be made of it.
        numbers: whether its numbers are looked at too.
    Raises:
        ValueError: NaN or infinity in a parameter or a statistic, inference mode, or another default dtype.
    """
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        counts = isinstance(value, nn.Parameter) or name.rpartition(".")[2].startswith("running_")
        if numbers and counts and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(f"cannot {verb} a network with NaN or infinity in {name}; train it again, or load others")
    if torch.is_inference_mode_enabled():
        raise ValueError(f"cannot {verb} in torch.inference_mode(), whose tensors cannot be trained; call it outside")
    if torch.get_default_dtype() != torch.float32:
        raise ValueError(
            f"expected torch's default dtype float32, got {torch.get_default_dtype()}; call "
            f"torch.set_default_dtype(torch.float32) before {verb}"
        )


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Run a block with the models in eval mode; afterwards each module has its own training flag again.

    ``model.train(was_training)`` would wake batch norms that their owner had frozen.
    """
    flags = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def training_flags(model: nn.Module) -> dict[str, bool]:
    """Return each module's own training flag, by name; the model itself is ""."""
    return {name: module.training for name, module in model.named_modules()}


def set_training_flags_(model: nn.Module, flags: Mapping[str, bool]) -> None:
    """Set each module's own training flag, in place; a module that has no entry takes that of the module around it.

    Args:
        model: the same network, or a copy in which layers were replaced or added.
        flags: from :func:`training_flags`.
    """
    for name, module in model.named_modules():
        while name not in flags and name:
            name = name.rpartition(".")[0]
        module.training = flags.get(name, module.training)


def frozen_norms(model: nn.Module) -> list[str]:
    """Return the names of the batch norms that were frozen on purpose.

    Those are in eval mode while their holder is in training mode. The flag of the model itself says nothing: a wrapper
    is in training mode when it is made, whatever it wraps. Where all is in eval mode, those that
    :func:`mark_frozen_norms_` has seen frozen are.
    """
    return [
        name for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) and not module.training
        and (model.get_submodule(name.rpartition(".")[0]).training or getattr(module, _FROZEN, False))
    ]  # fmt: skip


def mark_frozen_norms_(model: nn.Module) -> list[str]:
    """Do what :func:`frozen_norms` does, and mark them, so that they are found again when all is in eval mode.

    A network that was trained or loaded is; copies, and what the verbs make of it, keep the marks. One that is put into
    training mode loses its mark the next time.
    """
    frozen = frozen_norms(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.__dict__[_FROZEN] = name in frozen
    return frozen


def _inside(module: nn.Module) -> nn.Module | None:
    """What a wrapper runs, None for any other module."""
    if isinstance(module, WRAPPERS):
        return module.module
    inner = module.__dict__.get("_modules", {}).get("_orig_mod")
    return inner if type(module).__name__ == "OptimizedModule" else None


def _copy(model: nn.Module) -> nn.Module:
    """A copy without wrappers. What autograd computed (a pruned weight) cannot be copied as such: its value is."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    for module in reversed(list(model.modules())):  # from the inside out; deepcopy asks the memo first
        inner = _inside(module)
        if inner is not None:
            memo[id(module)] = copy.deepcopy(inner, memo)
    new: nn.Module = copy.deepcopy(model, memo)
    for module in new.modules():
        if hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable"):
            del module.__dict__["forward"]  # it is the compiled form of the method of the module that was copied
    return new


def _hooks(module: nn.Module) -> list[Any]:
    return [*module._forward_pre_hooks.values()]


def _reparametrized(module: nn.Module) -> bool:
    return bool(_computed(module)) or any(
        isinstance(hook, WeightNorm | SpectralNorm | prune.BasePruningMethod) for hook in _hooks(module)
    )


def _computed(module: nn.Module) -> list[str]:
    """The names of what is computed in the place of a parameter, but by our own: low-precision weights of networks from
    scratch are part of what these are."""
    if not parametrize.is_parametrized(module):
        return []
    made: Any = module.parametrizations
    return [name for name, steps in made.items() if not all(type(s).__module__.startswith("qsnn.") for s in steps)]


def _plain_(module: nn.Module) -> None:
    """Put the value of each computed parameter in its place, in place."""
    for hook in reversed(_hooks(module)):  # the last one that was put on is the outermost
        if isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)
        elif isinstance(hook, WeightNorm | SpectralNorm):
            parts = [f"{hook.name}{ending}" for ending in ("_g", "_v", "_orig")]
            trained = any(module._parameters[part].requires_grad for part in parts if part in module._parameters)  # type: ignore[union-attr]
            remove: Any = remove_weight_norm if isinstance(hook, WeightNorm) else remove_spectral_norm
            remove(module, hook.name)
            loading = module._load_state_dict_pre_hooks  # torch wraps the hook, and does not find it again
            for key, wrapped in list(loading.items()):
                if isinstance(getattr(wrapped, "hook", wrapped), SpectralNormLoadStateDictPreHook):
                    del loading[key]
            getattr(module, hook.name).requires_grad_(trained)
    if _computed(module):
        flag, own = module.training, type(module)
        # torch gives a parametrized module a class of its own, which a copy shares, and takes properties off that class
        body = {name: value for name, value in vars(own).items() if name not in ("__dict__", "__weakref__")}
        module.__class__ = type(own.__name__, own.__bases__, body)
        module.eval()  # a spectral norm moves its vectors whenever it is asked in training mode
        for name in _computed(module):
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        module.train(flag)


def _other_dtypes(model: nn.Module) -> list[str]:
    if any(type(module).__module__.startswith(_OURS) for module in model.modules()):
        return []
    found = {p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype != torch.float32}
    return sorted(str(dtype).removeprefix("torch.") for dtype in found)
