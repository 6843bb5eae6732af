"""perf/mfu: the work of a run by the weights of its matrices, over a rate that is measured on a GPU only."""

import pytest
import torch

from ppo_fast.rlhf import train_ppo
from ppo_fast.rlhf.models import tiny
from ppo_fast.rlhf.training.utilization import Utilization, matmul_rate, matrix_weights, training_work
from tests.rlhf.supervised_factories import make_model


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_every_matrix_but_the_embeddings_is_counted(arch):
    model = tiny.make_model(64, arch=arch, hidden=32, layers=2, heads=2)
    config = model.config
    inner = config.intermediate_size if arch == "llama" else 4 * 32
    layer = 4 * 32 * 32 + (3 if arch == "llama" else 2) * 32 * inner
    assert matrix_weights(model) == 2 * layer + 64 * 32
    assert training_work(model) == 6 * matrix_weights(model)
    model.requires_grad_(False)
    assert training_work(model) == 4 * matrix_weights(model)


def test_the_share_is_the_work_over_seconds_and_rate():
    utilization = Utilization(100.0, {"rollout": 2.0, "update": 6.0})
    found = utilization.metrics(10, {"update": 4.0}, {"rollout": 1.0, "score": 2.0, "update": 4.0})
    assert found == {"perf/mfu": (20 + 240) / 7 / 100, "perf/mfu_rollout": 0.2, "perf/mfu_update": 0.6}
    assert Utilization(None, {"update": 6.0}).metrics(10, {}, {"update": 1.0}) == {}
    assert matmul_rate(torch.device("cpu"), torch.float32) is None


def test_runs_record_it_where_the_rate_is_known(make_config, tokenizer, run_stage, monkeypatch):
    for stage in ("ppo", "supervised"):
        monkeypatch.setattr(f"ppo_fast.rlhf.{stage}.train.matmul_rate", lambda device, dtype: 1e12)
    assert 0 < run_stage("dpo").history[0]["perf/mfu"] < 1
    (metrics,) = train_ppo(
        make_config(updates=1),
        reward_fn=lambda completion_ids, **_: [float(len(ids)) for ids in completion_ids],
        prompts=["w1", "w2 w3"],
        policy=make_model(),
        tokenizer=tokenizer,
    ).history
    assert 0 < metrics["perf/mfu"] < 1
    assert {name for name in metrics if name.startswith("perf/")} == {
        "perf/mfu",
        "perf/mfu_rollout",
        "perf/mfu_logprobs",
        "perf/mfu_update",
    }


@pytest.mark.gpu
def test_the_rate_of_a_gpu():
    assert matmul_rate(torch.device("cuda"), torch.bfloat16) > 5e12
