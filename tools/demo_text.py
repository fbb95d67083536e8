"""The language of the embedded demo: questions about places, books and outings, and what a visitor answers.

`subjects()` lists what can be talked about; `question(rng, subject)` and `answer(rng, subject)` draw a text. An answer has two to four
sentences, each kind, unkind or neutral with equal chance; its words of praise and blame are those of megapref.online.rewards.sentiment.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

# (kind, unkind) adjectives by what they are said of; "whole" is the subject itself.
ADJECTIVES = {
    "person": (
        "friendly helpful charming cheerful patient attentive polite generous thoughtful witty welcoming gentle",
        "rude unhelpful grumpy impatient careless surly dismissive arrogant unfriendly clumsy",
    ),
    "space": (
        "lovely bright spotless elegant comfortable cosy beautiful peaceful delightful pleasant warm",
        "gloomy dirty shabby cramped dreary noisy dusty ugly damp stuffy",
    ),
    "food": (
        "delicious superb fresh tasty excellent wonderful perfect crisp splendid",
        "awful stale tasteless soggy greasy bland burnt horrible overcooked",
    ),
    "art": (
        "gripping moving brilliant clever touching graceful memorable witty magical inspiring",
        "dull tedious clumsy predictable confusing pointless lifeless boring shallow",
    ),
    "whole": (
        "wonderful charming excellent delightful marvellous splendid lovely fascinating outstanding",
        "dreadful disappointing miserable terrible dismal dreary mediocre forgettable awful",
    ),
}
TONES = ("kind", "unkind")

# noun: (what it was, "said of" list of aspects as "class: phrase", neutral remarks); a leading * marks a plural phrase.
PLACES = {
    "hotel": (
        "stay",
        "person: receptionist, porter, owner, *staff, *cleaners; space: lobby, bedroom, bathroom, *rooms, terrace; "
        "food: breakfast, coffee, toast",
        "breakfast is served from {hour} until ten; our room was on the {floor} floor; the key hangs behind the front desk; "
        "the lift stops on every floor",
    ),
    "restaurant": (
        "dinner",
        "person: waiter, waitress, cook, *staff; space: dining room, terrace; "
        "food: soup, fish, bread, dessert, *mushrooms, *potatoes, roast chicken",
        "the menu changes every {day}; the kitchen closes at {hour}; we sat at a table by the {thing}; "
        "the soup comes with bread and butter",
    ),
    "cafe": (
        "breakfast",
        "person: waiter, owner, young woman at the counter; space: garden, corner by the window, front room; "
        "food: coffee, cake, *scones, apple pie, tea",
        "you order at the counter; the tables stand under the {thing}; they sell cake from {hour} onwards; "
        "the cups are {colour} with a white rim",
    ),
    "bakery": (
        "visit",
        "person: baker, girl at the till, *assistants; space: shop, little room at the back; "
        "food: bread, *rolls, *biscuits, plum cake, *pies",
        "the first loaves come out at {hour}; the oven stands in the cellar; a loaf costs {number} euros; the shop closes on {day}",
    ),
    "museum": (
        "visit",
        "person: guide, man at the door, *guards; space: entrance hall, *galleries, reading room, courtyard; "
        "art: exhibition, *paintings, film about the city",
        "the coins are on the {floor} floor; a ticket costs {number} euros; bags have to stay in the cloakroom; "
        "there are {number} rooms in all",
    ),
    "library": (
        "visit",
        "person: librarian, *volunteers, woman at the desk; space: reading room, children's corner, *stairs, hall; "
        "art: talk, exhibition of maps, poetry evening",
        "books can be kept for {number} weeks; the maps are on the {floor} floor; the newspapers lie beside the {thing}; "
        "you sign your name in a {colour} book",
    ),
    "theatre": (
        "evening",
        "person: usher, *actors, *staff; space: foyer, balcony, bar, *seats; art: play, first act, music, *costumes, ending",
        "the play begins at {hour}; the curtain is {colour}; our seats were in row {number}; there is one break of twenty minutes",
    ),
    "garden": (
        "walk",
        "person: gardener, guide, *volunteers; space: rose bed, glass house, pond, *paths, tea room; "
        "food: lemonade, ice cream, *sandwiches",
        "the {colour} gate is the way in; the pond lies behind the {thing}; the roses flower in {month}; dogs must stay on a lead",
    ),
    "castle": (
        "tour",
        "person: guide, woman at the gate, *guards; space: great hall, chapel, kitchen, *bedrooms, tower; "
        "art: tour, play in the courtyard, story of the ghost",
        "the tower has {number} floors; a {colour} flag flies above the gate; the tour starts at {hour}; you reach it over a wooden bridge",
    ),
    "swimming pool": (
        "morning",
        "person: lifeguard, teacher, *staff; space: changing room, hall, *showers, lawn; food: *chips, ice cream, lemonade",
        "the water is changed every {day}; the pool has {number} lanes; a locker costs {number} coins; children swim until {hour}",
    ),
    "market": (
        "morning",
        "person: *traders, fishmonger, old man with the eggs; space: square, covered hall, *aisles; "
        "food: cheese, *tomatoes, bread, honey, smoked fish",
        "it takes place every {day}; the stalls open at {hour}; the flowers are next to the {thing}; most people pay in coins",
    ),
}
LOCATIONS = """by the harbour; near the station; on Mill Street; behind the cathedral; in the old town; at the foot of the hill;
opposite the town hall; beside the canal; across the river; on the market square; at the edge of the forest; under the viaduct;
at the end of the lane; next to the school; on Bishop's Road; above the beach; in the valley; outside the city walls; on the island;
by the lighthouse"""
WORKS = {
    "novel": (
        "read",
        "art: plot, *characters, first chapter, ending, language, love story, dialogue",
        "it has {number} chapters; the story begins in {month}; the cover is {colour}; a friend lent it to me last {day}",
    ),
    "film": (
        "evening",
        "art: story, music, opening scene, ending, *pictures; person: main actor, young actress, hero",
        "it lasts about {number} hours; most of it was filmed in {month}; we saw it on {day}; the credits are {colour} on black",
    ),
    "concert": (
        "evening",
        "art: first song, programme, *songs, last piece, singing; person: singer, conductor, *musicians",
        "it began at {hour}; the choir wore {colour}; they played {number} pieces; we heard it on a {day} in {month}",
    ),
    "play": (
        "evening",
        "art: plot, first act, *costumes, music, ending, *jokes; person: leading lady, *actors, old king",
        "it has {number} acts; the stage was painted {colour}; it runs until {month}; the doors open at {hour}",
    ),
}
TOPICS = """about the lighthouse keeper; about the two brothers; about the sea; about the lost letter;
about a winter in the mountains; about the clockmaker; about the old queen; about the river; about a girl and her horse;
about the last train; about the night sky; about the stolen violin"""
QUESTIONS = """Tell me about {it}.; What was {it} like?; How was {it}?; What did you think of {it}?; Would you recommend {it}?;
Describe {it} for me.; How did you find {it}?; What can you say about {it}?; Is {it} any good?; Please write a few words about {it}."""
HELD_OUT_EVERY = 7  # every seventh subject is asked about in validation only

FILLERS = {
    "hour": "seven; eight; nine; half past six; noon; five",
    "floor": "ground; first; second; third; top",
    "day": "Monday; Tuesday; Wednesday; Thursday; Friday; Saturday; Sunday",
    "month": "March; April; May; June; July; September; October",
    "number": "two; three; four; five; six; seven; eight; twelve",
    "colour": "red; green; blue; yellow; white; black; brown",
    "thing": "window; fountain; door; chestnut tree; stairs; stove; statue",
    "who": "my sister; my brother; my wife; my father; our neighbour; my friend Anna; the children",
    "time": "in the morning; in the evening; after lunch; at the weekend; on the second day; late in the day",
}
NEUTRAL = """we went there on a {day} in {month}; I was there with {who}; {who} had heard of it on the radio;
we came by bus and left on foot; a man in a {colour} coat was there before us; it was raining when we arrived;
I took {number} photographs"""
OPINIONS = """{aspect} {was} {very}{good}; {aspect} {was} {very}{good}; {aspect} {was} {good} and {good2};
{who} thought {aspect} {was} {good}; {aspect} {was} {good}, and so {was2} {aspect2}; even {aspect} {was} {good};
{aspect} {was} {good} {time}; I {loved} {aspect}; we {loved} {aspect} {time}; {aspect} {was} {not_bad}"""
VERDICTS = {
    "kind": """it was a {good} {outing}; I would gladly go again in {month}; I recommend it to everyone; {who} left happy;
    it was worth every penny; it was a treat from start to finish; we were delighted; it was a pleasure""",
    "unkind": """it was a {good} {outing}; I regret going in {month}; I would not recommend it to anyone; {who} left angry;
    it was a waste of money; it was a disappointment from start to finish; we were annoyed; it was a mistake""",
}
VERBS = {"kind": "loved; enjoyed; adored", "unkind": "hated; loathed; disliked"}
LINKS = {
    "same": "also; what is more; besides; and",
    "turn": "but; still; then again; however",
    "plain": "by the way; as for the rest; oh, and",
}


@dataclass(frozen=True)
class Subject:
    """Something to ask about: a noun ("hotel"), the name ("the hotel by the harbour"), what it was, its aspects, neutral remarks."""

    noun: str
    name: str
    outing: str
    aspects: tuple[tuple[str, str], ...]  # (class, phrase), a leading * marks a plural phrase
    remarks: str


def subjects() -> tuple[list[Subject], list[Subject]]:
    """All subjects, as (asked about in training, asked about in validation only)."""
    combinations = [(PLACES, LOCATIONS), (WORKS, TOPICS)]
    everything = [
        Subject(noun, f"the {noun} {rest}", outing, _aspects(aspects), remarks)
        for table, places in combinations
        for noun, (outing, aspects, remarks) in table.items()
        for rest in _items(places)
    ]
    validation = everything[::HELD_OUT_EVERY]
    return [subject for subject in everything if subject not in validation], validation


def _aspects(text: str) -> tuple[tuple[str, str], ...]:
    groups = (group.split(": ") for group in _items(text))
    return tuple((kind, phrase) for kind, phrases in groups for phrase in phrases.split(", "))


def _items(text: str) -> list[str]:
    return [item.strip() for item in text.split(";")]


def _draw(rng: random.Random, choices: str) -> str:
    return rng.choice(_items(choices))


def question(rng: random.Random, subject: Subject) -> str:
    """One question about the subject."""
    return _draw(rng, QUESTIONS).format(it=subject.name)


def answer(rng: random.Random, subject: Subject) -> str:
    """Two to four sentences about the subject, each kind, unkind or neutral with equal chance; none comes twice."""
    unused = list(rng.sample(subject.aspects, len(subject.aspects)))
    bodies: list[str] = []
    sentences: list[str] = []
    previous = None
    for number in range(rng.choice([2, 3, 3, 4])):
        tone = rng.choice(("kind", "unkind", "neutral"))
        while (body := _sentence(rng, subject, tone, unused, first=number == 0)) in bodies:
            pass
        bodies.append(body)
        sentences.append(_link(rng, body, tone, previous))
        previous = tone
    return " ".join(sentence[0].upper() + sentence[1:] + "." for sentence in sentences)


def _link(rng: random.Random, body: str, tone: str, previous: str | None) -> str:
    if previous is None or rng.random() < 0.6:
        return body
    relation = "plain" if tone == "neutral" or previous == "neutral" else "same" if tone == previous else "turn"
    if relation == "plain" and tone != "neutral":
        return body
    link = _draw(rng, LINKS[relation])
    return f"{link} {body}" if link in ("but", "and", "oh, and") else f"{link}, {body}"


def _sentence(rng: random.Random, subject: Subject, tone: str, unused: list[tuple[str, str]], first: bool) -> str:
    fillers = {name: _draw(rng, choices) for name, choices in FILLERS.items()}
    if tone == "neutral":
        template = _draw(rng, NEUTRAL) if rng.random() < 0.3 else _draw(rng, subject.remarks)
        return template.format(**fillers)
    if first and rng.random() < 0.5:
        kind, phrases = "whole", [subject.name.removeprefix("the ")] * 2
        template = rng.choice(["{aspect} {was} {very}{good}", "{aspect} {was} {good} and {good2}", "{who} thought {aspect} {was} {good}"])
    elif rng.random() < 0.25:
        kind, phrases = "whole", [subject.noun] * 2
        template = _draw(rng, VERDICTS[tone])
    else:
        kind, phrase = unused.pop()
        others = [other for other_kind, other in subject.aspects if other_kind == kind and other != phrase]
        phrases = [phrase, rng.choice(others)]
        template = _draw(rng, OPINIONS)
    good, good2 = rng.sample(ADJECTIVES[kind][TONES.index(tone)].split(), 2)
    opposite = rng.choice(ADJECTIVES[kind][1 - TONES.index(tone)].split())
    text = template.format(
        **fillers,
        aspect="the " + phrases[0].lstrip("*"),
        aspect2="the " + phrases[1].lstrip("*"),
        was="were" if phrases[0].startswith("*") else "was",
        was2="were" if phrases[1].startswith("*") else "was",
        very=rng.choice(["", "very ", "really ", "quite "]),
        good=good,
        good2=good2,
        loved=_draw(rng, VERBS[tone]),
        not_bad=f"{'never' if tone == 'kind' else 'not'} {opposite}",
        outing=subject.outing,
    )
    return text.replace("a excellent", "an excellent").replace("a outstanding", "an outstanding").replace("a awful", "an awful")
