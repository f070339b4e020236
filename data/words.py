"""The words of scene graphs: names in singular and plural, names found in a text, predicates and their groups."""

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache

from rewards import clean_label

# ---- names -----------------------------------------------------------------------------------------------------------

IRREGULAR = {
    "men": "man", "women": "woman", "children": "child", "people": "person", "feet": "foot", "teeth": "tooth",
    "geese": "goose", "mice": "mouse", "oxen": "ox", "knives": "knife", "leaves": "leaf", "shelves": "shelf",
    "wolves": "wolf", "loaves": "loaf", "halves": "half", "scarves": "scarf", "calves": "calf", "hooves": "hoof",
    "buses": "bus", "gases": "gas", "lenses": "lens", "shoes": "shoe", "toes": "toe", "canoes": "canoe",
    "taxis": "taxi", "kiwis": "kiwi", "movies": "movie", "cookies": "cookie", "ties": "tie",
    "pies": "pie", "hoodies": "hoodie", "caches": "cache",
}  # fmt: skip
PLURALS = {one: many for many, one in IRREGULAR.items()}
# The same in both numbers, or looking like a plural without being one.
UNCHANGED = {
    "sheep", "fish", "deer", "moose", "scissors", "pants", "jeans", "shorts", "sunglasses", "goggles", "tongs", "skis",
    "bus", "gas", "lens", "grass", "tennis", "canvas", "cactus", "hummus", "asparagus", "chess", "series", "clothes",
    "broccoli", "rice", "bread", "luggage", "furniture", "fruit", "food", "hay", "sand", "snow", "water",
}  # fmt: skip
# Names that may mean one and the same thing: "the man" is not certain where there is a skier too (spec 3.3).
PERSONS = {
    "person", "man", "woman", "boy", "girl", "child", "kid", "guy", "lady", "skier", "player", "baby", "adult",
    "snowboarder", "surfer", "skateboarder", "rider", "driver", "pedestrian", "officer", "batter", "catcher", "pitcher",
    "umpire", "chef", "worker", "biker", "cyclist", "rower", "toddler", "crowd", "spectator", "customer", "diner",
    "tourist", "student", "teen", "gentleman", "male", "female", "human", "couple", "group", "team", "family",
}  # fmt: skip


@lru_cache(maxsize=65536)
def singular(word: str) -> str:
    """'knives' -> 'knife', 'boxes' -> 'box', 'bus' -> 'bus'. Rules and a short list: no corpus is needed."""
    if word in IRREGULAR or word in UNCHANGED or len(word) < 4 or word.endswith(("ss", "us", "is")):
        return IRREGULAR.get(word, word)
    if word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "sses", "xes", "zzes", "oes")):
        return word[:-2]
    return word.removesuffix("s")


@lru_cache(maxsize=65536)
def plural(name: str) -> str:
    """'traffic light' -> 'traffic lights', 'wine glass' -> 'wine glasses'. What is plural already stays."""
    before, space, word = name.rpartition(" ")
    if word in PLURALS:
        return before + space + PLURALS[word]
    if word in UNCHANGED or singular(word) != word:
        return name
    if word.endswith(("s", "x", "z", "ch", "sh")) or (word.endswith("o") and word in ("potato", "tomato", "hero")):
        return name + "es"
    if word.endswith("y") and word[-2:-1] not in "aeiou":
        return name[:-1] + "ies"
    return name + "s"


def with_article(name: str) -> str:
    return name if singular(name) != name else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def label(identifier: str) -> str:
    """'Traffic_Light.2' -> 'traffic light': the name of an object id, as a reader says it."""
    return clean_label(identifier.rpartition(".")[0] or identifier)


def identifier_name(name: str) -> str:
    """'T-shirt' -> 't_shirt': letters and underscores only, which is all that the format reward takes; may be ''."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z]+", "_", plain.replace("'s", "")).strip("_")


@lru_cache(maxsize=65536)
def name_key(name: str) -> tuple[str, ...]:
    """The words of a name, lower case, each in singular: what two spellings of one name share."""
    return tuple(singular(word) for word in tokens(name))


def tokens(text: str) -> list[str]:
    """Lower-case words; hyphen and underscore part them, a possessive 's goes (spec 3.3)."""
    return re.findall(r"[^\W_]+", re.sub(r"['\u2019]s\b", "", text.lower()))


