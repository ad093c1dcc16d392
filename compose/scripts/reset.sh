#!/bin/sh
# Ends the stack and deletes what it stored: reset.sh --yes
set -eu
if [ "${1:-}" != --yes ]; then
    echo "this deletes the database, the queues and the keys; say reset.sh --yes" >&2
    exit 2
fi
"$(dirname "$0")/compose.sh" --profile core --profile cluster --profile load --profile observe --profile elastic down --volumes --remove-orphans
