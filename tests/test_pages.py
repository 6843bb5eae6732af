"""README and docs/ show what runs: blocks are executed, tables come from committed results, links lead to files."""

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ppo_fast.rlhf.config.names import field_defaults
from ppo_fast.rlhf.config.ppo import PPOConfig
from ppo_fast.rlhf.ppo.reward_hacking import RULES
from tests.pages import DOCS, PAGES, ROOT, Site, blocks

pytestmark = pytest.mark.filterwarnings("ignore:the judge gave no score")  # a model of one layer

# Pages whose blocks use runs that another page makes.
AFTER = {"checkpoints.md": ["train.md"], "advantages.md": ["pipeline.md"]}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    return Site(tmp_path_factory.mktemp("site"))


@pytest.mark.parametrize("page", [page for page in PAGES if any(block.kind == "run" for block in blocks(page))])
def test_the_blocks_of_a_page_run(page: str, site: Site) -> None:
    site.run(*AFTER.get(page, []), page)


def test_every_block_has_a_marker() -> None:
    for page in PAGES:
        for block in blocks(page):
            known = block.kind in ("run", "file", "example", "command", "not run")
            assert known or block.language in ("text", "math"), f"{page}: no marker before\n{block.text}"
            assert block.kind != "not run" or block.name, f"{page}: no reason why this is not run\n{block.text}"


def test_files_and_examples_are_used_and_current() -> None:
    shown = [block for page in PAGES for block in blocks(page)]
    run = "\n".join(block.text for block in shown if block.kind in ("run", "file"))
    for block in shown:
        if block.kind == "example":
            assert block.text == (ROOT / block.name).read_text()
            assert f'"{Path(block.name).name}"' in (ROOT / "tests/test_examples.py").read_text()
        if block.kind == "file":
            assert block.name in run, f"no block uses {block.name}"


def test_tables_are_what_the_committed_results_say() -> None:
    command = [sys.executable, ROOT / "benchmarks" / "tables.py", "--check"]
    assert subprocess.run(command, check=False).returncode == 0


def test_pages_made_from_the_code_are_current() -> None:
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / ".ci" / "site_pages.py")
    site_pages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(site_pages)
    assert site_pages.main(["--check"]) == 0, "run `make pages`"


def test_every_page_is_in_the_navigation_and_in_llms_txt() -> None:
    nav, llms = (ROOT / "mkdocs.yml").read_text(), (DOCS / "llms.txt").read_text()
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*") if path.suffix in (".md", ".ipynb")}
    pages -= {page for page in pages if page.replace(".md", ".ipynb") in pages and page.endswith(".md")}
    assert set(re.findall(r"\]\(([^)]*)\): \S", llms)) == pages
    assert {page.replace(".ipynb", ".md") for page in pages} == set(re.findall(r"^ +- (\S+\.md)$", nav, re.MULTILINE))


def test_links_lead_to_files() -> None:
    for page, path in PAGES.items():
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", path.read_text()):
            assert (path.parent / target).exists(), f"{page}: {target}"


def test_the_front_is_short_and_leads_to_the_pages() -> None:
    readme = PAGES["README.md"].read_text()
    assert len(readme.splitlines()) <= 215
    assert len(set(re.findall(r"\]\((docs/[\w./-]+)\)", readme))) >= 12


def test_no_sentence_stands_twice() -> None:
    seen: dict[str, str] = {}
    for page, path in PAGES.items():
        if page == "knobs.md":  # made from the help
            continue
        code = r"^```.*?^```$|^<!-- table.*?end table -->$|^<!--.*?-->$|^[|#].*?$"
        prose = re.sub(code, "\n\n", path.read_text(), flags=re.MULTILINE | re.DOTALL)
        for sentence in re.split(r"(?<=[.:;?])\s|\n\n|^\* ", prose, flags=re.MULTILINE):
            words = " ".join(sentence.split())
            assert len(words) < 60 or words not in seen, f"{page} and {seen.get(words)}: {words}"
            seen[words] = page


