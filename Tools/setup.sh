#!/usr/bin/env bash
# Checks the tools, finds torch or installs it, and records the choice in lib/torch.env. Twice is a no-op.
#   LIBTORCH  a libtorch folder or an installed torch package to build against
#   PYTHON    the Python to ask for torch, python3 when not given
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly torch_release=2.13.0 torch_range='2.10 ≤ version < 2.14'
readonly env_file=lib/torch.env log=.build/setup.log
mkdir -p lib .build
: >"$log"

say() { printf 'setup: %s\n' "$*"; }
die() {
  printf 'setup: %s\n' "$@" >&2
  exit 1
}
die_with_log() {
  tail -n 40 "$log" >&2
  die "$1; the whole log is in $log"
}
# One line with what is done and how long it took; the output goes to the log.
attempt() {
  local what=$1 start=$SECONDS
  shift
  printf 'setup: %s … ' "$what"
  if "$@" >>"$log" 2>&1 </dev/null; then
    echo "$((SECONDS - start)) s"
  else
    echo "failed after $((SECONDS - start)) s"
    return 1
  fi
}

# Installs Debian packages as root or with a password-free sudo; otherwise says what to type.
install_packages() {
  local root=() command="apt-get install -y --no-install-recommends $*"
  [ "$(id -u)" = 0 ] || root=(sudo -n)
  if ! command -v apt-get >/dev/null; then
    die "missing, by their Debian names: $*" "install them with this system's package manager and run make again"
  elif [ "$(id -u)" != 0 ] && ! sudo -n true 2>/dev/null; then
    die "missing: $*" "install with: sudo apt-get update && sudo $command"
  fi
  # The package lists may be absent or out of date: refresh them only if the installation fails without.
  attempt "installing $*" ${root[@]+"${root[@]}"} env DEBIAN_FRONTEND=noninteractive \
    sh -c "$command || { apt-get update && $command; }" || die_with_log "cannot install $*"
}

# The Debian packages whose content is absent, found by looking for the content.
missing_packages() {
  command -v c++ >/dev/null || echo g++
  command -v git >/dev/null || echo git
  command -v make >/dev/null || echo make
  command -v pkg-config >/dev/null || echo pkg-config
  pkg-config --exists cairo 2>/dev/null || echo libcairo2-dev
  pkg-config --exists libcurl 2>/dev/null || echo libcurl4-openssl-dev
  pkg-config --exists libturbojpeg 2>/dev/null || echo libturbojpeg0-dev
  ldconfig -p 2>/dev/null | grep -q 'libtesseract\.so\.' || echo libtesseract5
  [ -n "$(find /usr/share/tesseract-ocr /usr/share/tessdata -name eng.traineddata -print -quit 2>/dev/null)" ] ||
    echo tesseract-ocr-eng
  pkg-config --exists zlib 2>/dev/null || echo zlib1g-dev # cairo's headers need it anyway
  [ -n "$(find -L /usr/share/fonts /usr/local/share/fonts -name 'DejaVuSans.ttf' -print -quit 2>/dev/null)" ] ||
    echo fonts-dejavu-core
  [ -e /etc/ssl/certs/ca-certificates.crt ] || [ -d /etc/pki/tls/certs ] || echo ca-certificates
}

