"""How numbers are found on a training: scores of samples, counts of the network, what training logged."""

from collections.abc import Callable
from typing import Any

from gesso.evaluate import measure, protocols
from gesso.generate import device_of
from gesso.tables import inside
from gesso.tables.plan import Job
from gesso.tables.table import By


def scores(job: Job) -> dict[str, Any]:
    """eval.scores of samples, the least over eval.repeats as EDM2 reports them; the protocol with them."""
    assert job.trained is not None
    run = protocols.measured(job.trained.folder, job.part.protocol, list(job.settings))
    result, _ = measure.scores_of(measure.Work(job.trained.folder, run, device_of(run)), lambda done, total: None)
    return {"found": {name: each["least"] for name, each in result["scores"].items()}, "protocol": result["protocol"]}


FOUND: dict[By, Callable[[Job], dict[str, Any]]] = {
    "scores": scores, "gradients": inside.gradients, "attention": inside.attention,
}  # fmt: skip
