"""GPUs and the links between them, as their data sheets give them. What of it programs reach is in `stacks`.

Sources: NVIDIA's data sheets of V100, A100, H100, H200, HGX B200 and B300, GB200 NVL72, GB300 NVL72, L4, A10G, L40S,
RTX 4090 and 5090; AMD's of MI300X.
Matrix products are dense (data sheets often double them for sparsity); a link's figure is of one direction.
"""

import difflib
from dataclasses import dataclass, field, replace

from vishwamai_mp.config import UserError


@dataclass(frozen=True)
class Gpu:
    """One accelerator and what it is wired with.

    Attributes:
        name: as `find_gpu` takes it.
        title: for people.
        memory: bytes.
        bandwidth: of its memory, bytes/s.
        peak: FLOP/s of matrix products by type: "16", and "8" and "4" where its tensor cores have them.
        vector: FLOP/s of fp32 outside tensor cores.
        nvlink: bytes/s to the other GPUs of the domain, one direction.
        domain: GPUs that NVLink (or PCIe) connects with each other.
        network: bytes/s per GPU to other domains, one direction.
        dollars: of an hour, a round price for orders of magnitude; overridden on the command line.
        derate: share of the peak's clock that its power limit leaves, beside the family's usual.
        has_bf16: whether bf16 runs on tensor cores.
    """

    name: str
    title: str
    memory: float
    bandwidth: float
    peak: dict[str, float] = field(hash=False)
    vector: float
    nvlink: float
    domain: int
    network: float
    dollars: float
    derate: float = 1.0
    has_bf16: bool = True

    @property
    def tensor_fp32(self) -> float:
        """FLOP/s of products of fp32 as Transformer Engine's layers ask for them: TF32, at half the rate of 16 bits.

        GPUs before Ampere, which lack bf16 as well, have no TF32.
        """
        return self.peak["16"] / 2 if self.has_bf16 else self.vector


def _gpu(
    name: str,
    title: str,
    gib: float,
    terabytes: float,
    peaks: tuple[float, ...],
    vector: float,
    nvlink: float,
    domain: int,
    network: float,
    dollars: float,
    **more: float | bool,
) -> Gpu:
    """Memory in GiB, bandwidth in TB/s, peaks of 16, 8 and 4 bits and of fp32 vectors in TFLOP/s, links in GB/s."""
    peak = {bits: tera * 1e12 for bits, tera in zip(("16", "8", "4"), peaks, strict=False)}
    sizes = (gib * 2**30, terabytes * 1e12, peak, vector * 1e12, nvlink * 1e9, domain, network * 1e9, dollars)
    return Gpu(name, title, *sizes, **more)  # type: ignore[arg-type]


_H100 = _gpu("h100", "H100 SXM 80 GB", 79.6, 3.35, (989.4, 1978.9), 66.9, 450, 8, 50, 2.5)
_TABLE = [
    _gpu("v100-32", "V100 SXM2 32 GB", 31.7, 0.9, (125,), 15.7, 150, 8, 12.5, 0.6, has_bf16=False),
    _gpu("a100-40", "A100 SXM 40 GB", 39.4, 1.555, (312,), 19.5, 300, 8, 25, 1.1),
    _gpu("a100-80", "A100 SXM 80 GB", 79.2, 2.039, (312,), 19.5, 300, 8, 25, 1.4),
    _H100,
    _gpu("h100-pcie", "H100 PCIe 80 GB", 79.6, 2.0, (756, 1513), 51.2, 50, 8, 25, 2.0, derate=0.8),
    _gpu("h100-nvl", "H100 NVL 94 GB", 93.1, 3.9, (835.5, 1671), 60.3, 300, 2, 25, 2.2, derate=0.8),
    replace(
        _H100, name="h100-96-500w", title="H100 96 GB HBM2e, 500 W", memory=95e9 * 1.0, bandwidth=2.4e12, derate=0.8
    ),
    _gpu("h200", "H200 SXM 141 GB", 139.8, 4.8, (989.4, 1978.9), 66.9, 450, 8, 50, 3.0),
    _gpu("b200", "B200 SXM 180 GB", 178.0, 7.7, (2250, 4500, 9000), 75, 900, 8, 50, 4.0),
    _gpu("b300", "B300 SXM 270 GB", 268.0, 7.7, (2250, 4500, 13500), 75, 900, 8, 100, 5.0),
    _gpu("gb200", "GB200 NVL72 186 GB", 184.0, 8.0, (2450, 4900, 9800), 80, 900, 72, 50, 4.5),
    _gpu("gb300", "GB300 NVL72 279 GB", 276.0, 8.0, (2450, 4900, 14700), 80, 900, 72, 100, 5.5),
    _gpu("l4", "L4 24 GB", 22.0, 0.3, (121, 242), 30.3, 25, 1, 3, 0.5),
    _gpu("a10g", "A10G 24 GB", 22.1, 0.6, (70,), 35, 25, 1, 3, 0.8),
    _gpu("l40s", "L40S 48 GB", 44.4, 0.864, (362, 733), 91.6, 25, 8, 12.5, 0.9),
    _gpu("rtx4090", "RTX 4090 24 GB", 23.5, 1.008, (165.2, 330.3), 82.6, 20, 8, 3, 0.4),
    _gpu("rtx5090", "RTX 5090 32 GB", 31.4, 1.792, (209.5, 419, 1676), 104.8, 50, 8, 3, 0.7),
    _gpu("mi300x", "MI300X 192 GB", 191.5, 5.3, (1307.4, 2614.9), 163.4, 448, 8, 50, 2.5),
]
GPUS = {gpu.name: gpu for gpu in _TABLE}
# Other names in use, in small letters.
_ALIASES = {
    "v100": "v100-32",
    "a100": "a100-80",
    "a100-80gb": "a100-80",
    "a100-40gb": "a100-40",
    "h100-sxm": "h100",
    "h100-80gb": "h100",
    "h100-96gb-hbm2e-500w": "h100-96-500w",
    "4090": "rtx4090",
    "5090": "rtx5090",
}


def find_gpu(name: str, option: str = "--gpu") -> Gpu:
    """The GPU of that name, however it is spelt.

    Args:
        name: of the table, or a usual alias such as "A100-80GB".
        option: of the command line, for the message.

    Raises:
        UserError: there is none; the nearest names are told.
    """
    key = name.strip().lower().replace("_", "-").replace(" ", "-").removeprefix("nvidia-")
    key = _ALIASES.get(key, key)
    if key in GPUS:
        return GPUS[key]
    near = difflib.get_close_matches(key, [*GPUS, *_ALIASES], n=1, cutoff=0.4)
    hint = f"did you mean {_ALIASES.get(near[0], near[0])}? " if near else ""
    raise UserError(f"{option} {name}: not a known GPU; {hint}known: {', '.join(GPUS)}")


def known_gpu(device_name: str) -> Gpu | None:
    """The GPU that CUDA calls so ("NVIDIA H100 80GB HBM3"); None: not in the table."""
    words = device_name.lower().replace("-", " ").split()
    found = [gpu for gpu in _TABLE if gpu.name.split("-")[0].removeprefix("rtx") in words]
    found = [gpu for gpu in found if all((kind in words) == (kind in gpu.name) for kind in ("pcie", "nvl"))]
    sizes = [int(word.removesuffix("gb")) for word in words if word.endswith("gb") and word[:-2].isdigit()]
    if sizes:  # the same chip with more memory
        found.sort(key=lambda gpu: abs(gpu.memory / 2**30 - sizes[-1]))
    return found[0] if found else None