check_system() {
  local missing version
  mapfile -t missing < <(missing_packages)
  if [ ${#missing[@]} != 0 ]; then
    install_packages "${missing[@]}"
    mapfile -t missing < <(missing_packages)
    [ ${#missing[@]} = 0 ] || die "installed, but still not found: ${missing[*]}" \
      "look for another c++ ($(command -v c++ || echo none)) or pkg-config ($(command -v pkg-config || echo none)) on PATH"
  fi
  version=$(swift --version 2>/dev/null | sed -n 's/.*Swift version \([0-9.]*\).*/\1/p' | head -n 1) || true
  [ "$(printf '%s\n' 6.1 "${version:-0}" | sort -V | head -n 1)" = 6.1 ] ||
    die "Swift 6.1 or newer is needed, found ${version:-none} on PATH" \
      "install it from https://www.swift.org/install/linux and put its usr/bin on PATH"
}

# The version of the torch in folder $1, read from its files: importing torch takes seconds.
version_of() {
  if [ -f "$1/version.py" ]; then
    sed -n "s/^__version__ = ['\"]\([^'\"]*\).*/\1/p" "$1/version.py"
  elif [ -f "$1/build-version" ]; then
    head -n 1 "$1/build-version"
  else
    cat "$1"/include/torch/{headeronly,csrc/api/include/torch}/version.h "$1/include/torch/version.h" 2>/dev/null |
      sed -n 's/^#define TORCH_VERSION_\(MAJOR\|MINOR\|PATCH\) \([0-9]*\)$/\2/p' | head -n 3 | paste -sd .
  fi
}

# Why the torch in folder $1 cannot be used; prints nothing when it can.
objection() {
  local version
  if [ ! -d "$1" ]; then
    echo "is not a folder"
  elif [ ! -d "$1/include/ATen" ]; then
    echo "has no include/ATen"
  elif [ ! -f "$1/lib/libtorch.so" ]; then
    echo "has no lib/libtorch.so"
  else
    version=$(version_of "$1") || true
    case $version in
      2.1[0-3].*) ;;
      *) echo "is version ${version:-unknown}, not $torch_range" ;;
    esac
  fi
}

# The folder of the torch package that Python $1 would import; prints nothing without one.
torch_of_python() {
  "$1" -c 'import importlib.util as u; s = u.find_spec("torch"); s and print(s.submodule_search_locations[0])' \
    2>/dev/null || true
}

# The torch in .python/, a virtual environment or a plain package folder; prints nothing without one.
private_torch() {
  local folder
  for folder in "$PWD"/.python/lib/python3*/site-packages/torch "$PWD"/.python/torch; do
    [ ! -d "$folder" ] || { echo "$folder" && return; }
  done
}

# Installs torch into .python/: a virtual environment, or a plain package folder where Python cannot make one.
install_torch() {
  local python=${PYTHON:-python3} pip
  command -v "$python" >/dev/null || install_packages python3 python3-venv
  if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    if ! "$python" -m pip --version >/dev/null 2>&1; then
      install_packages python3-venv
    else
      say "$python has no ensurepip: using pip install --target .python instead of a virtual environment"
    fi
  fi
  rm -rf .python
  if "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    attempt "making the private Python environment .python/" "$python" -m venv .python ||
      die_with_log "cannot make .python/"
    pip=(.python/bin/python -m pip install -q --disable-pip-version-check)
  else
    pip=("$python" -m pip install -q --disable-pip-version-check --target .python)
  fi

  if nvidia-smi -L 2>/dev/null | grep -q GPU; then
    attempt "installing torch $torch_release for CUDA into .python/" "${pip[@]}" "torch==$torch_release"
  else
    attempt "no NVIDIA GPU: installing torch $torch_release+cpu into .python/" \
      "${pip[@]}" "torch==$torch_release+cpu" ||
      attempt "pip's index has no CPU build: taking it from PyTorch's index" "${pip[@]}" --retries 1 --timeout 30 \
        --index-url https://download.pytorch.org/whl/cpu "torch==$torch_release+cpu" ||
      attempt "no CPU build: installing the default one (with CUDA libraries, several GB)" \
        "${pip[@]}" "torch==$torch_release"
  fi || die_with_log "cannot install torch; install $torch_range yourself and set LIBTORCH or PYTHON"
}

# Sets torch to the chosen folder and origin to a word on why.
choose_torch() {
  local python=${PYTHON:-python3} why
  if [ -n "${LIBTORCH:-}" ]; then
    torch=$(realpath -m "$LIBTORCH") origin=LIBTORCH
    why=$(objection "$torch")
    [ -z "$why" ] || die "LIBTORCH=$LIBTORCH $why" \
      "set it to a libtorch folder or an installed torch package ($torch_range), or unset it"
    return
  fi
  torch=$(torch_of_python "$python") origin="the active $python"
  if [ -n "$torch" ]; then
    why=$(objection "$torch")
    [ -n "$why" ] || return 0
    say "torch of $origin ($torch) $why: using a private one"
  fi
  origin=.python/
  torch=$(private_torch)
  if [ -z "$torch" ] || [ -n "$(objection "$torch")" ]; then
    install_torch
    torch=$(private_torch)
    why=$(objection "${torch:-.python}")
    [ -z "$why" ] || die "the torch just installed in .python/ $why"
  fi
}

# The recorded choice stands while it is usable and neither LIBTORCH nor PYTHON names another.
recorded_choice_stands() {
  [ -f "$env_file" ] || return 1
  local TORCH='' TORCH_VERSION='' TORCH_PYTHON=''
  # shellcheck disable=SC1090
  . "$env_file"
  [ -z "${LIBTORCH:-}" ] || [ "$(realpath -m "$LIBTORCH")" = "$TORCH" ] || return 1
  [ -z "${PYTHON:-}" ] || [ "$PYTHON" = "$TORCH_PYTHON" ] || return 1
  [ -z "$(objection "$TORCH")" ] && [ "$(version_of "$TORCH")" = "$TORCH_VERSION" ]
}

check_system
recorded_choice_stands && exit 0

choose_torch
cuda=0 abi=0
[ ! -e "$torch/lib/libtorch_cuda.so" ] || cuda=1
# The mangled name of c10::Error's constructor tells which std::string torch was compiled with.
! grep -q '_ZN3c105ErrorC[12]ENS_14SourceLocationENSt7__cxx11' "$torch/lib/libc10.so" || abi=1
printf '%s=%q\n' TORCH "$torch" TORCH_VERSION "$(version_of "$torch")" TORCH_CUDA "$cuda" \
  TORCH_CXX11_ABI "$abi" TORCH_PYTHON "${PYTHON:-}" >"$env_file.new"
if cmp -s "$env_file.new" "$env_file"; then rm "$env_file.new"; else mv "$env_file.new" "$env_file"; fi
say "torch $(version_of "$torch") from $origin ($torch)"
