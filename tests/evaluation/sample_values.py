"""Made-up values of a whole evaluation, as `lbdt evaluate` writes them, from formulas alone."""

import math
from pathlib import Path

from PIL import Image

from lbdt.canvas import OBJECTS

KINDS = {"saeuron": (20, 3.0), "saemnesia": (20, 3.0), "gsae": (20, 3.0), "sdxl": (4, None)}
STRENGTHS = (-1.0, -2.0, -5.0, -10.0, -20.0)
CHOSEN = -5.0


def estimate(mean, half=None):
    mean = float(mean)
    if half is None:
        return {"mean": mean, "low": None, "high": None, "seeds": 1}
    return {"mean": mean, "low": max(0.0, mean - half), "high": min(100.0, mean + half), "seeds": 3}


def row(method, ua, ira, cra, ar, fd, half=3.0, pictures=780, **settings):
    ga = (ua + ira + cra + 100 - ar) / 4
    return {
        "method": method,
        "settings": settings,
        "pictures": pictures,
        "UA": estimate(ua, half),
        "IRA": estimate(ira, half),
        "CRA": estimate(cra, half),
        "AR": estimate(ar, half),
        "AR others": estimate(ar / 2, half),
        "GA": estimate(ga, half),
        "FD": estimate(fd, half and 0.4),
        **{name: estimate(mean, half) for name, mean in (("clean", ua - ar / 2), ("kept", ira - 1))},
        **{name: estimate(mean, half) for name, mean in (("pair gone", ua - 2), ("untouched", 100 - fd))},
        "CLIP": None,
        "replaced": estimate(0 if method != "per" else 21.5, half),
    }


def base(number, **other):
    """The unedited model's row: its accuracies beside the protocol's columns."""
    found = row("base", 1, 99, 98, 1, 1.1, pictures=500, **other) | {"GA": None, "FD": None}
    for metric in ("clean", "kept", "pair gone", "untouched"):
        del found[metric]
    seen = {"object seen": 99.1, "both seen": 90.2 - number, "nothing seen": 95.3, "style seen": 97.4}
    return found | {name: estimate(mean, 1.0) for name, mean in seen.items()}


def by_text(guidance):
    """The rows of a negative prompt, which needs guidance, and of UCE."""
    negative = row("negative", 70, 80, 90, 30, 9.0)
    if guidance is None:
        negative = {"method": "negative", "settings": {}, "note": "no guidance: not applicable"}
    return [negative, row("uce", 95, 60, 70, 20, 12.0)]


def _steered(strength, shift, **other):
    force = 1 - math.exp(-abs(strength) / 4)
    ua, ira = 99 * force, 98 - 60 * force**6 - shift
    return row("steering", ua, ira, ira - 2, 5 + 50 * force**2, 3 + 20 * force, strength=strength, **other)


def _per(shift, **other):
    return row("per", 93 - shift, 97, 96, 9 + shift, 4.2, **({"padding": 1, "source": "nearest"} | other))


def _both(number):
    """PER without the gate and with it."""
    ungated = _per(number + 1, min_patches=1) | {"method": "ungated"}
    return [ungated, _per(number)]


def _histogram(low, high, centre, width, bins=40):
    edges = [low + (high - low) * n / bins for n in range(bins + 1)]
    weights = [
        math.exp(-((((a + b) / 2 - centre) / width) ** 2) / 2) for a, b in zip(edges, edges[1:], strict=False)
    ]
    weights = [w if w > 1e-4 else 0.0 for w in weights]
    return {"edges": edges, "share": [w / sum(weights) for w in weights]}


def _activations():
    rows = [
        ("base", {}, 0.0),
        *(("steering", {"strength": s}, abs(s) / 6) for s in STRENGTHS),
        ("per", {}, 0.05),
    ]
    return [
        {
            "method": method,
            "settings": settings,
            "patches": 51200,
            "outside": 0.2 + 3 * moved,
            "wasserstein": 0.3 * moved,
            "norm wasserstein": 0.2 * moved,
            "norms": _histogram(0, 8, 3 + 0.6 * moved, 0.5 + 0.2 * moved),
            "dimension": {"index": 17, **_histogram(-8, 8, -moved, 1 + 0.4 * moved)},
        }
        for method, settings, moved in rows
    ]


