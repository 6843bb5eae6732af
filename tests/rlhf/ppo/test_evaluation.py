"""Evaluation: held-out prompts, paired with the model at the start; user's evaluators; the best model kept."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from ppo_fast.rlhf import UserError, train_ppo
from ppo_fast.rlhf.models import tiny
from ppo_fast.rlhf.ppo.evaluation import load_evaluation
from ppo_fast.rlhf.ppo.reward_sources import FunctionSource
from ppo_fast.rlhf.ppo.rewards import Scorer
from ppo_fast.rlhf.ppo.rollout import generate
from ppo_fast.rlhf.preflight import METRICS
from tests.rlhf.conftest import PROMPTS

HELD_OUT = ["w20", "w21 w22 w23", "w24 w25"]


def even(completion_ids, **_):
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


@pytest.fixture
def make_evaluation(make_config, make_models):
    """make_evaluation(reward_fn, **config) -> Evaluation of a tiny model on HELD_OUT, `begin` done."""

    def make(function=even, *, reward=None, data=None, **settings):
        config = make_config(
            data=data or {},
            evaluation={"every": 1} | settings,
            reward={"missing_eos_penalty": 0.0} | (reward or {}),
        )
        models = make_models(config)
        scorer = Scorer([FunctionSource(function)], config.reward)
        evaluation = load_evaluation(config, models, scorer, HELD_OUT)
        evaluation.begin()
        return evaluation

    return make


@pytest.fixture
def run(make_config, tokenizer):
    """run(reward_fn, **config) -> PPOResult of a new tiny model."""

    def go(reward_fn=even, *, eval_prompts=HELD_OUT, resume=False, **values):
        policy = tiny.make_model(64, hidden=32, layers=1, heads=2)
        return train_ppo(
            make_config(**values),
            reward_fn=reward_fn,
            prompts=PROMPTS,
            policy=policy,
            tokenizer=tokenizer,
            eval_prompts=eval_prompts,
            resume=resume,
        )

    return go


def test_the_model_at_the_start_ties_with_itself(make_evaluation, tmp_path):
    def middle(completion_ids, **_):
        return [sum(ids) / len(ids) / 10 for ids in completion_ids]

    evaluation = make_evaluation(middle)
    metrics, _ = evaluation.run(tmp_path / "best")
    assert metrics.keys() == {*METRICS}
    assert metrics["eval/win_rate"] == 0.5
    assert metrics["eval/kl"] == 0
    expected = middle(evaluation.start)
    assert metrics["eval/scores"] == pytest.approx(sum(expected) / 3)
    assert metrics["eval/length"] == pytest.approx(sum(map(len, evaluation.start)) / 3)
    assert 0 <= metrics["eval/truncated_frac"] <= 1


def test_an_answer_at_the_start_that_a_stop_string_ended_lacks_no_eos(make_evaluation, tmp_path, monkeypatch):
    def stopped(*arguments):
        generation = generate(*arguments)
        return dataclasses.replace(generation, ended=torch.ones_like(generation.ended))

    monkeypatch.setattr("ppo_fast.rlhf.ppo.environment.generate", stopped)
    evaluation = make_evaluation(reward={"missing_eos_penalty": 1.0})
    assert not any(ids[-1] == 2 for ids in evaluation.start)
    metrics, _ = evaluation.run(tmp_path / "best")
    assert metrics["eval/win_rate"] == 0.5
    assert metrics["eval/scores"] == pytest.approx(sum(even(evaluation.start)) / 3)


def test_a_better_model_wins(make_evaluation, tmp_path):
    evaluation = make_evaluation()
    with torch.no_grad():  # the logits of odd tokens fall far below the others
        head = evaluation.models.policy.get_output_embeddings()
        head.bias = torch.nn.Parameter(torch.where(torch.arange(64) % 2 == 1, -50.0, 0.0))
    metrics, _ = evaluation.run(tmp_path / "best")
    start = even(evaluation.start)
    assert metrics["eval/scores"] == 1
    assert metrics["eval/win_rate"] == pytest.approx(sum(1.0 if x < 1 else 0.5 for x in start) / 3)
    assert metrics["eval/kl"] > 0.5


def test_running_statistics_are_read_and_not_changed(make_evaluation, tmp_path):
    evaluation = make_evaluation(reward={"normalize": "running"})
    evaluation.scorer.running[0].update(torch.tensor([0.0, 2.0]))
    metrics, _ = evaluation.run(tmp_path / "best")
    assert metrics["eval/scores"] == pytest.approx(sum(even(evaluation.start)) / 3 - 1)
    assert metrics["eval/win_rate"] == 0.5
    assert evaluation.scorer.running[0].count == 2


def test_evaluators_see_the_policy(make_evaluation, tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "def words(generate, **_):\n"
        "    texts = generate(['w30', 'w31 w32'])\n"
        "    return {'texts': len(texts), 'words': sum(len(text.split()) for text in texts)}\n"
        "def size(model, tokenizer, **_):\n"
        "    return {'vocabulary': len(tokenizer), 'width': model.config.hidden_size}\n"
    )
    metrics, _ = make_evaluation(evaluators=[f"{path}:words", f"{path}:size"]).run(tmp_path / "best")
    assert metrics["eval/texts"] == 2
    assert metrics["eval/words"] > 0
    assert (metrics["eval/vocabulary"], metrics["eval/width"]) == (64, 32)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 3", r"^evaluator: expected a dict of numbers, got 3$"),
        ("generate('Hi')", r"^evaluator: generate: expected a list of prompts, got 'Hi'$"),
        ("return {'a': 'b'}", r"^evaluator: expected a dict of numbers, got \{'a': 'b'\}$"),
        ("return {'a': float('nan')}", r"^eval/a is not finite: nan$"),
        ("raise KeyError('x')", r"^the evaluator 'own' failed with KeyError: 'x' \(own\.py:2\)$"),
    ],
)
def test_a_bad_evaluator_is_named(make_evaluation, tmp_path, body, message):
    (tmp_path / "own.py").write_text(f"def own(generate, **_):\n    {body}\n")
    evaluation = make_evaluation(evaluators=[f"{tmp_path / 'own.py'}:own"])
    with pytest.raises(UserError, match=message):
        evaluation.run(tmp_path / "best")


@pytest.mark.parametrize(("best_is", "kept"), [("max", [0, 2]), ("min", [0, 1])])
def test_the_best_model_is_kept(make_evaluation, tmp_path, monkeypatch, best_is, kept):
    evaluation = make_evaluation(best="eval/length", best_is=best_is)
    lengths, saved = [3.0, 2.0, 4.0, 4.0], []
    monkeypatch.setattr("ppo_fast.rlhf.ppo.evaluation.save_models", lambda models, directory: saved.append(directory))
    notes = []
    for length in lengths:
        monkeypatch.setattr(evaluation, "_measured", lambda value=length: {"eval/length": value})
        notes.append(evaluation.run(tmp_path / "best")[1])
    assert [number for number, note in enumerate(notes) if note] == kept
    assert saved == [tmp_path / "best"] * len(kept)
    assert notes[0] == "best eval/length so far, 3: saved in best"


def test_the_metric_of_the_best_must_be_measured(make_evaluation, tmp_path):
    with pytest.raises(UserError, match=r"^evaluation\.best: expected one of eval/scores, .*, got 'eval/score'$"):
        make_evaluation(best="eval/score").run(tmp_path / "best")


def test_a_run_evaluates_in_time_and_leaves_its_random_numbers_alone(run, tmp_path):
    settings = {"every": 2, "best": "eval/scores"}
    with_it = run(updates=3, evaluation=settings, output_dir=str(tmp_path / "a"))
    without = run(updates=3, eval_prompts=None, output_dir=str(tmp_path / "b"))
    assert ["eval/scores" in metrics for metrics in with_it.history] == [False, True, True]
    for ours, theirs in zip(with_it.history, without.history, strict=True):
        assert ours["objective/kl"] == theirs["objective/kl"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "best")
    assert not (tmp_path / "b" / "best").exists()
    records = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert records[1]["note"].startswith("best eval/scores so far, ")


def test_a_run_ends_when_the_best_has_not_been_bettered_for_long_enough(run, tmp_path):
    scores = iter(
        [0.0, 0.0, -1.0, 0.0, 2.0, 1.0, 2.0, 2.0, 1.0, 3.0]
    )  # of evaluations: of answers now, then of the first

    def reward(completion_ids, **_):
        return [next(scores) if len(completion_ids) == len(HELD_OUT) else 0.5] * len(completion_ids)

    settings = {"every": 1, "patience": 2}
    values = {"updates": 9, "evaluation": settings, "checkpoint": {"every": 3}, "reward": {"missing_eos_penalty": 0.0}}
    result = run(reward, **values)
    assert [metrics["eval/scores"] for metrics in result.history] == [0.0, -1.0, 2.0, 2.0, 1.0]
    again = run(lambda **_: 1 / 0, resume=True, **values)  # nothing is left to do
    assert (len(again.history), again.model.is_dir()) == (5, True)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["note"] == "stopped early: no better eval/scores in 2 evaluations"


def test_an_evaluator_gets_an_answer_to_every_prompt(make_evaluation):
    evaluation = make_evaluation(data={"max_prompt_tokens": 3, "deduplicate": True})
    assert len(evaluation._complete(["w1", "w1", "w2"])) == 3
    with (
        pytest.raises(UserError, match=r"^evaluator: expected prompts of at most 3 tokens, got 1 longer ones$"),
        pytest.warns(UserWarning, match="dropped 1 of 2 prompts longer"),
    ):
        evaluation._complete(["w1", "w1 w2 w3 w4"])


def test_held_out_prompts_must_fit_the_model(run):
    with pytest.raises(UserError, match=r"^rollout\.max_new_tokens: expected at most 8 .*the longest prompt of 120"):
        run(eval_prompts=[" ".join(["w1"] * 120)], evaluation={"every": 1}, rollout={"max_new_tokens": 16})


def test_a_resumed_run_must_have_the_same_held_out_prompts(run):
    settings = {"evaluation": {"every": 2}, "checkpoint": {"every": 1}}
    run(updates=1, **settings)
    with pytest.raises(UserError, match=r"^resume: expected the held-out prompts that the run was begun with, got"):
        run(updates=2, eval_prompts=["w20"], resume=True, **settings)


def test_held_out_prompts_come_from_a_file(run, tmp_path):
    path = tmp_path / "held_out.jsonl"
    path.write_text('{"prompt": "w20"}\n')
    result = run(updates=1, eval_prompts=None, evaluation={"every": 1, "prompts": str(path)})
    assert "eval/win_rate" in result.history[0]
    with pytest.warns(UserWarning, match=r"^evaluation\.every is 0: the held-out prompts are not used$"):
        run(updates=1, eval_prompts=None, evaluation={"prompts": str(path)}, overwrite=True)
    with pytest.raises(UserError, match=r"^evaluation\.prompts: expected a file of prompts, got null$"):
        run(updates=1, eval_prompts=None, evaluation={"every": 1}, overwrite=True)
    with pytest.raises(UserError, match=r"^evaluation\.prompts: no such file 'none\.jsonl' in /"):
        run(updates=1, eval_prompts="none.jsonl", evaluation={"every": 1}, overwrite=True)
