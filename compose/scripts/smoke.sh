#!/bin/sh
# Sends one order through everything and waits until the database says that it is finished: smoke.sh [SECONDS], 30 unless given.
set -eu
here=$(dirname "$0")
[ ! -e "$here/../.env" ] || . "$here/../.env"
url=http://127.0.0.1:${API_PORT:-8000}
answer=$(curl -sS --fail-with-body -H 'content-type: application/json' -d '{
    "customer_id": "00000000-0000-0000-0000-000000000001",
    "lines": [{"sku": "article-00001", "quantity": 1, "unit_cents": 1000}]
}' "$url/orders")
order=$(printf '%s' "$answer" | sed -n 's/.*"order_id":"\([0-9a-f-]*\)".*/\1/p')
deadline=$(($(date +%s) + ${1:-30}))
while :; do
    status=$("$here/compose.sh" --profile core exec -T postgres psql -At -U "${POSTGRES_USER:-orderbus}" -d orders \
        -c "select status from orders where order_id = '$order'")
    case $status in
        confirmed | cancelled)
            echo "order $order: $status"
            exit 0
            ;;
    esac
    if [ "$(date +%s)" -ge "$deadline" ]; then
        echo "order $order is still '$status'" >&2
        exit 1
    fi
    sleep 0.2
done
