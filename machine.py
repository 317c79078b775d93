"""What this machine has: device, precision, memory; and how a script of ours is started. Model files never use it.

device = pick_device("auto"); dtype = pick_precision("auto", device)
"""

import os
import resource
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F


def pick_device(name, local_rank=0):
    """auto → cuda, mps or cpu, what is there. Raises ValueError for a device that does not work."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{local_rank}" if name == "cuda" else name)
        torch.empty(1, device=device)
        return device
    except Exception as e:
        raise ValueError(f"--device {name} does not work here ({str(e).strip().partition(chr(10))[0]})") from e


def pick_precision(amp, device):
    """dtype for autocast, or None for plain fp32. auto: bf16 on a GPU that has it, and on a CPU that gains from it.

    A CPU without bf16 instructions multiplies bf16 matrices hundreds of times slower than fp32 ones, so it is measured.
    """
    if amp != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type != "cpu":
        return None

    def seconds(dtype):
        x, w = torch.randn(256, 256), torch.randn(256, 256)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            F.linear(x.to(dtype), w.to(dtype)).float()
            times.append(time.perf_counter() - start)
        return min(times)

    return torch.bfloat16 if seconds(torch.bfloat16) < 0.8 * seconds(torch.float32) else None


def peak_memory(device):
    """Bytes: the most this process has held on a GPU, else its largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def total_memory(device):
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def torchrun(processes):
    """What stands between Python and a script so that so many processes train together."""
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []


def script_argv(script, flags, *paths, processes=1):
    """Command line of a script of ours. flags: True is a switch; what is False or '' is left out."""
    given = [[f"--{k}"] if v is True else [f"--{k}", str(v)] for k, v in flags.items() if v is not False and v != ""]
    script = str(Path(__file__).parent / script)
    return [sys.executable, *torchrun(processes), script, *map(str, paths), *sum(given, [])]


def child_environment(**more):
    """For a process of ours; the user's own settings stand. GOMP_SPINCOUNT: see the Makefile."""
    return {"GOMP_SPINCOUNT": "30000", **os.environ, **more}
