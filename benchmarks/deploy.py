"""What a deployed network costs, beside the network it came from: ``python benchmarks/deploy.py``.

It runs alone on the machine. The exported files of a W4/L2 network at T = 2, the folded network in torch, and peers:
torch float (batch norm folded, channels-last, frozen), ONNX Runtime float and int8 (static, QDQ), OpenVINO float and
int8, SpikingJelly's multi-step network. All take turns in one process, a few images each turn, so that a machine that
slows down slows all; the images change from call to call, for one repeated image is learned by the branch predictor.
Medians. Before anything is timed, every exported file must give the folded network's logits.
"""

from __future__ import annotations

import argparse
import copy
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import openvino
import torch
from spikingjelly.activation_based import functional, neuron
from spikingjelly.activation_based import layer as sj_layer
from torch import Tensor, nn

import qsnn
from qsnn.cli.one_line import one_line
from qsnn.measure.latency import TURN, in_turns, rotating
from qsnn.models.ann import VggSmall
from qsnn.quant.activations import level_quant
from qsnn.report.records import Record, append, environment, now

HERE = Path(__file__).resolve().parent
Side = Callable[[np.ndarray], Any]

MODELS: dict[str, tuple[str, Callable[[qsnn.Data], nn.Module]]] = {
    "study": ("fashion-mnist", lambda data: qsnn.create_model("study", data)),
    "vgg-small": ("fashion-mnist", lambda data: qsnn.create_model("vgg-small", data)),
    "vgg-512": ("cifar10", lambda data: VggSmall(data.shape[0], data.num_classes, [[64], [128], [256], [512]])),
}


def networks(name: str, root: Path | None) -> tuple[qsnn.Data, nn.Module, nn.Module, qsnn.SNN]:
    """The data, the float network with settled batch norms, its quantized form, and that one's folded form at T = 2."""
    data_name, make = MODELS[name]
    data = qsnn.load_data(data_name, root=root)
    torch.manual_seed(0)
    model = make(data)
    images = next(qsnn.batches(data.train.head(512), 512))[0]  # type: ignore[attr-defined]
    with torch.no_grad():
        for _ in range(20):  # running mean and variance
            model.train()(images)
    model.eval()
    qann = qsnn.quantize(model, [(images, torch.zeros(len(images), dtype=torch.int64))])
    qann.eval()
    folded = qsnn.fold(qsnn.convert(qann, qsnn.ConvertConfig(timesteps=2)))
    return data, model, qann, folded


