"""The model card of a finished run, `README.md` in its `final/`, and its upload to the Hugging Face Hub."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import shlex
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from jinja2 import Environment

from ppo_fast import __version__
from ppo_fast.rlhf.config.ppo import PPOConfig
from ppo_fast.rlhf.config.run import RunConfig
from ppo_fast.rlhf.config.supervised import RewardModelConfig, SupervisedConfig
from ppo_fast.rlhf.errors import UserError, require
from ppo_fast.rlhf.files import write_whole
from ppo_fast.rlhf.models.adapter_files import ADAPTER_CONFIG
from ppo_fast.rlhf.training.log import StageLog

CARD, CURVES = "README.md", "curves.png"
ROWS = 8  # of the table of metrics, at most; a run of as many steps has a picture
PACKAGES = ("torch", "transformers", "peft", "datasets")
HERE = "path/to/this/directory"  # of the example, without a name on the hub
PLACES = ("output_dir", "overwrite", "checkpoint", "log", "max_hours", "threads", "push_to_hub")  # not of the model
CLOCK = ("time/", "tokens_per_second", "memory/", "perf/")
SHOWN = ("reward/mean", "objective/scores", "objective/kl", "objective/entropy", "policy/clipfrac", "length/mean")
TEMPLATE = """\
---
{{ data }}
---

# {{ architecture }}, trained by {{ stage }}

{{ summary }}

| | |
|---|---|
{% for name, value in facts %}| {{ name }} | {{ value }} |
{% endfor %}

## How to load

```python
{{ load }}
```

## Curves

{% if picture %}![The metrics below by {{ unit }}](curves.png)

{% endif %}
{% if rows %}| {{ columns | join(" | ") }} |
|{{ "---|" * (columns | length) }}
{% for row in rows %}| {{ row | join(" | ") }} |
{% endfor %}
{% else %}The run logged no metrics.
{% endif %}

## Configuration

Everything else has its default.

```yaml
{{ config }}```
"""


def publish(final: Path, log: StageLog, model: Any) -> None:
    """Write the card of the model that a run saved in `final`, and upload it where `push_to_hub` names a place.

    The run is over: what fails is a warning that says how to do it by hand. Of several processes rank 0 does it.
    """
    if not log.is_main:
        return
    try:
        write_card(final, log, model)
    except OSError as error:
        warnings.warn(f"cannot write {str(final / CARD)!r}: {error.strerror}; the model is complete", stacklevel=2)
    if log.config.push_to_hub is not None:
        log.show("upload")
        push(log.config.push_to_hub, final)


def write_card(final: Path, log: StageLog, model: Any) -> None:
    """Write `README.md`, and a picture of the curves if the run has `ROWS` steps or more."""
    config, history = log.config, log.history
    picture = len(history) >= ROWS
    if picture:
        from ppo_fast.rlhf.reports import plots  # slow to import, and short runs have no picture

        plots.draw_curves({"": history}, final / CURVES, title="", panels=plots.choose_panels([history]))
    columns, rows = _table(history, log.unit)
    base = config.model.path or getattr(model, "name_or_path", "") or "a model in memory"
    environment = Environment(trim_blocks=True, keep_trailing_newline=True)
    page = environment.from_string(TEMPLATE).render(
        data=_data(final, log, base).to_yaml(),
        architecture=type(model).__name__.removeprefix("FSDP"),  # of weights that are split
        stage=log.stage,
        summary=f"{base} after {len(history):,} {log.unit}s of {log.stage} with ppo_fast {__version__}.",
        facts=_facts(config, base),
        load=_example(final, config),
        picture=picture,
        unit=log.unit,
        columns=columns,
        rows=rows,
        config=require("yaml").safe_dump(_changed(config), sort_keys=False, allow_unicode=True),
    )
    write_whole(final / CARD, page)


def check_hub(config: RunConfig) -> None:
    """Raise a UserError before training unless the model can be uploaded to `push_to_hub`, if that is set."""
    name = config.push_to_hub
    if name is None:
        return
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"push_to_hub: expected NAME or OWNER/NAME, got {name!r}: {reason}") from error
    try:
        user = HfApi().whoami()
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"push_to_hub: not logged in to the Hugging Face Hub (hf auth login): {reason}") from error
    owners = [user["name"], *(each["name"] for each in user.get("orgs", ()))]
    owner = name.rpartition("/")[0]
    if owner and owner not in owners:
        raise UserError(f"push_to_hub: expected an owner among {', '.join(owners)}, got {owner!r}")


def push(name: str, final: Path) -> None:
    """Upload a model directory; a new repository is private. A failure is a warning with the command that retries."""
    try:
        repository = HfApi().create_repo(name, private=True, exist_ok=True).repo_id
        HfApi().upload_folder(repo_id=repository, folder_path=final, commit_message=f"ppo_fast {__version__}")
    except Exception as error:  # the run is done, whatever the network does
        reason = str(error).strip().partition("\n")[0]
        retry = f"the model is in {str(final)!r}; hf upload {name} {shlex.quote(str(final))} tries again"
        warnings.warn(f"push_to_hub: cannot upload to {name!r}: {reason}; {retry}", stacklevel=3)


def _data(final: Path, log: StageLog, base: str) -> ModelCardData:
    reward = isinstance(log.config, RewardModelConfig)
    adapter = (final / ADAPTER_CONFIG).is_file()
    return ModelCardData(
        base_model=base if _on_hub(base) else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-classification" if reward else "text-generation",
        tags=["ppo_fast", log.stage.lower().replace(" ", "-")],
    )


def _on_hub(name: str) -> bool:
    """Whether a model is named by owner and name, and is no directory here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).exists()


