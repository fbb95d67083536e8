"""Published figures of GPUs and of the nodes they usually come in, and the shares of them that kernels and collectives are assumed to reach."""

from __future__ import annotations

from dataclasses import dataclass

# Assumptions, not data sheet values. The first is set so that the two 8,192-token rows of the Llama 3 paper come out (docs/scaling.md).
MATMUL_EFFICIENCY = 0.65  # of the peak rate, in large matrix products and attention
MEMORY_EFFICIENCY = 0.8  # of the memory bandwidth
LINK_EFFICIENCY = 0.8  # of a link's bandwidth
LINK_LATENCY = 10e-6  # seconds of one collective, or one message, on top of its bytes
USABLE_MEMORY = 0.9  # of a GPU's memory; the rest is for the CUDA context, NCCL's buffers and fragmentation


@dataclass(frozen=True)
class Gpu:
    """Bytes, operations and bytes per second of one GPU; `node` and `network` per direction and GPU, in nodes of `per_node`."""

    name: str
    memory: float
    flops: dict[str, float]  # dense, without sparsity
    bandwidth: float
    node: float  # NVLink
    network: float
    host: float  # PCIe
    per_node: int = 8


# NVIDIA's data sheets of the SXM modules (memory, dense FP8 and BF16 tensor cores, FP32, memory bandwidth, NVLink) and of DGX A100, H100 and H200,
# which have one 200 Gb/s, or 400 Gb/s, network adapter for each GPU.
GPUS = {
    "a100": Gpu("A100 SXM 80 GB", 80e9, {"bf16": 312e12, "fp32": 19.5e12}, 2.039e12, 300e9, 25e9, 32e9),
    "h100": Gpu("H100 SXM 80 GB", 80e9, {"fp8": 1979e12, "bf16": 989e12, "fp32": 67e12}, 3.35e12, 450e9, 50e9, 64e9),
    "h200": Gpu("H200 SXM 141 GB", 141e9, {"fp8": 1979e12, "bf16": 989e12, "fp32": 67e12}, 4.8e12, 450e9, 50e9, 64e9),
}

# As the driver names them; other variants have other rates.
_DEVICE_NAMES = {"NVIDIA A100-SXM4-80GB": "a100", "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200"}


def gpu_named(device_name: str) -> Gpu | None:
    """The GPU that the driver calls so, None where its data sheet is not here."""
    return GPUS[_DEVICE_NAMES[device_name]] if device_name in _DEVICE_NAMES else None


def parse_machine(text: str) -> tuple[int, Gpu]:
    """`64xh100` as the number and the GPU. Errors: ValueError naming what is wrong and which GPUs there are."""
    number, _, name = text.partition("x")
    if not number.isdecimal() or int(number) < 1 or name not in GPUS:
        raise ValueError(f"--plan={text}: not NUMBERxGPU, such as 64xh100; the GPUs that are known are {', '.join(GPUS)}")
    return int(number), GPUS[name]
