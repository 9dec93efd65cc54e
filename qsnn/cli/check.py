"""The command ``qsnn check``: what becomes of a network of one's own, in seconds, without training."""

from __future__ import annotations

from pathlib import Path

import tyro

from qsnn.cli.inputs import load_trained_
from qsnn.cli.inputs import model_options as options_of
from qsnn.data.memory import limit_memory
from qsnn.data.sources import load_data
from qsnn.measure.check import check as run_check
from qsnn.models.create import create_fitting
from qsnn.options import TaskName
from qsnn.quant.quantize import QuantizeConfig
from qsnn.training.processes import start


def check(
    model: str,
    data: str = "digits",
    model_options: tuple[str, ...] = (),
    weights: Path | None = None,
    key: str | None = None,
    task: TaskName | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    frames: int | None = None,
    timesteps: int = 2,
    seconds: float = 10.0,
    data_root: Path | None = None,
    device: str | None = None,
    memory: str | None = None,
    config: tyro.conf.OmitArgPrefixes[QuantizeConfig] = QuantizeConfig(),  # noqa: B008
) -> None:
    """Show what becomes of every layer of a network, its accuracy as loaded, and how long training will take.

    Args:
        model: Name of the network, or your own as package.module:function.
        data: Data set by name, or a folder of images.
        model_options: Options of the network, each as NAME=VALUE, like attention=channel.
        weights: Trained float weights.
        key: Which weights, where the file holds several: a dictionary's key ("ema"), or the front of the names.
        task: What the network is asked; default found from the labels and the answers.
        mean: Subtracted from each channel, of pixels on [0, 1]; default the data set's own.
        std: Each channel is divided by it; default the data set's own.
        frames: Frames of a recording of an event set, one for each time step; default 2.
        timesteps: Time steps T of the student.
        seconds: How long the accuracy may take; test images that do not fit in are left out.
        data_root: Folder of the data sets; default $QSNN_DATA.
        device: cpu, cuda or cuda:1; default a GPU where there is one.
        memory: What the images of one batch may take, like 512M or 4G; default 1G.
        config: Precision.
    """
    limit_memory(memory)
    place = start(device)
    found = load_data(data, root=data_root, timesteps=frames, mean=mean, std=std)
    network, found = create_fitting(model, found, **options_of(model_options))
    load_trained_(network, weights, key)
    result = run_check(network.to(place).eval(), found, config, timesteps=timesteps, seconds=seconds, task=task)
    print(result)
    if not result.ready:
        raise ValueError("the network cannot be converted as it is; see above for what to write instead")