def _facts(config: PPOConfig | SupervisedConfig, base: str) -> list[tuple[str, str]]:
    data = config.data.prompts if isinstance(config, PPOConfig) else config.data.train
    facts = [("base", base), ("data", data or "rows in memory")]
    if isinstance(config, PPOConfig):
        reward = [*filter(None, [config.reward.function]), *config.reward.models]
        facts.append(("reward", ", ".join(reward) or "a function in memory"))
    versions = [f"Python {platform.python_version()}", f"ppo_fast {__version__}"]
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return [
        (name, _cell(value)) for name, value in (*facts, ("seed", str(config.seed)), ("versions", ", ".join(versions)))
    ]


def _example(final: Path, config: RunConfig) -> str:
    """Return the lines that load the model of this directory."""
    kind = "SequenceClassification" if isinstance(config, RewardModelConfig) else "CausalLM"
    adapter = (final / ADAPTER_CONFIG).is_file()
    package, loader = ("peft", f"AutoPeftModelFor{kind}") if adapter else ("transformers", f"AutoModelFor{kind}")
    path = config.push_to_hub or HERE
    tokenizer = "from transformers import AutoTokenizer\n"
    imports = (
        f"from {package} import {loader}\n{tokenizer}"
        if adapter
        else f"from {package} import {loader}, AutoTokenizer\n"
    )
    return f'{imports}\nmodel = {loader}.from_pretrained("{path}")\ntokenizer = AutoTokenizer.from_pretrained("{path}")'


def _table(history: Sequence[Mapping[str, float]], unit: str) -> tuple[list[str], list[list[str]]]:
    """Return the columns and rows of the metrics at up to `ROWS` steps, the first and the last among them."""
    if not history:
        return [], []
    known = {name for row in history for name in row if not name.startswith(CLOCK)}
    names = [name for name in SHOWN if name in known] or [name for name in history[0] if name.startswith("train/")]
    names += sorted(name for name in known if name.startswith("eval/"))
    count = min(ROWS, len(history))
    steps = sorted({round(n * (len(history) - 1) / max(count - 1, 1)) for n in range(count)})
    rows = [
        [str(step + 1), *(f"{history[step][name]:.4g}" if name in history[step] else "" for name in names)]
        for step in steps
    ]
    return [unit, *names], rows


def _changed(config: RunConfig) -> dict[str, Any]:
    """Return the values that differ from the defaults, nested, without those that say only where and how it ran."""
    own, default = dataclasses.asdict(config), dataclasses.asdict(type(config)())
    changed = _difference(own, default)
    return {name: value for name, value in changed.items() if name not in PLACES}


def _difference(own: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in own.items():
        if isinstance(value, dict):
            value = _difference(value, default[name])
        elif value == default[name]:
            continue
        if value != {}:
            found[name] = [*value] if isinstance(value, tuple) else value
    return found


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
