#!/usr/bin/env bash
# Makes .python-tests/, the Python environment of Tools/reference/requirements.txt that tests compare with.
# Twice is a no-op. The torch that this build uses is linked rather than downloaded again where Python can import it.
#   PYTHON  the Python to make it from; .python/bin/python or python3 when not given
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly target=.python-tests requirements=Tools/reference/requirements.txt
readonly log=.build/setup-python-tests.log
python=${PYTHON:-$(ls .python/bin/python 2>/dev/null || echo python3)}
mkdir -p .build
: >"$log"

quiet() { "$@" >>"$log" 2>&1 </dev/null; }
packages_load() {
  # Links: a torch that was moved away leaves the environment without one.
  quiet "$target/bin/python" -c 'import importlib.metadata as m, torch
for name in ["diffusers", "transformers", "peft", "safetensors", "fastapi", "uvicorn", "pillow", "scipy", "pytest"]:
  m.version(name)'
}

if cmp -s "$requirements" "$target/requirements.txt" && packages_load; then
  echo "$target is complete"
  exit
fi
start=$SECONDS
printf 'setup: Python packages for the tests in %s … ' "$target"
fail() {
  echo "failed after $((SECONDS - start)) s"
  tail -n 5 "$log" >&2
  echo "setup: cannot make $target; the whole log is in $log" >&2
  exit 1
}

rm -rf "$target"
# Debian's python3 has no ensurepip without python3-venv: then the outer pip installs into the environment.
if quiet "$python" -m venv "$target"; then
  pip=("$target/bin/python" -m pip install -q --disable-pip-version-check)
else
  rm -rf "$target"
  quiet "$python" -m venv --without-pip "$target" || fail
  pip=("$python" -m pip --python "$target/bin/python" install -q --disable-pip-version-check)
fi

TORCH=''
# shellcheck disable=SC1091
[ ! -f lib/torch.env ] || . lib/torch.env
site=$("$target/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
[ ! -f "$TORCH/__init__.py" ] || dirname "$TORCH" >"$site/torch-of-the-build.pth"
if ! quiet "$target/bin/python" -c 'import torch'; then
  rm -f "$site/torch-of-the-build.pth"
  torch=$(grep '^torch==' "$requirements")
  # As in setup.sh: the CPU build is not in every index.
  quiet "${pip[@]}" "$torch" ||
    quiet "${pip[@]}" --retries 1 --timeout 30 --index-url https://download.pytorch.org/whl/cpu "$torch" ||
    quiet "${pip[@]}" "${torch%+cpu}" || fail
fi
# Whichever torch is there stays: no package may pull in another one.
"$target/bin/python" -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' \
  >"$target/constraints.txt" 2>>"$log" || fail
grep -v '^torch==' "$requirements" >"$target/without-torch.txt"
quiet "${pip[@]}" -r "$target/without-torch.txt" -c "$target/constraints.txt" || fail
packages_load || fail
cp "$requirements" "$target/requirements.txt"
echo "$((SECONDS - start)) s"
