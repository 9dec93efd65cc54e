"""What layers saw and gave while a block runs; the only place where forward hooks are set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Watcher = Callable[[str, Any, Any, Any], Any]
"""(name, module, positional inputs, output) -> None, or what takes the output's place."""


@contextmanager
def watching(modules: dict[str, nn.Module], watcher: Watcher) -> Iterator[None]:
    """Call ``watcher`` after each call of these modules while the block runs."""

    def hook(name: str) -> Any:
        return lambda module, args, output: watcher(name, module, args, output)

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recorded(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Collect what these modules give out while the block runs; of several calls the last."""
    found: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        found[name] = output

    with watching(modules, keep):
        yield found


@contextmanager
def recorded_inputs(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Collect the first input of these modules while the block runs; of several calls the last."""
    found: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, args: Any, output: Any) -> None:
        found[name] = args[0]

    with watching(modules, keep):
        yield found
