"""The command lines that READMEs and `--help` texts show, and how tests/test_commands_shown.py runs each."""

from lbdt.serving import EXAMPLE_POLICY
from tests import toy

PUT = {
    "DIR_OR_HUB": "pipe",
    "bcywinski/SAeUron": "SAeUron",
    "unet.up_blocks.1.attentions.1": toy.HOOKPOINT,
    "style50": "pipe512",
    "saeuron=DIR": "saeuron=known",
    "DIR": "known",
    "openai/clip-vit-large-patch14": "clip",
    "Qwen/Qwen2-VL-7B-Instruct": "qwen",
    "N": "2",
    "FILE": str(EXAMPLE_POLICY),
    "$W/evaluation": "evaluation",
}
ONE = "--processes 1 --device cpu --concept Cats --own 1 --others 1 --quick"
CANVAS = f"{ONE} --kind sdxl --seed 500 --steps 2"
ERASE = "'An image of Dogs and Cats in Sketch style.' --concept Cats --steps 2"
ATTACK = "--quick --concept Cats --style Sketch --steps 2 --iterations 1 --timesteps 1 --device cpu"
GENERATE = "--kind sdxl --steps 2 --batch 2 --device cpu"
TRAIN = "--steps 2 --rows 32 --expansion 2 --k 4 --device cpu"
BENCH = "--quick --rounds 2 --op patch_uniform"
HELP = "--help"
"""Of a command that is only named there; another row runs it."""

SMALL = {
    "lbdt collect --model DIR_OR_HUB --prompts prompts.jsonl --site unet.up_blocks.1.attentions.1 --patches 64 "
    "--out activations": "--steps 2 --device cpu",
    "lbdt train --recipe saeuron --activations activations --out sae": TRAIN,
    "lbdt score --sae sae --site unet.up_blocks.1.attentions.1 --activations activations "
    "--out dictionary": "--device cpu",
    "lbdt convert bcywinski/SAeUron --hookpoint unet.up_blocks.1.attentions.1 --out sae": "",
    "lbdt assemble --sae sae --dictionary dictionary --hookpoint unet.up_blocks.1.attentions.1 --percentile 99.99 "
    "--out eraser": "",
    "lbdt erase 'An image of Cats in Sketch style.' --concept Cats --model style50 --eraser eraser --steps 100 "
    "--guidance 9": "--steps 2 --device cpu",
    "lbdt evaluate": CANVAS,
    "lbdt evaluate --quick": CANVAS,
    "lbdt evaluate --out '$W/evaluation'": CANVAS,
    "lbdt evaluate --world unlearncanvas --model style50 --eraser saeuron=DIR --steering saeuron=DIR "
    "--object-classifier style50_cls.pth --style-classifier style50.pth": f"{ONE} --seed 188 --steps 2 "
    "--out unlearncanvas",
    "lbdt evaluate --world prompts.jsonl --model DIR_OR_HUB --eraser DIR --clip openai/clip-vit-large-patch14 --vlm "
    "Qwen/Qwen2-VL-7B-Instruct --nudity saemnesia": f"{ONE} --seed 0 --steps 2 --out mine",
    "lbdt convert cls_latents_dict_unet.up_blocks.1.attentions.1.pkl --out dictionary": "--timesteps 999,666,333,1",
    "lbdt train --stream": f"--recipe saeuron --model pipe --prompts prompts.jsonl --site {toy.HOOKPOINT} "
    f"--out streamed --sampling-steps 2 {TRAIN}",
    "lbdt erase ... --method steering": ERASE,
    "lbdt erase --min-patches 1": ERASE,
    "lbdt env": "",
    "lbdt concepts --eraser DIR": "",
    "lbdt policy check FILE": "",
    "lbdt generate jobs.jsonl --concept Cats --out pictures": GENERATE,
    "lbdt generate jobs.jsonl --concept Cats --out pictures --workers 4 --threads 8": "--workers 1 --threads 1 "
    f"{GENERATE}",
    "lbdt attack": ATTACK,
    "lbdt attack --quick": ATTACK,
    "lbdt attack --world unlearncanvas --model style50 --eraser DIR --classifier style50_cls.pth": "--quick --concept "
    "Cats --style Joy --tokens 1 --steps 2 --iterations 1 --timesteps 1 --device cpu",
    "lbdt bench --threads 2": BENCH,
    "lbdt bench --op hook --op detect_patches --shape sd15-b1 --shape host --threads 2 --cold": "--rounds 2 --share 1",
    "torchrun --nproc_per_node N -m lbdt collect ...": f"--model pipe --prompts prompts.jsonl --site {toy.HOOKPOINT} "
    "--out shared --steps 2 --device cpu",
    "torchrun --nproc_per_node N -m lbdt evaluate": CANVAS,
    "torchrun --nproc_per_node N -m lbdt evaluate ...": CANVAS,
    "torchrun --nproc_per_node N -m lbdt attack ...": ATTACK,
    **dict.fromkeys(
        (
            "lbdt assemble",
            "lbdt bench",
            "lbdt collect",
            "lbdt convert",
            "lbdt erase",
            "lbdt generate",
            "lbdt score",
        ),
        HELP,
    ),
}

