#!/usr/bin/env bash
# Run each chapter as a learner on Colab does: its notebook alone in an empty folder, from top to bottom, the first cell
# fetching the course (the last commit of the repository given, or COURSE_REVISION of it).
#
#     tools/run_alone.sh REPOSITORY [CHAPTER ...]        COURSE_PROFILE and COURSE_MIRROR are passed on
set -euo pipefail
repository="$(cd "$1" && pwd)"
shift
jupyter="jupyter"
[ -x "$repository/.venv/bin/jupyter" ] && jupyter="$repository/.venv/bin/jupyter"
[ $# -gt 0 ] || set -- ""
unset PYTHONPATH
export COURSE_REPOSITORY="$repository"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
status=0
for chapter in "$@"; do
  for page in "$repository"/chapters/"$chapter"[0-9_]*.ipynb; do
    name="$(basename "$page")"
    from=$SECONDS
    mkdir "$folder/${name%.ipynb}" && cd "$folder/${name%.ipynb}" && cp "$page" .
    if "$jupyter" nbconvert --to notebook --execute --ExecutePreprocessor.timeout=1200 --log-level WARN \
      --output done.ipynb "$name" > log.txt 2>&1; then
      echo "ok     $((SECONDS - from)) s  $name"
    else
      echo "FAILED $((SECONDS - from)) s  $name: $(tail -n 1 log.txt)"
      tail -n 25 log.txt
      status=1
    fi
  done
done
exit $status
