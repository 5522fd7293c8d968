"""Tables of words for corrupted captions (`word_table.Words`): of the synthetic world, and of English.

SYNTHETIC takes its words from `prompts`. ENGLISH is a selection of our own of frequent words of image
captions: most nouns are COCO's categories (Lin et al., "Microsoft COCO", 2014), with others of everyday
pictures. Its frequencies are rough guesses, not counts.

A class holds words that exclude each other. So it has no synonyms (gray and grey), no hypernyms (a bird and
a duck), nothing that is often seen together (a shirt and a hat, clouds and rain), and nothing that takes
another preposition (on a beach, in a kitchen). Words with a second meaning are left out (an orange, to
cross), or protected by compounds. It isn't perfect: `datasets.describe --corrupted` shows what it makes.
"""

import itertools
from collections.abc import Mapping
from typing import Any

from richhf_jax.datasets import prompts
from richhf_jax.word_table import MODIFIER, NOUN, NUMBER, OTHER

_COUNT_FREQUENCIES = (0.17, 0.15, 0.08)


def _single_phrases_of_other_splits() -> list[str]:
    """Lists the prompts of one phrase that only validation and test have.

    They are so few that a model would learn by heart that they are never true in training.
    """
    found = []
    parts = (
        (prompts.ARTICLE, *prompts.COUNT_WORDS.values()),
        (None, *prompts.SIZES),
        prompts.COLOURS,
        prompts.SHAPES,
    )
    for phrase in itertools.starmap(prompts.Phrase, itertools.product(*parts)):
        for opening in sorted(set(prompts.OPENINGS)):
            description = prompts.Description(opening, (phrase,), "")
            if description.split != "train":
                found.append(description.prompt)
    return found


SYNTHETIC: Mapping[str, Any] = {
    "classes": {
        "colour": {"words": prompts.COLOURS, "role": MODIFIER, "once": True},
        "shape": {
            "words": [f"{one}/{several}" for one, several in prompts.SHAPES.items()],
            "role": NOUN,
            "once": True,
        },
        "size": {"words": prompts.SIZES, "role": MODIFIER},
        "count": {
            "words": dict(zip(prompts.COUNT_WORDS.values(), _COUNT_FREQUENCIES, strict=True)),
            "role": NUMBER,
            "values": tuple(prompts.COUNT_WORDS),
        },
    },
    "most_objects": prompts.MAX_DESCRIBED_OBJECTS,
    "impossible": _single_phrases_of_other_splits(),
}

# They agree with a man, a woman, a boy, a girl.
_GENDERED = (
    "he",
    "she",
    "his",
    "her",
    "him",
    "hers",
    "himself",
    "herself",
    "beard",
    "bearded",
    "mustache",
    "pregnant",
)


def _noun(*words: str, **frequencies: float) -> dict[str, Any]:
    """Makes a class of nouns 'dog', with a regular plural, or 'bus/buses'; in keywords with frequencies."""
    pairs = dict.fromkeys(words, 1.0) | frequencies
    return {
        "words": {word if "/" in word else f"{word}/{word}s": share for word, share in pairs.items()},
        "role": NOUN,
        "once": True,
    }


def _modifier(*words: str, **frequencies: float) -> dict[str, Any]:
    return {"words": dict.fromkeys(words, 1.0) | frequencies, "role": MODIFIER}


def _other(*words: str) -> dict[str, Any]:
    return {"words": words, "role": OTHER, "once": True}


