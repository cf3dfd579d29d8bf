"""The work of a comparison, candidate by candidate, one after another or side by side: training, then the criteria."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm import tqdm

from laplace_ws.experiment.records import read_run
from laplace_ws.experiment.run import load_data, run_experiment, torch_settings
from laplace_ws.experiment.workers import side_by_side
from laplace_ws.marglik.schedule import TrainingDiverged
from laplace_ws.selection.criteria import CRITERIA
from laplace_ws.selection.members import Member
from laplace_ws.selection.networks import Networks, Split
from laplace_ws.selection.scores import Score, scored


@dataclass(frozen=True)
class Job:
    """What is to be done for a candidate.

    Attributes:
        member: the candidate.
        trains: whether it still has to be trained.
        resume: whether its training goes on from a checkpoint.
        criteria: that are wanted, that which ranks first.
        split: the part of the training images, and the rest.
        scratch: folder of the criteria.
        threads: of torch.
    """

    member: Member
    trains: bool
    resume: bool
    criteria: tuple[str, ...]
    split: Split
    scratch: Path
    threads: int


Outcome = str | Mapping[str, Score]
"""The criteria of a candidate, or why it is not ranked."""


def do_all(jobs: Sequence[Job], n_workers: int) -> list[Outcome]:
    """The outcome of each job, in order."""
    outcomes = []
    with tqdm(total=len(jobs), unit="candidate", disable=None) as bar:
        for outcome in side_by_side(do, [(job,) for job in jobs], n_workers):
            outcomes.append(outcome)
            bar.update()
    return outcomes


def do(job: Job) -> Outcome:
    """Train one candidate into its run folder, unless that is done, and compute its criteria."""
    member = job.member
    if job.trains:
        try:
            run_experiment(replace(member.run, out=str(member.folder.parent)), resume=job.resume)
        except TrainingDiverged as error:
            return str(error)
    found = read_run(member.folder).tuned
    evidence = found.log_marginal_likelihood
    if evidence is None or found.test_nll is None:
        return "its log marginal likelihood or its test NLL is not finite"

    def networks() -> Networks:
        return Networks(member.run, member.folder, load_data(member.run), evidence, job.split, job.scratch)

    basis = {"run": member.run.settings(), "log_marginal_likelihood": evidence, "split": asdict(job.split)}
    try:
        with torch_settings(job.threads, job.split.seed):
            scores = scored(networks, job.criteria, basis, job.scratch)
    except TrainingDiverged as error:
        return f"on a part of the images: {error}"
    if scores[job.criteria[0]].value is None:
        return f"its {CRITERIA[job.criteria[0]].title} is not finite"
    return scores
