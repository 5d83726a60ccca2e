"""Perplexity of a GPTQ checkpoint through PyTorch and transformers, by the documented layout and none of our code.

    python gptq_torch.py CHECKPOINT < request.json

request: {"windows": [[token ids], ...]}; prints {"nll": [nats of each token of each window but the first], "logits": of the first window's
last position}.

Layout (GPTQModel): qweight int32 [in / 32 * bits, out] and qzeros int32 [groups, out / 32 * bits] are little-endian bit strings, along the
inputs and along the outputs; weight[o, i] = scales[g_idx[i], o] * (q[i, o] - zero[g_idx[i], o]). checkpoint_format 'gptq' stores
zero points minus one. `dynamic` overrides bits per module: the first pattern that matches from the start of its name.
"""

import json
import re
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM


def unpack(words, bits, count):
    """int32 [n, words] -> int64 [n, count]"""
    place = torch.arange(count * bits)
    single = (words[:, place // 32].to(torch.int64) >> (place % 32)) & 1
    return (single.view(words.shape[0], count, bits) << torch.arange(bits)).sum(-1)


def bits_of(module, config):
    for pattern, override in config.get("dynamic", {}).items():
        if re.match(re.sub(r"^[+-]:", "", pattern), module):
            return override.get("bits", config["bits"])
    return config["bits"]


def dequantize(module, tensors, config):
    qweight, scales = tensors[f"{module}.qweight"], tensors[f"{module}.scales"].float()
    group = tensors[f"{module}.g_idx"].long()
    bits = bits_of(module, config)
    codes = unpack(qweight.T.contiguous(), bits, group.numel())
    zeros = unpack(tensors[f"{module}.qzeros"], bits, scales.shape[1])
    if config.get("checkpoint_format", "gptq") == "gptq":
        zeros = zeros + 1
    return (codes - zeros[group].T).float() * scales[group].T


def main(path, request):
    config = json.loads((path / "config.json").read_text())
    quantization = config.pop("quantization_config")
    tensors = {k: v for f in sorted(path.glob("*.safetensors")) for k, v in load_file(f).items()}
    weights = {k: v for k, v in tensors.items() if not re.search(r"\.(qweight|qzeros|scales|g_idx)$", k)}
    for name in tensors:
        if name.endswith(".qweight"):
            module = name.removesuffix(".qweight")
            weights[f"{module}.weight"] = dequantize(module, tensors, quantization)
    with tempfile.TemporaryDirectory() as plain:
        save_file({k: v.float().contiguous() for k, v in weights.items()}, Path(plain) / "model.safetensors")
        (Path(plain) / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
        model = AutoModelForCausalLM.from_pretrained(plain, config=AutoConfig.from_pretrained(plain), dtype=torch.float32)
    model.eval()
    nll, last = [], None
    with torch.no_grad():
        for window in request["windows"]:
            ids = torch.tensor(window)
            logits = model(ids[None]).logits[0].float()
            last = logits[-1].tolist() if last is None else last
            nll += torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none").tolist()
    print(json.dumps({"nll": nll, "logits": last}))


main(Path(sys.argv[1]), json.load(sys.stdin))
