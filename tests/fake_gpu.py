"""flux_distill.py as on a GPU, without one: python tests/fake_gpu.py FLAGS

Tensors on "cuda" compute on the CPU, but mixing them with the CPU's is refused as CUDA refuses it.
So the program takes its GPU's branch whole, in bfloat16. It says nothing of kernels, memory, speed.
Gradient checkpointing cannot run so (the backward's thread has no Python), nor can torchao.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

sys.path.insert(0, str(Path(__file__).parent.parent))
COPIES = ("aten::_to_copy", "aten::copy_", "aten::_foreach_copy_")  # from device to device
_setup_privateuseone_for_python_backend("fake")
DEVICE = torch.device("fake", 0)


def each(change, x):
    """x with its leaves, inside lists, tuples and dictionaries, changed."""
    if isinstance(x, dict):
        return {name: each(change, value) for name, value in x.items()}
    return type(x)([each(change, y) for y in x]) if isinstance(x, list | tuple) else change(x)


class OnDevice(torch.Tensor):
    """A tensor of the device; `numbers` is one of the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, cpu):
        like = dict(strides=cpu.stride(), storage_offset=cpu.storage_offset(), dtype=cpu.dtype)
        tensor = torch.Tensor._make_wrapper_subclass(cls, cpu.size(), device=DEVICE, **like)
        tensor.numbers = cpu
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


def compute(function, args, kwargs):
    """The same on the CPU, wrapped again, or the error that CUDA would raise."""
    name, device = function._schema.name, kwargs.get("device")
    ours, rest, given = [], [], {}

    def numbers(x):
        if isinstance(x, torch.Tensor):
            (ours if isinstance(x, OnDevice) else rest).append(x)
            given[id(getattr(x, "numbers", x))] = x
        return getattr(x, "numbers", x)

    inside = each(numbers, args), each(numbers, kwargs)
    if name == "aten::index" and isinstance(args[0], OnDevice):
        rest = []  # indices may come from the CPU
    elif name not in ("aten::cat", "aten::stack"):
        rest = [x for x in rest if x.ndim]  # so may numbers
    if ours and rest and name not in COPIES:
        raise RuntimeError(f"{name}: tensors of two devices, {[tuple(x.shape) for x in rest]}")
    on_device = device.type == DEVICE.type if device else bool(ours)
    if on_device and kwargs.get("generator") is not None:
        raise RuntimeError(f"{name}: a generator of the CPU")
    if on_device and device:
        inside[1]["device"] = torch.device("cpu")
    result = function(*inside[0], **inside[1])
    if name == "aten::_to_copy":  # a copy, also where the CPU would give the same back
        return OnDevice(result.clone()) if on_device else result.clone()

    def outside(x):
        new = isinstance(x, torch.Tensor) and on_device and id(x) not in given
        return OnDevice(x) if new else given.get(id(x), x)  # in place: what came in

    return each(outside, result)


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


class Names(TorchFunctionMode):
    """ "cuda" is the fake device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def ours(x):
            if isinstance(x, str | torch.device) and str(x).split(":")[0] == "cuda":
                return DEVICE
            return x

        args, kwargs = each(ours, args), each(ours, kwargs or {})
        if function is torch.Tensor.tolist and isinstance(args[0], OnDevice):
            return args[0].to("cpu").tolist()
        if function is torch.tensor and kwargs.get("device") == DEVICE:
            return torch.tensor(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        return function(*args, **kwargs)


def main(argv):
    import flux_distill as fd

    fd.FINE, fd.STEPS = 4, (3,)  # quicker
    torch.set_num_threads(1)
    torch.cuda.is_available = lambda: True
    torch.cuda.synchronize = torch.cuda.empty_cache = torch.cuda.ipc_collect = lambda: None
    torch.cuda.get_device_properties = lambda index: SimpleNamespace(total_memory=80 * 2**30)
    torch.cuda.get_device_name = lambda: "a fake GPU"
    torch.cuda.max_memory_allocated = lambda: 2**30
    torch.cuda.reset_peak_memory_stats = lambda: None
    fd.Adapter.recompute = lambda self, every: None
    with Names(), Dispatch():
        fd.main([*argv, "--recompute-every", "0"])


if __name__ == "__main__":
    main(sys.argv[1:])
