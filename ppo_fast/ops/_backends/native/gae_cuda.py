"""The launcher of the extension's CUDA kernels; it neither waits for the device nor reads from it."""

import torch

from ppo_fast.ops._backends.native.extension import extension
from ppo_fast.ops._core.inputs import GaeInputs
from ppo_fast.ops._core.results import GaeResult


def gae(inputs: GaeInputs) -> GaeResult:
    """Advantages and returns in float32, of inputs in float32, bfloat16 or float16 and of any strides."""
    rewards, bootstrap = inputs.rewards, inputs.bootstrap
    if bootstrap is not None:
        inputs = inputs._replace(bootstrap=bootstrap.to(torch.float32).contiguous())
    results = GaeResult(
        torch.empty(rewards.shape, dtype=torch.float32, device=rewards.device),
        torch.empty(rewards.shape, dtype=torch.float32, device=rewards.device),
    )
    extension.gae_cuda(inputs, results, torch.cuda.current_stream(rewards.device).cuda_stream)
    return results