def _together():
    counts = (1, 2, 4, 7, 10)
    return [
        {
            "method": method,
            "settings": {},
            "order": order,
            "erased": list(OBJECTS[:count]),
            "pictures": 260,
            "UA": estimate(95 - count * loss / 3, 2.0),
            "RA": estimate(97 - count * loss, 2.0),
            "CRA": estimate(96 - count * loss / 2, 2.0),
        }
        for order in ("at once", "one after another")
        for method, loss in (("steering", 5), ("per", 1.5))
        for count in counts
    ]


def _concepts(shift):
    return {
        method: {
            name: {
                "UA": 100 - (7 * number + level) % 37,
                "IRA": 97.0,
                "CRA": 95.0,
                "AR": (level + 5 * number) % (60 if method == "steering" else 20) + 1.0,
            }
            for number, name in enumerate(OBJECTS)
        }
        for method, level in (("steering", 11 + shift), ("per", 3 + shift))
    }


def _ratio(steps):
    times = [999.0 - 999.0 * number / steps for number in range(steps)]
    return {
        str(padding): [
            {
                "timestep": t,
                "detected": 0.1 + 0.2 * t / 1000,
                "replaced": min(1.0, (0.1 + 0.2 * t / 1000) * (1 + padding)),
            }
            for t in times
        ]
        for padding in range(4)
    }


def kind(number, steps, guidance):
    """One pipeline's part; `number` shifts its figures."""
    sweep = [{**_steered(s, number, pictures=260), "chosen": s == CHOSEN} for s in STRENGTHS]
    return {
        "sampling": {"steps": steps, "guidance": guidance},
        "rows": [base(number), *by_text(guidance), _steered(CHOSEN, number), *_both(number)],
        "sweep": [*sweep, {**_per(number, pictures=260), "chosen": False}],
        "padding": [_per(number + p, padding=p) for p in range(4)],
        "sources": [_per(number + n, source=s) for n, s in enumerate(("random", "nearest", "mean", "row"))],
        "avoid": [_per(number, avoid="known")],
        "together": _together(),
        "per concept": _concepts(number),
        "ratio": _ratio(steps),
        "activations": _activations(),
        "grid": [
            {
                "concept": name,
                "style": "Sketch" if place % 2 == 0 else None,
                "seed": 7 + place,
                **{part: f"pictures/{part}.png" for part in ("base", "steering", "per", "mask")},
            }
            for place, name in enumerate(OBJECTS[:4])
        ],
    }


def values():
    """All parts of four pipelines, three seeds."""
    return {
        "about": {
            "world": "EmojiCanvas",
            "quick": False,
            "seeds": [500, 501, 502],
            "sweep seeds": [700000],
            "commit": "91723ac",
            "dirty": False,
            "command": "lbdt evaluate --out report",
            "date": "2026-11-25T03:19:28Z",
            "versions": {"lbdt": "0.1", "torch": "2.13.0"},
            "device": {"name": "cpu", "threads": 2},
            "judge": "EmojiCanvas object and style classifiers",
            "features": "EmojiCanvas style classifier (192)",
            "artifacts": "Mahalanobis distance beyond the 99th percentile of unedited generations",
            "design": "every concept erased from one prompt of each object and style",
        },
        "kinds": {name: kind(number, *given) for number, (name, given) in enumerate(KINDS.items())},
        "cost": {
            name: {"base": 0.31, "steering": 0.35, "per": 0.32, "unit": "seconds a picture"} for name in KINDS
        },
    }


def bare():
    """One seed, one pipeline without styles and without any part but the main rows and no steering."""
    rows = [row("base", 0, 100, 0, 0, 1, half=None), row("per", 90, 95, 0, 8, 4, half=None, padding=1)]
    for each in rows:
        each |= dict.fromkeys(("CRA", "AR others", "FD", "clean", "kept", "pair gone", "untouched"))
    return {"about": {"world": "Plain", "seeds": [1]}, "kinds": {"saeuron": {"rows": rows, "sweep": None}}}


def pictures(folder: Path):
    """Writes what `values()["kinds"][...]["grid"]` names into `folder`."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(("base", "steering", "per", "mask")):
        picture = Image.linear_gradient("L").resize((128, 128)).rotate(90 * number)
        picture.convert("RGB").save(folder / "pictures" / f"{part}.png")
