"""The first screen in plain words: what was compared, which method won and by how much, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

from .analysis import Analysis
from .comparison import CONTROL, FIRST, UNTRAINED, Comparison
from .statistics import Average, Paired
from .table import count, loss, p_value, share
from .tables import FORWARD_ONLY, metric_name

SURE = 0.05
BUSY = 1.5  # clock time over processor time


@dataclass
class Story:
    """won: the best method and its margin; compared: the methods and tasks; facts, terms: headings with a sentence or two."""

    title: str
    won: str
    compared: str
    facts: list[tuple[str, str]]
    terms: list[tuple[str, str]]


def story(analysis: Analysis, other: Analysis) -> Story:
    """analysis: by the measure that ranks; other: by the other measure, mentioned if it ranks another method first."""
    models = sorted({str(info["model"]) for info in analysis.data.infos if info.get("model")})
    model = listed([name.rstrip("/").rpartition("/")[2] for name in models]) if models else "a model"
    facts = [("How sure is that?", _sure(analysis)), *_gradients(analysis), *_cautions(analysis, other)]
    title = f"Fine-tuning {model}: which method is best?"
    return Story(title, _unfinished(analysis) + _won(analysis), _compared(analysis, model), facts, _terms(analysis))


def listed(names: Sequence[str], most: int = 6) -> str:
    """a, b and c."""
    names = [*names[: most - 1], f"{len(names) - most + 1} more"] if len(names) > most else list(names)
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]


def some(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _compared(analysis: Analysis, model: str) -> str:
    data = analysis.data
    ways = sum(data.family(column) != UNTRAINED for column in data.columns)
    seeds = len(data.seeds)
    repeated = f"every run was repeated with {seeds} random seeds" if seeds > 1 else "there is one random seed"
    return (
        f"{some(ways, 'way')} of fine-tuning the language model {model} on {some(len(data.tasks), 'task')} "
        f"({listed(data.tasks)}). {_budgets(data)} (one forward pass computes the model’s loss on a "
        f"batch of examples), and {repeated}."
    )


def _budgets(data: Comparison) -> str:
    """Forward passes per run: a column may have its own, and parts of a grid may be of an earlier one."""
    columns: dict[str, set[int]] = {}
    for info in data.infos:
        if info.get("kind") == "seed" and isinstance(budget := info.get("budget"), int) and budget:
            columns.setdefault(str(info.get("column")), set()).add(budget)
    every = sorted(set().union(*columns.values()))
    if len(every) < 2:
        return "All had the same budget of " + (
            f"{count(every[0])} forward passes per run" if every else "forward passes"
        )
    each = [f"{' or '.join(map(count, sorted(found)))} for {column}" for column, found in columns.items()]
    return f"They had different budgets of forward passes per run, {listed(each)}"


def forward_only(analysis: Analysis) -> list[tuple[str, Average]]:
    """The ranking of the columns that train with forward passes only and have no failed run."""
    data, tasks = analysis.data, analysis.tasks
    return [(c, found) for c, found in analysis.ranking if data.family(c) in FORWARD_ONLY and data.steady(c, tasks)]


def amount(analysis: Analysis, value: float) -> str:
    """An average in words."""
    if analysis.measure == "loss":
        return f"an average loss of {loss(value)}"
    named = metric_name(analysis.data, analysis.tasks)
    split = analysis.data.split(analysis.tasks)
    return (
        f"{share(value)} of 100 {split} questions right" if named.startswith("accuracy") else f"{named} {share(value)}"
    )


def _unfinished(analysis: Analysis) -> str:
    data = analysis.data
    every = len(data.tasks) * len(data.columns) * len(data.seeds)
    missing = [f"{len(data.missing)} of {some(every, 'run')}"] if data.missing else []
    missing += [f"{some(len(data.untimed), 'run')} to the time budget"] if data.untimed else []
    one = not data.missing and len(data.untimed) == 1
    return f"Not finished: {' and '.join(missing)} {'is' if one else 'are'} missing. " if missing else ""


def _won(analysis: Analysis) -> str:
    data, ranked = analysis.data, forward_only(analysis)
    if not analysis.tasks:
        return "No task counts in the averages (see “Which tasks count”), so no method won; the tables show each task."
    if not any(data.family(column) in FORWARD_ONLY for column in data.columns):
        return "Every method here takes gradients, so no method that learns from forward passes alone won."
    finished = "finished and tested" if data.untested(analysis.tasks) else "finished"
    if not ranked:
        return f"No method that learns from forward passes alone {finished} all its runs, so no method won."
    (best, found), others = ranked[0], ranked[1:]
    counted, every = len(analysis.tasks), len(data.tasks)
    on = f" on the {counted} of {every} tasks that count ({listed(analysis.tasks)})" if counted < every else ""
    if not others:
        return f"Only {best} learns from forward passes alone and {finished} every run{on}: {amount(analysis, found.mean)}."
    among = "Of the methods that learn from forward passes alone, " if _has_gradients(analysis) else ""
    plain = ", the reference method," if best == data.reference else ""
    random = ", whose scales are random numbers," if data.family(best) == CONTROL else ""
    text = f"{among}{best}{plain}{random} came first{on}: {amount(analysis, found.mean)}, against "
    shown = loss if analysis.measure == "loss" else share
    base = next((value for column, value in others if column == data.reference), None)
    if base is None:
        text += f"{shown(others[0][1].mean)} for {others[0][0]}, the second."
    else:
        text += f"{shown(base.mean)} for {data.reference}, the reference method"
        if analysis.measure == "loss" and base.mean > 0:
            text += f" ({100 * (1 - found.mean / base.mean):.0f} % less)"
        text += "."
        test = analysis.tests.get(best)
        if test is None or test.holm is None or test.holm >= SURE:
            text += " The difference may be due to chance."
        elif not test.better:
            text += f" But most pairs of runs go the other way: {best} was worse in {test.losses} of {test.pairs}."
    return text


def _sure(analysis: Analysis) -> str:
    data, ranked = analysis.data, forward_only(analysis)
    if not analysis.tasks or len(ranked) < 2:
        return "There are no two methods to compare, so nothing can be said about which is better."
    if data.reference is None:
        wanted = data.grid.get("reference") or "mezo"
        return f"There is no finished column {wanted} to test against, so the difference may be due to chance."
    column = next(column for column, _ in ranked if column != data.reference)
    test = analysis.tests.get(column)
    return _tested(analysis, column, test) if test else "There are no pairs of runs to test."


def _tested(analysis: Analysis, column: str, test: Paired) -> str:
    """A paired test in words."""
    text = f"In {some(test.pairs, 'pair')} of runs with the same task and seed, {column} was better than "
    text += f"{analysis.data.reference} in {test.wins} and worse in {test.losses}. "
    if test.holm is None or test.least is None or test.least_holm is None or test.least_holm > SURE:
        differ, least = some(test.wins + test.losses, "pair"), ""
        if test.least:
            least = f": {differ} that differ cannot give p below {p_value(test.least)}"
            if test.least <= SURE:
                least += f", which correction for {len(analysis.tests)} comparisons makes {p_value(test.least_holm)}"
        return f"{text}These are too few pairs to rule out chance, whatever the result{least}."
    others = f"After correction for {len(analysis.tests)} comparisons, " if len(analysis.tests) > 1 else ""
    p = p_value(test.holm)
    text += f"{others}p {p if p.startswith('<') else f'= {p}'}: "
    if test.holm < SURE and test.gain is not None and test.better != (test.gain > 0):
        return text + (
            "the pairs differ beyond chance on these tasks and this model, but in the other direction than the averages, which "
            "a few large differences decide."
        )
    if test.holm < SURE:
        return text + "the difference is unlikely to be chance on these tasks and this model; others were not tried."
    return text + f"no evidence that either is better (the usual limit is {SURE:g})."


def _has_gradients(analysis: Analysis) -> bool:
    return any(analysis.data.family(column) == FIRST for column, _ in analysis.ranking)


def _gradients(analysis: Analysis) -> list[tuple[str, str]]:
    """The result of training with gradients, and its cost in memory."""
    data, ours = analysis.data, forward_only(analysis)
    ranked = [(column, value) for column, value in analysis.ranking if data.family(column) == FIRST]
    if not ranked:
        return []
    column, found = ranked[0]
    text = f"Training with gradients, which needs backward passes, has {amount(analysis, found.mean)} ({column})"
    known = {
        name: [r.memory for t in data.tasks for r in data.of(t, name) if r.memory] for name in (column, *dict(ours[:1]))
    }
    if len(known) == 2 and all(known.values()):
        theirs, mine = (median(values) / 1e6 for values in known.values())
        text += (
            f" and takes {theirs / mine:.2g} times the memory: {theirs:.3g} MB against {mine:.3g} MB for {ours[0][0]}"
        )
    return [("And with gradients?", f"{text}.")]


def _cautions(analysis: Analysis, other: Analysis) -> list[tuple[str, str]]:
    """Cautions: the other measure ranks another method first, tasks left out, learning rates at the edge, failed runs.
    A run of a search may diverge: that is a result of the search.
    """
    data, parts = analysis.data, []
    firsts = [ranked[0][0] for ranked in map(forward_only, (analysis, other)) if ranked]
    if len(set(firsts)) > 1:
        parts.append(
            f"By {'loss' if other.measure == 'loss' else metric_name(data, other.tasks)}, {firsts[1]} is first."
        )
    out = [verdict.task for verdict in analysis.verdicts if not verdict.counts]
    if out:
        parts.append(f"{listed(out)}: not in the averages (“Which tasks count” says why).")
    shaky = [column for column in data.columns if not data.steady(column, analysis.tasks)]
    without = [column for column in shaky if analysis.average(column) is None]
    if shaky := [column for column in shaky if column not in without]:
        parts.append(
            f"{listed(shaky)}: some runs failed, so the average is over the others only and is not ranked first."
        )
    if without:
        parts.append(f"{listed(without)}: no run finished on one of the tasks, so there is no average.")
    if untested := data.untested(data.tasks):
        parts.append(f"{listed(untested)}: scored on dev, not on test as the others, and so not compared with them.")
    if on_dev := [task for task in data.tasks if data.split_of(task) == "dev"]:
        parts.append(
            f"No run on {listed(on_dev)} was tested, so its scores are on dev. They may be too good, because dev also "
            "chooses learning rates and the weights that are kept."
        )
    if not data.grid:
        parts.append(
            "grid.yaml is missing or cannot be read, so it is not known which runs were asked for, which column is the "
            f"reference ({data.reference or 'none'} was taken) and what the time budget is."
        )
    searches = [(column, search) for found in data.searches.values() for column, search in found.items()]
    if edges := {column for column, search in searches if search.doubt == "edge"}:
        parts.append(
            f"{listed(sorted(edges))}: the learning rate is at the edge of the tried rates, so a better one may exist."
        )
    if gaps := {column for column, search in searches if search.doubt == "gap"}:
        parts.append(
            f"{listed(sorted(gaps))}: the next larger learning rate that was tried diverged and is far from the chosen one, so "
            "a better one may be between."
        )
    if lost := {column for column, search in searches if search.lr is None}:
        parts.append(f"{listed(sorted(lost))}: no learning rate of a search gave a finite loss.")
    if others := data.objectives():
        named = listed(list(dict.fromkeys(others.values())))
        parts.append(
            f"{listed(list(others))}: training minimised an objective ({named}) and not the loss, so that losses, and the "
            "work and time until a loss, say little about it."
        )
    busy = data.busy()
    if busy and busy > BUSY:
        parts.append(
            f"The machine was busy: runs took {busy:.1f} times their processor time, so times are not reliable."
        )
    broken = [f for f in data.failures if f.kind.startswith("search") and f.readable and f.status == "failed"]
    if broken:
        parts.append(
            f"{listed(list(dict.fromkeys(f.column for f in broken)))}: the learning-rate search is incomplete, because "
            f"{some(len(broken), 'run')} of it failed ({broken[0].reason.rstrip('.')}); the same metazo compare command "
            "repeats what failed."
        )
    failed = sum(f.status != "diverged" or not f.kind.startswith("search") for f in data.failures)
    missing = len(data.missing) + len(data.untimed)
    if failed or missing:
        parts.append(f"{some(failed, 'run')} failed or cannot be read, {some(missing, 'run')} missing: listed below.")
    return [("What to know before trusting it", " ".join(parts))] if parts else []


def _terms(analysis: Analysis) -> list[tuple[str, str]]:
    data = analysis.data
    shares = [value for task in analysis.tasks if (value := data.majority(task)) is not None]
    guess = f" Always giving the commonest answer would score {share(fmean(shares))}." if shares else ""
    reference = data.reference or "mezo"
    mezo = "MeZO (Malladi et al., 2023), which perturbs all weights alike." if reference == "mezo" else "the reference."
    first = [column for column, _ in forward_only(analysis)[:1] if column not in (reference, data.label(column))]
    terms = {
        "Forward pass": "A forward pass computes the model’s loss on one batch of examples. It takes no more memory than "
        "using the model. The methods compared here learn from forward passes alone: they perturb the model’s weights at "
        "random, measure whether the loss rises or falls, and update the weights accordingly. Training with gradients also "
        "needs backward passes, which take several times the memory; one such step is counted as three forward passes.",
        "Accuracy": f"The number of correct answers per 100 questions on which the model was not trained.{guess}",
        "Loss": "The mean negative log-probability of the correct answers, in nats: 0 is certain and correct, and lower is "
        f"better. {'It' if data.objectives() else 'Training minimises it, and it'} changes before the accuracy does.",
        "Seed": "The seed fixes the random choices of a run. Repeating a run with other seeds shows how much of a "
        "difference is due to chance. The bars in the picture are 95 % intervals of the average over seeds.",
        reference: f"The method with which the others are compared: {mezo}",
        **{column: f"The column that came first: {data.label(column)}." for column in first},
    }
    if not any(data.metric_of(task) == "accuracy" for task in data.tasks):
        del terms["Accuracy"]
    return list(terms.items())
