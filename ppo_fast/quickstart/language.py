"""A small language of restaurant reviews, in which every sentence can be judged without a model.

Templates generate the reviews and a regular expression made from the same templates recognizes them, so
"is this a sentence" has an exact answer. The words carry a tone. Plain Python without imports from the
package: the quickstart copies this file into its output directory, where its runs call `gold` in their evaluations.
"""

import random
import re
from collections.abc import Callable, Collection

# Symbols are upper case; each stands for any one of its words.
NOUNS = {
    "PERSON": "waiter waitress chef host barista",
    "DISH": "soup bread curry pasta salad cake",
    "DISHES": "noodles dumplings pancakes olives",
    "FOOD": "soup bread curry pasta salad cake noodles dumplings pancakes olives",
    "PLACE": "room garden terrace kitchen",
}
WARM = {
    "MANNER": "kind friendly cheerful patient charming",
    "TASTE": "delicious fresh fragrant crisp perfect",
    "AIR": "cosy sunny spotless peaceful",
    "FELT": "loved enjoyed adored",
}
COLD = {
    "MANNER": "rude grumpy careless hasty clumsy",
    "TASTE": "bland stale greasy burnt salty",
    "AIR": "dingy noisy dirty crowded",
    "FELT": "hated regretted disliked",
}
CLAUSES = (
    "the PERSON was MANNER",
    "the DISH was TASTE",
    "the DISHES were TASTE",
    "the PLACE was AIR",
    "we FELT the FOOD",
    "a MANNER PERSON served us TASTE FOOD",
)
REVIEWS = (
    "CLAUSE .",
    "CLAUSE and CLAUSE .",
    "CLAUSE but CLAUSE .",
    "CLAUSE , CLAUSE and CLAUSE .",
)
MAX_WORDS = 24  # three clauses of seven words, a comma, an "and" and the full stop

WARM_WORDS = frozenset(" ".join(WARM.values()).split())
COLD_WORDS = frozenset(" ".join(COLD.values()).split())


def words() -> list[str]:
    """Every word of the language, sorted."""
    symbols = {"CLAUSE", *NOUNS, *WARM}
    texts = (*REVIEWS, *CLAUSES, *NOUNS.values(), *WARM.values(), *COLD.values())
    return sorted({word for text in texts for word in text.split()} - symbols)


def sample(rng: random.Random) -> str:
    """Draw a review, as words joined by spaces: "the soup was fresh but the waiter was rude ."

    Its clauses are all warm or all cold, up to a "but", which turns the tone.
    """
    tone, other = rng.sample([WARM, COLD], 2)
    parts = []
    for part in rng.choice(REVIEWS).split():
        if part == "but":
            tone, other = other, tone
        parts.append(_sample_clause(rng, NOUNS | tone) if part == "CLAUSE" else part)
    return " ".join(parts)


def _sample_clause(rng: random.Random, lexicon: dict[str, str]) -> str:
    clause = rng.choice(CLAUSES).split()
    return " ".join(rng.choice(lexicon[part].split()) if part in lexicon else part for part in clause)


def sample_answers(
    count: int, rng: random.Random, *, longest: int = 5, without: Collection[str] = ()
) -> list[dict[str, str]]:
    """Draw ``count`` reviews cut in two, {"prompt", "completion"}: the first 1 to ``longest`` words, and the rest.

    A review whose prompt is in ``without`` is drawn again.
    """
    answers: list[dict[str, str]] = []
    while len(answers) < count:
        words = sample(rng).split()
        cut = min(rng.randint(1, longest), len(words) - 1)
        prompt = " ".join(words[:cut])
        if prompt not in without:
            answers.append({"prompt": prompt, "completion": " " + " ".join(words[cut:])})
    return answers


def sample_prompts(count: int, rng: random.Random, *, longest: int = 5, without: Collection[str] = ()) -> list[str]:
    """Draw ``count`` beginnings: the first 1 to ``longest`` words of sampled reviews, never a whole one."""
    return [answer["prompt"] for answer in sample_answers(count, rng, longest=longest, without=without)]


def sample_test_prompts(count: int, rng: random.Random, *, shortest: int = 3) -> list[str]:
    """Draw ``count`` different beginnings of ``shortest`` words or more, few enough that training can do without them.

    There are three beginnings of one word and 35 of two: training cannot do without those.
    """
    found: dict[str, None] = {}
    while len(found) < count:
        found.update((prompt, None) for prompt in sample_prompts(1, rng) if len(prompt.split()) >= shortest)
    return [*found]


def _any_of(texts: list[str]) -> str:
    return f"(?:{'|'.join(texts)})"


def _recognizer() -> re.Pattern[str]:
    """The expression of all reviews. It judges form, not sense: any clause may take words of either tone."""
    lexicon = {symbol: _any_of(text.split()) for symbol, text in NOUNS.items()}
    lexicon |= {symbol: _any_of(f"{WARM[symbol]} {COLD[symbol]}".split()) for symbol in WARM}
    clauses = [" ".join(lexicon.get(part, part) for part in clause.split()) for clause in CLAUSES]
    forms = [review.replace(".", r"\.").replace("CLAUSE", _any_of(clauses)) for review in REVIEWS]
    return re.compile(_any_of(forms))


_REVIEW = _recognizer()


def is_valid(text: str) -> bool:
    """Whether ``text`` is a complete, well-formed review."""
    return _REVIEW.fullmatch(text) is not None


def tone(text: str) -> int:
    """Warm words minus cold words."""
    return sum((word in WARM_WORDS) - (word in COLD_WORDS) for word in text.split())


def score(text: str) -> float:
    """Warm words minus cold words if ``text`` is a well-formed review, else -3."""
    return float(tone(text)) if is_valid(text) else -3.0


def reward(prompts: list[str], completions: list[str], completion_ids: list, **columns: list) -> list[float]:
    """The score of each prompt together with its completion, as a reward function."""
    return [score(f"{prompt} {completion}") for prompt, completion in zip(prompts, completions, strict=True)]


def gold(generate: Callable[[list[str]], list[str]], **_: object) -> dict[str, float]:
    """An evaluator: the mean score of completions, and the share of well-formed ones, that no training sees."""
    prompts = sample_prompts(200, random.Random(2))
    texts = [f"{prompt} {completion}" for prompt, completion in zip(prompts, generate(prompts), strict=True)]
    return {"gold": sum(map(score, texts)) / len(texts), "valid": sum(map(is_valid, texts)) / len(texts)}
