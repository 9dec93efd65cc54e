"""graph/hooks.py: a block sees what layers saw and gave, and leaves no hook behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from qsnn.graph.hooks import recorded, recorded_inputs, watching


@pytest.fixture
def net() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Identity())


def hooks(net: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in net.modules())


def test_watching_changes_nothing_and_leaves_nothing(net: nn.Sequential) -> None:
    x, seen = torch.tensor([[-1.0, 2.0]]), []
    with watching(dict(net.named_children()), lambda name, *_: seen.append(name)):
        assert torch.equal(net(x), x.relu())
        assert hooks(net) == 3
    assert hooks(net) == 0 and seen == ["0", "1", "2"]
    with pytest.raises(RuntimeError, match="stop"), watching({"1": net[1]}, lambda *_: None):
        raise RuntimeError("stop")
    assert hooks(net) == 0


def test_what_a_watcher_returns_replaces_the_output(net: nn.Sequential) -> None:
    def doubled(name: str, module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return 2 * output

    with watching({"1": net[1]}, doubled):
        assert net(torch.tensor([[-1.0, 2.0]])).tolist() == [[0.0, 4.0]]


def test_inputs_and_outputs_of_the_last_call(net: nn.Sequential) -> None:
    with recorded_inputs({"relu": net[1]}) as inputs, recorded({"relu": net[1]}) as outputs:
        net(torch.tensor([[5.0]]))
        net(torch.tensor([[-3.0]]))
    assert inputs["relu"].tolist() == [[-3.0]] and outputs["relu"].tolist() == [[0.0]]
