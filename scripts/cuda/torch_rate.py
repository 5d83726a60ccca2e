"""What PyTorch reaches on this GPU, for scripts/cuda/check. Prints names and values, a line each; in words on stderr.

rate               FLOP/s of a bf16 matrix product, the better of two layouts
grouped_<tokens>   seconds of the grouped bf16 products (gate and up as one, down; no activation, no sorting) of a Mixtral layer

Standard input: for each number of tokens the (token, expert) pairs of each expert, as `cuda_check --loads` prints them.
Samples of 20 ms at least, the median of seven: as the check program takes them.
"""
import statistics
import sys

import torch

HIDDEN, INNER = 4096, 14336


def elapsed(f, calls):
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        f()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def median_seconds(f):
    elapsed(f, 3)
    calls = max(1, round(0.022 / (elapsed(f, 3) / 3)))
    return statistics.median(elapsed(f, calls) / calls for _ in range(7))


def random(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def matrix_rate(n=8192):
    a, b = random(n, n), random(n, n)
    return 2 * n**3 / min(median_seconds(lambda: a @ b), median_seconds(lambda: a @ b.t()))


def weights(experts, inputs, outputs, transposed):
    """(experts, inputs, outputs); transposed: as checkpoints have them, the inputs beside each other."""
    if transposed:
        return random(experts, outputs, inputs).mul_(0.02).transpose(1, 2)
    return random(experts, inputs, outputs).mul_(0.02)


def grouped_seconds(pairs, transposed):
    product = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    ends = torch.tensor(pairs, device="cuda").cumsum(0).to(torch.int32)
    x, h = random(sum(pairs), HIDDEN), random(sum(pairs), INNER)
    gate_up = weights(len(pairs), HIDDEN, 2 * INNER, transposed)
    down = weights(len(pairs), INNER, HIDDEN, transposed)

    def layer():
        product(x, gate_up, offs=ends)
        product(h, down, offs=ends)

    last = slice(sum(pairs[:-1]), None)
    got, expected = product(x, gate_up, offs=ends)[last].float(), (x[last] @ gate_up[-1]).float()
    if (got - expected).abs().max() > 0.05 * expected.abs().max():
        raise RuntimeError("another result than of a plain product")
    return median_seconds(layer)


def main():
    rate = matrix_rate()
    print("rate", rate, flush=True)
    print(f"PyTorch {torch.__version__}, bf16 matrix product: {rate / 1e12:.0f} TFLOP/s", file=sys.stderr)
    for line in sys.stdin:
        tokens, *pairs = map(int, line.split())
        operations = 6 * sum(pairs) * HIDDEN * INNER
        times = []
        for transposed in (True, False):
            layout = "transposed" if transposed else "row-major"
            try:
                times.append(grouped_seconds(pairs, transposed))
                done = f"{times[-1] * 1e6:.0f} us, {operations / times[-1] / 1e12:.0f} TFLOP/s"
            except Exception as error:  # an older PyTorch, or a layout that it refuses
                done = f"did not run: {error}"
            print(f"PyTorch grouped bf16 product, Mixtral, {tokens} tokens, {layout} weights: {done}", file=sys.stderr)
        if times:
            print(f"grouped_{tokens}", min(times), flush=True)


main()
