"""A pretended device: its tensors say that they are on `meta`, and yet have their numbers.

An operation on tensors of that device and of the CPU fails, as it does beside a real GPU.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class There(torch.Tensor):
    """A tensor on the pretended device; `numbers` holds them, on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, numbers):
        options = {"strides": numbers.stride(), "dtype": numbers.dtype, "device": DEVICE}
        there = torch.Tensor._make_wrapper_subclass(cls, numbers.shape, **options)
        there.numbers = numbers
        return there

    @classmethod
    def __torch_dispatch__(cls, operation, types, args, kwargs=None):
        return computed(operation, args, kwargs or {})

    def tolist(self):
        return self.numbers.tolist()

    def data_ptr(self):
        return self.numbers.data_ptr()


class PretendedDevice(TorchDispatchMode):
    """While it is entered, `.to("meta")` and device="meta" lead to the pretended device."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return computed(operation, args, kwargs or {})


def computed(operation, args, kwargs):
    """Compute on the CPU, and say where the result is. RuntimeError for tensors of two devices."""
    tensors = [each for each in tree_flatten((args, kwargs))[0] if torch.is_tensor(each)]
    there = [isinstance(tensor, There) for tensor in tensors]
    empty = [t.device == DEVICE and not isinstance(t, There) for t in tensors]
    if any(empty):
        raise RuntimeError(f"{operation} of a tensor that was made unseen, without numbers")
    here = [tensor.dim() > 0 and not isinstance(tensor, There) for tensor in tensors]
    indexed = operation is torch.ops.aten.index.Tensor and there[0]  # places may be on the CPU
    if operation not in COPIES and any(there) and any(here) and not indexed:
        shapes = [tuple(tensor.shape) for tensor in tensors]
        raise RuntimeError(f"{operation} of tensors on two devices, {there}, {shapes}")

    # A copy, or a new tensor, goes to the device that is asked for.
    goes_there = there[0] if operation is COPIES[1] else any(there)
    if kwargs.get("device") is not None:
        goes_there = torch.device(kwargs["device"]) == DEVICE
        kwargs = kwargs | {"device": torch.device("cpu")}

    args, kwargs = tree_map(numbers_of, (args, kwargs))
    result = operation(*args, **kwargs)
    return tree_map(as_there, result) if goes_there else result


def numbers_of(value):
    return value.numbers if isinstance(value, There) else value


def as_there(value):
    return There(value) if torch.is_tensor(value) else value


def move(model):
    """A model's weights go to the pretended device."""
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(There(weight.detach())))
