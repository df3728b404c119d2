"""What an eraser does in calls of each pipeline class: one list, which the tests run and lbdt/hooks/README.md shows.

`python -m tests.pipeline_matrix` prints the table.
"""

COLUMNS = {
    "one set": "one set of concepts for all images",
    "sets": "a set for each prompt",
    "cond": 'rows="cond"',
    "copies": "a set for each prompt, `num_images_per_prompt=2`",
    "embeddings": "a set for each prompt, its embeddings given",
    "unguided": "a set for each prompt, no guidance",
    "compiled": "a set for each prompt, denoiser compiled",
    "offloaded": "a set for each prompt, sequential offload",
    "half": "a set for each prompt, bfloat16",
}

FRAMES = "makes 3 frames, which are rows of its blocks"
APART = "are no layout of FluxPipeline that lbdt knows"
NO_PROMPTS = "its class takes pictures, no prompts"
NO_COPIES = "has no such argument"

WORKS = dict.fromkeys(COLUMNS, "works")
MATRIX: dict[str, dict[str, str]] = {
    "sd": WORKS,
    "sdxl": WORKS,
    "sdxl-refiner": WORKS,
    "sdxl-turbo": WORKS,
    "img2img": WORKS,
    "inpaint": WORKS,
    "controlnet": WORKS,
    "pag": WORKS,
    "instruct-pix2pix": WORKS,
    "image-variation": {**WORKS, "embeddings": NO_PROMPTS},
    "lcm": WORKS,
    "animatediff": dict.fromkeys(COLUMNS, FRAMES),
    "sd3": WORKS,
    "flux": WORKS,
    "flux-true-cfg": {**dict.fromkeys(COLUMNS, APART), "one set": "works", "unguided": "works"},
    "pixart": WORKS,
}
"""By key of `tests.tiny_pipelines.BUILD` (of "flux", with a negative prompt and a scale for it, in a row of its own):
"works", a sentence that a call is refused with, or why there is no such call."""


def table() -> str:
    """The matrix as Markdown; refusals are numbered below it."""
    said = list(dict.fromkeys(cell for row in MATRIX.values() for cell in row.values() if cell != "works"))
    lines = ["| pipeline | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, row in MATRIX.items():
        cells = ["works" if row[c] == "works" else f"({said.index(row[c]) + 1})" for c in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", *(f"({number + 1}) {text}" for number, text in enumerate(said))]
    lines += ["", *(f"*{name}*: {words}." for name, words in COLUMNS.items())]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
