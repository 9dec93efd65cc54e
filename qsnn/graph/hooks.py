"""What layers saw and gave while a block runs; the only place where forward hooks are set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

See = Callable[[str, nn.Module, "tuple[Any, ...]", Any], Any]
"""(name, module, inputs, output), after a call of the module; what it returns, unless None, replaces the output."""


@contextmanager
def watching(modules: Mapping[str, nn.Module], see: See) -> Iterator[None]:
    """Call ``see(name, module, inputs, output)`` after every call of one of these modules, while the block runs.

    Args:
        modules: what is watched, by the name that ``see`` is told.
        see: may only look, and return None; or return what takes the place of the output.
    """

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
        return lambda module, inputs, output: see(name, module, inputs, output)

    with ExitStack() as handles:
        for name, module in modules.items():
            handles.callback(module.register_forward_hook(hook_of(name)).remove)
        yield


@contextmanager
def recorded(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Collect by name what these modules give out while the block runs; of several calls the last."""
    found: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        found[name] = output

    with watching(modules, keep):
        yield found


@contextmanager
def recorded_inputs(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Collect by name the first input of these modules while the block runs; of several calls the last."""
    found: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        found[name] = inputs[0]

    with watching(modules, keep):
        yield found
