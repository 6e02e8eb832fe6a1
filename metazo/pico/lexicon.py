"""Words and sentence templates of pico's generated tasks.

Every pool is a tuple of words; `part` divides it 60/20/20 into the words of the train, validation and test
splits. Templates are divided by hand into the same three parts.
"""

from __future__ import annotations


def part(pool: tuple, name: str) -> tuple:
    """The entries of ``pool`` in part ``name`` ("train", "validation" or "test"; "all" is the whole pool)."""
    if name == "all":
        return pool
    wanted = {"train": (0, 1, 2), "validation": (3,), "test": (4,)}[name]
    return tuple(word for i, word in enumerate(pool) if i % 5 in wanted)


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = words(
    "Anna Tom Mary John Emma Peter Alice Henry Ruth James Clara Frank Helen George Jane Robert Susan Edward "
    "Kate Arthur Laura Simon Nancy Walter Grace"
)
PERSONS = words(
    "man woman boy girl farmer teacher sailor doctor baker soldier captain painter tailor miller hunter "
    "nurse merchant priest student gardener"
)
OBJECTS = words(
    "key letter lamp knife book hat coin basket ring map bottle clock candle rope box brush blanket mirror "
    "kettle spoon shoe cup pipe ladder saddle"
)
PLACES = words(
    "kitchen garden cellar church forest market school harbour barn tower library castle tent stable hall "
    "mill shop station cottage attic palace prison yard cabin chapel"
)
COLOURS = words("red blue green white black brown yellow old new small large heavy broken clean dirty")
ACTIONS = words("hid left found lost kept bought dropped painted forgot carried")

# Sentiment: things that are judged, and words that judge them.
JUDGED = words(
    "film book play song story show novel concert dinner hotel journey speech party meal poem picture "
    "lecture dance game tour series ending cast music plot"
)
POSITIVE = words(
    "wonderful brilliant charming delightful superb excellent splendid lovely beautiful magnificent "
    "enjoyable pleasant amusing perfect marvellous thrilling graceful touching clever fresh moving funny "
    "exciting remarkable tender witty elegant gripping joyful warm"
)
NEGATIVE = words(
    "awful boring dreadful horrible dull tedious miserable stupid ugly disgusting tiresome unpleasant clumsy "
    "ridiculous dreary painful weak stale annoying silly hollow pointless shameful sloppy confusing bland "
    "cheap gloomy foolish cold"
)
ADVERBS = words("very quite really rather truly simply most so deeply utterly")

# Topic: things and acts that belong to one of four topics.
TOPICS = ("food", "music", "weather", "sport")
TOPIC_THINGS = (
    words(
        "bread cheese soup butter cake apple pie fish honey sugar potato meat salad egg rice onion pudding "
        "bacon cream sauce"
    ),
    words(
        "violin piano drum guitar flute choir opera melody trumpet harp organ tune waltz chorus song singer "
        "fiddle band symphony ballad"
    ),
    words(
        "rain snow wind storm thunder cloud frost sunshine fog hail ice breeze lightning mist heat flood "
        "drizzle gale shower blizzard"
    ),
    words(
        "football tennis race goal team match cricket runner ball coach player referee champion stadium "
        "rider swimmer league wrestler trophy hockey"
    ),
)

