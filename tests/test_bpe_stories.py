"""The built-in corpus: what the grammar writes, it reads back, with the probability that it wrote it with."""

import itertools
import math
import random
import re
from collections import Counter

import pytest

import bpe

CAUSES = ("loss", "damage", "sound", "problem", "reason", "spent")
THINGS = ("thing", "toy", "monster")


def write(seed: int, number: int) -> tuple[str, float, dict]:
    memory = {}
    text, nats = bpe._write(bpe.STORY, memory, random.Random(f"{seed} {number}").random)
    return text, nats, memory


@pytest.fixture(scope="module")
def thousand() -> list[tuple[str, float, dict]]:
    return [write(7, number) for number in range(1000)]


@pytest.fixture
def tiny_grammar(monkeypatch):
    """Put another grammar in the place of the built-in one, and back."""

    def use(grammar: str) -> None:
        monkeypatch.setattr(bpe, "GRAMMAR", grammar)
        bpe._rules.cache_clear()

    yield use
    monkeypatch.undo()
    bpe._rules.cache_clear()


def test_every_story_has_one_derivation_and_its_probability(thousand):
    """1,000 stories parse back in exactly one way, at the -log p of the draws that wrote them."""
    for text, nats, _ in thousand:
        readings = list(bpe._read(text))
        assert len(readings) == 1, f"{len(readings)} derivations of: {text}"
        assert readings[0] == pytest.approx(nats, rel=1e-12), text
        assert bpe.story_nats(text) == readings[0]


def test_probabilities_of_a_small_grammar_sum_to_one(tiny_grammar):
    """In a grammar small enough to list, the probabilities of all stories add up to 1 and are their frequencies."""
    tiny_grammar(
        "\nstory: {who} saw {a fruit}, {a fruit2} (|or two )and {a colour} {thing}. {He} took the {thing}.{end};\n"
        "thing: {colour2} box | hat; end:  | {who} {did}. | So did {a fruit3}.; did: sang (a|no) song | slept;\n"
        "who/he = Ann/she Bob/he; fruit = apple plum old_pear; colour = red blue;\n"
    )
    draws = Counter(itertools.islice(bpe.stories(1), 20_000))
    probabilities = {text: math.exp(-bpe.story_nats(text)) for text in draws}
    assert sum(probabilities.values()) == pytest.approx(1, abs=1e-12), f"{len(draws)} stories"
    for text, probability in probabilities.items():
        spread = math.sqrt(20_000 * probability * (1 - probability))
        assert abs(draws[text] - 20_000 * probability) < 6 * spread, text


def test_a_hand_computed_probability(tiny_grammar):
    """One of 2 names and 2 different fruits of 3: -log p = log 2 + log 3 + log 2; what returns costs nothing."""
    tiny_grammar(
        "\nstory: {who} ate {a fruit} and {a fruit2}. {Fruit} for {who}!;\nwho = Ann Bob; fruit = apple plum fig;\n"
    )
    nats = math.log(2) + math.log(3) + math.log(2)
    assert bpe.story_nats("Bob ate a plum and an apple. Plum for Bob!") == pytest.approx(nats, rel=1e-12)
    for wrong in ("Bob ate a plum and a plum. Plum for Bob!", "Bob ate a plum and an apple. Plum for Ann!",
                  "Bob ate a plum and a apple. Plum for Bob!", "Bob ate a plum and an apple. plum for Bob!"):
        with pytest.raises(ValueError, match="cannot write"):
            bpe.story_nats(wrong)


def test_entropy_floor_and_sizes(thousand):
    """At least 0.25 nats a byte; each story is ASCII, 80 to 165 words, at most 900 bytes, clean at both ends."""
    size = sum(len(text.encode()) for text, _, _ in thousand)
    density = sum(nats for _, nats, _ in thousand) / size
    assert density >= 0.25, f"{density:.4f} nats a byte"
    for text, _, _ in thousand:
        assert text == text.strip() and text.isascii() and bpe.END_OF_TEXT not in text, text
        assert 80 <= len(text.split()) <= 165 and len(text) <= 900, (len(text.split()), len(text), text)


def test_vocabulary():
    """At least 1,500 distinct words, each of them at least 10 times in 4,000 stories: a small model can learn it."""
    made = itertools.islice(bpe.stories(3), 4000)
    words = Counter(word for text in made for word in re.findall("[a-z]+", text.lower()))
    assert len(words) >= 1500, len(words)
    rare = {word: count for word, count in words.items() if count < 10}
    assert not rare, rare


def test_english(thousand):
    """No unfilled slot, doubled word or punctuation, or wrong article; sentences begin with capital letters."""
    for text, _, _ in thousand:
        assert not re.search(r"[{}()|_/]|  |\.\.| [.,!?]|[,.][a-z]", text), text
        assert not re.search(r"\b(\w+) \1\b", text), text
        assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]", text), text
        assert not re.search(r"[.!?] [a-z]", re.sub(r'[.!?]" [a-z]', "", text)), text
        assert text[0].isupper() and text[-1] in '."' and text.count('"') % 2 == 0, text


