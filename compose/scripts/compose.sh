#!/bin/sh
# docker compose for this stack, whichever of the two programs is installed: compose/scripts/compose.sh --profile core up -d --build
set -eu
folder=$(cd "$(dirname "$0")/.." && pwd)

# A profile that there is not starts nothing, and says nothing.
known=$(sed -n 's/^ *profiles: \[\([a-z]*\)\]$/\1/p' "$folder/docker-compose.yml" | sort -u | tr '\n' ' ')
check() {
    case " $known" in
        *" $1 "*) ;;
        *)
            echo "there is no profile '$1'; there are: $known" >&2
            exit 2
            ;;
    esac
}
for profile in $(printf '%s' "${COMPOSE_PROFILES:-}" | tr ',' ' '); do check "$profile"; done
before=
for word; do
    case $word in --profile=*) check "${word#--profile=}" ;; esac
    [ "$before" != --profile ] || check "$word"
    before=$word
done

[ ! -e "$folder/.env" ] || set -- --env-file "$folder/.env" "$@"
if docker compose version > /dev/null 2>&1; then
    exec docker compose -f "$folder/docker-compose.yml" "$@"
fi
if command -v docker-compose > /dev/null 2>&1; then
    exec docker-compose -f "$folder/docker-compose.yml" "$@"
fi
echo "neither 'docker compose' nor docker-compose is installed" >&2
exit 1
