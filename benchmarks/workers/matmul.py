"""How fast this machine multiplies matrices of given shapes, by torch and numpy: what no step can surpass."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.workers.serving import serve


def build(spec: dict[str, Any]) -> Callable[[], dict[str, list[float]]]:
    """spec: `matmuls`, lists as of `case.Matmul`; `device`, `dtype` of torch; `seconds` for each product."""
    device, dtype = torch.device(spec["device"]), getattr(torch, spec["dtype"])
    rng = np.random.default_rng(0)

    def pair(batch: int, m: int, k: int, n: int, turned: bool) -> tuple[np.ndarray, np.ndarray]:
        a = rng.standard_normal((batch, k, m) if turned else (batch, m, k), np.float32)
        b = rng.standard_normal((batch, k, n), np.float32)
        a, b = (a[0], b[0]) if batch == 1 else (a, b)
        return (a.T if turned else a), b

    products: dict[str, list[Callable[[], Any]]] = {"torch": [], "numpy": []}
    for *shape, _ in spec["matmuls"]:
        a, b = pair(*shape)
        x, y = (torch.from_numpy(array).to(device, dtype) for array in (a, b))
        products["torch"].append(lambda x=x, y=y: x @ y)
        if device.type == "cpu":
            products["numpy"].append(lambda a=a, b=b: a @ b)
    flops = [2.0 * batch * m * k * n for batch, m, k, n, *_ in spec["matmuls"]]

    def rate(product: Callable[[], Any], flops: float) -> float:
        def seconds(count: int) -> float:
            start = time.perf_counter()
            for _ in range(count):
                product()
            if device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - start

        once = seconds(1)
        count = max(1, round(spec["seconds"] / once))
        return flops * count / seconds(count)

    def step() -> dict[str, list[float]]:
        return {name: list(map(rate, list_, flops)) for name, list_ in products.items() if list_}

    return step


if __name__ == "__main__":
    serve(build, ("torch", "numpy"))
