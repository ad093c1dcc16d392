#!/bin/sh
# Orders into the stack that runs, and a verdict: load.sh [steady|ramp|spike|soak]. LOAD_RATE and LOAD_SECONDS are those of compose/.env, or of
# the environment. Fails (1) where a threshold is not kept. Locust's report is fetched to build/load-PROFILE.html.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
[ ! -e "$here/../.env" ] || LOAD_PROFILE=${LOAD_PROFILE:-$(sed -n 's/^LOAD_PROFILE=//p' "$here/../.env")}
LOAD_PROFILE=${1:-${LOAD_PROFILE:-steady}}
export LOAD_PROFILE
in_load() { "$here/compose.sh" --profile core --profile load run --rm -T "$@"; }
verdict=0
in_load load || verdict=$?
[ "$verdict" -le 1 ] || exit "$verdict"
reports=$here/../../build
mkdir -p "$reports"
in_load --no-deps --entrypoint cat load "build/load-$LOAD_PROFILE.html" > "$reports/load-$LOAD_PROFILE.html"
exit "$verdict"
