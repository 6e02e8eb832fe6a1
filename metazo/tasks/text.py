"""Real short-text classification: 22 public tasks in 17 families, each with label phrases.

Rows are {"text": str, "label": int}, from DIR/<task>/{train,validation}.jsonl of `data`; the data sets themselves are not
part of metazo, and each has its owner's licence. Five of them can be read from the Hub as well, which has another sample
of the same data set. A family holds tasks on related topics: meta-training on one task of a family and testing on another
is not a test on an unseen task, so `META_TRAIN` and `HELD_OUT` split by family.
"""

from __future__ import annotations

from typing import Any

from metazo.tasks.task import Task

# name: (family, the sentence about the text, with {} for a label phrase; label phrases in the order of the classes)
_TABLE: dict[str, tuple[str, str, str]] = {
    "airline_sentiment": (
        "airline tweets",
        "the customer of the airline is {}",
        "negative; neutral; positive",
    ),
    "app_reviews": (
        "app reviews",
        "this app review is {}",
        "a bug report; a feature request; a plain rating, praise or dislike; a user experience",
    ),
    "clinc150": (
        "assistant intents",
        "this request is about: {}",
        "accept reservations; account blocked; alarm; application status; annual percentage rate (APR); are "
        "you a bot; balance; bill balance; bill due; book flight; book hotel; calculator; calendar; calendar "
        "update; calories; cancel; cancel reservation; car rental; card declined; carry on; change accent; "
        "change ai name; change language; change speed; change user name; change volume; confirm reservation; "
        "cook time; credit limit; credit limit change; credit score; current location; damaged card; date; "
        "definition; direct deposit; directions; distance; do you have pets; exchange rate; expiration date; "
        "find phone; flight status; flip coin; food last; freeze account; fun fact; gas; gas type; goodbye; "
        "greeting; how busy; how old are you; improve credit score; income; ingredient substitution; "
        "ingredients list; insurance; insurance change; interest rate; international fees; international "
        "visa; jump start; last maintenance; lost luggage; make call; maybe; meal suggestion; meaning of "
        "life; measurement conversion; meeting schedule; min payment; miles per gallon; new card; next "
        "holiday; next song; no; nutrition info; oil change how; oil change when; order; order checks; order "
        "status; pay bill; payday; pin change; play music; plug type; paid time off balance; request paid "
        "time off; paid time off request status; paid time off used; recipe; redeem rewards; reminder; "
        "reminder update; repeat; replacement card duration; report fraud; report lost card; reset settings; "
        "restaurant reservation; restaurant reviews; restaurant suggestion; rewards balance; roll dice; "
        "rollover 401k; routing; schedule maintenance; schedule meeting; share location; shopping list; "
        "shopping list update; smart home; spelling; spending history; sync device; taxes; tell joke; text; "
        "thank you; time; timer; timezone; tire change; tire pressure; todo list; todo list update; traffic; "
        "transactions; transfer; translate; travel alert; travel notification; travel suggestion; call an "
        "uber; update playlist; user name; vaccines; w-2 tax form; weather; what are your hobbies; what can i "
        "ask you; what is your name; what song; where are you from; whisper mode; who do you work for; who "
        "made you; yes",
    ),
    "snips": (
        "assistant intents",
        "this request is to {}",
        "add a song to a playlist; book a restaurant; get the weather; play music; rate a book; search for a "
        "creative work; search for movie showtimes",
    ),
    "spooky_author": (
        "authorship",
        "this sentence was written by {}",
        "Edgar Allan Poe; H. P. Lovecraft; Mary Shelley",
    ),
    "banking77": (
        "banking",
        "this banking question is about: {}",
        "card arrival; card linking; exchange rate; card payment wrong exchange rate; extra charge on "
        "statement; pending cash withdrawal; fiat currency support; card delivery estimate; automatic top-up; "
        "card not working; exchange via app; lost or stolen card; age limit; pin blocked; contactless not "
        "working; top-up by bank transfer charge; pending top-up; cancel transfer; top-up limits; wrong "
        "amount of cash received; card payment fee charged; transfer not received by recipient; supported "
        "cards and currencies; getting virtual card; card acceptance; top-up reverted; balance not updated "
        "after cheque or cash deposit; card payment not recognised; edit personal details; why verify "
        "identity; unable to verify identity; get physical card; visa or mastercard; topping up by card; "
        "disposable card limits; compromised card; atm support; direct debit payment not recognised; passcode "
        "forgotten; declined cash withdrawal; pending card payment; lost or stolen phone; request refund; "
        "declined transfer; refund not showing up; declined card payment; pending transfer; terminate "
        "account; card swallowed; transaction charged twice; verify source of funds; transfer timing; "
        "reverted card payment; change pin; beneficiary not allowed; transfer fee charged; receiving money; "
        "failed transfer; transfer into account; verify top-up; getting spare card; top-up by cash or cheque; "
        "order physical card; virtual card not working; wrong exchange rate for cash withdrawal; get "
        "disposable virtual card; top-up failed; balance not updated after bank transfer; cash withdrawal not "
        "recognised; exchange charge; top-up by card charge; activate my card; cash withdrawal charge; card "
        "about to expire; apple pay or google pay; verify my identity; country support",
    ),
    "biomedical_topics": (
        "biomedical titles",
        "this medical paper title is about {}",
        "aging; cats; chemistry; erythrocytes (red blood cells); glucose; insulin; lung; lymphocytes; "
        "mathematics; mutation; myocardium (heart muscle); norepinephrine; potassium; prognosis; risk; skin; "
        "sodium; spleen; swine (pigs); temperature",
    ),
    "dailydialog_act": (
        "dialogue act",
        "the speaker is {}",
        "informing; asking a question; giving a directive, request or suggestion; committing: accepting or "
        "refusing an offer or request",
    ),
    "sarcasm_headlines": (
        "headlines",
        "this is {}",
        "a serious news headline; a sarcastic satirical headline",
    ),
    "ag_news": (
        "news topic",
        "this news item is about {}",
        "world politics; sports; business; science and technology",
    ),
    "mpqa": (
        "opinion polarity",
        "this phrase is {}",
        "negative; positive",
    ),
    "mr": (
        "pang-lee movie",
        "this movie review is {}",
        "negative; positive",
    ),
    "sst5": (
        "pang-lee movie",
        "this movie review is {}",
        "very negative; negative; neutral; positive; very positive",
    ),
    "subj": (
        "pang-lee movie",
        "this sentence is {}",
        "a subjective opinion; an objective plot description",
    ),
    "stackoverflow_sentiment": (
        "programmer sentiment",
        "this programmer comment is {}",
        "negative; neutral; positive",
    ),
    "amazon_counterfactual": (
        "review language",
        "this review sentence is {}",
        "a plain statement of what happened; a counterfactual statement about what did not happen",
    ),
    "cr": (
        "review sentiment",
        "this customer review is {}",
        "negative; positive",
    ),
    "review_sentences": (
        "review sentiment",
        "this review is {}",
        "negative; positive",
    ),
    "sms_spam": (
        "sms",
        "this text message is {}",
        "a normal personal message; a spam message",
    ),
    "tweet_emotion": (
        "tweeteval",
        "this tweet expresses {}",
        "anger; joy; optimism; sadness",
    ),
    "tweet_sentiment": (
        "tweeteval",
        "this tweet is {}",
        "negative; neutral; positive",
    ),
    "search_snippets": (
        "web topic",
        "this web search snippet is about {}",
        "business; computers; culture, arts and entertainment; education and science; engineering; health; "
        "politics and society; sports",
    ),
}
_HUB: dict[str, dict[str, str]] = {
    "ag_news": {"hub": "fancyzhx/ag_news", "test_split": "test"},
    "tweet_emotion": {"hub": "cardiffnlp/tweet_eval", "config": "emotion"},
    "tweet_sentiment": {"hub": "cardiffnlp/tweet_eval", "config": "sentiment"},
    "mr": {"hub": "cornell-movie-review-data/rotten_tomatoes"},
    "sst5": {"hub": "SetFit/sst5"},
}

HELD_OUT = ("banking", "dialogue act", "news topic", "pang-lee movie", "programmer sentiment", "sms")
"""Families that are never used for meta-training."""
META_TRAIN = tuple(sorted({family for family, _, _ in _TABLE.values()} - set(HELD_OUT)))
"""Families to meta-train on."""


def _task(name: str) -> Task:
    family, phrase, words = _TABLE[name]
    own: dict[str, Any] = _HUB.get(name, {})
    return Task(
        name=name,
        kind="classification",
        family=family,
        prompt="{text}\n" + phrase[:1].upper() + phrase[1:],
        phrase=phrase,
        labels=words.split("; "),  # type: ignore[arg-type]
        metric=("accuracy", "macro_f1"),
        **own,
    )


TASKS = tuple(_task(name) for name in _TABLE)


def of_families(families: tuple[str, ...]) -> list[str]:
    """Names of the tasks of these families."""
    return [task.name for task in TASKS if task.family in families]
