#!/bin/sh
# docker compose for this stack, whichever of the two programs is installed: compose/scripts/compose.sh --profile core up -d --build
set -eu
folder=$(cd "$(dirname "$0")/.." && pwd)
[ ! -e "$folder/.env" ] || set -- --env-file "$folder/.env" "$@"
if docker compose version > /dev/null 2>&1; then
    exec docker compose -f "$folder/docker-compose.yml" "$@"
fi
if command -v docker-compose > /dev/null 2>&1; then
    exec docker-compose -f "$folder/docker-compose.yml" "$@"
fi
echo "neither 'docker compose' nor docker-compose is installed" >&2
exit 1
