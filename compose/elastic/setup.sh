#!/bin/sh
# Run in a container of the profile elastic: `password` gives the user kibana_system its password, `dashboards` loads dashboards.ndjson.
set -eu
case $1 in
    password)
        curl -fsS -u "elastic:$ELASTIC_PASSWORD" -H 'content-type: application/json' \
            -d "{\"password\": \"$KIBANA_PASSWORD\"}" http://elasticsearch:9200/_security/user/kibana_system/_password
        ;;
    dashboards)
        curl -fsS -u "elastic:$ELASTIC_PASSWORD" -H 'kbn-xsrf: true' -F file=@/setup/dashboards.ndjson \
            'http://kibana:5601/api/saved_objects/_import?overwrite=true'
        ;;
    *)
        echo "setup.sh password|dashboards" >&2
        exit 2
        ;;
esac
