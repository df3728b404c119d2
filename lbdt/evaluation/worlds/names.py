"""The class names of UnlearnCanvas, in the index order of its classifiers, and its prompts (METHOD.md, 8.1)."""

from __future__ import annotations

OBJECTS = (
    *("Architectures", "Bears", "Birds", "Butterfly", "Cats", "Dogs", "Fishes", "Flame", "Flowers", "Frogs"),
    *("Horses", "Human", "Jellyfish", "Rabbits", "Sandwiches", "Sea", "Statues", "Towers", "Trees"),
    "Waterfalls",
)
PHOTO = "Seed_Images"
"""The theme of the photographs that the styles were painted from: a class of the classifier, and no style."""
THEMES = (
    *("Abstractionism", "Artist_Sketch", "Blossom_Season", "Bricks", "Byzantine", "Cartoon", "Cold_Warm"),
    *("Color_Fantasy", "Comic_Etch", "Crayon", "Cubism", "Dadaism", "Dapple", "Defoliation", "Early_Autumn"),
    *("Expressionism", "Fauvism", "French", "Glowing_Sunset", "Gorgeous_Love", "Greenfield", "Impressionism"),
    *("Ink_Art", "Joy", "Liquid_Dreams", "Magic_Cube", "Meta_Physics", "Meteor_Shower", "Monet", "Mosaic"),
    *("Neon_Lines", "On_Fire", "Pastel", "Pencil_Drawing", "Picasso", "Pop_Art", "Red_Blue_Ink", "Rust"),
    *(PHOTO, "Sketch", "Sponge_Dabbed", "Structuralism", "Superstring", "Surrealism", "Ukiyoe", "Van_Gogh"),
    *("Vibrant_Flow", "Warm_Love", "Warm_Smear", "Watercolor", "Winter"),
)
STYLES = tuple(theme for theme in THEMES if theme != PHOTO)
TEMPLATES = {
    "saeuron": ("An image of {object} in {style} style.", "An image of {object}."),
    "official": ("A {object} image in {style} style.", "A {object} image."),
}
"""Styled and plain: "saeuron" is SAeUron's, SAEmnesia's and PER's; "official" is UnlearnCanvas' own, whose plain form no
source states: it is ours. Figures of the two are not of identical prompts."""


def prompt_text(thing: str, style: str | None, template: str = "saeuron") -> str:
    """The prompt of an object in a style or (None) in none. Underscores become spaces; the official template says
    "Photo" for `PHOTO`.

    Raises:
        ValueError: another template.
    """
    if template not in TEMPLATES:
        raise ValueError(f"template: expected one of {', '.join(TEMPLATES)}; got {template!r}")
    styled, plain = TEMPLATES[template]
    if style is None:
        return plain.format(object=thing)
    if style == PHOTO and template == "official":
        style = "Photo"
    return styled.format(object=thing, style=style.replace("_", " "))
