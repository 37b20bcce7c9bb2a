"""Which images' answers changed, as cards of the page."""

from __future__ import annotations

from functools import cache
from typing import Any

from .answers import Answers
from .pictures import Pictures

#: cards that are shown at the most; one of neighbours has many pictures
CLASS_CARDS, NEIGHBOUR_CARDS = 24, 9


def answers_section(answers: Answers, pictures: Pictures) -> dict[str, Any]:
    """Heading, a sentence for every model, and the cards."""
    dense, *others = answers.chosen
    changed = answers.changed()
    if answers.kind == "classes":
        cards = [_class_card(answers, pictures, i) for i in changed[:CLASS_CARDS]]
        heading, what, order = "Predictions that changed", "images have another class", "surest first"
        counts = {name: sum(answers.chosen[name][:, 0] != answers.chosen[dense][:, 0]) for name in others}
        said = "; ".join(f"{name}: {n} of {len(pictures)} {what}" for name, n in counts.items())
    else:
        thumbnail = cache(pictures.thumbnail)
        cards = [_neighbour_card(answers, pictures, i, thumbnail) for i in changed[:NEIGHBOUR_CARDS]]
        heading, order = "Nearest neighbours that changed", "those that changed most first"
        k = answers.chosen[dense].shape[1]
        said = "; ".join(f"{n}: {answers.agreement(n):.1%} of the {k} nearest images are the same" for n in others)
    summary = f"On {pictures.source}, beside the dense model: {said}."
    if answers.accuracy:
        rates = ", ".join(f"{name} {rate:.1%}" for name, rate in answers.accuracy.items())
        summary += f" {answers.accuracy_name.capitalize()}: {rates}."
    shown = f"{len(cards)} of {len(changed)} images, {order}." if cards else ""
    return {"kind": answers.kind, "heading": heading, "summary": summary, "cards": cards, "shown": shown}


def _class_card(answers: Answers, pictures: Pictures, image: int) -> dict[str, Any]:
    truth = None if pictures.labels is None else pictures.labels[image]
    says = []
    for name, chosen in answers.chosen.items():
        number = int(chosen[image, 0])
        mark = "" if truth is None else "right" if number == truth else "wrong"
        sure = f"{answers.sure[name][image]:.0%}"
        says.append({"model": name, "what": answers.class_names[number], "sure": sure, "mark": mark})
    return {
        "thumbnail": pictures.thumbnail(image),
        "name": pictures.names[image],
        "truth": "" if truth is None else answers.class_names[truth],
        "says": says,
    }


def _neighbour_card(answers: Answers, pictures: Pictures, image: int, thumbnail: Any) -> dict[str, Any]:
    dense = next(iter(answers.chosen))
    before = set(answers.chosen[dense][image].tolist())
    says = []
    for name, chosen in answers.chosen.items():
        nearest = [
            {
                "thumbnail": thumbnail(near),
                "name": pictures.names[near],
                "new": near not in before,
                "caption": "new" if near not in before else "" if name == dense else "same",
            }
            for near in chosen[image].tolist()
        ]
        says.append({"model": f"{name}: nearest images", "nearest": nearest})
    return {"thumbnail": thumbnail(image), "name": pictures.names[image], "truth": "", "says": says}