TEMPLATES: dict[str, dict[str, tuple]] = {
    "pico_sentiment": {
        "train": (
            "The {judged} was {adverb} {opinion}.",
            "{name} thought that the {judged} was {opinion}.",
            "We saw a {opinion} {judged} last night.",
            "A {opinion} and {opinion2} {judged}.",
            "I told {name} that this {judged} is {adverb} {opinion}.",
            "The {judged} had a {opinion} start and a {opinion2} end.",
        ),
        "validation": (
            "What a {opinion} {judged} that was!",
            "{name} called it a {opinion}, {opinion2} {judged}.",
        ),
        "test": ("Never before was a {judged} so {opinion}.", "This is one {opinion} {judged}, said {name}."),
    },
    "pico_topic": {
        "train": (
            "{name} talked about the {thing} and the {thing2}.",
            "The {person} wrote a page on {thing}.",
            "There was a {thing} near the {place}.",
            "We heard of the {thing} from {name}.",
            "The {thing} and the {thing2} were in the paper.",
            "{name} asked the {person} about a {thing}.",
        ),
        "validation": (
            "All day the {person} thought of {thing}.",
            "News of the {thing} reached the {place}.",
        ),
        "test": ("Nobody at the {place} knew the {thing}.", "First came the {thing}, then the {thing2}."),
    },
    # premise, then the slots of which one is changed to make a false hypothesis, then the hypothesis
    "pico_entail": {
        "train": (
            (
                "{name} {action} the {colour} {object} in the {place}.",
                ("object", "name"),
                "{name} {action} the {object}",
            ),
            (
                "{name} {action} the {colour} {object} in the {place}.",
                ("place", "name"),
                "{name} was in the {place}",
            ),
            ("The {object} of {name} is {colour}.", ("object", "name"), "{name} has a {object}"),
            (
                "In the {place} there is a {object} and a {object2}.",
                ("object", "place"),
                "a {object} is in the {place}",
            ),
            ("The {person} gave {name} a {object}.", ("object", "name"), "{name} got a {object}"),
        ),
        "validation": (
            (
                "{name} took the {object} to the {place}.",
                ("object", "place"),
                "the {object} is in the {place}",
            ),
            ("The {colour} {object} belongs to {name}.", ("object", "name"), "{name} has a {object}"),
        ),
        "test": (
            ("{name} sent a {object} to the {place}.", ("object", "place"), "a {object} is in the {place}"),
            ("{name} sold the {person} a {object}.", ("object", "name"), "{name} had a {object}"),
        ),
    },
    "pico_cause": {
        "train": ("{event}.", "Yesterday {event}.", "That morning {event}.", "At noon {event}."),
        "validation": ("Last week {event}.", "{name} saw that {event}."),
        "test": ("One evening {event}.", "It is said that {event}."),
    },
    # two facts; then (question, answer)
    "pico_span": {
        "train": (
            ("{name} put the {object} in the {place}.", "Where is the {object}?", "the {place}"),
            ("{name} bought a {object}.", "Who bought the {object}?", "{name}"),
            ("The {object} was in the {place}.", "Where is the {object}?", "the {place}"),
            ("{name} went to the {place}.", "Where is {name}?", "the {place}"),
        ),
        "validation": (
            ("{name} found the {object} at last.", "Who found the {object}?", "{name}"),
            ("{name} left a {object} near the {place}.", "Where is the {object}?", "the {place}"),
        ),
        "test": (
            ("{name} painted the {object}.", "Who painted the {object}?", "{name}"),
            ("{name} hid the {object} behind the {place}.", "Where is the {object}?", "the {place}"),
        ),
    },
}

# Cause and effect, both about the same person.
EVENTS: tuple[tuple[str, str], ...] = (
    ("the {person} forgot the umbrella", "the {person} got wet"),
    ("the {person} ate too much cake", "the {person} felt sick"),
    ("the {person} stayed awake all night", "the {person} was tired"),
    ("the {person} dropped the glass", "the glass broke"),
    ("the {person} lit the fire", "the room became warm"),
    ("the {person} ran for an hour", "the {person} was out of breath"),
    ("the {person} lost the purse", "the {person} had no money"),
    ("the {person} told a joke", "everybody laughed"),
    ("the {person} watered the flowers", "the flowers grew"),
    ("the {person} worked hard", "the {person} earned a reward"),
    ("the {person} stole a horse", "the {person} was put in prison"),
    ("the {person} touched the hot stove", "the {person} burned a finger"),
    ("the {person} blew out the candle", "the room became dark"),
    ("the {person} shouted loudly", "the baby woke up"),
    ("the {person} missed the train", "the {person} came home late"),
    ("the {person} fed the dog", "the dog wagged its tail"),
    ("the {person} left the gate open", "the sheep ran away"),
    ("the {person} drank cold water", "the {person} was no longer thirsty"),
    ("the {person} fell from the ladder", "the {person} broke a leg"),
    ("the {person} sang sweetly", "the crowd clapped"),
    ("the {person} read a sad letter", "the {person} wept"),
    ("the {person} opened the window", "fresh air came in"),
    ("the {person} sharpened the knife", "the knife cut well"),
    ("the {person} saw a ghost", "the {person} screamed"),
    ("the {person} mended the roof", "the rain stayed out"),
)