def runtime_session(model: bytes | Path, threads: int) -> onnxruntime.InferenceSession:
    """ONNX Runtime on so many threads, which wait as they do by default, but stop when their side's turn is over."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    raw = model.read_bytes() if isinstance(model, Path) else model
    return onnxruntime.InferenceSession(raw, options, providers=["CPUExecutionProvider"])


def onnx_side(path: Path, threads: int) -> Side:
    """A file in ONNX Runtime."""
    session = runtime_session(path, threads)
    entry, answer = session.get_inputs()[0].name, session.get_outputs()[0].name
    return lambda images: session.run([answer], {entry: images})[0]


def openvino_side(path: Path, threads: int) -> Side:
    """A file in OpenVINO, made for latency, in float32."""
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.compile_model(path, "CPU", options).create_infer_request()
    return lambda images: request.infer([images])[0]


def float_files(model: nn.Module, images: Tensor, folder: Path) -> tuple[Path, Path]:
    """The float network as ONNX, and quantized to int8 (static, QDQ, a scale a channel) on 128 of the images."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.parts: Iterator[Tensor] = iter(images[:128].split(16))

        def get_next(self) -> dict[str, np.ndarray] | None:
            part = next(self.parts, None)
            return None if part is None else {"images": part.numpy()}

    plain, prepared, int8 = (folder / f"{name}.onnx" for name in ("float", "prepared", "int8"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter that needs no further package is to go one day
        torch.onnx.export(
            model, (images[:1],), str(plain), input_names=["images"], output_names=["logits"], opset_version=17,
            dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}}, dynamo=False,
        )  # fmt: skip
    logging.disable(logging.WARNING)
    quant_pre_process(str(plain), str(prepared))
    quantize_static(
        str(prepared), str(int8), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    logging.disable(logging.NOTSET)
    return plain, int8


def torch_side(model: nn.Module, images: Tensor, *, channels_last: bool = True) -> Side:
    """The float network as torch runs it best: traced, frozen (which folds batch norm), optimised, channels-last."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = copy.deepcopy(model).eval().to(memory_format=layout)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, images.to(memory_format=layout))
        frozen = torch.jit.optimize_for_inference(torch.jit.freeze(traced))

    @torch.inference_mode()
    def run(x: np.ndarray) -> Tensor:
        return frozen(torch.from_numpy(x).to(memory_format=layout))

    return run


class PeerNetwork(nn.Module):
    """The same spiking network of SpikingJelly's modules: plain layers on (T·B), multi-step IF nodes, soft reset."""

    def __init__(self, qann: Any, timesteps: int) -> None:
        super().__init__()
        self.timesteps, layers = timesteps, list[nn.Module]()
        for node in qann.graph.nodes:
            if node.op != "call_module":
                continue
            module = qann.get_submodule(str(node.target))
            quant = level_quant(module)
            if quant is not None and quant.signed:
                continue
            if quant is not None:
                theta = float(quant.step.detach()) * quant.levels
                layers.append(neuron.IFNode(v_threshold=theta, v_reset=None, step_mode="m"))
                layers.append(_Scaled(theta))
                continue
            if hasattr(module, "quant_weight"):
                weight, bias = module.quant_weight().value.detach(), module.bias
                plain: Any = nn.Conv2d if isinstance(module, nn.Conv2d) else nn.Linear
                shape = weight.shape[1], weight.shape[0], *weight.shape[2:3]
                options = {"padding": module.padding} if plain is nn.Conv2d else {}
                module = plain(*shape, bias=bias is not None, **options)
                module.weight = nn.Parameter(weight)
                if bias is not None:
                    module.bias = nn.Parameter(bias.detach())
            layers.append(sj_layer.SeqToANNContainer(copy.deepcopy(module)))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        functional.reset_net(self)
        return self.layers(images.expand(self.timesteps, *images.shape)).mean(0)


class _Scaled(nn.Module):
    def __init__(self, theta: float) -> None:
        super().__init__()
        self.theta = theta

    def forward(self, x: Tensor) -> Tensor:
        return x * self.theta


def eager_side(model: nn.Module, **options: Any) -> Side:
    """A module of torch as it is called."""
    model.eval()

    @torch.inference_mode()
    def run(x: np.ndarray) -> Tensor:
        return model(torch.from_numpy(x), **options)

    return run


def checked(folded: qsnn.SNN, path: Path, images: Tensor, firing: str) -> Path:
    """The file, once it has given the folded network's logits for all images.

    Raises:
        ValueError: it did not.
    """
    with torch.no_grad():
        wanted = folded(images, timesteps=2, firing=firing).float().numpy()
    found = onnx_side(path, 1)(images.numpy())
    if not np.array_equal(found.reshape(wanted.shape), wanted):
        raise ValueError(f"{path.name} does not give the folded network's logits; nothing is timed")
    return path


def measured(name: str, batch: int, threads: int, seconds: float, root: Path | None) -> tuple[dict[str, Any], str]:
    """Milliseconds of every side, the ratios that issue and report ask for, and the data's name."""
    torch.set_num_threads(threads)
    data, model, qann, folded = networks(name, root)
    images = next(qsnn.batches(data.test.head(max(256, batch)), max(256, batch)))[0]  # type: ignore[attr-defined]
    batches = [part.contiguous().numpy() for part in images.split(batch) if len(part) == batch]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        files = {
            f"{firing} {kernels}": checked(
                folded, qsnn.export(folded, folder / f"{firing}-{kernels}.onnx", firing=firing, kernels=kernels),
                images, firing,
            )
            for firing in ("deferred", "online") for kernels in ("int8", "float")
        }  # fmt: skip
        plain, int8 = float_files(model, images, folder)
        sides: dict[str, Side] = {
            **{f"qsnn {label}": onnx_side(path, threads) for label, path in files.items()},
            "qsnn deferred OpenVINO": openvino_side(files["deferred float"], threads),
            "qsnn online OpenVINO": openvino_side(files["online float"], threads),
            "qsnn deferred folded torch": eager_side(folded, timesteps=2, firing="deferred"),
            "qsnn online folded torch": eager_side(folded, timesteps=2, firing="online"),
            "torch float": torch_side(model, images[:batch]),
            "torch float, contiguous": torch_side(model, images[:batch], channels_last=False),
            "ONNX Runtime float": onnx_side(plain, threads), "ONNX Runtime int8": onnx_side(int8, threads),
            "OpenVINO float": openvino_side(plain, threads), "OpenVINO int8": openvino_side(int8, threads),
            "SpikingJelly T = 2": eager_side(PeerNetwork(qann, 2)),
        }  # fmt: skip
        found: dict[str, Any] = in_turns(
            {label: rotating(side, batches) for label, side in sides.items()}, seconds=seconds
        )
        weights = sum(value.numel() for key, value in folded.named_buffers() if key.endswith("weight"))
        sizes = {f"{label} bytes": path.stat().st_size for label, path in files.items()}
    best = min(found["torch float"], found["torch float, contiguous"])
    deferred, online = (min(found[f"qsnn {f} int8"], found[f"qsnn {f} float"]) for f in ("deferred", "online"))
    return {
        **found, **sizes, "weights": weights,
        "deferred / torch float": deferred / best, "online / torch float": online / best,
        "deferred / ONNX Runtime int8": deferred / found["ONNX Runtime int8"],
        "deferred / folded torch": deferred / found["qsnn deferred folded torch"],
        "file / weights at 8 bit": sizes["deferred int8 bytes"] / weights,
    }, data.name  # fmt: skip


def main() -> None:
    """Measure, print, append records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seconds", type=float, default=4.0, help="time of each side")
    parser.add_argument("--data-root", type=Path, default=None)
    parser.add_argument("--records", type=Path, default=HERE / "records" / "deploy.jsonl")
    args = parser.parse_args()
    versions = {package: version(package) for package in ("onnx", "onnxruntime", "openvino", "spikingjelly")}
    for name in args.models:
        for threads in args.threads:
            for batch in args.batches:
                metrics, data = measured(name, batch, threads, args.seconds, args.data_root)
                print(f"{name}, batch {batch}, {threads} threads [ms]")
                for label, value in metrics.items():
                    print(f"  {label:32} {value:.4g}")
                append(args.records, Record(
                    name=f"deploy/{name}", data=data, seed=0, n=batch, metrics=metrics,
                    config={"model": name, "batch": batch, "threads": threads, "T": 2, "weight_bits": 4, "levels": 2,
                            "seconds": args.seconds, "turn": TURN, **versions},
                    environment=environment("cpu"), time=now(),
                ))  # fmt: skip


if __name__ == "__main__":
    with one_line("deploy.py"):
        main()