ENGLISH: Mapping[str, Any] = {
    "classes": {
        "colour": _modifier(
            white=6, black=5, red=5, blue=4, green=3, brown=3, yellow=2, gray=1, pink=1, purple=0.5
        ),
        "number": {
            "words": {"two": 10, "three": 5, "four": 2, "five": 1, "six": 0.5},
            "role": NUMBER,
            "values": (2, 3, 4, 5, 6),
        },
        "size": _modifier(large=3, small=3),
        "size of things big or tiny": _modifier(big=3, tiny=1),
        "age": _modifier(young=4, elderly=1),
        "state": _modifier("empty", "full"),
        "door": _modifier("open", "closed"),
        "cleanness": _modifier("dirty", "clean"),
        "material": _modifier(wooden=5, metal=3, plastic=2, leather=1, concrete=1),
        "pattern": _modifier("striped", "plaid", "floral"),
        "weather": _modifier(sunny=2, cloudy=1),
        "adult": _noun(**{"man/men": 3, "woman/women": 2}) | {"unless": _GENDERED},
        "child": _noun("boy", "girl") | {"unless": _GENDERED},
        "animal": _noun(
            dog=4,
            cat=4,
            bird=2,
            horse=3,
            cow=2,
            elephant=2,
            giraffe=2,
            zebra=2,
            bear=1.5,
            goat=0.5,
            rabbit=0.5,
            monkey=0.5,
            lion=0.5,
            tiger=0.5,
            pig=0.5,
        ),
        "vehicle": _noun(
            **{"bus/buses": 3},
            train=4,
            truck=2,
            car=2,
            motorcycle=3,
            bicycle=1,
            airplane=2,
            boat=2,
            helicopter=0.5,
        ),
        "furniture": _noun(**{"table": 5, "bed": 3, "chair": 2, "couch/couches": 2, "bench/benches": 2}),
        "tableware": _noun(plate=4, bowl=2, cup=2),
        "cutlery": _noun(**{"fork": 3, "knife/knives": 2, "spoon": 1}),
        "food": _noun(**{"sandwich/sandwiches": 3}, pizza=5, cake=3, donut=2, banana=2, apple=1, burger=0.5),
        "vegetable": _noun(carrot=3, **{"potato/potatoes": 1}, mushroom=1, cucumber=1),
        "dish": _other("rice", "soup", "salad", "pasta", "bread"),
        "drink": _other("coffee", "wine", "beer", "milk", "tea"),
        "headwear": _noun(hat=2, helmet=1),
        "outfit": _noun(**{"dress/dresses": 2}, suit=2, bikini=0.5),
        "board": _noun(skateboard=3, surfboard=3, snowboard=1),
        "thing held": _noun(umbrella=3, kite=2, frisbee=2),
        "device": _noun(laptop=3, phone=2, camera=1, television=1),
        "sport": _other("tennis", "baseball", "soccer", "basketball", "golf"),
        "room": _noun(kitchen=3, bathroom=3, bedroom=2, office=0.5, garage=0.5),
        "ground": _noun(**{"beach/beaches": 2}, street=3, bridge=0.5),
        "instrument": _noun(guitar=3, piano=2, violin=1, drum=1),
        "plant": _noun(**{"tree": 4, "bush/bushes": 1}),
        "flower": _noun(**{"rose": 3, "daisy/daisies": 1}, tulip=1, sunflower=1),
        "building": _noun(**{"house": 4, "church/churches": 2}, castle=1, barn=1, lighthouse=1),
        "shape": _noun("circle", "square", "triangle", "star"),
        "height": _other("above", "under"),
        "side": _other("left", "right"),
        "place": _other("inside", "outside"),
        "action": _other("sleeping", "running", "swimming"),
    },
    "swap_weight": 1.0,
    "phrase_weight": 0.0,
    "compounds": (
        "black and white",
        "white and black",
        "red white and blue",
        "red wine",
        "white wine",
        "green beans",
        "hot dog",
        "hot dogs",
        "teddy bear",
        "teddy bears",
        "stuffed bear",
        "cell phone",
        "cell phones",
        "phone booth",
        "bus stop",
        "train station",
        "train tracks",
        "train track",
        "bus station",
        "bus driver",
        "train car",
        "train cars",
        "car door",
        "fire truck",
        "street sign",
        "street signs",
        "street light",
        "street lights",
        "tennis court",
        "tennis racket",
        "tennis player",
        "tennis ball",
        "tennis match",
        "baseball player",
        "baseball game",
        "baseball bat",
        "baseball field",
        "baseball players",
        "soccer ball",
        "soccer field",
        "soccer player",
        "golf course",
        "basketball court",
        "carrot cake",
        "apple pie",
        "apple juice",
        "banana bread",
        "coffee table",
        "coffee cup",
        "coffee maker",
        "coffee shop",
        "coffee mug",
        "tea pot",
        "tea cup",
        "wine glass",
        "wine glasses",
        "beer bottle",
        "table top",
        "table cloth",
        "young boy",
        "young girl",
        "young boys",
        "young girls",
        "young child",
        "young children",
        "young kids",
        "two way",
        "two story",
        "three way",
        "under construction",
        "running water",
        "of metal",
        "of plastic",
        "of leather",
        "of concrete",
        "in concrete",
        "left on",
        "left in",
        "left out",
        "left behind",
        "right next",
        "right now",
        "tree house",
        "green house",
        "full of",
        "full moon",
        "full size",
        "horse drawn",
        "christmas tree",
        "birthday cake",
        "bell pepper",
        "tiger lily",
        "open air",
        "big ben",
        "bathing suit",
        "swim suit",
        "wet suit",
        "laptop computer",
        "laptop computers",
        "double decker",
        "phone call",
        "playing frisbee",
        "swimming pool",
        "swimming pools",
        "left over",
    ),
    # "No dogs" is as true as "no cats", and so may be "a dog or a horse".
    "unless": (
        *("no", "not", "without", "neither", "nor", "or", "none", "never", "nobody", "nothing", "cannot"),
        *("isn't", "aren't", "wasn't", "weren't", "doesn't", "don't", "didn't", "hasn't", "haven't", "can't"),
    ),
}

TABLES = {"english": ENGLISH, "synthetic": SYNTHETIC}
