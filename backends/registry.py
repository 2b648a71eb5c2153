"""The table of kernels: names, the devices they run on, and the backends that drive them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from vllm_adamas.backends.base import HOPPER, MIN_CAPABILITY, Backend
from vllm_adamas.errors import AdamasError

Capability = tuple[int, int]


@dataclass(frozen=True)
class Kernels:
    """One value of the option ``kernels``.

    Args:
        device: type of the device that they run on.
        backend: class that drives them, ``module:Class`` in ``vllm_adamas.backends``.
        needs: the GPUs that they need, in words.
        runs_on: whether they run on GPUs of a compute capability.
        auto_on: whether ``auto`` may take them there.
    """

    name: str
    device: str
    backend: str
    needs: str = ""
    runs_on: Callable[[Capability], bool] = lambda capability: True
    auto_on: Callable[[Capability], bool] = lambda capability: True

    def backend_class(self) -> type[Backend]:
        module, _, name = self.backend.partition(":")
        return getattr(import_module(f"vllm_adamas.backends.{module}"), name)


#: ``auto`` takes the first kernels that run on the device, unless they are to be named there.
KERNELS = (
    Kernels("cpu", "cpu", "cpu.backend:CpuBackend"),
    Kernels("reference", "cpu", "reference.backend:ReferenceBackend"),
    Kernels(
        "cuda",
        "cuda",
        "cuda.backend:CudaBackend",
        "an NVIDIA GPU of compute capability 8.x, 9.0, 10.x or 12.x",
        lambda capability: capability == HOPPER or capability[0] in (8, 10, 12),
        # Elsewhere the kernels are compiled, and nobody has run them.
        lambda capability: capability == HOPPER,
    ),
    Kernels(
        "triton",
        "cuda",
        "triton.backend:TritonBackend",
        f"compute capability {'.'.join(map(str, MIN_CAPABILITY))} or newer",
        lambda capability: capability >= MIN_CAPABILITY,
    ),
)


def kernel_names(device_type: str) -> tuple[str, ...]:
    """Valid values of the option ``kernels`` on a device."""
    return ("auto", *(kernels.name for kernels in KERNELS if kernels.device == device_type))


def find_kernels(name: str, device_type: str, capability: Capability | None = None) -> Kernels:
    """The kernels that a value of the option selects on a device.

    Args:
        capability: compute capability of the GPU; default: that of the current one.

    Raises:
        AdamasError: no such kernels run on the device.
    """
    here = [kernels for kernels in KERNELS if kernels.device == device_type]
    named = [kernels for kernels in here if name in ("auto", kernels.name)]
    if not named:
        raise AdamasError(
            f"kernels={name!r} do not run on {device_type} devices: choose one of "
            f"{', '.join(kernel_names(device_type))}, or another attention backend."
        )
    if device_type == "cuda" and capability is None:
        import torch

        capability = torch.cuda.get_device_capability()
    found = [kernels for kernels in named if kernels.runs_on(capability or (0, 0))]
    if name == "auto":
        found = [kernels for kernels in found if kernels.auto_on(capability or (0, 0))]
    if not found:
        others = [k.name for k in here if k not in named and k.runs_on(capability or (0, 0))]
        way_out = f"choose {' or '.join(['auto', *others])}, or another attention backend"
        raise AdamasError(f"kernels={name!r} need {named[-1].needs}: {way_out}.")
    return found[0]


def get_backend(name: str, device_type: str = "cpu") -> Backend:
    """A new backend for a value of the option ``kernels``; ``auto`` takes the device's fastest.

    Raises:
        AdamasError: no such backend exists for the device, or its library is not built.
    """
    return find_kernels(name, device_type).backend_class()()


def available(device_type: str) -> dict[str, Backend | AdamasError]:
    """Every set of kernels of a device by name: its backend, or why there is none."""
    found: dict[str, Backend | AdamasError] = {}
    for name in kernel_names(device_type):
        if name == "auto":
            continue
        try:
            found[name] = get_backend(name, device_type)
        except AdamasError as error:
            found[name] = error
        except Exception as error:  # a library or a dependency that does not load
            found[name] = AdamasError(
                f"kernels={name!r} do not load ({type(error).__name__}: {error}): install vllm-adamas and "
                "its dependencies again."
            )
    return found
