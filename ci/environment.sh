# Sourced by the scripts of this folder: sets "venv", the folder of the environment that they use, seen from the root.
# It is .venv, unless one of two variables asks for another, which gets a folder of its own:
#   DASKFED_DASK=2026.7.0   another release of dask and distributed than the one in ci/constraints.txt
#   PYTHON=python3.12       another Python: a command or a path
# Both together make .venvs/python3.12.1-dask2026.7.0.

environment_folder() {
  local parts=()
  if [ -n "${PYTHON:-}" ]; then
    parts+=("$("$PYTHON" -c 'import platform; print("python" + platform.python_version())')") || {
      echo "ci: PYTHON=$PYTHON does not run; give the command or the path of a Python 3.11 or newer" >&2
      return 1
    }
  fi
  if [ -n "${DASKFED_DASK:-}" ]; then parts+=("dask$DASKFED_DASK"); fi
  if [ ${#parts[@]} = 0 ]; then echo .venv; else (IFS=-; echo ".venvs/${parts[*]}"); fi
}

venv=$(environment_folder) || exit 1

unset PYTHONDONTWRITEBYTECODE  # else each of some thousand processes of a test run compiles our modules anew
