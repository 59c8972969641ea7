"""What accelerators and their links can do, and the share of it that programs reach."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from pydantic import TypeAdapter, with_config

from rmoe_megatron.errors import UserError
from rmoe_megatron.files.untrusted import CLOSED, read_json


@dataclass(frozen=True)
class Hardware:
    """An accelerator and how it reaches others; rates are those of the data sheet.

    Attributes:
        memory: bytes.
        bf16_flops: dense matrix products in bf16, a second.
        fp32_flops: the same in TF32, which PyTorch takes for float32 only if it is told to.
        bandwidth: bytes a second between the processor and its memory.
        link: bytes a second to the others of a node, in one direction.
        network: bytes a second to other nodes, in one direction.
        product, attention, element_wise, message: share of the rate that matrix products, attention, element-wise kernels and
            messages reach.
        latency: seconds before the first byte of a message arrives.
        kernel: seconds that the smallest kernel takes.
        storage: bytes a second that all ranks together write to the file system that they share.
    """

    name: str
    memory: float
    bf16_flops: float
    fp32_flops: float
    bandwidth: float
    link: float
    network: float
    product: float = 0.65
    attention: float = 0.45
    element_wise: float = 0.75
    message: float = 0.75
    latency: float = 15e-6
    kernel: float = 4e-6
    storage: float = 10e9


# Data sheets of NVIDIA (SXM modules; NVLink's rate is given there for both directions together) and AMD. The network is one adapter
# for each accelerator: 400 Gbit/s (ConnectX-7), for the A100 200 Gbit/s.
HARDWARE = {
    "a100": Hardware("A100 80 GB", 80e9, 312e12, 19.5e12, 2.04e12, 300e9, 25e9),
    "h100": Hardware("H100 80 GB", 80e9, 989e12, 67e12, 3.35e12, 450e9, 50e9),
    "h200": Hardware("H200 141 GB", 141e9, 989e12, 67e12, 4.8e12, 450e9, 50e9),
    "b200": Hardware("B200 180 GB", 180e9, 2250e12, 80e12, 8.0e12, 900e9, 50e9),
    "mi300x": Hardware("MI300X 192 GB", 192e9, 1307e12, 163e12, 5.3e12, 448e9, 50e9),
}


@with_config(CLOSED)
class Measured(TypedDict, total=False):
    """A file of figures that take the place of those in the table."""

    name: str
    memory: float
    bf16_flops: float
    fp32_flops: float
    bandwidth: float
    link: float
    network: float
    product: float
    attention: float
    element_wise: float
    message: float
    latency: float
    kernel: float
    storage: float


def find_hardware(name: str, measured: Path | None = None) -> Hardware:
    """Return the accelerator of this name, with what a JSON file of :class:`Measured` says otherwise.

    Raises:
        UserError: no accelerator is called so, or a figure of the file is not above 0.
    """
    found = HARDWARE.get(name.lower())
    if found is None:
        raise UserError(
            f"--gpu {name} is not known; choose {', '.join(HARDWARE)}, or give its figures by --hardware FILE."
        )
    if measured is None:
        return found
    figures = read_json(measured, TypeAdapter(Measured))
    for key, value in figures.items():
        if isinstance(value, float) and not 0 < value < 1e18:
            raise UserError(f"{measured}: {key} is {value}; it must be above 0.")
    return dataclasses.replace(found, **figures)