def test_every_public_name_is_in_the_reference() -> None:
    import ppo_fast.ops
    import ppo_fast.rlhf

    listed = re.findall(r"^::: \S+\.(\w+)$", "".join(path.read_text() for path in (DOCS / "api").iterdir()), re.M)
    assert {*ppo_fast.ops.__all__, *ppo_fast.rlhf.__all__} - {*listed} == set()
    assert len(listed) == len({*listed})


PROSE = "".join(path.read_text() for page, path in PAGES.items() if page not in ("knobs.md", "migrating-from-trl.md"))


def test_the_metrics_that_pages_name_are_logged(site: Site) -> None:
    site.run("rewards.md")
    run = site.directory / "runs/ensemble"
    metrics = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"hacking/ensemble_std", "filter/masked", "eval/win_rate", "eval/capitals"} <= metrics.keys()
    assert (run / "best" / "config.json").is_file()
    groups = sorted({name.partition("/")[0] for name in metrics if "/" in name})
    named = re.findall(rf"`((?:{'|'.join(groups)})/\w+)`", PROSE)
    assert len(named) > 30
    assert set(named) - metrics.keys() == set()


def test_the_options_that_pages_name_exist() -> None:
    fields = field_defaults(PPOConfig)
    groups = sorted({name.partition(".")[0] for name in fields if "." in name})
    named = re.findall(rf"`((?:{'|'.join(groups)})\.\w+)", PROSE)
    assert len(named) > 80
    assert set(named) - {"reward.py"} - fields.keys() == set()


def test_the_ten_knobs_have_the_defaults_of_the_config() -> None:
    fields = field_defaults(PPOConfig)
    rows = re.findall(r"^\| (`[^|]*`) \((\S+)\) \|", PAGES["debugging.md"].read_text(), re.MULTILINE)
    assert len(rows) == 10
    for names, default in rows:
        assert [fields[name] for name in re.findall(r"`(.*?)`", names)] == [float(default)] * (names.count("`") // 2)


def test_the_page_on_debugging_names_every_sign_of_reward_hacking() -> None:
    for sign in RULES:
        (row,) = re.findall(rf"^\| `{sign.metric}` .*", PAGES["debugging.md"].read_text(), re.MULTILINE)[-1:]
        assert sign.limit == 0 or f" {sign.limit:g} " in row
        for field in re.findall(r"\w+\.\w+", sign.remedy):
            assert field in row


def test_the_figures_of_sampling_on_a_gpu_are_those_of_the_committed_result() -> None:
    cases = json.loads((ROOT / "benchmarks/results/NVIDIA-H200/rollout-7b.json").read_text())["cases"]
    page = PAGES["benchmarks.md"].read_text()
    for row, case in zip(("all weights", "adapters of rank 64"), cases.values(), strict=True):
        rate, times = f"{case['slots_tokens_per_s']:,.0f}", [case[f"{name}_s"] for name in ("slots", "prefill")]
        cells = [rate, *(f"{x:.2f} s" for x in times), f"{case['step_ms']:.2f} ms"]
        cells += [*(f"{case[f'{name}_s']:.2f} s" for name in ("capture", "first_token")), f"{case['peak_gib']:.1f} GiB"]
        assert f"| {row} | {' | '.join(cells)} |" in page


def test_the_shares_of_the_profile_are_those_of_the_committed_result() -> None:
    times = json.loads((ROOT / "benchmarks/results/AMD-EPYC-AVX512/profile.json").read_text())["milliseconds"]
    text = " ".join(PAGES["benchmarks.md"].read_text().split())
    for group, milliseconds in times.items():
        assert f"{group} {round(100 * milliseconds / sum(times.values()))} %" in text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("quickstart", "pip install '.[train]' && ppo-fast quickstart\n"),
        ("test", "pip install -e '.[dev]' && make check\n"),
    ],
)
def test_the_set_up_commands_of_the_front_can_be_extracted(name: str, expected: str) -> None:
    command = [sys.executable, ROOT / ".ci" / "readme_command.py", name]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == expected
