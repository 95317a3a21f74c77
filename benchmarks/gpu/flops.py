"""The arithmetic of training, and so the share of a device's that was put to use (MFU)."""

from __future__ import annotations

from benchmarks.gpu.shapes import Shape

FORMULA = {
    "full": "6·N: 2·N forward, 4·N backward (Kaplan et al. 2020, section 2.1)",
    "lora, qlora": "4·N + 6·A: the frozen weights have no gradients of their own, so their backward is 2·N",
    "dpo": "2·N more, for the reference policy",
    "grpo": "2·N more, for sampling; of each answer's tokens alone",
    "N": "weights of all linear layers, the output layer's too; embeddings are looked up",
    "A": "weights of the adapters",
    "not counted": "attention's own products, what is recomputed, padding",
    "MFU": "FLOP a token · tokens/s over the device's dense bfloat16 peak (as Chowdhery et al. 2022, appendix B)",
}


def flops_per_token(stage: str, tuning: str, shape: Shape, rank: int) -> float:
    """The FLOP that a token costs in a stage and tuning mode; see `FORMULA`."""
    weights, adapters = shape.multiplied_parameters, shape.adapter_parameters(rank)
    training = 6 * weights if tuning == "full" else 4 * weights + 6 * adapters
    return training + (2 * weights if stage in ("dpo", "grpo") else 0)
