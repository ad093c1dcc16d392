#!/bin/sh
# Waits until every service of the profile core is healthy, and others that are named: wait.sh [SECONDS [rabbitmq-2 …]], 180 s unless given.
# Says which are not, and fails.
set -eu
here=$(dirname "$0")
deadline=$(($(date +%s) + ${1:-180}))
[ $# = 0 ] || shift
for service in postgres rabbitmq redis orders-api outbox-dispatcher payment inventory aggregator notification "$@"; do
    while :; do
        container=$("$here/compose.sh" --profile core --profile cluster --profile elastic ps -q "$service" 2> /dev/null || true)
        state=none
        [ -z "$container" ] || state=$(docker inspect -f '{{.State.Health.Status}}' "$container" 2> /dev/null || echo none)
        [ "$state" != healthy ] || break
        if [ "$(date +%s)" -ge "$deadline" ]; then
            echo "$service is not healthy: $state; look at: compose/scripts/compose.sh --profile core logs $service" >&2
            exit 1
        fi
        sleep 1
    done
done
echo "all healthy"
