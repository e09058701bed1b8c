"""What `asystem plan` shows and `placement=auto` runs."""

from asystem.controller.planning.choices import Choice, Estimate, Estimator
from asystem.controller.planning.plan import Candidate, Plan, make_plan, with_choice
from asystem.controller.planning.predict import Workload
from asystem.controller.planning.resolve import plan_run, resolve
from asystem.controller.planning.show import as_json, settings, show

__all__ = [
    "Candidate",
    "Choice",
    "Estimate",
    "Estimator",
    "Plan",
    "Workload",
    "as_json",
    "make_plan",
    "plan_run",
    "resolve",
    "settings",
    "show",
    "with_choice",
]
