"""The first screen in plain words: what was compared, which method won and by how much, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

from .analysis import Analysis
from .cautions import cautions
from .chance import against_chance, sure
from .comparison import CONTROL, FIRST, FORWARD_ONLY, UNTRAINED, Comparison
from .table import count, listed, loss, share, some
from .tables import metric_name


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
    facts = [("How sure is that?", sure(analysis)), *_gradients(analysis), *cautions(analysis, other)]
    title = f"Fine-tuning {model}: which method is best?"
    return Story(title, _unfinished(analysis) + _won(analysis), _compared(analysis, model), facts, _terms(analysis))


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
    data, ranked, first = analysis.data, analysis.contest, analysis.first
    unscored = sum(verdict.counts for verdict in analysis.verdicts) > len(analysis.tasks)
    if not analysis.tasks and unscored:
        return "No task that counts has a metric, so no method won by it; the tables show the loss."
    if not analysis.tasks:
        return "No task counts in the averages (see “Which tasks count”), so no method won; the tables show each task."
    if not any(data.family(column) in FORWARD_ONLY for column in data.columns):
        return "Every method here takes gradients, so no method that learns from forward passes alone won."
    finished = "finished and tested" if data.untested(analysis.tasks) else "finished"
    if not ranked:
        return f"No method that learns from forward passes alone {finished} all its runs, so no method won."
    (best, found), others = ranked[0], ranked[len(first) :]
    counted, every = len(analysis.tasks), len(data.tasks)
    which = "that count and have a metric" if unscored else "that count"
    on = f" on the {counted} of {every} tasks {which} ({listed(analysis.tasks)})" if counted < every else ""
    if len(ranked) == 1:
        if any(len(data.of(task, best)) < len(data.seeds) for task in analysis.tasks):
            alone = f"So far, only {best} learns from forward passes alone and lacks no run that another method has"
            return f"{alone}{on}: {amount(analysis, found.mean)}."
        return f"Only {best} learns from forward passes alone and {finished} every run{on}: {amount(analysis, found.mean)}."
    among = "Of the methods that learn from forward passes alone, " if _has_gradients(analysis) else ""
    now = " so far" if data.missing else ""
    if len(first) > 1:
        what = dict.fromkeys((c for c in first if data.family(c) == CONTROL), " (random scales)")
        what |= {data.reference: " (the reference method)"}
        names = [column + what.get(column, "") for column in first]
        text = f"{among}{listed(names)} share first place{now}{on}, each with {amount(analysis, found.mean)}"
    else:
        plain = ", the reference method," if best == data.reference else ""
        random = ", whose scales are random numbers," if data.family(best) == CONTROL else ""
        came = "is first so far" if now else "came first"
        text = f"{among}{best}{plain}{random} {came}{on}: {amount(analysis, found.mean)}"
    if not others:
        return f"{text}."
    shown = loss if analysis.measure == "loss" else share
    other, value = next((pair for pair in others if pair[0] == data.reference), others[0])
    text += f", against {shown(value.mean)} for {other}, "
    if other != data.reference:
        text += "the second." if len(first) == 1 else "the next."
    else:
        text += "the reference method"
        if analysis.measure == "loss" and value.mean > 0:
            text += f" ({100 * (1 - found.mean / value.mean):.0f} % less)"
        text += "."
    return text + against_chance(analysis, first, other)


def _has_gradients(analysis: Analysis) -> bool:
    return any(analysis.data.family(column) == FIRST for column, _ in analysis.ranking)


def _gradients(analysis: Analysis) -> list[tuple[str, str]]:
    """The result of training with gradients, and its cost in memory."""
    data, ours = analysis.data, analysis.contest
    ranked = [(column, value) for column, value in analysis.ranking if data.family(column) == FIRST]
    ranked.sort(key=lambda pair: not data.steady(pair[0], analysis.tasks))
    if not ranked:
        return []
    column, found = ranked[0]
    text = f"Training with gradients, which needs backward passes, has {amount(analysis, found.mean)} ({column})"
    if ratios := _memory_ratios(data, analysis.tasks, [column, *dict(ours[:1])]):
        over = f", the median of {len(ratios)} tasks" if len(ratios) > 1 else ""
        text += f" and takes {median(ratios):.2f} times the memory of {ours[0][0]}{over}"
    return [("And with gradients?", f"{text}.")]


def _memory_ratios(data: Comparison, tasks: Sequence[str], columns: Sequence[str]) -> list[float]:
    """The peak memory of the first column by that of the second, each the median over seeds, by task: tasks differ in size, so
    that a median over runs of several tasks would compare one task's runs with another's."""
    if len(columns) < 2:
        return []
    held = [[[run.memory for run in data.of(task, column) if run.memory] for column in columns] for task in tasks]
    return [median(theirs) / median(mine) for theirs, mine in held if theirs and mine]


def _terms(analysis: Analysis) -> list[tuple[str, str]]:
    data = analysis.data
    counted = [task for task in analysis.tasks if data.metric_of(task) == "accuracy"]
    shares = [value for task in counted if (value := data.majority(task)) is not None]
    guess = f" Always giving the commonest answer would score {share(fmean(shares))}." if shares else ""
    reference = data.reference or "mezo"
    mezo = "MeZO (Malladi et al., 2023), which perturbs all weights alike." if reference == "mezo" else "the reference."
    first = [column for column in analysis.first if column not in (reference, data.label(column))]
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
        **{
            column: f"{'The' if len(analysis.first) == 1 else 'A'} column that came first: {data.label(column)}."
            for column in first
        },
    }
    if not any(data.metric_of(task) == "accuracy" for task in data.tasks):
        del terms["Accuracy"]
    return list(terms.items())
