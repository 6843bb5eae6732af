"""The model card in `final/`, and its way to the hub."""

import inspect
import warnings

import huggingface_hub
import pytest
from huggingface_hub import HfApi, ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_fast.rlhf import UserError, train_ppo
from ppo_fast.rlhf.models import tiny
from ppo_fast.rlhf.reports import card
from tests.helpers import raises_exactly
from tests.rlhf.conftest import PROMPTS
from tests.rlhf.supervised_factories import make_model

DRAWN = {"updates": card.ROWS, "optim": {"epochs": 1, "minibatch_size": 8}}


@pytest.fixture
def run(make_config, tokenizer):
    """run(**config) -> the result of a run of PPO on a tiny model."""

    def go(**values):
        policy = tiny.make_model(64, hidden=32, layers=1, heads=2)
        reward = lambda completions, **_: [float(len(text)) for text in completions]  # noqa: E731
        return train_ppo(make_config(**values), reward_fn=reward, prompts=PROMPTS, policy=policy, tokenizer=tokenizer)

    return go


def test_a_card_says_what_the_model_is_and_loads_it(run, monkeypatch):
    result = run(**DRAWN, kl={"coef": 0.125})
    page = (result.model / "README.md").read_text()
    found = ModelCard(page)
    assert found.data.library_name == "transformers"
    assert found.data.tags == ["ppo_fast", "ppo"]
    assert found.data.base_model is None  # no model of the hub
    assert "# LlamaForCausalLM, trained by PPO" in page
    assert "| data | rows in memory |" in page
    assert "| reward | a function in memory |" in page
    assert "kl:\n  coef: 0.125\n" in page
    assert "output_dir" not in page
    first, last = result.history[0], result.history[-1]
    assert f"| 1 | {first['reward/mean']:.4g} | {first['objective/scores']:.4g} |" in page
    assert f"| {card.ROWS} | {last['reward/mean']:.4g} |" in page
    assert "(curves.png)" in page
    assert (result.model / "curves.png").stat().st_size > 10_000
    assert AutoModelForCausalLM.from_pretrained(result.model).num_parameters() > 0
    code = page.partition("```python\n")[2].partition("```")[0].replace(card.HERE, str(result.model))
    names = {}
    exec(code, names)
    assert type(names["model"]).__name__ == "LlamaForCausalLM"
    assert names["tokenizer"].get_vocab() == AutoTokenizer.from_pretrained(result.model).get_vocab()


@pytest.mark.parametrize(
    ("stage", "model", "library", "task"),
    [
        ("reward", {}, "transformers", "text-classification"),
        ("sft", {"lora": {"rank": 2}}, "peft", "text-generation"),
    ],
)
def test_cards_of_other_stages(run_stage, tmp_path, stage, model, library, task):
    make_model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    result = run_stage(stage, policy=base, model=model, optim={"epochs": 1})
    found = ModelCard((result.model / "README.md").read_text())
    assert (found.data.library_name, found.data.pipeline_tag) == (library, task)
    assert f"| base | {tmp_path / 'base'} |" in found.text
    assert "| step | train/loss |" in found.text
    assert not (result.model / "curves.png").exists()  # it is short
    code = found.text.partition("```python\n")[2].partition("```")[0].replace(card.HERE, str(result.model))
    names = {}
    exec(code, names)
    assert names["model"].num_parameters() > 0


class Hub:
    """`HfApi` without a network, called by its true signatures."""

    def __init__(self, monkeypatch, error=None):
        self.calls, self.error = [], error
        for name in ("whoami", "create_repo", "upload_folder"):
            monkeypatch.setattr(HfApi, name, self.fake(name, inspect.signature(getattr(HfApi, name))))

    def fake(self, name, signature):
        def call(*args, **kwargs):
            given = dict(signature.bind(*args, **kwargs).arguments)
            self.calls.append((name, {key: value for key, value in given.items() if key != "self"}))
            if name == "whoami":
                return {"name": "me", "orgs": [{"name": "us"}]}
            if name == "upload_folder" and self.error is not None:
                raise self.error
            full = given["repo_id"] if "/" in given["repo_id"] else f"me/{given['repo_id']}"
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{full}")

        return call


def test_a_model_is_uploaded_after_it_is_complete(run, monkeypatch):
    hub = Hub(monkeypatch)
    result = run(updates=1, push_to_hub="us/polite")
    assert [name for name, _ in hub.calls] == ["whoami", "create_repo", "upload_folder"]
    assert hub.calls[1][1] == {"repo_id": "us/polite", "private": True, "exist_ok": True}
    upload = hub.calls[2][1]
    assert (upload["repo_id"], upload["folder_path"]) == ("us/polite", result.model)
    page = (result.model / "README.md").read_text()
    assert 'from_pretrained("us/polite")' in page


def test_a_failed_upload_leaves_the_run_done_and_says_how_to_retry(run, monkeypatch):
    Hub(monkeypatch, OSError("no route to host\nmore"))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = run(updates=1, push_to_hub="polite")
    message = (
        f"push_to_hub: cannot upload to 'polite': no route to host; the model is in {str(result.model)!r}; "
        f"hf upload polite {result.model} tries again"
    )
    assert message in [str(each.message) for each in found]
    assert AutoModelForCausalLM.from_pretrained(result.model)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a b", r"^push_to_hub: expected NAME or OWNER/NAME, got 'a b': "),
        ("them/x", r"^push_to_hub: expected an owner among me, us, got 'them'$"),
    ],
)
def test_a_name_is_checked_before_training(run, monkeypatch, name, message):
    Hub(monkeypatch)
    with pytest.raises(UserError, match=message):
        run(push_to_hub=name)


def test_who_is_not_logged_in_learns_it_before_training(run, monkeypatch):
    monkeypatch.setattr(HfApi, "whoami", lambda self: (_ for _ in ()).throw(OSError("Token is required\nmore")))
    message = "push_to_hub: not logged in to the Hugging Face Hub (hf auth login): Token is required"
    with raises_exactly(message, UserError):
        run(push_to_hub="x")


def test_a_card_that_cannot_be_written_costs_nothing(run, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(card, "write_whole", full)
    with pytest.warns(
        UserWarning, match=r"^cannot write '.*README\.md': No space left on device; the model is complete$"
    ):
        result = run(updates=1)
    assert AutoModelForCausalLM.from_pretrained(result.model)