def mentions(text: str, names: Iterable[str]) -> list[tuple[str, int, int]]:
    """(name, first word, word after it) of each name that a text says, in singular or plural, in the text's order. The
    longest reading wins: 'traffic light' is no 'light'. Words are counted as tokens() parts them."""
    by_key = {name_key(name): name for name in names}
    longest = max(map(len, by_key), default=0)
    words, found, at = [singular(word) for word in tokens(text)], [], 0
    while at < len(words):
        lengths = range(min(longest, len(words) - at), 0, -1)
        length = next((n for n in lengths if tuple(words[at : at + n]) in by_key), 0)
        if length:
            found.append((by_key[tuple(words[at : at + length])], at, at + length))
        at += length or 1
    return found


def confusable(a: str, b: str) -> bool:
    """Whether 'the A' might be said of a B: the same name, a longer form of it (light, traffic light), two persons."""
    x, y = name_key(a), name_key(b)
    if not x or not y:
        return False
    return x[-len(y) :] == y or y[-len(x) :] == x or (x[-1] in PERSONS and y[-1] in PERSONS)


# ---- predicates ------------------------------------------------------------------------------------------------------

# The 50 predicates of VG150 and the 34 that the paper adds, by what they say of two things.
PREDICATES = {
    "above": ("above", "over"),
    "below": ("below", "beneath", "under"),
    "left": ("left of", "left"),
    "right": ("right of", "right"),
    "front": ("in front of",),
    "behind": ("behind", "on back of", "at the back of"),
    "inside": ("inside", "in"),
    "holds": ("contain", "consist", "surrounding", "covering"),
    "outside": ("outside",),
    "on": ("on", "on top of", "sitting on", "standing on", "lying on", "laying on", "riding", "parked on",
           "walking on", "walking in", "growing on", "mounted on", "painted on"),
    "touch": ("touching", "reached", "holding", "carrying", "leaning against", "against", "attached to",
              "hanging from", "using", "eating", "playing"),
    "near": ("near", "next to", "beside", "alongside", "close", "at", "with"),
    "far": ("far from", "far", "far away"),
    "between": ("between", "in between"),
    "along": ("across", "across from", "along", "parallel to", "perpendicular to"),
    "facing": ("facing", "facing towards", "looking at", "watching"),
    "away": ("facing away",),
    "size": ("bigger", "smaller", "taller", "shorter"),
    "clothing": ("wearing", "wears", "covered in"),
    "belonging": ("of", "part of", "belonging to", "has", "made of", "from", "for", "to", "and", "says", "flying in"),
}  # fmt: skip
GROUPS = {predicate: group for group, members in PREDICATES.items() for predicate in members}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above", "front": "behind", "behind": "front"}
_SIDE = re.compile(r"(?:(?:on|at|to) )?(?:the |its )?(?:far )?(left|right)(?: hand)?(?: side)?(?: of)?(?: (?:the|it))?")


@lru_cache(maxsize=65536)
def canonical(predicate: str) -> str:
    """The table's form of a predicate; another one comes back tidied. 'To the left of' -> 'left of'."""
    text = " ".join(tokens(predicate))
    if match := _SIDE.fullmatch(text):
        return f"{match[1]} of"
    for start in ("is ", "are ", "it is ", "located ", "standing ", "sitting ", "positioned ", "directly "):
        if text.startswith(start) and text not in GROUPS and text.removeprefix(start) in GROUPS:
            return text.removeprefix(start)
    if text not in GROUPS:
        text = text.removesuffix(" it")
    return {"on top": "on top of", "underneath": "below", "atop": "on top of", "close to": "close", "in back of": "behind",
            "within": "inside", "larger": "bigger", "in the front of": "in front of"}.get(text, text)  # fmt: skip


def group_of(predicate: str) -> str | None:
    """The group of a predicate in any wording, None for one that the table does not know."""
    return GROUPS.get(canonical(predicate))
