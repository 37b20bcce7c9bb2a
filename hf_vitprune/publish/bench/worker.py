"""One model in one form in a process of its own, which times it when told to: its memory is that of nothing else.

Started as a script, so that a graph's process imports its runtime only. It reads one line a command from its input:
a number of calls to time after one that is not timed, or nothing more to come; the answers are lines of JSON.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def _in_torch(order: dict[str, Any], inputs: dict[str, Any]) -> Callable[[], Any]:
    import torch
    import transformers

    from hf_vitprune.modeling import hosts, registry

    torch.set_num_threads(order["threads"])
    name = order["model_class"]
    owner = next(place for place in (registry, hosts, transformers) if hasattr(place, name))
    model = getattr(owner, name).from_pretrained(order["folder"]).eval()
    call = torch.compile(model) if order["form"] == "compile" else model
    tensors = {key: torch.from_numpy(value) for key, value in inputs.items()}

    def run() -> None:
        with torch.inference_mode():
            call(**tensors, **order["switches"])

    return run


def _in_onnxruntime(order: dict[str, Any], inputs: dict[str, Any]) -> Callable[[], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = order["threads"]
    # the models take turns: threads that spin on after a call, while another one is timed, would slow it
    options.add_session_config_entry("session.force_spinning_stop", "1")
    path = os.path.join(order["folder"], "model.onnx")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    taken = {spec.name: inputs[spec.name] for spec in session.get_inputs()}
    return lambda: session.run(None, taken)


def _in_openvino(order: dict[str, Any], inputs: dict[str, Any]) -> Callable[[], Any]:
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": order["threads"],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # else the processor's bfloat16, which the other forms do without
    }
    path = os.path.join(order["folder"], "openvino_model.xml")
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    names = {name for port in compiled.inputs for name in port.get_names()}
    taken = {name: value for name, value in inputs.items() if name in names}
    request = compiled.create_infer_request()
    return lambda: request.infer(taken)


_RUNTIMES = {"eager": _in_torch, "compile": _in_torch, "onnx": _in_onnxruntime, "openvino": _in_openvino}


def _peak_megabytes() -> float:
    """Of this process since it was started; on Linux ``getrusage`` tells the parent's, where that was larger."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def main() -> None:
    """Read the order, make the model ready, and answer until the input ends."""
    order = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    with np.load(order["inputs"]) as file:
        inputs = {name: file[name] for name in file.files}
    run = _RUNTIMES[order["form"].removesuffix("-int8")](order, inputs)
    run()
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        repeats = int(line)
        run()  # another model had its turn: caches hold that one's weights
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        seconds = (time.perf_counter() - start) / repeats
        print(json.dumps({"seconds": seconds, "megabytes": _peak_megabytes()}), file=answers, flush=True)


if __name__ == "__main__":
    main()
