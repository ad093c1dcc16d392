#!/bin/sh
# Run in a container of the profile elastic: `password` gives the user kibana_system its password, `kibana` loads dashboards.ndjson and rules/.
# Dashboards are replaced. A rule that is there already is left as it is, with the actions that somebody gave it: delete it in Kibana to have it anew.
set -eu
here=$(dirname "$0")
case $1 in
    password)
        curl -fsS -u "elastic:$ELASTIC_PASSWORD" -H 'content-type: application/json' \
            -d "{\"password\": \"$KIBANA_PASSWORD\"}" http://elasticsearch:9200/_security/user/kibana_system/_password
        ;;
    kibana)
        answer=$(curl -sS --fail-with-body -u "elastic:$ELASTIC_PASSWORD" -H 'kbn-xsrf: true' -F "file=@$here/dashboards.ndjson" \
            'http://kibana:5601/api/saved_objects/_import?overwrite=true') || { echo "dashboards: $answer" >&2; exit 1; }
        case $answer in
            *'"success":true'*) echo "dashboards: loaded" ;;
            *)
                echo "dashboards: refused: $answer" >&2 # with status 200
                exit 1
                ;;
        esac
        for rule in "$here"/rules/*.json; do
            name=$(basename "$rule" .json)
            answer=$(curl -sS -w '\n%{http_code}' -u "elastic:$ELASTIC_PASSWORD" -H 'kbn-xsrf: true' -H 'content-type: application/json' \
                -d "@$rule" "http://kibana:5601/api/alerting/rule/${name#*_}")
            case $(printf '%s' "$answer" | tail -n 1) in
                200) echo "rule ${name%_*}: made" ;;
                409) echo "rule ${name%_*}: there already" ;;
                *)
                    echo "rule ${name%_*}: refused: $answer" >&2
                    exit 1
                    ;;
            esac
        done
        ;;
    *)
        echo "setup.sh password|kibana" >&2
        exit 2
        ;;
esac