PARSED = (
    "python -m benchmarks.train_vs_sparsify --peers DIR",
    "python -m benchmarks.faults",
    "python -m benchmarks.evaluation FOLDER",
    "python -m benchmarks.sanitize --asan --fuzz-cases 10000",
    "python -m lbdt.canvas.train vae --work '$W' --count 15000 --steps 1600 --start '$START/vae'",
    "python -m lbdt.canvas.train latents --work '$W' --count 15000",
    "python -m lbdt.canvas.train unet --work '$W' --steps 3000 --start '$START'",
    "python -m lbdt.canvas.train classifiers --work '$W'",
    "python -m lbdt.canvas.train classifiers --work '$W' --judge style --steps 6000",
    "python -m lbdt.canvas.train release --work '$W'",
    "python -m lbdt.canvas.design --pipeline '$W/pipeline-unet' --judges '$W'",
    "python -m benchmarks.pipelines '$W/pipelines' --release",
    "python -m lbdt.evaluation.worlds.canvas_judges --work '$W/artifacts'",
    "python -m lbdt.evaluation.worlds.canvas_judges --work '$W/artifacts' --kind sdxl",
    "python -m lbdt.evaluation.worlds.canvas_judges --work DIR --check",
    "python -m benchmarks.contact_sheet",
    "python -m benchmarks.contact_sheet --kind saemnesia",
    "python -m benchmarks.contact_sheet --pairs",
    "python -m benchmarks.first_picture",
    "python -m benchmarks.latent_examples",
)
"""They take from minutes to hours, or another project's checkout: they are run until their arguments are read."""

SCRIPTS = ("benchmarks/pipelines.sh", "benchmarks/pipelines.sh '$W/pipelines'", "benchmarks/attack.sh WORK")
"""Minutes: run with an interpreter that does nothing, whose arguments are read by the commands then."""

ELSEWHERE = {
    "pip install .": "tests/test_packaging.py",
    "pip install --no-build-isolation .": "tests/test_packaging.py",
    "python -m benchmarks.early_stop": "tests/test_benchmarks.py",
    "python -m benchmarks.gate_cost --threads 2": "tests/test_benchmarks.py",
    "python -m benchmarks.screen_bounds": "tests/test_measured_shares.py",
    "python -m benchmarks.paper_model": "tests/kernels/test_paper_model.py",
    "pytest tests/kernels -s": "tests/kernels",
    "python -m tests.kernels.ptx.mutants": "tests/kernels/test_ptx_mutants.py",
    "python -m tests.kernels.ptx.run": "tests/kernels/test_ptx_kernels.py",  # fewer
    "python -m tests.kernels.ptx.run --case half --seed 3": "tests/kernels/test_ptx_kernels.py",
    ".ci/setup --tests": "tests/kernels/test_ptx_kernels.py",  # what it installs
    ".ci/versions": "tests/test_packaging.py",
    ".ci/test --misaligned": "tests/misaligned",
    ".ci/test --fuzz-cases 10000 -m fuzz": "tests/fuzz",
    "benchmarks/gpu.sh": "tests/test_benchmarks.py",  # its syntax: there is no GPU
    "lbdt serve": "tests/serving/test_server.py",
    "lbdt serve --policy FILE --audit audit": "tests/serving/test_server.py",
    "lbdt audit verify": "tests/serving/test_audit_command.py",
    "lbdt audit verify audit": "tests/serving/test_audit_command.py",
    "pip install 'lbdt[serve]'": "tests/test_packaging.py",
    "pip install 'lbdt[app]'": "tests/test_packaging.py",
    "lbdt app": "tests/app/test_page.py",
    "lbdt erase --settings FILE": "tests/app/test_settings.py",
    "python -m benchmarks.serving": "tests/serving/test_server.py",  # in small
    "python -m benchmarks.serving_table benchmarks/results/serving.json": "tests/test_readme.py",
}

INSTALLS = (".ci/demo", ".ci/test")
NO_COMMAND = (
    "'W=~/emojicanvas'",
    "git worktree add '$W/before' ec5e91a",
    "'START=$W/before/lbdt/canvas/weights/pipeline'",
)
