"""Models on the Hugging Face hub, or in a folder laid out like one: weights, config.json, and a model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from qsnn import __version__
from qsnn.checkpoint import load, save
from qsnn.files import write_atomic
from qsnn.graph.recipe import recipe_of
from qsnn.measure.certificate import Certificate
from qsnn.measure.result import Benchmark

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
_MISSING = "sharing on the hub needs huggingface_hub: pip install 'qsnn[hub]'"


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    benchmark: Benchmark | None = None,
    certificate: Certificate | None = None,
    repo_id: str | None = None,
    push: bool = False,
    **push_options: Any,
) -> Path:
    """Write ``model.safetensors``, ``config.json`` and a model card into a folder, and push it where asked to.

    The card tells how the model was made and how to run it, and what ``benchmark`` and ``certificate`` found; without
    them it says that this was not measured.

    Args:
        model: from any of qsnn's verbs, one that :func:`qsnn.save` can write.
        folder: made where missing; a card that is there already is replaced.
        benchmark: what :func:`qsnn.benchmark` measured of this model.
        certificate: what :func:`qsnn.certify` found of it.
        repo_id: "user/name" on the hub; needed to push, and named in the card.
        push: upload the folder (needs a login and a network).
        push_options: of ``ModelHubMixin.push_to_hub``, e.g. ``private=True``.
    Returns:
        The folder.
    Raises:
        ImportError: huggingface_hub is missing.
        ValueError: qsnn cannot build this model again, ``push`` without ``repo_id``, or ``folder`` is a file.
    """
    mixin = _mixin()
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"expected a folder, {folder} is a file; name a folder to write")
    if push and not repo_id:
        raise ValueError("expected repo_id='user/name' to push to")
    text = model_card(model, benchmark=benchmark, certificate=certificate, repo_id=repo_id)
    published = mixin(model)
    published.card = text
    (folder / CARD).unlink(missing_ok=True)
    published.save_pretrained(folder)
    if push:
        published.push_to_hub(repo_id, **push_options)
    return folder


def from_pretrained(
    name: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    **load_options: Any,
) -> nn.Module:
    """Load a model from the hub, or from a folder that :func:`save_pretrained` wrote; bit-equal to what was saved.

    Args:
        name: "user/name" on the hub, or a folder.
        revision: branch, tag or commit.
        cache_dir, token, local_files_only, force_download: as in ``huggingface_hub.hf_hub_download``.
        load_options: of :func:`qsnn.load`.
    Raises:
        ImportError: huggingface_hub is missing.
        ValueError: the model was not written by qsnn, or its parts contradict each other.
        OSError: it could not be fetched.
    """
    mixin = _mixin()
    if Path(name).is_dir():
        _config(Path(name) / CONFIG)  # the mixin itself would only warn of a folder without one
    elif Path(name).exists():
        raise ValueError(f"{name} is a file, expected a folder or a name on the hub; use qsnn.load for a file")
    options: dict[str, Any] = dict(
        load_options=load_options, revision=revision, cache_dir=cache_dir, token=token,
        local_files_only=local_files_only, force_download=force_download,
    )  # fmt: skip
    try:
        model: nn.Module = mixin.from_pretrained(name, **options).network
    except OSError as error:  # the client's own messages fill paragraphs
        raise OSError(f"cannot fetch {name}: {' '.join(str(error).split())[:200]}") from None
    return model


def write(model: nn.Module, path: str | Path, **options: Any) -> Path:
    """Do what :func:`save_pretrained` does, under the name that every format has; ``path`` is a folder."""
    return save_pretrained(model, path, **options)


def _config(path: Path) -> dict[str, Any]:
    """The config.json of a model that qsnn wrote.

    Raises:
        ValueError: there is none, or it is another library's.
    """
    if not path.is_file():
        raise ValueError(f"{path.parent} is no model of qsnn: it has no {CONFIG}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from None
    library = config.get("library_name") if isinstance(config, dict) else None
    if library != "qsnn":
        raise ValueError(f"{path.parent} is no model of qsnn: its {CONFIG} names the library {library!r}")
    return dict(config)


def _mixin() -> Any:
    """The class that the hub's client knows how to save, load and push."""
    try:
        from huggingface_hub import ModelCard, ModelHubMixin, constants, hf_hub_download
    except ImportError:
        raise ImportError(_MISSING) from None

    class Published(ModelHubMixin):  # type: ignore[misc]
        """A model of any kind, held by name, so that its own class stays as it is."""

        card = ""

        def __init__(self, network: nn.Module) -> None:
            self.network = network

        def _save_pretrained(self, save_directory: Path) -> None:
            digest = save(self.network, save_directory / WEIGHTS)
            config = {
                "library_name": "qsnn", "qsnn_version": __version__, "sha256": digest,
                "recipe": recipe_of(self.network),
            }  # fmt: skip
            write_atomic(save_directory / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")

        def generate_model_card(self, *args: Any, **kwargs: Any) -> Any:
            return ModelCard(self.card)

        @classmethod
        def _from_pretrained(cls, *, model_id: str, revision: Any, cache_dir: Any, force_download: bool,
                             local_files_only: bool, token: Any, **more: Any) -> Any:  # fmt: skip
            def fetched(name: str) -> Path:
                if Path(model_id).is_dir():
                    return Path(model_id) / name
                return Path(hf_hub_download(
                    repo_id=model_id, filename=name, revision=revision, cache_dir=cache_dir,
                    force_download=force_download, token=token, local_files_only=local_files_only,
                ))  # fmt: skip

            config = _config(fetched(constants.CONFIG_NAME))
            model = load(fetched(WEIGHTS), **more.get("load_options", {}))
            found = recipe_of(model).get("sha256")
            if found != config.get("sha256"):
                raise ValueError(f"{model_id}: {WEIGHTS} is not the file that {CONFIG} names; fetch it again")
            return cls(model)

    return Published


def model_card(
    model: nn.Module,
    *,
    benchmark: Benchmark | None = None,
    certificate: Certificate | None = None,
    repo_id: str | None = None,
) -> str:
    """Return the card of a model: how it was made, what it reaches, what was proved, how to run it (Markdown)."""
    recipe = recipe_of(model)
    kind, name = recipe.get("kind", "teacher"), recipe.get("model", {}).get("name", type(model).__name__)
    data = recipe.get("data", {}).get("name")
    tags = ["spiking-neural-network", "quantization", "image-classification", *([kind] if kind else [])]
    head = ["---", "library_name: qsnn", "pipeline_tag: image-classification", "tags:", *(f"- {tag}" for tag in tags)]
    lines = [*head, "---", "", f"# {repo_id or name}", "", f"A {_KINDS[kind]}, made with qsnn {__version__}.", ""]
    lines += ["## How it was made", "", "| | |", "|---|---|", f"| network | `{name}` |"]
    lines += [f"| data | {data} |"] if data else []
    if recipe.get("input_shape"):
        lines.append(f"| image | {'x'.join(map(str, recipe['input_shape']))} (channels, height, width) |")
    for verb in ("quantize", "convert", "distill"):
        if recipe.get(verb):
            options = ", ".join(f"{k}={v}" for k, v in recipe[verb].items() if v not in (None, {}, []))
            lines.append(f"| {verb} | {options} |")
    lines += ["", "## What it reaches", "", *_reached(benchmark), "", "## What was proved", "", *_proved(certificate)]
    lines += ["", "## How to run it", "", "```python", "from qsnn.export.hub import from_pretrained", ""]
    lines += [f'model = from_pretrained("{repo_id or "this/folder"}")']
    if kind in ("teacher", "qann"):
        lines += ["logits = model(images)                     # (B, C, H, W), normalised -> (B, K)"]
    else:
        lines += ["logits = model(images)                     # (B, C, H, W), normalised -> (T, B, K)"]
    mean, std = recipe.get("data", {}).get("mean"), recipe.get("data", {}).get("std")
    if mean and std:
        lines += [f"# normalised: (pixel / 255 - {mean}) / {std}, channel by channel"]
    lines += ["```", ""]
    if ":" in str(name):
        lines += [f"The network is the user's own: `{name}` must be importable where it is loaded.", ""]
    return "\n".join(lines)


_KINDS = {
    "teacher": "float network",
    "qann": "quantized network",
    "snn": "spiking network",
    "student": "spiking network, distilled",
    "folded": "spiking network in integers",
}


def _reached(found: Benchmark | None) -> list[str]:
    if found is None:
        return ["Not measured: save it with `benchmark=qsnn.benchmark(model, data.test)`."]
    steps = found.timesteps or ("-",)
    lines = ["| T | accuracy [%] | 95 % interval |", "|---|---|---|"]
    for t, accuracy, (low, high) in zip(steps, found.accuracy, found.intervals, strict=True):
        lines.append(f"| {t} | {accuracy:.2f} | {low:.2f} to {high:.2f} |")
    lines += ["", f"{found.n:,} test images" + (f", {found.firing} firing." if found.firing else ".")]
    lines += ["", f"Weights {found.weight_bytes:,} bytes; {found.macs:,.0f} MACs an image" + (
        f", {found.synops:,.0f} synaptic operations at T = {found.made_for}." if found.synops is not None else "."
    )]  # fmt: skip
    lines += ["", "| energy | [µJ] an image | of the same network, not spiking | assumes |", "|---|---|---|---|"]
    for e in found.energy:
        cells = ("-" if x is None else f"{x:.3g}" for x in (e.microjoules, e.ratio))
        lines.append(f"| {e.name} | {' | '.join(cells)} | {e.assumes} ({e.source}) |")
    return lines


def _proved(certificate: Certificate | None) -> list[str]:
    if certificate is None:
        return ["Not certified: save it with `certificate=qsnn.certify(snn, qann, data.test)`."]
    total = sum(layer.elements for layer in certificate.layers)
    return [
        f"**{certificate.verdict}**: {len(certificate.layers)} layers, {total:,} integers of {certificate.images:,} "
        f"images compared with the quantized network, {certificate.firing} firing, T = {certificate.timesteps}; "
        f"{certificate.same_answers:,} answers equal.",
    ]
