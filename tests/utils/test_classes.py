"""Classes of the data found among the model's, by name."""

from __future__ import annotations

import pytest

from hf_vitprune.errors import InvalidDataError
from hf_vitprune.utils.classes import chance_note, match_classes


def labels(*names: str) -> dict[int, str]:
    return dict(enumerate(names))


#: ImageNet's synsets (made up but for six) and what a model calls them
PLACES = {0: ("n01440764", "tench, Tinca tinca"), 207: ("n02099601", "golden retriever")}
PLACES |= {281: ("n02123045", "tabby, tabby cat"), 388: ("n02510455", "giant panda, panda")}
PLACES |= {817: ("n04285008", "sports car, sport car"), 999: ("n15075141", "toilet tissue, toilet paper")}


def synsets() -> list[str]:
    known = sorted(PLACES)
    found = []
    for place in range(1000):
        before = max(k for k in known if k <= place)
        found.append(f"n{int(PLACES[before][0][1:]) + place - before:08d}")
    return found


IMAGENET = labels(*(PLACES[i][1] if i in PLACES else f"thing {i}" for i in range(1000)))


@pytest.mark.parametrize(
    ("names", "model", "numbers", "said"),
    [
        (["cat", "dog"], labels("cat", "dog"), (0, 1), ""),
        (["four", "one", "two"], labels("one", "two", "four"), (2, 0, 1), "own order"),
        (["Chat_noir", "dog"], labels("dog", "chat noir"), (1, 0), "'Chat_noir' = 'chat noir'"),
        (["u\u0308n", "dog"], labels("dog", "\u00fcn"), (1, 0), "taken for the same class"),  # as macOS writes it
        (
            ["goldfish", "tench"],
            labels("tench, Tinca tinca", "goldfish, Carassius"),
            (1, 0),
            "'goldfish' = 'goldfish, C",
        ),
        (["n01440764", "n01443537"], labels("n01443537 goldfish", "n01440764 tench, T"), (1, 0), "'n01440764' = "),
        (["missile", "projectile"], labels("projectile, missile", "missile"), (1, 0), "'projectile' = "),
        (["0", "2", "1"], labels("cat", "dog", "emu"), (0, 2, 1), "0 = 'cat'"),
        (["2", "0", "1"], labels("LABEL_0", "LABEL_1", "LABEL_2"), (2, 0, 1), "numbers"),
        (["0", "1"], labels("1", "0"), (1, 0), "own order"),
        (["cat", "dog"], labels("LABEL_0", "LABEL_1"), (0, 1), "LABEL_0 = 'cat', LABEL_1 = 'dog'"),
        (synsets()[::-1], IMAGENET, tuple(range(999, -1, -1)), "synsets"),
    ],
)
def test_classes_are_found_by_name(
    names: list[str], model: dict[int, str], numbers: tuple[int, ...], said: str
) -> None:
    match = match_classes(names, model)
    assert match.numbers == numbers and said in match.how and bool(match.how) == bool(said)
    assert match.named != model[0].startswith("LABEL_")


@pytest.mark.parametrize(
    ("names", "model", "said"),
    [
        (["cat", "god"], labels("dog", "cat"), "Only in the data: 'god'. Only in the model: 'dog'"),
        (["cat"], labels("dog", "cat"), "Only in the model: 'dog'"),
        (["a", "b", "c"], labels("LABEL_0", "LABEL_1"), "2 classes and the data 3"),
        (["1", "2"], labels("cat", "dog"), "Only in the data: '1', '2'"),  # counted from 1, or of some other kind
        (["1", "2"], labels("LABEL_0", "LABEL_1", "LABEL_2"), "3 classes and the data 2"),
        (
            ["crane", "dog"],
            labels("crane, bird", "crane, machine"),
            "'crane' could be 'crane, bird' or 'crane, machine'",
        ),
        (["CAT", "Cat"], labels("cat", "dog"), "'CAT' could be 'cat', as 'Cat' could"),
        (["crane", "dog"], labels("crane", "crane"), "'crane' could be 'crane' or 'crane'"),
        (synsets(), {**IMAGENET, 388: "tench"}, "and 995 more"),  # 1000 classes in some other order
        ([f"x{i}" for i in range(9)], labels("y"), "'x4' and 4 more"),
    ],
)
def test_what_does_not_align_is_refused_with_the_cures(names: list[str], model: dict[int, str], said: str) -> None:
    with pytest.raises(InvalidDataError) as error:
        match_classes(names, model, model="vit")
    assert said in str(error.value) and str(error.value).startswith("vit has")
    assert "id2label" in str(error.value) and "--new-head" in str(error.value)


def test_some_of_the_classes_will_do_where_nothing_is_trained() -> None:
    match = match_classes(["emu", "cat"], labels("cat", "dog", "emu"), every=False)
    assert match.numbers == (2, 0) and "1 of its 3 classes have no images: dog" in match.how
    assert match_classes(["2", "0"], labels("cat", "dog", "emu"), every=False).numbers == (2, 0)
    with pytest.raises(InvalidDataError, match="Only in the data: 'bee'") as error:
        match_classes(["bee"], labels("cat", "dog"), every=False)
    assert "--new-head" not in str(error.value)


def test_accuracy_at_chance() -> None:
    even = [0, 1] * 50
    assert chance_note(0.52, even) and chance_note(0.1, even) and chance_note(0.65, even) is None
    assert "90.0% are of one class" in (chance_note(0.92, [0] * 90 + [1] * 10) or "")
    assert chance_note(0.97, [0] * 90 + [1] * 10) is None
    assert chance_note(0.5, [0, 0, 1, 1]) and chance_note(1.0, [0, 0, 1, 1]) is None
    assert chance_note(1.0, [0, 0])  # there is nothing to tell apart
