"""What PyTorch reaches on this GPU, for scripts/cuda/check: the bf16 matrix rate in FLOP/s, or (--grouped) its grouped bf16 product on a
Mixtral layer's shapes (hidden 4096, 14336, 8 experts, top-2), gate and up and down without the activation, microseconds a layer."""
import sys

import torch


def median_seconds(f, repetitions=15):
    for _ in range(3):
        f()
    times = []
    for _ in range(repetitions):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        f()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2]


def grouped(tokens, hidden=4096, inner=14336, experts=8, top_k=2):
    pairs = tokens * top_k
    ends = torch.tensor([pairs * (e + 1) // experts for e in range(experts)], device="cuda", dtype=torch.int32)
    x = torch.randn(pairs, hidden, device="cuda", dtype=torch.bfloat16)
    h = torch.randn(pairs, inner, device="cuda", dtype=torch.bfloat16)
    gate_up = torch.randn(experts, hidden, 2 * inner, device="cuda", dtype=torch.bfloat16) * 0.02
    down = torch.randn(experts, inner, hidden, device="cuda", dtype=torch.bfloat16) * 0.02

    def layer():
        torch._grouped_mm(x, gate_up, offs=ends)
        torch._grouped_mm(h, down, offs=ends)

    seconds = median_seconds(layer)
    operations = 2 * pairs * hidden * inner * 3
    print(f"PyTorch bf16 grouped product, Mixtral, {tokens} tokens: {seconds * 1e6:.0f} us, {operations / seconds / 1e12:.0f} TFLOP/s")


if "--grouped" in sys.argv:
    for tokens in (512, 4096):
        try:
            grouped(tokens)
        except Exception as error:  # an older PyTorch, or another layout of the offsets
            print(f"PyTorch's grouped product did not run: {error}")
else:
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    print(2 * n**3 / median_seconds(lambda: a @ b))
