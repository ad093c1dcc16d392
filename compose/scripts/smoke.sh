#!/bin/sh
# Sends one order through everything and waits until the database says that it is finished; then, where Elasticsearch runs, until that has its trace
# (OTEL_ENDPOINT: the collector) or what the services counted since: smoke.sh [SECONDS], 30 unless given, and twice that for Elasticsearch.
set -eu
here=$(dirname "$0")
[ ! -e "$here/../.env" ] || . "$here/../.env"
url=http://127.0.0.1:${API_PORT:-8000}
seconds=${1:-30}
random() { od -An -N"$1" -tx1 /dev/urandom | tr -d ' \n'; }
trace=$(random 16)
began=$(date -u +%Y-%m-%dT%H:%M:%SZ)
# The 01 at the end: this trace is kept, however small a share the others are.
answer=$(curl -sS --fail-with-body -H 'content-type: application/json' -H "traceparent: 00-$trace-$(random 8)-01" -d '{
    "customer_id": "00000000-0000-0000-0000-000000000001",
    "lines": [{"sku": "article-00001", "quantity": 1, "unit_cents": 1000}]
}' "$url/orders")
order=$(printf '%s' "$answer" | sed -n 's/.*"order_id":"\([0-9a-f-]*\)".*/\1/p')
deadline=$(($(date +%s) + seconds))
while :; do
    status=$("$here/compose.sh" --profile core exec -T postgres psql -At -U "${POSTGRES_USER:-orderbus}" -d orders \
        -c "select status from orders where order_id = '$order'")
    case $status in
        confirmed | cancelled)
            echo "order $order: $status"
            break
            ;;
    esac
    if [ "$(date +%s)" -ge "$deadline" ]; then
        echo "order $order is still '$status'" >&2
        exit 1
    fi
    sleep 0.2
done

elastic() { "$here/compose.sh" --profile core --profile elastic "$@"; }
container=$(elastic ps -q elasticsearch 2> /dev/null || true)
[ -n "$container" ] || exit 0
[ "$(docker inspect -f '{{.State.Running}}' "$container" 2> /dev/null || echo false)" = true ] || exit 0

case ${OTEL_ENDPOINT:-} in
    *//collector:*)
        what="its trace $trace"
        index='traces-*'
        query="trace_id:$trace"
        ;;
    *)
        what="what was handled since $began"
        index='metrics-*'
        query="metrics.orderbus_handled_total:>0 AND attributes.orderbus_outcome:handled AND @timestamp:[\"$began\" TO *]"
        ;;
esac
deadline=$(($(date +%s) + 2 * seconds))
while :; do
    # The password is the container's own; what is counted are documents.
    answer=$(elastic exec -T elasticsearch sh -c \
        'curl -sS -m 5 -G -u "elastic:$ELASTIC_PASSWORD" --data-urlencode "q=$2" "http://127.0.0.1:9200/$1/_count"' \
        sh "$index" "$query" < /dev/null 2>&1 || true)
    count=$(printf '%s' "$answer" | sed -n 's/.*"count":\([0-9]*\).*/\1/p')
    if [ "${count:-0}" -gt 0 ]; then
        echo "order $order: Elasticsearch has $what, $count documents"
        exit 0
    fi
    if [ "$(date +%s)" -ge "$deadline" ]; then
        echo "order $order: Elasticsearch does not have $what; it answers: $answer; look at: compose/scripts/compose.sh --profile elastic logs collector" >&2
        exit 1
    fi
    sleep 0.5
done
