"""Networks of timm and torchvision by name, with their pretrained weights where these lie on the disk."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qsnn.graph.arrived import QsnnWarning
from qsnn.models.weights import load_weights

LIBRARIES = ("timm", "torchvision")
_FILES = ("model.safetensors", "pytorch_model.bin")
"""What timm's weights are called in the cache of Hugging Face's hub."""


def build_from_library(
    name: str, shape: tuple[int, ...] | None, num_classes: int | None, pretrained: bool, options: dict[str, Any]
) -> nn.Module:
    """Return a library's network; called by :func:`qsnn.create_model`.

    Nothing is downloaded: weights count where the library's own cache holds them (torch.hub's folder, Hugging Face's
    cache), which is said, as it is where there are none. A head for another number of classes is new.

    Args:
        name: "timm:NAME" or "torchvision:NAME".
        shape: of the input; timm's networks take its channels.
        num_classes: K; by default as pretrained.
        pretrained: look for weights.
        options: passed on to the library.
    Raises:
        ImportError: the library is not installed.
        ValueError: it has no network of that name, or does not take an option.
    """
    library, _, kind = name.partition(":")
    if library == "timm":
        return _timm(kind, shape, num_classes, pretrained, options)
    return _torchvision(kind, num_classes, pretrained, options)


def _torchvision(kind: str, num_classes: int | None, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    try:
        from torchvision import models
    except (ImportError, RuntimeError) as error:  # RuntimeError: operator torchvision::nms does not exist
        raise ImportError(
            f"expected a torchvision that fits torch {torch.__version__}, got: {error}; install both in one command"
        ) from error
    if kind not in models.list_models(models):
        raise ValueError(f"torchvision has no classifier {kind!r}; it has {', '.join(models.list_models(models))}")
    published = models.get_model_weights(kind).DEFAULT
    name = f"torchvision:{kind}"
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(published.url).name
    classes = len(published.meta["categories"])

    def build(count: int) -> nn.Module:
        try:
            model: nn.Module = models.get_model(kind, weights=None, num_classes=count, **options)
        except TypeError as error:
            raise ValueError(f"{name} does not take these options: {error}") from error
        return model

    if not pretrained or not path.is_file():
        if pretrained:
            _say(name, f"weights are fresh: {path} is not there (its own are at {published.url})")
        return build(num_classes or classes)
    model = build(classes)
    load_weights(model, path)
    if num_classes in (None, classes):
        _say(name, f"weights are those of {path}")
        return model
    return _with_new_head(model, build(num_classes), name, path)  # type: ignore[arg-type]


def _with_new_head(trained: nn.Module, fresh: nn.Module, name: str, path: Path) -> nn.Module:
    """The fresh network with every trained tensor that has its shape."""
    tensors, new = trained.state_dict(), []
    for key, value in fresh.state_dict().items():
        if tensors[key].shape != value.shape:
            tensors[key] = value
            new.append(key)
    fresh.load_state_dict(tensors)
    _say(name, f"weights are those of {path}, but for {', '.join(new)}, which are new and have to be trained")
    return fresh


def _timm(
    kind: str, shape: tuple[int, ...] | None, num_classes: int | None, pretrained: bool, options: dict[str, Any]
) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ImportError("expected timm to be installed: pip install 'qsnn[timm]'") from error
    name = f"timm:{kind}"
    if not timm.is_model(kind):
        near = timm.list_models(f"{kind[:6]}*")[:8] or timm.list_models()[:8]
        raise ValueError(f"timm has no network {kind!r}; near it: {', '.join(near)}; timm.list_models() names them all")
    path = _timm_file(kind) if pretrained else None
    wanted: dict[str, Any] = dict(options)
    if num_classes is not None:
        wanted.setdefault("num_classes", num_classes)
    if shape is not None and len(shape) == 3:
        wanted.setdefault("in_chans", shape[0])
    if path is not None:  # timm fits the head and the first layer itself
        wanted |= {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}}
    try:
        model: nn.Module = timm.create_model(kind, **wanted)
    except TypeError as error:
        raise ValueError(f"{name} does not take these options: {error}") from error
    if pretrained:
        _say(name, f"weights are those of {path}" if path else "weights are fresh: none are in the cache on this disk")
    return model


def _timm_file(kind: str) -> Path | None:
    import timm

    config = timm.get_pretrained_cfg(kind)
    if config is None:
        return None
    if config.hf_hub_id:
        from huggingface_hub import try_to_load_from_cache

        for file in (config.hf_hub_filename, *_FILES):
            found = try_to_load_from_cache(config.hf_hub_id, file) if file else None
            if isinstance(found, str):
                return Path(found)
    if config.url:
        path = Path(torch.hub.get_dir()) / "checkpoints" / Path(str(config.url)).name
        return path if path.is_file() else None
    return None


def _say(name: str, what: str) -> None:
    warnings.warn(f"{name}: {what}", QsnnWarning, stacklevel=6)
