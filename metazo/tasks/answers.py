"""Tasks answered in free text: SQuAD, DROP (reading), GSM8K, MetaMathQA (arithmetic).

SQuAD and DROP prompts follow MeZO (arXiv 2305.17333); the arithmetic ones are plain question and answer.
"""

from __future__ import annotations

from metazo.tasks.task import Task

TASKS = (
    Task(
        name="squad",
        kind="generation",
        prompt="Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:",
        context="context",
        answer="answers.text",
        metric=("f1", "exact_match"),
        stop="\n",
        hub="rajpurkar/squad",
    ),
    Task(
        name="drop",
        kind="generation",
        prompt="Passage: {passage}\nQuestion: {question}\nAnswer:",
        context="passage",
        answer="answers_spans.spans",
        metric=("f1", "exact_match"),
        stop="\n",
        hub="ucinlp/drop",
    ),
    Task(
        name="gsm8k",
        kind="generation",
        prompt="Question: {question}\nAnswer:",
        metric=("exact_number",),
        max_new_tokens=256,
        hub="openai/gsm8k",
        config="main",
        test_split="test",
    ),
    Task(
        name="metamathqa",
        kind="generation",
        prompt="Question: {query}\nAnswer:",
        answer="response",
        metric=("exact_number",),
        max_new_tokens=256,
        hub="meta-math/MetaMathQA",
        test_split="train",
    ),
)
