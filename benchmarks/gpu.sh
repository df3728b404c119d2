#!/usr/bin/env bash
# Proof on a machine with an NVIDIA GPU: versions, build, the whole test suite on the device,
# compute-sanitizer, benchmarks.
#
#   benchmarks/gpu.sh                 results go to benchmarks/results/<device>.json and <device>-unet.json
#   OUT=folder benchmarks/gpu.sh      they, and the log of every step, go there
#
# Needs Python 3.11 or later ($PYTHON) with torch (CUDA), triton, pytest and hypothesis; no network, and
# nothing is installed: what is missing (diffusers, say) may lie in folders on PYTHONPATH. A step that fails,
# or takes longer than its share of 9 minutes, does not stop the next one; the exit code is 1 if any did.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
root="$PWD"
python="${PYTHON:-python3}"
stage="$(mktemp -d)"
trap 'rm -rf "$stage"' EXIT
out="${OUT:-$root/benchmarks/results}"
logs="${OUT:-$stage}"
mkdir -p "$out" || exit 1
out="$(cd "$out" && pwd)"
readonly total=535
failed=()

# The package as an installation lays it out, of links: kernels/triton is lbdt.kernels.
mkdir "$stage/lbdt"
ln -s "$root"/lbdt/* "$stage/lbdt/"
if [[ -d "$root/kernels/triton" ]]; then ln -s "$root/kernels/triton" "$stage/lbdt/kernels"; fi
export PYTHONPATH="$stage:$root${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONSAFEPATH=1 # or the checkout, which lacks lbdt.kernels, would come before the links
export PYTHONUNBUFFERED=1 LBDT_BUILD_CUDA=1

# step NAME SECONDS COMMAND...: runs the command for so long at most, and for what is left of the total.
step() {
  local name="$1" limit="$2" left=$((total - SECONDS)) begun="$SECONDS" code=0
  shift 2
  if ((left < limit)); then limit="$left"; fi
  printf '\n== %s\n' "$name"
  if ((limit < 5)); then
    echo "FAILED: $name: no time left"
    failed+=("$name")
    return
  fi
  timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$logs/gpu-${name// /-}.log"
  code="${PIPESTATUS[0]}"
  if ((code == 0)); then
    echo "passed: $name ($((SECONDS - begun)) s)"
  elif ((code == 124 || code == 137)); then
    echo "FAILED: $name: not done after $limit s"
    failed+=("$name")
  else
    echo "FAILED: $name: exit code $code"
    failed+=("$name")
  fi
}

versions() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv
  nvcc --version | tail -n 2
  git log -1 --format='commit %H' 2>/dev/null
  "$python" -c 'import torch; assert torch.cuda.is_available(), "torch sees no CUDA device"' && "$python" -m lbdt env
}
build='from pathlib import Path; from lbdt import _build
_build.compile_extension(Path("lbdt/_C.abi3.so").resolve())
reason = _build.load()
assert reason is None, reason'
slug='import torch; from lbdt.bench import hardware; print(hardware.slug(hardware.cuda(torch.device("cuda"))))'

export -f versions
export python
step "build" 110 "$python" -c "$build"
step "versions" 30 bash -c versions
workers=()
if "$python" -c 'import xdist' 2>/dev/null; then workers=(-n 8); fi
step "tests" 170 env LBDT_TEST_DEVICE=cuda "$python" -m pytest tests -q ${workers[@]+"${workers[@]}"}
if command -v compute-sanitizer >/dev/null; then
  # API errors that a library meets while it probes the device are its own business: kernels are in question.
  for tool in memcheck racecheck; do
    step "sanitizer $tool" 45 compute-sanitizer --tool "$tool" --error-exitcode 1 --report-api-errors no \
      "$python" -m benchmarks.sanitize --device cuda
  done
else
  echo "no compute-sanitizer on PATH: its calls run without it"
  step "sanitizer calls" 45 "$python" -m benchmarks.sanitize --device cuda
fi
device="$("$python" -c "$slug" 2>/dev/null || echo gpu)"
step "bench" 200 "$python" -m lbdt bench --device cuda --dtype float16 --rounds 30 --out "$out/$device.json"
step "bench unet" 150 "$python" -m lbdt bench --device cuda --dtype float16 --op hook --shape sd15-b1 --unet \
  --out "$out/$device-unet.json"

printf '\n%s s in all\n' "$SECONDS"
if ((${#failed[@]})); then
  printf 'FAILED: %s\n' "${failed[@]}"
  exit 1
fi
echo "all steps passed"
