"""The judge: what it is asked, how its answers are read, and a local model in its place."""

import pytest
import torch

from ppo_fast.rlhf import UserError
from ppo_fast.rlhf.decoding.slots import run_slots
from ppo_fast.rlhf.models import tiny
from ppo_fast.rlhf.ppo.judge import Judge, read_score
from tests.helpers import raises_exactly


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Clear and kind.\nScore: 7", 7.0),
        ("Score: 3 at first sight. On reflection:\n**Score:** 8/10.", 8.0),
        ("A fair try, 6 out of 10", 6.0),
        ("I would say 4.5 / 10.", 4.5),
        ("My rating is 9!", 9.0),
        ("The critique.\n\n  **5**\n", 5.0),
        ("Score (1-10): 2", 2.0),
        ("On a scale of 1 to 10, the score: 10/10", 10.0),
        ("It breaks principle 2.", None),
        ("Score: 11", None),
        ("Score: -3", None),
        ("No comment", None),
        ("", None),
    ],
)
def test_scores_are_read_from_answers(answer, score):
    assert read_score(answer, (1, 10)) == score


def test_a_negative_scale_is_read():
    assert read_score("Score: -2", (-5, 5)) == -2


def test_scores_are_brought_to_0_1_and_the_unread_count():
    judge = Judge(lambda instructions: ["Score: 1", "Score: 10", "Score: 5.5", "hm"], principles=["Be kind."])
    assert judge(prompts=["p"] * 4, completions=["a", "b", "c", "d"], completion_ids=[]) == [0.0, 1.0, 0.5, 0.5]
    assert judge.unread == 1


def test_a_judge_without_scores_warns():
    judge = Judge(lambda instructions: ["hm", "so"], rubric="5 is best.", scale=(0, 5))
    with pytest.warns(UserWarning, match=r"^the judge gave no score to 2 of 2 responses$"):
        assert judge(prompts=["p", "q"], completions=["a", "b"]) == [0.5, 0.5]


def test_the_instruction_holds_standard_prompt_and_response_and_asks_for_the_critique_first():
    seen = []

    def answers(instructions):
        seen.extend(instructions)
        return ["Score: 3"] * len(instructions)

    prompt = [{"role": "user", "content": "How are you?"}]
    Judge(answers, principles=["Be kind.", "Be brief."], scale=(0, 5))(prompts=[prompt], completions=["Score: 5"])
    (text,) = seen
    assert "1. Be kind.\n2. Be brief." in text
    assert "<prompt>\nuser: How are you?\n</prompt>\n<response>\nScore: 5\n</response>" in text
    assert text.index("critique") < text.index('"Score: N"')
    assert text.endswith("from 0 (worst) to 5 (best).")


def test_braces_in_a_response_are_left_alone():
    judge = Judge(lambda instructions: ["Score: 1"], rubric="r")
    assert "{prompt} {0}" in judge.instruction("p", "{prompt} {0}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Judge: expected principles or a rubric, got both or neither"),
        ({"principles": ["a"], "rubric": "b"}, "Judge: expected principles or a rubric, got both or neither"),
        (
            {"rubric": "b", "model": "m", "device": "tpu"},
            "Judge: device: expected 'auto' or one of 'cpu', got 'tpu'",
        ),
        ({"rubric": "b", "scale": (5, 5)}, "Judge: expected a scale from a lower to a higher score, got (5, 5)"),
    ],
)
def test_a_judge_that_cannot_be_is_refused(options, message):
    with raises_exactly(message, UserError):
        Judge(**{"model": lambda instructions: []} | options)


@pytest.fixture
def says_seven(tmp_path):
    """A model directory whose model answers every text with "7", and its tokenizer, without a chat template."""
    tokenizer = tiny.make_tokenizer(["7", "judge"])
    model = tiny.make_model(len(tokenizer), hidden=16, layers=1, heads=2, max_positions=512)
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(1.0)
        for name, weight in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.zero_()  # so that the hidden state is all ones everywhere
        model.get_output_embeddings().weight.fill_(0.0)[tokenizer.convert_tokens_to_ids("7")] = 1.0
    model.save_pretrained(tmp_path)
    tokenizer.padding_side = "right"  # as most models have it; generation needs the other
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_a_local_model_judges(says_seven):
    judge = Judge(str(says_seven), principles=["Be kind."], scale=(6, 8), max_new_tokens=1, batch_size=2)
    assert judge.answer(["judge judge", "judge", "judge judge judge"]) == ["7"] * 3
    assert judge(prompts=["a", "b", "c"], completions=["d", "e", "f"]) == [0.5] * 3
    assert judge.unread == 0


def test_a_local_model_is_asked_through_its_chat_template(says_seven, monkeypatch):
    (says_seven / "chat_template.jinja").write_text("judge {{ messages[0]['content'] }}")
    judge = Judge(str(says_seven), rubric="r", max_new_tokens=1)
    seen = []

    def engine(model, requests, settings):
        seen.extend(judge.answer.tokenizer.decode(request.prompt) for request in requests)
        return run_slots(model, requests, settings)

    monkeypatch.setattr("ppo_fast.rlhf.ppo.judge.find_engine", lambda *_: engine)
    judge.answer(["7 7", "7"])
    assert seen == ["judge 7 7", "judge 7"]