def spelled(key: str, memory: dict) -> str:
    return bpe._write((("", key),), memory, None)[0]


def gaps(text: str, part: str) -> list[int]:
    """Words between any two mentions of `part`."""
    places = [len(text[: match.start()].split()) for match in re.finditer(re.escape(part) + r"\b", text)]
    return [later - earlier for earlier, later in itertools.combinations(places, 2)]


def test_names_things_and_causes_return(thousand):
    """The hero, the friend, the thing and the cause of every story return 20 to 80 words after a mention of theirs."""
    for text, _, memory in thousand:
        cause, = (key for key in CAUSES if key in memory)
        thing = next(key for key in reversed(THINGS) if key in memory)
        for key in ("hero", "pet", thing, cause):
            returns = gaps(text, spelled(key, memory))
            assert any(20 <= gap <= 80 for gap in returns), f"{key} {spelled(key, memory)!r}: {returns} in: {text}"


def test_characters_stay_who_they_are(thousand):
    """A story names one child and one friend, calls the child he or she throughout, and the friend by one kind."""
    rules = bpe._rules()
    children = {name: rule for rule in ("girl", "boy") for (name,) in rules[rule][1]}
    for text, _, memory in thousand:
        named = set(re.findall("[A-Z][a-z]+", text)) & set(children)
        assert named == {spelled("hero", memory)}, (named, text)
        wrong = r"\b(he|his|him|boy)\b" if children[named.pop()] == "girl" else r"\b(she|her|girl)\b"
        assert not re.search(wrong, text, re.I), text
        kinds = re.findall(rf"{spelled('pet', memory)}, (?:his |her )?an? (?:[\w-]+, )?[\w-]+ (\w+) in", text)
        kinds += re.findall(r"The (\w+) \w+ (?:found|fetched) ", text)
        assert len(set(kinds)) <= 1, (kinds, text)
    assert not re.search(r"\{(hero|he|his|him|pet|animal)\d", bpe.GRAMMAR)


def test_a_tampered_story_is_refused(thousand):
    """Another name half-way, a changed cause, a word too many or a cut end: ValueError, never a number."""
    for text, _, memory in thousand[:50]:
        hero = spelled("hero", memory)
        other = "Ada" if hero != "Ada" else "Zoe"
        last = text.rindex(hero)
        cause = spelled(next(key for key in CAUSES if key in memory), memory)
        assert text.count(cause) >= 2, (cause, text)
        swapped = text[:last] + other + text[last + len(hero) :]
        late = "it was late".join(text.rsplit(cause, 1))
        for wrong in (swapped, late, text[:-1], text + " ", text + " The end.", text.lower(), ""):
            with pytest.raises(ValueError, match="not one of the built-in stories"):
                bpe.story_nats(wrong)


def test_a_story_is_a_function_of_seed_and_number():
    """Story i is the same wherever one starts, so that processes can write disjoint ranges; no global state is used."""
    whole = list(itertools.islice(bpe.stories(5), 40))
    state = random.getstate()
    assert list(itertools.islice(bpe.stories(5, 17), 23)) == whole[17:]
    assert random.getstate() == state
    assert whole == [write(5, number)[0] for number in range(40)]


def test_no_repeats_and_disjoint_seeds():
    """10,000 stories of four seeds (validation has seeds of its own) are 10,000 different ones."""
    made = [text for seed in (0, 1, 2, -1) for text in itertools.islice(bpe.stories(seed), 2500)]
    assert len(set(made)) == len(made), len(made) - len(set(made))


@pytest.mark.slow
def test_no_repeats_in_100_000():
    """100,000 stories of one seed are all different, and none of them is among 10,000 of another seed."""
    made = set(itertools.islice(bpe.stories(0), 100_000))
    assert len(made) == 100_000, len(made)
    assert made.isdisjoint(itertools.islice(bpe.stories(1), 10_000))


def test_the_grammar_is_sound():
    """Every slot has a rule, every rule is used, no row stands twice in its list, and no list runs out of rows."""
    rules = bpe._rules()
    used = {name.rpartition(" ")[2].lower() for name in re.findall(r"\{(.*?)\}", bpe.GRAMMAR)} | {"story"}
    assert used <= set(rules), used - set(rules)
    for columns, rows, (head,) in rules.values():
        assert len(set(rows)) == len(rows), Counter(rows).most_common(1)
        slots = "(" + head.replace("/", "|") + ")([2-6]?)"
        suffixes = {found[2] for name in used if (found := re.fullmatch(slots, name))}
        if not head.endswith("~"):
            assert suffixes, f"{head} is never used"
            assert len(suffixes) <= len(rows), f"{head} has {len(rows)} rows for {len(suffixes)} draws"
        assert all(len(row) == len(columns) for row in rows), head
