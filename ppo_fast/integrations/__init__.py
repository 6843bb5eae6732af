"""The ops inside other trainers: each ``patch_*`` replaces a project's own functions, visibly and reversibly."""

from ppo_fast.integrations.openrlhf import patch_openrlhf
from ppo_fast.integrations.patching import Report
from ppo_fast.integrations.trl import patch_trl
from ppo_fast.integrations.verl import patch_verl

__all__ = ["patch_trl", "patch_openrlhf", "patch_verl", "Report"]
