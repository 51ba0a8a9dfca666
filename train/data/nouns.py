"""The emoji of scenes as nouns in English and French: one of them with its article, and several of them.

CLDR has the names, but neither gender nor plural. The genders stand here; this is also the choice of what scenes are
made of: things that can be counted, whose names follow the rules below, and whose pictures do not resemble each other.
"""

from __future__ import annotations

import re

FEMININE = "🍎🍌🍓🍐🍉🥕🍆🍕🐄🐢🐙🐝🐞🦉🌹🌷🚗🚂🚀🏠⛺⭐🎸🎺🔑🔔💡👑👗👟🪑🚪⚓💎🐸"
MASCULINE = "🐕🐈🐎🐘🐬🦋🐌🦆🐧🌻🌵🌴🍄🍋🍍🍔🍩🚌🚲✈⛵🏰☀⚽🎻🎁🔨❤💙🚜🚁🧸🪁🏆🎈🌈🦀"
GENDERS = dict.fromkeys(FEMININE, True) | dict.fromkeys(MASCULINE, False)
AS_DETAIL = {"peau": "à la peau", "cheveux": "aux cheveux", "chauve": "chauve"}
Nouns = tuple[str, str]  # "a red apple" and "red apples"

# Behind one of these nothing of a French name agrees: "chaussures de sport", "arcs-en-ciel".
LINKS = re.compile(r"[ -](?:(?:de|du|des|en|à|au|aux|avec|sur)[ -]|d')")


def english(name: str) -> Nouns:
    """The last word takes the plural: -es after a hiss and an o after a consonant, -ies for such a y, else -s."""
    if re.search(r"(?:s|x|z|ch|sh|[^aeiou]o)$", name):
        many = f"{name}es"
    else:
        many = re.sub(r"([^aeiou])y$", r"\1ie", name) + "s"
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}", many


def french(name: str, feminine: bool) -> Nouns:
    """Each word before a preposition takes the plural, because adjectives agree: "pommes rouges"."""
    link = LINKS.search(name)
    end = link.start() if link else len(name)
    many = re.sub(r"[^ -]+", lambda word: _plural(word[0]), name[:end])
    return f"{'une' if feminine else 'un'} {name}", many + name[end:]


def _plural(word: str) -> str:
    """-x after -eau and -eu but "bleus", -aux for -al, nothing after -s, -x and -z, else -s."""
    if word[-1] in "sxz":
        return word
    if word.endswith("al"):
        return f"{word[:-1]}ux"
    return word + ("x" if word.endswith(("eau", "eu")) and word != "bleu" else "s")


def spoken_french(emoji: str, name: str) -> str:
    """With its article where the gender is known; "homme : peau mate et cheveux roux" -> "homme à la peau mate et aux
    cheveux roux"; another name as it is."""
    if emoji in GENDERS:
        return french(name, GENDERS[emoji])[0]
    base, _, listed = name.partition(" : ")
    details = [detail.partition(" ") for detail in re.split(", | et ", listed)]
    if not all(first in AS_DETAIL for first, *_ in details):
        return name
    return f"{base} {' et '.join(f'{AS_DETAIL[first]}{space}{rest}' for first, space, rest in details)}"
