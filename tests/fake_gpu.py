"""flux_distill.py as on a GPU, without one: python tests/fake_gpu.py FLAGS

Tensors on "cuda" compute on the CPU, but mixing them with the CPU's is refused as CUDA refuses it.
So the program takes the whole branch for GPUs, in bfloat16. That shows nothing about kernels,
memory or speed. Gradient checkpointing can't run like this, because the thread of the backward
pass has no Python, and neither can torchao.
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
JOINS = ("aten::cat", "aten::stack")  # which refuse numbers of the CPU, too
_setup_privateuseone_for_python_backend("fake")
DEVICE = torch.device("fake", 0)


def each(change, x):
    """x with its leaves, inside lists, tuples and dictionaries, changed."""
    if isinstance(x, dict):
        return {name: each(change, value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return type(x)([each(change, value) for value in x])
    return change(x)


class OnDevice(torch.Tensor):
    """A tensor of the device; `numbers` is one of the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, cpu):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            cpu.size(),
            strides=cpu.stride(),
            storage_offset=cpu.storage_offset(),
            dtype=cpu.dtype,
            device=DEVICE,
        )
        tensor.numbers = cpu
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


def compute(function, args, kwargs):
    """The same on the CPU, wrapped again, or the error that CUDA would raise."""
    name = function._schema.name
    device = kwargs.get("device")
    ours = []  # tensors of the device
    others = []  # tensors of the CPU
    given = {}  # what came in, by the id of its numbers

    def numbers(x):
        if not isinstance(x, torch.Tensor):
            return x
        if isinstance(x, OnDevice):
            ours.append(x)
            given[id(x.numbers)] = x
            return x.numbers
        others.append(x)
        given[id(x)] = x
        return x

    cpu_args = each(numbers, args)
    cpu_kwargs = each(numbers, kwargs)
    if name == "aten::index" and isinstance(args[0], OnDevice):
        others = []  # indices may come from the CPU
    elif name not in JOINS:
        others = [x for x in others if x.ndim > 0]  # numbers may come from the CPU
    if ours and others and name not in COPIES:
        raise RuntimeError(f"{name}: tensors of two devices, {[tuple(x.shape) for x in others]}")
    on_device = device.type == DEVICE.type if device else bool(ours)
    if on_device and kwargs.get("generator") is not None:
        raise RuntimeError(f"{name}: a generator of the CPU")
    if on_device and device:
        cpu_kwargs["device"] = torch.device("cpu")
    result = function(*cpu_args, **cpu_kwargs)
    if name == "aten::_to_copy":  # a copy, also where the CPU would return the same tensor
        copy = result.clone()
        return OnDevice(copy) if on_device else copy

    def outside(x):
        if id(x) in given:  # changed in place: what came in
            return given[id(x)]
        return OnDevice(x) if on_device and isinstance(x, torch.Tensor) else x

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

        args = each(ours, args)
        kwargs = each(ours, kwargs or {})
        if function is torch.Tensor.tolist and isinstance(args[0], OnDevice):
            return args[0].to("cpu").tolist()
        if function is torch.tensor and kwargs.get("device") == DEVICE:
            return torch.tensor(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        return function(*args, **kwargs)


def nothing(*args, **kwargs):
    pass


def main(argv):
    """The command, with fewer steps of the teacher, so that it is quicker."""
    import flux_distill as fd

    torch.set_num_threads(1)
    torch.cuda.is_available = lambda: True
    torch.cuda.synchronize = nothing
    torch.cuda.empty_cache = nothing
    torch.cuda.ipc_collect = nothing
    torch.cuda.reset_peak_memory_stats = nothing
    torch.cuda.get_device_properties = lambda index: SimpleNamespace(total_memory=80 * 2**30)
    torch.cuda.get_device_name = lambda: "a fake GPU"
    torch.cuda.max_memory_allocated = lambda: 2**30
    fd.LoRA.recompute = nothing  # the device check turns it on, whatever the flag says
    quicker = ["--teacher-steps", "6", "--steps", "3", "--recompute-every", "0"]
    with Names(), Dispatch():
        fd.main([*argv, *quicker])


if __name__ == "__main__":
    main(sys.argv[1:])
